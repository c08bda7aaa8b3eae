// One pass over memory: a small sample suggests a threshold, what reaches it is collected, and the exact selection runs
// among the collected. Should they become too many, all but the k best so far are dropped and the threshold rises to
// the k-th of them, so that no input takes much longer than another. Should they be fewer than k, the pass is repeated
// without a threshold.
//
// Magnitudes are compared as integers: without its sign bit, the bits of an IEEE float have the float's order. NaN lies
// above infinity there and is brought down to it.

#include <algorithm>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HVD_X86 1
#endif

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

// Elements that may be among the k best: a contiguous part of the tensor, those that reached a threshold.
template <class Word>
struct Candidates {
    Candidates(const Word* part, Index size, Index k)
        : x(part), length(size), capacity(std::min(size + kBlock, 2 * (k + kBlock))),
          bits(new Word[capacity + kOverrun]), place(new Word[capacity + kOverrun]) {}

    const Word* x;
    Index length;
    Index capacity;
    Index count = 0;
    std::unique_ptr<Word[]> bits;   // as they are in x, sign included
    std::unique_ptr<Word[]> place;  // in x, ascending
};

// Appends what reaches the threshold in x[begin, end) to bits and place; returns the new count.
template <class Word>
Index collect_portably(const Word* x, Index begin, Index end, Word threshold, Word* bits, Word* place, Index count) {
    for (Index i = begin; i < end; ++i) {
        bits[count] = x[i];
        place[count] = static_cast<Word>(i);
        count += (x[i] & kNoSign<Word>) >= threshold;
    }
    return count;
}

#ifdef HVD_X86
__attribute__((target("avx2"))) Index collect_avx2(const Word32* x, Index begin, Index end, Word32 threshold,
                                                    Word32* bits, Word32* place, Index count) {
    const __m256i no_sign = _mm256_set1_epi32(static_cast<int>(kNoSign<Word32>));
    const __m256i below = _mm256_set1_epi32(static_cast<int>(threshold) - 1);  // signed: -1 is below everything
    Index i = begin;
    for (; i + 8 <= end; i += 8) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
        const __m256i reaches = _mm256_cmpgt_epi32(_mm256_and_si256(v, no_sign), below);
        unsigned found = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(reaches)));
        for (; found; found &= found - 1) {
            const Index at = i + __builtin_ctz(found);
            bits[count] = x[at];
            place[count++] = static_cast<Word32>(at);
        }
    }
    return collect_portably(x, i, end, threshold, bits, place, count);
}

__attribute__((target("avx512f,popcnt"))) Index collect_avx512(const Word32* x, Index begin, Index end,
                                                               Word32 threshold, Word32* bits, Word32* place,
                                                               Index count) {
    const __m512i no_sign = _mm512_set1_epi32(static_cast<int>(kNoSign<Word32>));
    const __m512i least = _mm512_set1_epi32(static_cast<int>(threshold));
    const __m512i step = _mm512_set1_epi32(16);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(begin)), lanes);
    Index i = begin;
    for (; i + 16 <= end; i += 16) {
        const __m512i v = _mm512_loadu_si512(x + i);
        const __mmask16 found = _mm512_cmpge_epu32_mask(_mm512_and_si512(v, no_sign), least);
        // Compressed in a register and stored whole: compressing stores are slow on some machines.
        _mm512_storeu_si512(bits + count, _mm512_maskz_compress_epi32(found, v));
        _mm512_storeu_si512(place + count, _mm512_maskz_compress_epi32(found, index));
        count += __builtin_popcount(found);
        index = _mm512_add_epi32(index, step);
    }
    return collect_portably(x, i, end, threshold, bits, place, count);
}
#endif

enum class Unit { portable, avx2, avx512 };

Unit unit() {
#ifdef HVD_X86
    static const Unit best = __builtin_cpu_supports("avx512f") ? Unit::avx512
                             : __builtin_cpu_supports("avx2")  ? Unit::avx2
                                                               : Unit::portable;
    return best;
#else
    return Unit::portable;
#endif
}

Index collect(const Word32* x, Index begin, Index end, Word32 threshold, Word32* bits, Word32* place, Index count) {
#ifdef HVD_X86
    if (unit() == Unit::avx512) return collect_avx512(x, begin, end, threshold, bits, place, count);
    if (unit() == Unit::avx2) return collect_avx2(x, begin, end, threshold, bits, place, count);
#endif
    return collect_portably(x, begin, end, threshold, bits, place, count);
}

Index collect(const Word64* x, Index begin, Index end, Word64 threshold, Word64* bits, Word64* place, Index count) {
    return collect_portably(x, begin, end, threshold, bits, place, count);
}

template <class Word>
struct Kth {
    Word value;   // the k-th largest magnitude
    Index above;  // how many are larger
};

template <class Word>
struct Span {
    const Word* bits;
    Index count;
};

// By radix: the digits of the k-th largest are found from the highest on, by counting.
template <class Word>
Kth<Word> kth_largest(const Span<Word>* spans, std::size_t size, Index k) {
    constexpr int digit = 11, highest = sizeof(Word) == 4 ? 20 : 52;  // 31 = 11 + 10 + 10, 63 = 11 + 52
    Word prefix = 0;
    Index above = 0;
    for (int shift = highest, width = digit; width > 0;) {
        Index counts[1 << digit] = {};
        const Word mask = (Word{1} << width) - 1;
        for (std::size_t s = 0; s < size; ++s) {
            for (Index i = 0; i < spans[s].count; ++i) {
                const Word m = magnitude(spans[s].bits[i]);
                if ((m >> shift >> width) == prefix) ++counts[(m >> shift) & mask];
            }
        }
        Word value = mask;
        while (above + counts[value] < k) above += counts[value--];
        prefix = prefix << width | value;
        width = std::min(shift, sizeof(Word) == 4 ? 10 : digit);
        shift -= width;
    }
    return {prefix, above};
}

// Drops all but the k best; returns a threshold that only better ones than those reach. Later equals lose to them.
template <class Word>
Word keep_best(Candidates<Word>& c, Index k) {
    const Span<Word> span{c.bits.get(), c.count};
    const Kth<Word> kth = kth_largest(&span, 1, k);
    Index equals = k - kth.above, kept = 0;
    for (Index i = 0; i < c.count; ++i) {
        const Word m = magnitude(c.bits[i]);
        const bool equal = m == kth.value;
        c.bits[kept] = c.bits[i];
        c.place[kept] = c.place[i];
        kept += m > kth.value || (equal && equals > 0);
        equals -= equal;
    }
    c.count = kept;
    return kth.value + 1;
}

template <class Word>
void collect_all(Candidates<Word>& c, Index k, Word threshold) {
    c.count = 0;
    for (Index begin = 0; begin < c.length; begin += kBlock) {
        if (c.count + kBlock > c.capacity) threshold = keep_best(c, k);
        const Index end = std::min(begin + kBlock, c.length);
        c.count = collect(c.x, begin, end, threshold, c.bits.get(), c.place.get(), c.count);
    }
}

// A magnitude that k elements or a few more most likely reach. The sample is made of short runs, which cost one look
// at memory each, at places without a period, since the elements of a tensor often have one.
template <class Word>
Word likely_threshold(const Word* x, Index d, Index k) {
    constexpr Index run = 4, most_runs = 1024, one_of = 16;
    const Index runs = std::min(d / (one_of * run), most_runs);
    if (runs < 16) return 0;
    const Index stride = d / runs, taken = runs * run;
    const double expected = static_cast<double>(taken) * static_cast<double>(k) / static_cast<double>(d);
    const Index rank = static_cast<Index>(expected + 4 * __builtin_sqrt(expected)) + 4;
    if (rank >= taken) return 0;
    Word sample[most_runs * run];
    for (Index r = 0; r < runs; ++r) {
        const Word64 scattered = (static_cast<Word64>(r) * 0x9E3779B97F4A7C15ull) >> 32;  // in [0, 2^32)
        const Index within = static_cast<Index>((scattered * static_cast<Word64>(stride - run + 1)) >> 32);
        std::memcpy(sample + r * run, x + r * stride + within, run * sizeof(Word));
    }
    const Span<Word> span{sample, taken};
    return kth_largest(&span, 1, rank).value;
}

template <class Word>
void top_k_words(const Word* x, Index d, Index k, int threads, Index* indices, Word* values) {
    // Places are of the word's width, so a part has less than 2^31 elements.
    const Index parts = std::max(parts_of(d, threads), (d >> 30) + 1), size = (d + parts - 1) / parts;
    std::vector<Candidates<Word>> candidates;
    for (Index begin = 0; begin < d; begin += size) candidates.emplace_back(x + begin, std::min(size, d - begin), k);
    std::vector<Span<Word>> spans(candidates.size());
    Index total = 0;
    const auto collect_from = [&](Word threshold) {
        in_parallel(static_cast<Index>(candidates.size()), [&](Index p) { collect_all(candidates[p], k, threshold); });
        total = 0;
        for (std::size_t p = 0; p < candidates.size(); ++p) {
            spans[p] = {candidates[p].bits.get(), candidates[p].count};
            total += candidates[p].count;
        }
    };
    collect_from(likely_threshold(x, d, k));
    if (total < k) collect_from(0);

    const Kth<Word> kth = kth_largest(spans.data(), spans.size(), k);
    Index equals = k - kth.above, kept = 0;
    for (const auto& c : candidates) {
        const Index base = c.x - x;
        for (Index i = 0; i < c.count && kept < k; ++i) {
            const Word m = magnitude(c.bits[i]);
            const bool equal = m == kth.value;
            indices[kept] = base + static_cast<Index>(c.place[i]);
            values[kept] = c.bits[i];
            kept += m > kth.value || (equal && equals > 0);
            equals -= equal;
        }
    }
}

}  // namespace

template <>
void top_k(const float* x, Index d, Index k, int threads, Index* indices, float* values) {
    top_k_words(reinterpret_cast<const Word32*>(x), d, k, threads, indices, reinterpret_cast<Word32*>(values));
}

template <>
void top_k(const double* x, Index d, Index k, int threads, Index* indices, double* values) {
    top_k_words(reinterpret_cast<const Word64*>(x), d, k, threads, indices, reinterpret_cast<Word64*>(values));
}

const char* instruction_set() {
    switch (unit()) {
        case Unit::avx512: return "AVX-512";
        case Unit::avx2: return "AVX2";
        default: return "portable";
    }
}

}  // namespace hvd
