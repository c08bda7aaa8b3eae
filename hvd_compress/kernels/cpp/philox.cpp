#include "philox.h"

#include <algorithm>
#include <vector>

#include "machine.h"
#include "threads.h"

namespace hvd {

using Word = std::uint32_t;

HVD_CLONES void draw_words(std::uint64_t seed, std::uint64_t first, Index counters, Word* words) {
    for (Index begin = 0; begin < counters; begin += kDrawn) {
        Word a[kDrawn], b[kDrawn], c[kDrawn], d[kDrawn];
        for (Index i = 0; i < kDrawn; ++i) {
            const std::uint64_t counter = first + begin + i;
            a[i] = static_cast<Word>(counter);
            b[i] = static_cast<Word>(counter >> 32);
            c[i] = d[i] = 0;
        }
        Word low = static_cast<Word>(seed), high = static_cast<Word>(seed >> 32);
        for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
            for (Index i = 0; i < kDrawn; ++i) {
                const std::uint64_t one = std::uint64_t{0xD2511F53u} * a[i];
                const std::uint64_t other = std::uint64_t{0xCD9E8D57u} * c[i];
                a[i] = static_cast<Word>(other >> 32) ^ b[i] ^ low;
                b[i] = static_cast<Word>(other);
                c[i] = static_cast<Word>(one >> 32) ^ d[i] ^ high;
                d[i] = static_cast<Word>(one);
            }
        }
        for (Index i = 0; i < kDrawn; ++i) {
            Word* const to = words + 4 * (begin + i);
            to[0] = a[i], to[1] = b[i], to[2] = c[i], to[3] = d[i];
        }
    }
}

// As many bits of the words as a mantissa holds.
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

template <class Float>
void uniform(std::uint64_t seed, Index n, int threads, Float* draws) {
    in_chunks(n, threads, [&](Index chunk, Index begin, Index end) {
        Float some[kChunk];
        draw(seed, chunk, some);
        std::copy_n(some, end - begin, draws + begin);
    });
}

template void uniform(std::uint64_t, Index, int, float*);
template void uniform(std::uint64_t, Index, int, double*);

void random_signs(std::uint64_t seed, Index n, int threads, std::int8_t* signs) {
    constexpr Index chunk = kChunk * 32;  // a sign for each bit
    in_chunks<chunk>(n, threads, [&](Index number, Index begin, Index end) {
        Word words[kChunk];
        std::int8_t some[chunk];
        draw_words(seed, number * kDrawn, kDrawn, words);
        for (Index i = 0; i < kChunk; ++i) {
            for (int bit = 0; bit < 32; ++bit) {
                some[32 * i + bit] = static_cast<std::int8_t>(static_cast<int>(words[i] >> bit & 1) * 2 - 1);
            }
        }
        std::copy_n(some, end - begin, signs + begin);
    });
}

void random_subset(std::uint64_t seed, Index numel, Index count, Index* indices) {
    std::vector<std::uint64_t> chosen((numel + 63) / 64);  // a bit each
    Index left = count;
    for (Index chunk = 0; left > 0; ++chunk) {
        double draws[kChunk];
        draw(seed, chunk, draws);
        for (Index i = 0; i < kChunk && left > 0; ++i) {
            const Index at = std::min(static_cast<Index>(draws[i] * static_cast<double>(numel)), numel - 1);
            std::uint64_t& word = chosen[at >> 6];
            left -= ~word >> (at & 63) & 1;
            word |= std::uint64_t{1} << (at & 63);
        }
    }
    for (std::size_t word = 0; word < chosen.size(); ++word) {
        for (std::uint64_t bits = chosen[word]; bits; bits &= bits - 1) {
            *indices++ = static_cast<Index>(word * 64) + __builtin_ctzll(bits);
        }
    }
}

}  // namespace hvd
