// Loops that read two or three vectors once. They are bound by memory, so the compiler's own vectors are enough.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "threads.h"

namespace hvd {

template <class Float>
bool is_finite(const Float* x, Index n, int threads) {
    using Word = std::conditional_t<sizeof(Float) == 4, std::uint32_t, std::uint64_t>;
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

template <class Float>
bool all_nonzero(const Float* x, Index n) {
    bool found = false;
    for (Index i = 0; i < n; ++i) found |= x[i] == 0;
    return !found;
}

template <class Float>
void add_at(Float* flat, Index n, const Index* indices, const Float* values, Index count, Float alpha) {
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

template <class Float>
void require_ascending(const std::vector<Part<Float>>& parts, Index n) {
    for (const auto& part : parts) {
        bool wrong = part.count && (part.indices[0] < 0 || part.indices[part.count - 1] >= n);
        for (Index i = 1; i < part.count; ++i) wrong |= part.indices[i] <= part.indices[i - 1];
        if (wrong) throw std::invalid_argument("indices must be strictly ascending and below the vector's length");
    }
}

// One block after the other, so that what is set to zero is still in the cache when the values come.
template <class Float>
void sum_at(Float* flat, Index n, const std::vector<Part<Float>>& parts, Float divisor, int threads) {
    require_ascending(parts, n);
    constexpr Index block = 8192;
    in_ranges(n, threads, [&](Index begin, Index end) {
        std::vector<Index> first(parts.size()), behind(parts.size());  // of each part, within the block
        for (std::size_t p = 0; p < parts.size(); ++p) {
            behind[p] = std::lower_bound(parts[p].indices, parts[p].indices + parts[p].count, begin) - parts[p].indices;
        }
        bool is_whole[block] = {};  // elements that are still to be divided
        for (Index from = begin; from < end; from += block) {
            const Index to = std::min(from + block, end);
            std::memset(flat + from, 0, (to - from) * sizeof(Float));
            for (std::size_t p = 0; p < parts.size(); ++p) {
                const Part<Float>& part = parts[p];
                Index i = first[p] = behind[p];
                for (; i < part.count && part.indices[i] < to; ++i) {
                    flat[part.indices[i]] += part.values[i];
                    is_whole[part.indices[i] - from] = true;
                }
                behind[p] = i;
            }
            if (divisor == 1) continue;
            for (std::size_t p = 0; p < parts.size(); ++p) {
                for (Index i = first[p]; i < behind[p]; ++i) {
                    const Index at = parts[p].indices[i];
                    flat[at] = is_whole[at - from] ? flat[at] / divisor : flat[at];
                    is_whole[at - from] = false;
                }
            }
        }
    });
}

// The sum is made one block after the other, beside the vector, of which only the elements in question are touched. An
// element that several parts have is zero in the sum from the second visit on.
template <class Float>
void subtract_at(Float* flat, Index n, const std::vector<Part<Float>>& parts, Float divisor) {
    require_ascending(parts, n);
    constexpr Index block = 8192;
    Float sum[block] = {};
    std::vector<Index> first(parts.size()), behind(parts.size());  // of each part, within the block
    for (Index from = 0; from < n; from += block) {
        const Index to = std::min(from + block, n);
        for (std::size_t p = 0; p < parts.size(); ++p) {
            const Part<Float>& part = parts[p];
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
template bool all_nonzero(const float*, Index);
template bool all_nonzero(const double*, Index);
template void add_at(float*, Index, const Index*, const float*, Index, float);
template void add_at(double*, Index, const Index*, const double*, Index, double);
template void sum_at(float*, Index, const std::vector<Part<float>>&, float, int);
template void sum_at(double*, Index, const std::vector<Part<double>>&, double, int);
template void subtract_at(float*, Index, const std::vector<Part<float>>&, float);
template void subtract_at(double*, Index, const std::vector<Part<double>>&, double);

}  // namespace hvd
