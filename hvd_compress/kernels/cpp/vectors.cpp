// Loops that read two or three vectors once. They are bound by memory, so the compiler's own vectors are enough.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "machine.h"
#include "threads.h"

namespace hvd {
namespace {

// Writing past the caches spares the reading of what is overwritten. It is worth it for what would not stay in the
// caches anyway, and needs the widest stores: narrow ones take as long as what they spare.
constexpr Index kWorthStreaming = Index{1} << 16;  // elements

// to[i] = from[i] * factor for whole cache lines, to an address where one begins.
template <class Float>
using Stream = void (*)(const Float* from, Index n, Float factor, Float* to);

#ifdef HVD_X86
__attribute__((target("avx2"))) void stream_avx2(const float* from, Index n, float factor, float* to) {
    const __m256 f = _mm256_set1_ps(factor);
    for (Index i = 0; i < n; i += 8) _mm256_stream_ps(to + i, _mm256_mul_ps(_mm256_loadu_ps(from + i), f));
}

__attribute__((target("avx2"))) void stream_avx2(const double* from, Index n, double factor, double* to) {
    const __m256d f = _mm256_set1_pd(factor);
    for (Index i = 0; i < n; i += 4) _mm256_stream_pd(to + i, _mm256_mul_pd(_mm256_loadu_pd(from + i), f));
}

__attribute__((target("avx512f"))) void stream_avx512(const float* from, Index n, float factor, float* to) {
    const __m512 f = _mm512_set1_ps(factor);
    for (Index i = 0; i < n; i += 16) _mm512_stream_ps(to + i, _mm512_mul_ps(_mm512_loadu_ps(from + i), f));
}

__attribute__((target("avx512f"))) void stream_avx512(const double* from, Index n, double factor, double* to) {
    const __m512d f = _mm512_set1_pd(factor);
    for (Index i = 0; i < n; i += 8) _mm512_stream_pd(to + i, _mm512_mul_pd(_mm512_loadu_pd(from + i), f));
}
#endif

template <class Float>
void multiply(const Float* from, Index n, Float factor, Float* to) {
    for (Index i = 0; i < n; ++i) to[i] = from[i] * factor;
}

template <class Float>
Stream<Float> best_stream() {
#ifdef HVD_X86
    const VectorUnit unit = vector_units().front();
    if (unit == VectorUnit::avx512) return stream_avx512;
    if (unit == VectorUnit::avx2) return stream_avx2;
#endif
    return multiply<Float>;
}

// What was streamed arrives when it likes: other threads may be told only behind this. It waits for all of it, so once
// for all blocks.
void finish_writing() {
#ifdef HVD_X86
    _mm_sfence();
#endif
}

template <class Float>
void write_out(const Float* from, Index n, Float factor, Float* to, bool is_large) {
    static const Stream<Float> stream = best_stream<Float>();
    constexpr Index line = 64 / sizeof(Float);
    const Index head = std::min<Index>(n, -reinterpret_cast<std::uintptr_t>(to) / sizeof(Float) % line);
    const bool has_lines = reinterpret_cast<std::uintptr_t>(to) % sizeof(Float) == 0;  // where elements begin
    const Index body = is_large && has_lines ? (n - head) / line * line : 0;
    multiply(from, head, factor, to);
    stream(from + head, body, factor, to + head);
    multiply(from + head + body, n - head - body, factor, to + head + body);
}

// What to multiply by rather than divide, for the same bits: the reciprocal of a power of two; 0 if there is none.
template <class Float>
Float exact_reciprocal(Float divisor) {
    int exponent;
    const Float reciprocal = 1 / divisor;
    return std::frexp(divisor, &exponent) == Float{0.5} && std::isnormal(reciprocal) ? reciprocal : 0;
}

template <class Number>
using WordOf = std::conditional_t<sizeof(Number) == 1, std::uint8_t,
                                  std::conditional_t<sizeof(Number) == 4, std::uint32_t, std::uint64_t>>;

template <class Float>
[[gnu::always_inline]] inline Float largest_of(const Float* x, Index n) {
    using Word = std::make_signed_t<WordOf<Float>>;  // without its sign bit, a float's bits have its order
    const Word* words = reinterpret_cast<const Word*>(x);
    Word most = 0;
    for (Index i = 0; i < n; ++i) most = std::max<Word>(most, words[i] & std::numeric_limits<Word>::max());
    Float result;
    std::memcpy(&result, &most, sizeof result);
    return result;
}

}  // namespace

template <class Float>
bool is_finite(const Float* x, Index n, int threads) {
    using Word = WordOf<Float>;
    constexpr Word exponent = sizeof(Float) == 4 ? Word(0x7F800000u) : Word(0x7FF0000000000000ull);
    constexpr Index block = 4096;
    const Word* words = reinterpret_cast<const Word*>(x);
    std::atomic<bool> finite{true};
    in_ranges(n, threads, [&](Index begin, Index end) {
        for (Index from = begin; from < end && finite.load(std::memory_order_relaxed); from += block) {
            const Index to = std::min(from + block, end);
            Word found = 0;
            for (Index i = from; i < to; ++i) found |= (words[i] & exponent) == exponent;
            if (found) finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite;
}

template <class Number>
bool none_is(const Number* x, Index n, Number number) {
    WordOf<Number> found = 0;  // of the elements' width, so that the compiler makes vectors of both
    for (Index i = 0; i < n; ++i) found |= x[i] == number;
    return !found;
}

HVD_CLONES float largest(const float* x, Index n) { return largest_of(x, n); }
HVD_CLONES double largest(const double* x, Index n) { return largest_of(x, n); }

template <class Float, class Place>
void add_at(Float* flat, Index n, const Place* indices, const Float* values, Index count, Float alpha) {
    const auto size = static_cast<std::uint64_t>(n);
    bool outside = false;
    for (Index i = 0; i < count; ++i) outside |= static_cast<std::uint64_t>(indices[i]) >= size;  // negative is large
    if (outside) throw std::out_of_range("an index is not below the vector's length, " + std::to_string(n));
    constexpr Index ahead = 16;  // elements are far apart, each one waits for memory
    for (Index i = 0; i < count; ++i) {
        if (i + ahead < count) __builtin_prefetch(flat + indices[i + ahead], 1);
        flat[indices[i]] += values[i] * alpha;
    }
}

template <class Float, class Place>
void require_ascending(const std::vector<Part<Float, Place>>& parts, Index n) {
    for (const auto& part : parts) {
        Place wrong = part.count && (part.indices[0] < 0 || part.indices[part.count - 1] >= n);
        for (Index i = 1; i < part.count; ++i) wrong |= part.indices[i] <= part.indices[i - 1];
        if (wrong) throw std::invalid_argument("indices must be strictly ascending and below the vector's length");
    }
}

// The sum is made one block after the other, in the cache, and then written out.
template <class Float, class Place>
void sum_at(Float* flat, Index n, const std::vector<Part<Float, Place>>& parts, Float divisor, int threads) {
    require_ascending(parts, n);
    constexpr Index block = 4096;
    const Float reciprocal = exact_reciprocal(divisor);
    in_ranges(n, threads, [&](Index begin, Index end) {
        std::vector<Index> first(parts.size()), behind(parts.size());  // of each part, within the block
        for (std::size_t p = 0; p < parts.size(); ++p) {
            behind[p] = std::lower_bound(parts[p].indices, parts[p].indices + parts[p].count, begin) - parts[p].indices;
        }
        alignas(64) Float sum[block] = {};
        bool is_divided[block] = {};
        for (Index from = begin; from < end; from += block) {
            const Index to = std::min(from + block, end);
            for (std::size_t p = 0; p < parts.size(); ++p) {
                const auto& part = parts[p];
                Index i = first[p] = behind[p];
                for (; i < part.count && part.indices[i] < to; ++i) {
                    sum[part.indices[i] - from] += part.values[i];
                }
                behind[p] = i;
            }
            const auto each = [&](auto visit) {
                for (std::size_t p = 0; p < parts.size(); ++p) {
                    for (Index i = first[p]; i < behind[p]; ++i) visit(parts[p].indices[i] - from);
                }
            };
            if (!reciprocal) {
                each([&](Index at) {
                    sum[at] = is_divided[at] ? sum[at] : sum[at] / divisor;
                    is_divided[at] = true;
                });
                each([&](Index at) { is_divided[at] = false; });
            }
            write_out(sum, to - from, reciprocal ? reciprocal : Float{1}, flat + from, n >= kWorthStreaming);
            each([&](Index at) { sum[at] = 0; });
        }
        finish_writing();
    });
}

// The sum is made one block after the other, beside the vector, of which only the elements in question are touched. An
// element that several parts have is zero in the sum from the second visit on.
template <class Float, class Place>
void subtract_at(Float* flat, Index n, const std::vector<Part<Float, Place>>& parts, Float divisor) {
    require_ascending(parts, n);
    constexpr Index block = 8192;
    Float sum[block] = {};
    std::vector<Index> first(parts.size()), behind(parts.size());  // of each part, within the block
    for (Index from = 0; from < n; from += block) {
        const Index to = std::min(from + block, n);
        for (std::size_t p = 0; p < parts.size(); ++p) {
            const auto& part = parts[p];
            Index i = first[p] = behind[p];
            for (; i < part.count && part.indices[i] < to; ++i) {
                __builtin_prefetch(flat + part.indices[i], 1);
                sum[part.indices[i] - from] += part.values[i];
            }
            behind[p] = i;
        }
        for (std::size_t p = 0; p < parts.size(); ++p) {
            for (Index i = first[p]; i < behind[p]; ++i) {
                const Index at = parts[p].indices[i];
                flat[at] -= sum[at - from] / divisor;
                sum[at - from] = 0;
            }
        }
    }
}

template bool is_finite(const float*, Index, int);
template bool is_finite(const double*, Index, int);
template bool none_is(const float*, Index, float);
template bool none_is(const double*, Index, double);
template bool none_is(const std::uint8_t*, Index, std::uint8_t);
template bool none_is(const std::int32_t*, Index, std::int32_t);
template bool none_is(const Index*, Index, Index);

#define HVD_INSTANTIATE(Float, Place)                                                               \
    template void add_at(Float*, Index, const Place*, const Float*, Index, Float);                  \
    template void sum_at(Float*, Index, const std::vector<Part<Float, Place>>&, Float, int);        \
    template void subtract_at(Float*, Index, const std::vector<Part<Float, Place>>&, Float);
HVD_INSTANTIATE(float, std::int32_t)
HVD_INSTANTIATE(float, std::int64_t)
HVD_INSTANTIATE(double, std::int32_t)
HVD_INSTANTIATE(double, std::int64_t)

}  // namespace hvd
