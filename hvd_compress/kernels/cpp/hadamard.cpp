// The Walsh-Hadamard transform, level by level as its definition, but several levels while the elements are at hand.

#include <algorithm>

#include "kernels.h"
#include "machine.h"

namespace hvd {
namespace {

constexpr Index kRow = 16, kBlock = 4096;

// y[i], y[i + half] become their sum and difference, for all pairs of n elements.
template <class Float>
[[gnu::always_inline]] inline void level(Float* y, Index n, Index half) {
    for (Index begin = 0; begin < n; begin += 2 * half) {
        Float* const low = y + begin;
        Float* const high = low + half;
        for (Index i = 0; i < half; ++i) {
            const Float a = low[i], b = high[i];
            low[i] = a + b;
            high[i] = a - b;
        }
    }
}

// Two levels at once, in one pass over memory.
template <class Float>
[[gnu::always_inline]] inline void two_levels(Float* y, Index n, Index half) {
    for (Index begin = 0; begin < n; begin += 4 * half) {
        Float *const p = y + begin, *const q = p + half, *const r = q + half, *const s = r + half;
        for (Index i = 0; i < half; ++i) {
            const Float a = p[i] + q[i], b = p[i] - q[i], c = r[i] + s[i], d = r[i] - s[i];
            p[i] = a + c;
            q[i] = b + d;
            r[i] = a - c;
            s[i] = b - d;
        }
    }
}

// The levels within rows, on sixteen rows side by side, whose columns make better vectors than their halves.
template <class Float>
[[gnu::always_inline]] inline void levels_of_rows(Float* y) {
    Float columns[kRow][kRow];
    for (Index row = 0; row < kRow; ++row) {
        for (Index i = 0; i < kRow; ++i) columns[i][row] = y[row * kRow + i];
    }
    for (Index half = 1; half < kRow; half *= 2) level(&columns[0][0], kRow * kRow, half * kRow);
    for (Index row = 0; row < kRow; ++row) {
        for (Index i = 0; i < kRow; ++i) y[row * kRow + i] = columns[i][row];
    }
}

template <class Float>
[[gnu::always_inline]] inline void transform(const Float* x, Index n, Float divisor, Float* y) {
    const Index block = std::min(n, kBlock);
    Index half = block;
    for (Index begin = 0; begin < n; begin += block) {
        Float* const part = y + begin;
        std::copy_n(x + begin, block, part);
        half = 1;
        if (block >= kRow * kRow) {
            for (Index i = 0; i < block; i += kRow * kRow) levels_of_rows(part + i);
            half = kRow;
        }
        for (; half < block; half *= 2) level(part, block, half);
    }
    for (; 2 * half < n; half *= 4) two_levels(y, n, half);
    if (half < n) level(y, n, half);
    for (Index i = 0; i < n; ++i) y[i] /= divisor;
}

HVD_CLONES void transform_floats(const float* x, Index n, float divisor, float* y) { transform(x, n, divisor, y); }

HVD_CLONES void transform_doubles(const double* x, Index n, double divisor, double* y) { transform(x, n, divisor, y); }

}  // namespace

void hadamard(const float* x, Index n, float divisor, float* y) { transform_floats(x, n, divisor, y); }

void hadamard(const double* x, Index n, double divisor, double* y) { transform_doubles(x, n, divisor, y); }

}  // namespace hvd
