// Bits in bytes, lowest first. Received streams and tables are not trusted: every read and write is bounded by the
// lengths that were handed over, every number is checked before it is used in arithmetic.

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace hvd {
namespace {

using Byte = std::uint8_t;
using Word = std::uint64_t;

Word low_bits(int width) { return (Word{1} << width) - 1; }  // width < 64

constexpr int kTogether = 56;  // bits that go into a word behind what is left of a byte

class BitWriter {
public:
    BitWriter(Byte* begin, std::size_t size) : next_(begin), end_(begin + size) {}

    void put(Word bits, int width) {  // bits < 2^width, width <= kTogether
        pending_ |= bits << filled_;
        filled_ += width;
        written_ += width;
        // Always, since whether a byte is full is hard to predict; what is not full is written again.
        if (end_ - next_ >= 8) {
            std::memcpy(next_, &pending_, 8);
        } else {
            const Word last = pending_;  // the other one's address is not to be known, so that it stays in a register
            std::memcpy(next_, &last, end_ - next_);
        }
        next_ += filled_ >> 3;
        pending_ >>= filled_ & ~7;
        filled_ &= 7;
    }

    Index written() const { return written_; }  // bits

private:
    Byte* next_;
    Byte* end_;
    Word pending_ = 0;
    int filled_ = 0;
    Index written_ = 0;
};

class FieldReader {
public:
    FieldReader(const Byte* begin, std::size_t size) : begin_(begin), size_(size) {}

    Word take(int width) {  // width <= kTogether; zeros behind the end
        const std::size_t byte = position_ >> 3;
        Word window = 0;
        if (byte + 8 <= size_) {
            std::memcpy(&window, begin_ + byte, 8);
        } else if (byte < size_) {
            std::memcpy(&window, begin_ + byte, size_ - byte);
        }
        window >>= position_ & 7;
        position_ += width;
        return window & low_bits(width);
    }

private:
    const Byte* begin_;
    std::size_t size_;
    std::size_t position_ = 0;  // in bits
};

class UnaryReader {
public:
    UnaryReader(const Byte* begin, std::size_t size) : begin_(begin), size_(size) { load(); }

    // How many zeros there are before the next one, or -1 when none is left.
    Index next() {
        while (!pending_) {
            at_ += 8;
            if (at_ >= size_) return -1;
            load();
        }
        const Index one = static_cast<Index>(at_ * 8) + __builtin_ctzll(pending_), zeros = one - end_;
        pending_ &= pending_ - 1;
        end_ = one + 1;
        return zeros;
    }

    Index end() const { return end_; }  // of what was read, in bits

private:
    void load() {
        Word word = 0;
        if (at_ < size_) std::memcpy(&word, begin_ + at_, std::min<std::size_t>(8, size_ - at_));
        pending_ = word;
    }

    const Byte* begin_;
    std::size_t size_;
    std::size_t at_ = 0;
    Word pending_ = 0;
    Index end_ = 0;
};

// Eight levels of `bits` bits, one in each byte of a word, moved together, and back.
Word squeeze(Word eight, int bits) {
    eight = (eight & 0x00FF00FF00FF00FFull) | (eight & 0xFF00FF00FF00FF00ull) >> (8 - bits);
    eight = (eight & 0x0000FFFF0000FFFFull) | (eight & 0xFFFF0000FFFF0000ull) >> (16 - 2 * bits);
    return (eight & 0x00000000FFFFFFFFull) | (eight & 0xFFFFFFFF00000000ull) >> (32 - 4 * bits);
}

Word spread(Word packed, int bits) {
    const Word four = low_bits(4 * bits), two = low_bits(2 * bits), one = low_bits(bits);
    packed = (packed & four) | (packed >> (4 * bits) & four) << 32;
    packed = (packed & (two | two << 32)) | (packed >> (2 * bits) & (two | two << 32)) << 16;
    const Word each = one | one << 16 | one << 32 | one << 48;
    return (packed & each) | (packed >> bits & each) << 8;
}

[[noreturn]] void wrong_indices() {
    throw std::invalid_argument("indices must be strictly ascending and below the tensor's size");
}

// numbers[j] >> width zeros and a one, for each j.
template <class Size>
void put_unary(BitWriter& runs, const Word* numbers, int width, Size together) {
    Word zeros = 0;
    for (int j = 0; j < together; ++j) zeros += numbers[j] >> width;
    if (zeros + together <= kTogether) {
        Word bits = 0, bit = 0;
        for (int j = 0; j < together; ++j) {
            bit += numbers[j] >> width;
            bits |= Word{1} << bit++;
        }
        runs.put(bits, static_cast<int>(bit));
        return;
    }
    for (int j = 0; j < together; ++j) {
        Word left = numbers[j] >> width;
        for (; left >= kTogether; left -= kTogether) runs.put(0, kTogether);
        runs.put(Word{1} << left, static_cast<int>(left) + 1);
    }
}

// Calls work(n), n known to the compiler, for the row's indices, n at a time: as many as have their fields in a word.
template <class Work>
void in_groups(const Row& row, const Work& work) {
    Index left = row.count;
    const auto groups = [&](auto together) {
        for (; together * row.parameter <= kTogether && left >= together; left -= together) work(together);
    };
    groups(std::integral_constant<int, 8>());
    groups(std::integral_constant<int, 4>());
    groups(std::integral_constant<int, 2>());
    groups(std::integral_constant<int, 1>());
}

}  // namespace

Index unary_bytes_at_most(const Row* rows, Index messages) {
    Index bits = 0;
    for (Index m = 0; m < messages; ++m) {
        if (rows[m].rice && rows[m].count) bits += rows[m].count + ((rows[m].numel - rows[m].count) >> rows[m].parameter);
    }
    return (bits + 7) / 8;
}

template <class Place>
void encode_indices(const Place* indices, const Row* rows, Index messages, Byte* unary, std::size_t unary_bytes,
                    Byte* fixed, std::size_t fixed_bytes, Index* unary_bits) {
    BitWriter runs(unary, unary_bytes), fields(fixed, fixed_bytes);
    for (Index m = 0; m < messages; ++m) {
        const Row row = rows[m];
        const Index before = runs.written();
        Index previous = -1;
        in_groups(row, [&](auto together) {
            const int width = static_cast<int>(row.parameter);
            Word numbers[together], group = 0;
            bool wrong = false;
            for (int j = 0; j < together; ++j) {
                const Index index = *indices++;
                wrong |= index <= previous || index >= row.numel;
                numbers[j] = static_cast<Word>(index) - (row.rice ? static_cast<Word>(previous) + 1 : 0);  // may wrap
                previous = index;
            }
            if (wrong) wrong_indices();
            for (int j = 0; j < together; ++j) group |= (numbers[j] & low_bits(width)) << j * width;
            fields.put(group, together * width);
            if (row.rice) put_unary(runs, numbers, width, together);
        });
        unary_bits[m] = runs.written() - before;
    }
}

template <class Place>
void decode_indices(const Byte* unary, std::size_t unary_bytes, const Byte* fixed, std::size_t fixed_bytes,
                    const Row* rows, Index messages, Place* indices) {
    constexpr Index highest = std::numeric_limits<Place>::max();
    UnaryReader runs(unary, unary_bytes);
    FieldReader fields(fixed, fixed_bytes);
    for (Index m = 0; m < messages; ++m) {
        const Row row = rows[m];
        if (row.numel - 1 > highest) throw std::invalid_argument("a tensor has more elements than its indices can tell");
        Index previous = -1;
        in_groups(row, [&](auto together) {
            const int width = static_cast<int>(row.parameter);
            const Word group = fields.take(together * width);
            bool wrong = false;
            for (int j = 0; j < together; ++j) {
                Index index = static_cast<Index>(group >> j * width & low_bits(width));
                if (row.rice) {
                    const Index zeros = runs.next();
                    if (zeros < 0) throw std::invalid_argument("there are fewer index gaps than the table says");
                    const Index quotient = std::min(zeros, (row.numel >> width) + 1);  // it might overflow
                    index += previous + 1 + (quotient << width);
                }
                wrong |= index <= previous || index >= row.numel;
                if (wrong) wrong_indices();
                previous = index;
                *indices++ = static_cast<Place>(index);
            }
        });
    }
    const Index bits = runs.end();
    if (runs.next() >= 0 || static_cast<std::size_t>(bits + 7) / 8 != unary_bytes) {
        throw std::invalid_argument("there are more index gaps than the table says");
    }
}

template <class Level>
void pack_levels(const Level* levels, Index count, int bits, Byte* packed) {
    const std::size_t size = (static_cast<std::size_t>(count) * bits + 7) / 8;
    Index i = 0;
    if (sizeof(Level) == 1 && bits <= 8) {
        for (Byte* next = packed; i + 8 <= count && next + 8 <= packed + size; i += 8, next += bits) {
            Word eight;
            std::memcpy(&eight, levels + i, 8);
            eight = squeeze(eight, bits);
            std::memcpy(next, &eight, 8);  // what is too much is overwritten next
        }
    }
    const std::size_t done = static_cast<std::size_t>(i) / 8 * bits;
    BitWriter rest(packed + done, size - done);
    for (; i < count; ++i) rest.put(static_cast<Word>(levels[i]), bits);
}

template <class Level>
void unpack_levels(const Byte* packed, Index count, int bits, Level* levels) {
    const std::size_t size = (static_cast<std::size_t>(count) * bits + 7) / 8;
    Index i = 0;
    if (sizeof(Level) == 1 && bits <= 8) {
        for (const Byte* next = packed; i + 8 <= count && next + 8 <= packed + size; i += 8, next += bits) {
            Word eight;
            std::memcpy(&eight, next, 8);
            eight = spread(eight, bits);
            std::memcpy(levels + i, &eight, 8);
        }
    }
    const std::size_t done = static_cast<std::size_t>(i) / 8 * bits;
    FieldReader rest(packed + done, size - done);
    for (; i < count; ++i) levels[i] = static_cast<Level>(rest.take(bits));
}

template void encode_indices(const std::int32_t*, const Row*, Index, Byte*, std::size_t, Byte*, std::size_t, Index*);
template void encode_indices(const std::int64_t*, const Row*, Index, Byte*, std::size_t, Byte*, std::size_t, Index*);
template void decode_indices(const Byte*, std::size_t, const Byte*, std::size_t, const Row*, Index, std::int32_t*);
template void decode_indices(const Byte*, std::size_t, const Byte*, std::size_t, const Row*, Index, std::int64_t*);
template void pack_levels(const std::uint8_t*, Index, int, Byte*);
template void pack_levels(const std::int32_t*, Index, int, Byte*);
template void pack_levels(const std::int64_t*, Index, int, Byte*);
template void unpack_levels(const Byte*, Index, int, std::uint8_t*);
template void unpack_levels(const Byte*, Index, int, std::int64_t*);

}  // namespace hvd
