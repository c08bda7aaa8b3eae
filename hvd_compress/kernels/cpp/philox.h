// Random draws in chunks that stay in the cache.

#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "threads.h"

namespace hvd {

constexpr Index kDrawn = 64;          // counters at once: loops that are shorter are not made vectors of
constexpr Index kChunk = 4 * kDrawn;  // draws

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words for each of so many
// counters from the first one on, a multiple of kDrawn.
void draw_words(std::uint64_t seed, std::uint64_t first, Index counters, std::uint32_t* words);

// The draws of a chunk from [0, 1).
void draw(std::uint64_t seed, Index chunk, float* draws);
void draw(std::uint64_t seed, Index chunk, double* draws);

// Calls work(number, begin, end) for all chunks of n elements.
template <Index chunk = kChunk, class Work>
void in_chunks(Index n, int threads, const Work& work) {
    const Index chunks = (n + chunk - 1) / chunk, parts = parts_of(n, threads);
    in_parallel(parts, [&](Index part) {
        for (Index number = chunks * part / parts; number < chunks * (part + 1) / parts; ++number) {
            work(number, number * chunk, std::min((number + 1) * chunk, n));
        }
    });
}

}  // namespace hvd
