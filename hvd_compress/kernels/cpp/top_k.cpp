// One pass over memory: a small sample suggests a threshold, what reaches it is collected, and the exact selection runs
// among the collected, by counting how many reach this or that. Should they become too many, all but the k best so far
// are dropped and the threshold rises to the k-th of them, so that no input takes much longer than another. Should they
// be fewer than k, the pass is repeated without a threshold.
//
// Magnitudes are compared as integers: without its sign bit, the bits of an IEEE float have the float's order. NaN lies
// above infinity there and is brought down to it.

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "machine.h"
#include "threads.h"

namespace hvd {
namespace {

using Word32 = std::uint32_t;
using Word64 = std::uint64_t;

template <class Word>
constexpr Word kNoSign = static_cast<Word>(~Word{0}) >> 1;
template <class Word>
constexpr Word kInfinity = sizeof(Word) == 4 ? Word(0x7F800000u) : Word(0x7FF0000000000000ull);

template <class Word>
Word magnitude(Word bits) {
    return std::min<Word>(bits & kNoSign<Word>, kInfinity<Word>);
}

constexpr Index kBlock = 4096;  // elements between two looks at how many were collected
constexpr Index kOverrun = 16;  // a vector store writes so far beyond what it keeps
constexpr Index kAhead = 512;   // elements that are asked for in advance: a processor itself does so within a page only

// What is selected from: x, or the sum of x and y, which is written to another place, that of x perhaps, as it is made.
template <class Word, bool adds>
struct Vector {
    const Word* x;
    const Word* y;  // if it adds, like the next one
    Word* to;

    Vector from(Index at) const { return {x + at, adds ? y + at : nullptr, adds ? to + at : nullptr}; }

    // What lies behind the vectors may be asked for.
    void prefetch(Index i) const {
        __builtin_prefetch(x + i + kAhead);
        if constexpr (adds) __builtin_prefetch(y + i + kAhead);
    }

    // Where what is selected from lies, once it has been read.
    const Word* made() const { return adds ? to : x; }
};

template <class Word>
Word sum(Word a, Word b) {
    using Float = std::conditional_t<sizeof(Word) == 4, float, double>;
    Float x, y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    x += y;
    std::memcpy(&a, &x, sizeof x);
    return a;
}

// Elements that may be among the k best: a contiguous part of the tensor, those that reached a threshold.
template <class Word>
struct Candidates {
    Candidates(Index begin, Index size, Index k)
        : first(begin), length(size), capacity(std::min(size + kBlock, 2 * (k + kBlock))),
          bits(new Word[capacity + kOverrun]), place(new Word[capacity + kOverrun]) {}

    Index first;  // of the part
    Index length;
    Index capacity;
    Index count = 0;
    std::unique_ptr<Word[]> bits;   // as they are in x, sign included
    std::unique_ptr<Word[]> place;  // in the part, ascending
};

// Appends the elements x[base + i] whose bit i is set. Four at a time and without asking whether there are as many: a
// branch would be mispredicted about as often as there are candidates.
template <class Word>
inline Index append(Word64 found, const Word* x, Index base, Word* bits, Word* place, Index count) {
    const Index total = count + __builtin_popcountll(found);
    do {
        for (int j = 0; j < 4; ++j, ++count) {
            const Index at = base + __builtin_ctzll(found | Word64{1} << 63);
            bits[count] = x[at];
            place[count] = static_cast<Word>(at);
            found &= found - 1;
        }
    } while (count < total);
    return total;
}

// Appends what reaches the threshold in v[begin, end) to bits and place; returns the new count.
template <class Word, bool adds>
Index collect_portably(Vector<Word, adds> v, Index begin, Index end, Word threshold, Word* bits, Word* place,
                       Index count) {
    for (Index i = begin; i < end; ++i) {
        Word one = v.x[i];
        if constexpr (adds) v.to[i] = one = sum(one, v.y[i]);
        bits[count] = one;
        place[count] = static_cast<Word>(i);
        count += (one & kNoSign<Word>) >= threshold;
    }
    return count;
}

#ifdef HVD_X86
template <bool adds>
__attribute__((target("avx2,popcnt,bmi"))) Index collect_avx2(Vector<Word32, adds> from, Index begin, Index end,
                                                              Word32 threshold, Word32* bits, Word32* place,
                                                              Index count) {
    const __m256i no_sign = _mm256_set1_epi32(static_cast<int>(kNoSign<Word32>));
    const __m256i below = _mm256_set1_epi32(static_cast<int>(threshold - 1));  // signed: -1 is below everything
    Index i = begin;
    for (; i + 64 <= end; i += 64) {
        Word64 found = 0;
        for (int j = 0; j < 64; j += 8) {
            if (j % 16 == 0) from.prefetch(i + j);  // a cache line
            __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.x + i + j));
            if constexpr (adds) {
                const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.y + i + j));
                v = _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(v), _mm256_castsi256_ps(w)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(from.to + i + j), v);
            }
            const __m256i reaches = _mm256_cmpgt_epi32(_mm256_and_si256(v, no_sign), below);
            found |= Word64(_mm256_movemask_ps(_mm256_castsi256_ps(reaches)) & 0xFF) << j;
        }
        count = append(found, from.made(), i, bits, place, count);
    }
    return collect_portably(from, i, end, threshold, bits, place, count);
}

template <bool adds>
__attribute__((target("avx512f,popcnt,bmi"))) Index collect_avx512(Vector<Word32, adds> from, Index begin, Index end,
                                                                   Word32 threshold, Word32* bits, Word32* place,
                                                                   Index count) {
    const __m512i no_sign = _mm512_set1_epi32(static_cast<int>(kNoSign<Word32>));
    const __m512i least = _mm512_set1_epi32(static_cast<int>(threshold));
    Index i = begin;
    for (; i + 64 <= end; i += 64) {
        Word64 found = 0;
        for (int j = 0; j < 64; j += 16) {
            from.prefetch(i + j);
            __m512i v = _mm512_loadu_si512(from.x + i + j);
            if constexpr (adds) {
                const __m512i w = _mm512_loadu_si512(from.y + i + j);
                v = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(v), _mm512_castsi512_ps(w)));
                _mm512_storeu_si512(from.to + i + j, v);
            }
            found |= Word64{_mm512_cmpge_epu32_mask(_mm512_and_si512(v, no_sign), least)} << j;
        }
        count = append(found, from.made(), i, bits, place, count);
    }
    return collect_portably(from, i, end, threshold, bits, place, count);
}
#endif

template <class Word, bool adds>
using Collect = Index (*)(Vector<Word, adds>, Index, Index, Word, Word*, Word*, Index);

template <class Word, bool adds>
Collect<Word, adds> collect_with(VectorUnit unit) {
#ifdef HVD_X86
    if constexpr (sizeof(Word) == 4) {
        if (unit == VectorUnit::avx512) return collect_avx512<adds>;
        if (unit == VectorUnit::avx2) return collect_avx2<adds>;
    }
#endif
    static_cast<void>(unit);
    return collect_portably<Word, adds>;
}

template <class Word>
struct Span {
    const Word* bits;
    Index count;
};

template <class Word>
inline Index reaching(const Word* bits, Index n, Word least) {
    using Signed = std::make_signed_t<Word>;  // which more vector units can compare
    Word found = 0;
    for (Index i = 0; i < n; ++i) found += static_cast<Signed>(bits[i] & kNoSign<Word>) >= static_cast<Signed>(least);
    return static_cast<Index>(found);
}

// How many magnitudes reach `least`, which is infinity at most: a NaN reaches all.
HVD_CLONES Index count_reaching(const Word32* bits, Index n, Word32 least) { return reaching(bits, n, least); }
HVD_CLONES Index count_reaching(const Word64* bits, Index n, Word64 least) { return reaching(bits, n, least); }

// Which magnitudes are kept: all that reach `least`, but of those equal to it only the first ones.
template <class Word>
struct Cut {
    static constexpr Index kAll = std::numeric_limits<Index>::max();

    Word least;
    Index equals;  // that are kept
};

// What keeps k of more than k magnitudes that all reach `floor`. Mostly there is a number that just k reach, which is
// found long before the k-th itself is known to the bit. With a `precision` the search ends once it is known but for
// so many bits, and equals mean nothing.
template <class Word>
Cut<Word> cut_to(const Span<Word>* spans, std::size_t size, Index k, Word floor, int precision = 0) {
    constexpr Word part_of_an_octave = Word{1} << (sizeof(Word) == 4 ? 18 : 47);
    Word low = floor, high = kInfinity<Word> + 1;  // which more and fewer than k reach
    Word step = floor ? part_of_an_octave : high;  // candidates crowd above their threshold
    Index above = 0;
    while (high - low > (Word{1} << precision)) {
        const Word middle = low + std::min<Word>(step, (high - low) / 2);
        Index count = 0;
        for (std::size_t s = 0; s < size; ++s) count += count_reaching(spans[s].bits, spans[s].count, middle);
        if (count == k) return {middle, Cut<Word>::kAll};
        if (count > k) {
            low = middle;
            step = std::min<Word>(2 * step, kInfinity<Word>);
        } else {
            high = middle;
            above = count;
        }
    }
    return {low, k - above};
}

// Drops the candidates that do not reach `least`; returns how many are left.
template <class Word>
Index keep_reaching_portably(Word* bits, Word* place, Index count, Word least) {
    Index kept = 0;
    for (Index i = 0; i < count; ++i) {
        const bool reaches = (bits[i] & kNoSign<Word>) >= least;
        bits[kept] = bits[i];
        place[kept] = place[i];
        kept += reaches;
    }
    return kept;
}

#ifdef HVD_X86
// What is written in vain lies where candidates have been read, or behind the last.
__attribute__((target("avx512f,popcnt"))) Index keep_reaching_avx512(Word32* bits, Word32* place, Index count,
                                                                     Word32 least) {
    const __m512i no_sign = _mm512_set1_epi32(static_cast<int>(kNoSign<Word32>));
    const __m512i bound = _mm512_set1_epi32(static_cast<int>(least));
    Index kept = 0;
    for (Index i = 0; i < count; i += 16) {
        const __mmask16 there = static_cast<__mmask16>(count - i >= 16 ? 0xFFFF : (1 << (count - i)) - 1);
        const __m512i v = _mm512_loadu_si512(bits + i), p = _mm512_loadu_si512(place + i);
        const __mmask16 reaches = _mm512_mask_cmpge_epu32_mask(there, _mm512_and_si512(v, no_sign), bound);
        _mm512_storeu_si512(bits + kept, _mm512_maskz_compress_epi32(reaches, v));
        _mm512_storeu_si512(place + kept, _mm512_maskz_compress_epi32(reaches, p));
        kept += __builtin_popcount(reaches);
    }
    return kept;
}
#endif

template <class Word>
Index keep_reaching(Word* bits, Word* place, Index count, Word least, VectorUnit unit) {
#ifdef HVD_X86
    if constexpr (sizeof(Word) == 4) {
        if (unit == VectorUnit::avx512) return keep_reaching_avx512(bits, place, count, least);
    }
#endif
    static_cast<void>(unit);
    return keep_reaching_portably(bits, place, count, least);
}

// Drops what the cut does not keep, which then says how many equals are left to be kept of what comes next.
template <class Word>
void drop_below(Candidates<Word>& c, Cut<Word>& cut, VectorUnit unit) {
    Word* const bits = c.bits.get();
    Word* const place = c.place.get();
    c.count = keep_reaching(bits, place, c.count, cut.least, unit);
    if (cut.equals == Cut<Word>::kAll) return;
    Index kept = 0;
    for (Index i = 0; i < c.count; ++i) {
        const Word m = magnitude(bits[i]);
        const Index equal = (m == cut.least) & (cut.equals > 0);
        bits[kept] = bits[i];
        place[kept] = place[i];
        kept += (m > cut.least) | equal;
        cut.equals -= equal;
    }
    c.count = kept;
}

// Drops all but the k best; returns a threshold that only better ones than those reach. Later equals lose to them.
template <class Word>
Word keep_best(Candidates<Word>& c, Index k, VectorUnit unit) {
    const Span<Word> span{c.bits.get(), c.count};
    Cut<Word> cut = cut_to(&span, 1, k, Word{0});
    drop_below(c, cut, unit);
    Word worst = kInfinity<Word>;
    for (Index i = 0; i < c.count; ++i) worst = std::min(worst, magnitude(c.bits[i]));
    // Nothing is better than infinity, not even a NaN, whose bits are larger.
    return worst == kInfinity<Word> ? kNoSign<Word> + 1 : worst + 1;
}

template <class Word, bool adds>
void collect_all(Candidates<Word>& c, Index k, Word threshold, Vector<Word, adds> vector, VectorUnit unit) {
    const Collect<Word, adds> collect = collect_with<Word, adds>(unit);
    const Vector<Word, adds> part = vector.from(c.first);
    c.count = 0;
    for (Index begin = 0; begin < c.length; begin += kBlock) {
        if (c.count + kBlock > c.capacity) threshold = keep_best(c, k, unit);
        const Index end = std::min(begin + kBlock, c.length);
        c.count = collect(part, begin, end, threshold, c.bits.get(), c.place.get(), c.count);
    }
}

// A magnitude that k elements or a few more most likely reach. The sample is made of short runs, which cost one look
// at memory each, at places without a period, since the elements of a tensor often have one. Where many neighbours are
// alike, as in the rows of an embedding, a run tells little more than one of its elements, so that a large tensor gets
// more of them.
template <class Word, bool adds>
Word likely_threshold(Vector<Word, adds> vector, Index d, Index k) {
    constexpr Index run = 16, few_runs = 256, most_runs = 1024, one_of = 16;
    const Index runs = std::min(d / (one_of * run), std::clamp(d >> 14, few_runs, most_runs));
    if (runs < 16) return 0;
    const Index stride = d / runs, taken = runs * run;
    const double expected = static_cast<double>(taken) * static_cast<double>(k) / static_cast<double>(d);
    const Index rank = static_cast<Index>(expected + 3 * __builtin_sqrt(expected)) + 3;
    if (rank >= taken) return 0;
    Word sample[most_runs * run];
    for (Index r = 0; r < runs; ++r) {
        const Word64 scattered = (static_cast<Word64>(r) * 0x9E3779B97F4A7C15ull) >> 32;  // in [0, 2^32)
        const Index within = static_cast<Index>((scattered * static_cast<Word64>(stride - run + 1)) >> 32);
        const Vector<Word, adds> from = vector.from((r * stride + within) / run * run);  // one cache line each
        for (Index i = 0; i < run; ++i) {
            if constexpr (adds) {
                sample[r * run + i] = sum(from.x[i], from.y[i]);
            } else {
                sample[r * run + i] = from.x[i];
            }
        }
    }
    const Span<Word> span{sample, taken};
    constexpr int precision = sizeof(Word) == 4 ? 16 : 45;  // leaves seven bits of the mantissa
    return cut_to(&span, 1, rank, Word{0}, precision).least;
}

template <class Word, bool adds, class Place>
void top_k_of(Vector<Word, adds> vector, Index d, Index k, int threads, VectorUnit unit, Place* indices, Word* values) {
    // Places are of the word's width, so a part has less than 2^31 elements.
    const Index parts = std::max(parts_of(d, threads), (d >> 30) + 1), size = (d + parts - 1) / parts;
    std::vector<Candidates<Word>> candidates;
    candidates.reserve(parts);
    for (Index begin = 0; begin < d; begin += size) candidates.emplace_back(begin, std::min(size, d - begin), k);
    std::vector<Span<Word>> spans(candidates.size());
    Index total = 0;
    const auto collect_from = [&](auto from, Word threshold) {
        in_parallel(static_cast<Index>(candidates.size()),
                    [&](Index p) { collect_all(candidates[p], k, threshold, from, unit); });
        total = 0;
        for (std::size_t p = 0; p < candidates.size(); ++p) {
            spans[p] = {candidates[p].bits.get(), candidates[p].count};
            total += candidates[p].count;
        }
    };
    Word threshold = likely_threshold(vector, d, k);
    collect_from(vector, threshold);
    if (total < k) {
        const Vector<Word, false> made{vector.made(), nullptr, nullptr};
        collect_from(made, threshold = 0);
    }

    Cut<Word> cut{threshold, Cut<Word>::kAll};
    if (total > k) cut = cut_to(spans.data(), spans.size(), k, threshold);
    for (auto& c : candidates) {
        drop_below(c, cut, unit);
        for (Index i = 0; i < c.count; ++i) indices[i] = static_cast<Place>(c.first + static_cast<Index>(c.place[i]));
        std::copy_n(c.bits.get(), c.count, values);
        indices += c.count;
        values += c.count;
    }
}

}  // namespace

template <class Float>
void top_k(const Float* x, Index d, Index k, int threads, VectorUnit unit, Index* indices, Float* values) {
    using Word = std::conditional_t<sizeof(Float) == 4, Word32, Word64>;
    const Vector<Word, false> vector{reinterpret_cast<const Word*>(x), nullptr, nullptr};
    top_k_of(vector, d, k, threads, unit, indices, reinterpret_cast<Word*>(values));
}

template <class Float, class Place>
void split_top_k(const Float* x, const Float* y, Float* to, Index d, Index k, int threads, VectorUnit unit,
                 Place* indices, Float* values) {
    using Word = std::conditional_t<sizeof(Float) == 4, Word32, Word64>;
    const Vector<Word, true> vector{reinterpret_cast<const Word*>(x), reinterpret_cast<const Word*>(y),
                                    reinterpret_cast<Word*>(to)};
    top_k_of(vector, d, k, threads, unit, indices, reinterpret_cast<Word*>(values));
    add_at(to, d, indices, values, k, Float{-1});
}

template void top_k(const float*, Index, Index, int, VectorUnit, Index*, float*);
template void top_k(const double*, Index, Index, int, VectorUnit, Index*, double*);

#define HVD_INSTANTIATE(Float, Place)                                                                       \
    template void split_top_k(const Float*, const Float*, Float*, Index, Index, int, VectorUnit, Place*, Float*);
HVD_INSTANTIATE(float, std::int32_t)
HVD_INSTANTIATE(float, std::int64_t)
HVD_INSTANTIATE(double, std::int32_t)
HVD_INSTANTIATE(double, std::int64_t)

std::vector<VectorUnit> vector_units() {
    std::vector<VectorUnit> units;
#ifdef HVD_X86
    const bool bits = __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi");
    if (bits && __builtin_cpu_supports("avx512f")) units.push_back(VectorUnit::avx512);
    if (bits && __builtin_cpu_supports("avx2")) units.push_back(VectorUnit::avx2);
#endif
    units.push_back(VectorUnit::portable);
    return units;
}

}  // namespace hvd
