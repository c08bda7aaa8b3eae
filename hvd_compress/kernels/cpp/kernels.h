// Loops over whole tensors. Each equals, bit for bit, a torch expression in the Python package, which is its
// definition; module.cpp checks what Python hands over, so that pointers and lengths are right here.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hvd {

static_assert(sizeof(float) == 4 && sizeof(double) == 8, "IEEE 754 floats");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bit streams are written as little-endian words"
#endif

using Index = std::int64_t;

// top_k.cpp
enum class VectorUnit { portable, avx2, avx512 };

// Those that this machine has, the best one first. Others must not be asked for.
std::vector<VectorUnit> vector_units();

// The k (1 <= k <= d) largest magnitudes of x[d], ascending by index; among equals the lowest index wins, NaN counts as
// infinite. The result does not depend on the vector unit, nor on the number of threads.
template <class Float>
void top_k(const Float* x, Index d, Index k, int threads, VectorUnit unit, Index* indices, Float* values);

// The same of x + y, off which it is then taken; what is left is written to a place that is x or does not overlap it,
// nor y. Here and below a Place is 32 or 64 bits wide, with a sign.
template <class Float, class Place>
void split_top_k(const Float* x, const Float* y, Float* to, Index d, Index k, int threads, VectorUnit unit,
                 Place* indices, Float* values);

// vectors.cpp
template <class Float>
bool is_finite(const Float* x, Index n, int threads);

template <class Number>
bool none_is(const Number* x, Index n, Number number);

// The largest magnitude, 0 of nothing; NaN if there is one.
float largest(const float* x, Index n);
double largest(const double* x, Index n);

// flat[indices[i]] += alpha * values[i], in order. Throws std::out_of_range before anything is written.
template <class Float, class Place>
void add_at(Float* flat, Index n, const Place* indices, const Float* values, Index count, Float alpha);

// One message's part in a sum.
template <class Float, class Place>
struct Part {
    const Place* indices;  // ascending
    const Float* values;
    Index count;
};

// flat[n] becomes the sum of the parts, in their order, divided by divisor; it may hold anything before. Throws
// std::invalid_argument before anything is written unless each part's indices ascend strictly from 0 to below n.
template <class Float, class Place>
void sum_at(Float* flat, Index n, const std::vector<Part<Float, Place>>& parts, Float divisor, int threads);

// flat[n] less that sum. Throws as sum_at does.
template <class Float, class Place>
void subtract_at(Float* flat, Index n, const std::vector<Part<Float, Place>>& parts, Float divisor);

// philox.cpp. n draws from [0, 1), which depend on the seed and their place only.
template <class Float>
void uniform(std::uint64_t seed, Index n, int threads, Float* draws);

// The first `count` different ones of a sequence of indices below numel, ascending. 0 <= count <= numel.
void random_subset(std::uint64_t seed, Index numel, Index count, Index* indices);

// n independent fair signs, 1 or -1.
void random_signs(std::uint64_t seed, Index n, int threads, std::int8_t* signs);

// hadamard.cpp. y = H x / divisor, n a power of two.
void hadamard(const float* x, Index n, float divisor, float* y);
void hadamard(const double* x, Index n, double divisor, double* y);

// rounding.cpp. levels[i] is how many steps x[i] lies above the offset, cut at least and most, rounded to one of the two
// nearest whole numbers by draw i, less `least`. Each `bucket` (1 or more) elements share one of the steps.
template <class Float, class Level>
void round_by_chance(const Float* x, Index n, Float offset, const Float* steps, Index bucket, std::int32_t least,
                     std::int32_t most, std::uint64_t seed, int threads, Level* levels);

// The same with s steps to each side of zero, the last of which is the largest magnitude, which it returns.
template <class Float, class Level>
Float round_to_largest(const Float* x, Index n, std::int32_t s, std::uint64_t seed, int threads, Level* levels);

// levels[i] is the place of one of the two table entries around x[i], chosen by draw i. The table ascends and has two
// entries or more, all finite or all NaN.
template <class Float, class Level>
void choose_by_chance(const Float* x, Index n, const Float* table, Index entries, std::uint64_t seed, int threads,
                      Level* levels);

// values[i] = table[levels[i]]. Throws std::out_of_range.
template <class Float, class Level>
void look_up(const Float* table, Index entries, const Level* levels, Index n, int threads, Float* values);

// The same of several runs of counts[r] levels each, one after the other: times scales[r].
template <class Float, class Level>
void look_up_runs(const Float* table, Index entries, const Level* levels, const std::vector<Index>& counts,
                  const Float* scales, Float* values);

// streams.cpp. One message's place in the index streams; see wire/indices.py.
struct Row {
    Index count;      // indices
    Index parameter;  // bits of a Rice remainder, or of a whole index
    Index rice;       // 1: Rice coded gaps, 0: whole indices
    Index numel;      // of the tensor
};

constexpr int kMaxWidth = 31;  // bits of a field

// What the unary stream takes at most, whatever the indices are.
Index unary_bytes_at_most(const Row* rows, Index messages);

// Fills the fields, and as much of the unary stream as the indices take: so many bits for each message. Throws
// std::invalid_argument unless each message's indices ascend strictly from 0 to below numel.
template <class Place>
void encode_indices(const Place* indices, const Row* rows, Index messages, std::uint8_t* unary,
                    std::size_t unary_bytes, std::uint8_t* fixed, std::size_t fixed_bytes, Index* unary_bits);

// Reads nothing outside the streams and writes nothing outside `indices`, whatever the streams hold. Throws
// std::invalid_argument unless they hold exactly the ascending indices that the rows announce, and a Place can hold
// those of such tensors.
template <class Place>
void decode_indices(const std::uint8_t* unary, std::size_t unary_bytes, const std::uint8_t* fixed,
                    std::size_t fixed_bytes, const Row* rows, Index messages, Place* indices);

// Levels of 1 to 16 bits, one after the other, lowest bit first; ceil(count * bits / 8) bytes.
template <class Level>
void pack_levels(const Level* levels, Index count, int bits, std::uint8_t* packed);

template <class Level>
void unpack_levels(const std::uint8_t* packed, Index count, int bits, Level* levels);

}  // namespace hvd
