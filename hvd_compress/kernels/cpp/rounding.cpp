// Random rounding, in chunks that stay in the cache: draws, then levels. Plain loops, which the compiler makes vectors of.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "threads.h"

// One version of a function for each kind of machine, chosen when the library is loaded. All give the same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define HVD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HVD_CLONES
#endif

namespace hvd {
namespace {

using Word = std::uint32_t;

constexpr Index kChunk = 256;  // elements

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words for each counter.
HVD_CLONES void draw_words(std::uint64_t seed, std::uint64_t first_counter, Index counters, Word* words) {
    constexpr Index lanes = 64;
    for (Index begin = 0; begin < counters; begin += lanes) {
        Word a[lanes], b[lanes], c[lanes], d[lanes];
        for (Index i = 0; i < lanes; ++i) {
            const std::uint64_t counter = first_counter + begin + i;
            a[i] = static_cast<Word>(counter);
            b[i] = static_cast<Word>(counter >> 32);
            c[i] = d[i] = 0;
        }
        Word low = static_cast<Word>(seed), high = static_cast<Word>(seed >> 32);
        for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
            for (Index i = 0; i < lanes; ++i) {
                const std::uint64_t first = std::uint64_t{0xD2511F53u} * a[i];
                const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * c[i];
                a[i] = static_cast<Word>(second >> 32) ^ b[i] ^ low;
                b[i] = static_cast<Word>(second);
                c[i] = static_cast<Word>(first >> 32) ^ d[i] ^ high;
                d[i] = static_cast<Word>(first);
            }
        }
        for (Index i = 0; i < lanes; ++i) {
            Word* const to = words + 4 * (begin + i);
            to[0] = a[i], to[1] = b[i], to[2] = c[i], to[3] = d[i];
        }
    }
}

// The draws of one chunk: as many bits of its words as a mantissa holds.
void draw(std::uint64_t seed, Index chunk, float* draws) {
    constexpr Index counters = kChunk / 4;
    Word words[kChunk];
    draw_words(seed, chunk * counters, counters, words);
    for (Index i = 0; i < kChunk; ++i) draws[i] = static_cast<float>(static_cast<std::int32_t>(words[i] >> 8)) * 0x1p-24f;
}

void draw(std::uint64_t seed, Index chunk, double* draws) {
    constexpr Index counters = kChunk / 2;
    Word words[2 * kChunk];
    draw_words(seed, chunk * counters, counters, words);
    for (Index i = 0; i < kChunk; ++i) {
        const double high = words[2 * i] >> 5, low = words[2 * i + 1] >> 6;
        draws[i] = (high * 0x1p26 + low) * 0x1p-53;
    }
}

// Calls work(chunk, begin, end) for all chunks of n elements.
template <class Work>
void in_chunks(Index n, int threads, const Work& work) {
    const Index chunks = (n + kChunk - 1) / kChunk, parts = parts_of(n, threads);
    in_parallel(parts, [&](Index part) {
        for (Index chunk = chunks * part / parts; chunk < chunks * (part + 1) / parts; ++chunk) {
            work(chunk, chunk * kChunk, std::min((chunk + 1) * kChunk, n));
        }
    });
}

template <class Float>
[[gnu::always_inline]] inline void round_some(const Float* x, Index n, Float offset, Float step, std::int32_t least,
                                              std::int32_t most, const Float* draws, std::int32_t* levels) {
    constexpr Float infinity = std::numeric_limits<Float>::infinity();
    for (Index i = 0; i < n; ++i) {
        const Float at = (x[i] - offset) / step;
        const Float finite = std::abs(at) < infinity ? at : Float(0);
        const Float steps = std::min(std::max(finite, Float(least)), Float(most));
        const auto whole = static_cast<std::int32_t>(steps);  // towards zero
        const std::int32_t up = draws[i] < std::abs(steps - static_cast<Float>(whole));
        levels[i] = whole + (steps < 0 ? -up : up) - least;
    }
}

HVD_CLONES void round_chunk(const float* x, Index n, float offset, float step, std::int32_t least, std::int32_t most,
                            const float* draws, std::int32_t* levels) {
    round_some(x, n, offset, step, least, most, draws, levels);
}

HVD_CLONES void round_chunk(const double* x, Index n, double offset, double step, std::int32_t least,
                            std::int32_t most, const double* draws, std::int32_t* levels) {
    round_some(x, n, offset, step, least, most, draws, levels);
}

constexpr Index kFew = 64;  // table entries: comparing with all takes less time than a search

template <class Float>
[[gnu::always_inline]] inline void choose_some(const Float* x, Index n, const Float* table, Index entries,
                                               const Float* draws, std::int32_t* levels) {
    const Float least = table[0], most = table[entries - 1];
    Float inside[kChunk];
    std::int32_t above[kChunk] = {};  // the first entry that is not less
    for (Index i = 0; i < n; ++i) {
        const Float cut = x[i] > most ? most : x[i];
        inside[i] = cut < least ? least : cut;
    }
    if (entries <= kFew) {
        for (Index entry = 0; entry < entries; ++entry) {
            for (Index i = 0; i < n; ++i) above[i] += !(table[entry] >= inside[i]);
        }
    } else {
        Index left = entries;  // from above[i] on, it is one of these, or the one behind them
        for (; left > 1; left -= left / 2) {
            const auto half = static_cast<std::int32_t>(left / 2);
            for (Index i = 0; i < n; ++i) above[i] += !(table[above[i] + half - 1] >= inside[i]) * half;
        }
        for (Index i = 0; i < n; ++i) above[i] += !(table[above[i]] >= inside[i]);
    }
    for (Index i = 0; i < n; ++i) {
        const std::int32_t high = std::clamp<std::int32_t>(above[i], 1, static_cast<std::int32_t>(entries) - 1);
        const Float from = table[high - 1], to = table[high];
        levels[i] = high - 1 + (draws[i] < (inside[i] - from) / (to - from));  // 0 / 0 is not above
    }
}

HVD_CLONES void choose_chunk(const float* x, Index n, const float* table, Index entries, const float* draws,
                             std::int32_t* levels) {
    choose_some(x, n, table, entries, draws, levels);
}

HVD_CLONES void choose_chunk(const double* x, Index n, const double* table, Index entries, const double* draws,
                             std::int32_t* levels) {
    choose_some(x, n, table, entries, draws, levels);
}

}  // namespace

template <class Float>
void uniform(std::uint64_t seed, Index n, int threads, Float* draws) {
    in_chunks(n, threads, [&](Index chunk, Index begin, Index end) {
        Float some[kChunk];
        draw(seed, chunk, some);
        std::copy_n(some, end - begin, draws + begin);
    });
}

template <class Float, class Level>
void round_by_chance(const Float* x, Index n, Float offset, const Float* steps, Index bucket, std::int32_t least,
                     std::int32_t most, std::uint64_t seed, int threads, Level* levels) {
    in_chunks(n, threads, [&](Index chunk, Index begin, Index end) {
        Float draws[kChunk];
        std::int32_t some[kChunk];
        draw(seed, chunk, draws);
        for (Index from = begin; from < end;) {
            const Index to = std::min(end, (from / bucket + 1) * bucket), at = from - begin;
            round_chunk(x + from, to - from, offset, steps[from / bucket], least, most, draws + at, some + at);
            from = to;
        }
        for (Index i = begin; i < end; ++i) levels[i] = static_cast<Level>(some[i - begin]);
    });
}

template <class Float, class Level>
void choose_by_chance(const Float* x, Index n, const Float* table, Index entries, std::uint64_t seed, int threads,
                      Level* levels) {
    in_chunks(n, threads, [&](Index chunk, Index begin, Index end) {
        Float draws[kChunk];
        std::int32_t some[kChunk];
        draw(seed, chunk, draws);
        choose_chunk(x + begin, end - begin, table, entries, draws, some);
        for (Index i = begin; i < end; ++i) levels[i] = static_cast<Level>(some[i - begin]);
    });
}

template <class Float, class Level>
void look_up(const Float* table, Index entries, const Level* levels, Index n, int threads, Float* values) {
    std::atomic<bool> is_outside{false};
    in_ranges(n, threads, [&](Index begin, Index end) {
        Level highest = 0;
        for (Index i = begin; i < end; ++i) highest = std::max(highest, levels[i]);
        bool negative = false;
        if constexpr (std::is_signed_v<Level>) {
            for (Index i = begin; i < end; ++i) negative |= levels[i] < 0;
        }
        if (negative || (begin < end && static_cast<Index>(highest) >= entries)) {
            is_outside = true;
            return;
        }
        for (Index i = begin; i < end; ++i) values[i] = table[levels[i]];
    });
    if (is_outside) throw std::out_of_range("a level lies outside the table of " + std::to_string(entries));
}

#define HVD_INSTANTIATE(Float, Level)                                                                               \
    template void round_by_chance(const Float*, Index, Float, const Float*, Index, std::int32_t, std::int32_t,       \
                                  std::uint64_t, int, Level*);                                                      \
    template void choose_by_chance(const Float*, Index, const Float*, Index, std::uint64_t, int, Level*);            \
    template void look_up(const Float*, Index, const Level*, Index, int, Float*);
HVD_INSTANTIATE(float, std::uint8_t)
HVD_INSTANTIATE(float, Index)
HVD_INSTANTIATE(double, std::uint8_t)
HVD_INSTANTIATE(double, Index)
template void uniform(std::uint64_t, Index, int, float*);
template void uniform(std::uint64_t, Index, int, double*);

}  // namespace hvd
