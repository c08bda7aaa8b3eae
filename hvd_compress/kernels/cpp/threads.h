#pragma once

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace hvd {

constexpr Index kWorthAThread = Index{1} << 18;  // elements: about what is read while a thread starts

inline Index parts_of(Index n, int threads) {
    return std::clamp<Index>(n / kWorthAThread, 1, std::max(threads, 1));
}

// Calls work(0) … work(parts - 1), each in a thread of its own. The work must not throw.
template <class Work>
void in_parallel(Index parts, const Work& work) {
    std::vector<std::thread> others;
    others.reserve(parts - 1);
    for (Index part = 1; part < parts; ++part) {
        try {
            others.emplace_back(work, part);
        } catch (const std::system_error&) {  // the machine has no more threads to give
            work(part);
        }
    }
    work(Index{0});
    for (auto& other : others) other.join();
}

// Calls work(begin, end) for consecutive parts of 0 … n.
template <class Work>
void in_ranges(Index n, int threads, const Work& work) {
    const Index parts = parts_of(n, threads), size = (n + parts - 1) / parts;
    in_parallel(parts, [&](Index part) { work(std::min(part * size, n), std::min((part + 1) * size, n)); });
}

}  // namespace hvd
