// Random rounding, in chunks that stay in the cache: draws, then levels. Plain loops, of which the compiler makes vectors.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "machine.h"
#include "philox.h"
#include "threads.h"

namespace hvd {
namespace {

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

template <class Level>
bool are_below(Index entries, const Level* levels, Index n) {
    Level highest = 0, lowest = 0;
    for (Index i = 0; i < n; ++i) highest = std::max(highest, levels[i]);
    for (Index i = 0; i < n; ++i) lowest = std::min(lowest, levels[i]);
    return n == 0 || (lowest >= 0 && static_cast<Index>(highest) < entries);
}

[[noreturn]] void lies_outside(Index entries) {
    throw std::out_of_range("a level lies outside the table of " + std::to_string(entries));
}

}  // namespace

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
Float round_to_largest(const Float* x, Index n, std::int32_t s, std::uint64_t seed, int threads, Level* levels) {
    const Float norm = largest(x, n), step = norm / static_cast<Float>(s);
    round_by_chance(x, n, Float{0}, &step, std::max<Index>(n, 1), -s, s, seed, threads, levels);
    return norm;
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
        if (!are_below(entries, levels + begin, end - begin)) {
            is_outside = true;
            return;
        }
        for (Index i = begin; i < end; ++i) values[i] = table[levels[i]];
    });
    if (is_outside) lies_outside(entries);
}

template <class Float, class Level>
void look_up_runs(const Float* table, Index entries, const Level* levels, const std::vector<Index>& counts,
                  const Float* scales, Float* values) {
    for (const Index count : counts) {
        if (!are_below(entries, levels, count)) lies_outside(entries);
        for (Index i = 0; i < count; ++i) values[i] = table[levels[i]] * *scales;
        levels += count;
        values += count;
        ++scales;
    }
}

#define HVD_INSTANTIATE(Float, Level)                                                                               \
    template void round_by_chance(const Float*, Index, Float, const Float*, Index, std::int32_t, std::int32_t,       \
                                  std::uint64_t, int, Level*);                                                      \
    template Float round_to_largest(const Float*, Index, std::int32_t, std::uint64_t, int, Level*);                  \
    template void choose_by_chance(const Float*, Index, const Float*, Index, std::uint64_t, int, Level*);            \
    template void look_up(const Float*, Index, const Level*, Index, int, Float*);                                     \
    template void look_up_runs(const Float*, Index, const Level*, const std::vector<Index>&, const Float*, Float*);
HVD_INSTANTIATE(float, std::uint8_t)
HVD_INSTANTIATE(float, Index)
HVD_INSTANTIATE(double, std::uint8_t)
HVD_INSTANTIATE(double, Index)
#define HVD_INSTANTIATE_FOR_32_BITS(Float)                                                                \
    template void look_up(const Float*, Index, const std::int32_t*, Index, int, Float*);                   \
    template void look_up_runs(const Float*, Index, const std::int32_t*, const std::vector<Index>&, const Float*, \
                               Float*);
HVD_INSTANTIATE_FOR_32_BITS(float)
HVD_INSTANTIATE_FOR_32_BITS(double)

}  // namespace hvd
