// Loops that read two or three vectors once. They are bound by memory, so the compiler's own vectors are enough.

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "threads.h"

namespace hvd {

template <class Float>
void swap_add(Float* memory, Float* gradient, Index n, Float decay, int threads) {
    in_ranges(n, threads, [=](Index begin, Index end) {
        Float* __restrict m = memory;
        Float* __restrict g = gradient;
        if (decay == 1) {
            for (Index i = begin; i < end; ++i) {
                const Float before = m[i];
                m[i] = before + g[i];
                g[i] = before;
            }
        } else {
            for (Index i = begin; i < end; ++i) {
                const Float before = m[i];
                m[i] = before * decay + g[i];
                g[i] = before;
            }
        }
    });
}

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

template void swap_add(float*, float*, Index, float, int);
template void swap_add(double*, double*, Index, double, int);
template bool is_finite(const float*, Index, int);
template bool is_finite(const double*, Index, int);
template void add_at(float*, Index, const Index*, const float*, Index, float);
template void add_at(double*, Index, const Index*, const double*, Index, double);

}  // namespace hvd
