// The Python side of the kernels. Arrays are taken as they are, contiguous and of the right type, or refused with a
// TypeError; lengths are checked here. No kernel holds the interpreter's lock.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;
using namespace hvd;
using py::literals::operator""_a;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;  // with noconvert(): no copies, no other types
using Bytes = Array<std::uint8_t>;

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

void require_vector(const py::array& array, const char* name) {
    require(array.ndim() == 1, std::string(name) + " must have one dimension, not " + std::to_string(array.ndim()));
}

template <class Float>
void require_top_k(const Array<Float>& flat, Index k, VectorUnit unit) {
    static const std::vector<VectorUnit> units = vector_units();
    require_vector(flat, "flat");
    require(std::find(units.begin(), units.end(), unit) != units.end(), "this machine does not have that vector unit");
    require(1 <= k && k <= flat.size(), "k must be 1 to " + std::to_string(flat.size()) + ", got " + std::to_string(k));
}

template <class Float>
py::tuple top_k_of(const Array<Float>& flat, Index k, int threads, VectorUnit unit) {
    require_top_k(flat, k, unit);
    Array<Index> indices(k);
    Array<Float> values(k);
    const Float* x = flat.data();
    Index* i = indices.mutable_data();
    Float* v = values.mutable_data();
    const Index d = flat.size();
    {
        py::gil_scoped_release released;
        top_k(x, d, k, threads, unit, i, v);
    }
    return py::make_tuple(std::move(indices), std::move(values));
}

// The selections of several vectors, one after the other.
template <class Float, class Place>
py::tuple split_top_k_of(const std::vector<Array<Float>>& flats, const std::vector<Array<Float>>& others,
                         std::vector<Array<Float>>& outs, const std::vector<Index>& ks, int threads, VectorUnit unit) {
    struct Split {
        const Float *x, *y;
        Float* to;
        Index d, k;
    };
    require(others.size() == flats.size() && outs.size() == flats.size() && ks.size() == flats.size(),
            "there must be as many of each");
    std::vector<Split> splits;
    Index total = 0;
    for (std::size_t s = 0; s < flats.size(); ++s) {
        require_top_k(flats[s], ks[s], unit);
        require_vector(others[s], "other");
        require_vector(outs[s], "out");
        const Index d = flats[s].size();
        require(others[s].size() == d && outs[s].size() == d, "the vectors must be of one length");
        require(d - 1 <= std::numeric_limits<Place>::max(), "a vector has more elements than such indices can tell");
        const Float *x = flats[s].data(), *y = others[s].data();
        Float* to = outs[s].mutable_data();
        require(to == x || to + d <= x || x + d <= to, "flat and out must be the same or not overlap");
        require(to + d <= y || y + d <= to, "other and out must not overlap");
        splits.push_back({x, y, to, d, ks[s]});
        total += ks[s];
    }
    Array<Place> indices(total);
    Array<Float> values(total);
    Place* i = indices.mutable_data();
    Float* v = values.mutable_data();
    {
        py::gil_scoped_release released;
        for (const Split& s : splits) {
            split_top_k(s.x, s.y, s.to, s.d, s.k, threads, unit, i, v);
            i += s.k;
            v += s.k;
        }
    }
    return py::make_tuple(std::move(indices), std::move(values));
}

template <class Float>
bool is_finite_of(const Array<Float>& flat, int threads) {
    const Float* x = flat.data();
    const Index n = flat.size();
    py::gil_scoped_release released;
    return is_finite(x, n, threads);
}

template <class Number>
bool none_is_of(const std::vector<Array<Number>>& vectors, Number number) {
    py::gil_scoped_release released;
    return std::all_of(vectors.begin(), vectors.end(),
                       [&](const auto& v) { return none_is(v.data(), v.size(), number); });
}

template <class Float, class Place>
void add_at_of(Array<Float>& flat, const Array<Place>& indices, const Array<Float>& values, Float alpha) {
    require_vector(flat, "flat");
    require_vector(indices, "indices");
    require_vector(values, "values");
    require(indices.size() == values.size(), "indices and values must be of one length");
    Float* x = flat.mutable_data();
    const Place* i = indices.data();
    const Index n = flat.size(), count = indices.size();
    const Float* v = values.data();
    py::gil_scoped_release released;
    add_at(x, n, i, v, count, alpha);
}

// Calls work(flat, n, parts) for each of the vectors, with its share of each rank's indices and values.
template <class Float, class Place, class Work>
void for_each_sum(std::vector<Array<Float>>& flats, const std::vector<Array<Place>>& indices,
                  const std::vector<Array<Float>>& values, const std::vector<std::vector<Index>>& counts,
                  const Work& work) {
    const std::size_t ranks = counts.size();
    require(indices.size() == ranks && values.size() == ranks, "there must be indices, values and counts of each rank");
    std::vector<Part<Float, Place>> next;
    for (std::size_t r = 0; r < ranks; ++r) {
        require_vector(indices[r], "indices");
        require_vector(values[r], "values");
        require(counts[r].size() == flats.size(), "there must be a count for each vector");
        Index left = indices[r].size();
        require(values[r].size() == left, "indices and values must be of one length");
        for (const Index count : counts[r]) {
            require(0 <= count && count <= left, "the counts are not as many as the indices");
            left -= count;
        }
        require(left == 0, "the counts are not as many as the indices");
        next.push_back({indices[r].data(), values[r].data(), 0});
    }
    std::vector<Float*> to;
    for (auto& flat : flats) {
        require_vector(flat, "flat");
        to.push_back(flat.mutable_data());
    }
    std::vector<Index> sizes;
    for (const auto& flat : flats) sizes.push_back(flat.size());
    py::gil_scoped_release released;
    for (std::size_t f = 0; f < to.size(); ++f) {
        for (std::size_t r = 0; r < ranks; ++r) {
            next[r] = {next[r].indices + next[r].count, next[r].values + next[r].count, counts[r][f]};
        }
        work(to[f], sizes[f], next);
    }
}

template <class Float, class Place>
void sum_at_of(std::vector<Array<Float>>& flats, const std::vector<Array<Place>>& indices,
               const std::vector<Array<Float>>& values, const std::vector<std::vector<Index>>& counts, Float divisor,
               int threads) {
    for_each_sum(flats, indices, values, counts,
                 [&](Float* flat, Index n, const auto& parts) { sum_at(flat, n, parts, divisor, threads); });
}

template <class Float, class Place>
void subtract_at_of(std::vector<Array<Float>>& flats, const std::vector<Array<Place>>& indices,
                    const std::vector<Array<Float>>& values, const std::vector<std::vector<Index>>& counts,
                    Float divisor) {
    for_each_sum(flats, indices, values, counts,
                 [&](Float* flat, Index n, const auto& parts) { subtract_at(flat, n, parts, divisor); });
}

Array<Index> random_subset_of(std::uint64_t seed, Index numel, Index count) {
    require(0 <= count && count <= numel, "a subset has 0 to " + std::to_string(numel) + " elements");
    Array<Index> indices(count);
    Index* to = indices.mutable_data();
    {
        py::gil_scoped_release released;
        random_subset(seed, numel, count, to);
    }
    return indices;
}

Array<std::int8_t> random_signs_of(std::uint64_t seed, Index n, int threads) {
    require(n >= 0, "n must be 0 or more");
    Array<std::int8_t> signs(n);
    std::int8_t* to = signs.mutable_data();
    {
        py::gil_scoped_release released;
        random_signs(seed, n, threads, to);
    }
    return signs;
}

template <class Float>
Array<Float> hadamard_of(const Array<Float>& flat, Float divisor) {
    require_vector(flat, "flat");
    const Index n = flat.size();
    require(n > 0 && (n & (n - 1)) == 0, "the length must be a power of two");
    Array<Float> result(n);
    const Float* x = flat.data();
    Float* to = result.mutable_data();
    {
        py::gil_scoped_release released;
        hadamard(x, n, divisor, to);
    }
    return result;
}

template <class Float>
Array<Float> uniform_of(std::uint64_t seed, Index n, int threads) {
    require(n >= 0, "n must be 0 or more");
    Array<Float> draws(n);
    Float* to = draws.mutable_data();
    {
        py::gil_scoped_release released;
        uniform(seed, n, threads, to);
    }
    return draws;
}

// An array of n levels of the narrowest type that holds all of them, filled by work(pointer) without the lock.
template <class Work>
py::array levels_by(Index n, Index highest, const Work& work) {
    const auto fill = [&](auto levels) -> py::array {
        auto* const to = levels.mutable_data();
        {
            py::gil_scoped_release released;
            work(to);
        }
        return levels;
    };
    return highest < 256 ? fill(Array<std::uint8_t>(n)) : fill(Array<Index>(n));
}

// How many elements consecutive runs have together.
Index sum_of(const std::vector<Index>& counts) {
    Index sum = 0;
    for (const Index count : counts) {
        require(0 <= count && count <= (Index{1} << 56) - sum, "the counts are impossible");
        sum += count;
    }
    return sum;
}

template <class Float>
py::array round_by_chance_of(const Array<Float>& flat, Float offset, const Array<Float>& steps, Index bucket,
                             std::int32_t least, std::int32_t most, std::uint64_t seed, int threads) {
    require_vector(flat, "flat");
    require_vector(steps, "steps");
    require(bucket >= 1, "a bucket has one element or more");
    require(steps.size() >= (flat.size() + bucket - 1) / bucket, "there must be a step for each bucket");
    require(-65536 < least && least < most && most < 65536, "levels must have up to 16 bits");
    const Float *x = flat.data(), *s = steps.data();
    const Index n = flat.size();
    return levels_by(n, most - least, [&](auto* levels) {
        round_by_chance(x, n, offset, s, bucket, least, most, seed, threads, levels);
    });
}

// The levels, and the largest magnitude.
template <class Float>
py::tuple round_to_largest_of(const Array<Float>& flat, std::int32_t s, std::uint64_t seed, int threads) {
    require_vector(flat, "flat");
    require(1 <= s && s < 32768, "levels must have up to 16 bits");
    const Float* x = flat.data();
    const Index n = flat.size();
    Array<Float> scale(1);
    Float* const norm = scale.mutable_data();
    py::array rounded =
        levels_by(n, 2 * s, [&](auto* levels) { *norm = round_to_largest(x, n, s, seed, threads, levels); });
    return py::make_tuple(std::move(rounded), std::move(scale));
}

// The same of several runs of counts[r] elements each, one after the other, with a seed for each.
template <class Float>
py::tuple round_runs_to_largest_of(const Array<Float>& flat, const std::vector<Index>& counts, std::int32_t s,
                                   const std::vector<std::uint64_t>& seeds, int threads) {
    require_vector(flat, "flat");
    require(1 <= s && s < 32768, "levels must have up to 16 bits");
    require(sum_of(counts) == flat.size(), "the counts are not as many as the elements");
    require(counts.size() == seeds.size(), "there must be a seed for each run");
    const Float* x = flat.data();
    Array<Float> scales(static_cast<Index>(counts.size()));
    Float* const norms = scales.mutable_data();
    py::array rounded = levels_by(flat.size(), 2 * s, [&](auto* levels) {
        Index at = 0;
        for (std::size_t r = 0; r < counts.size(); at += counts[r++]) {
            norms[r] = round_to_largest(x + at, counts[r], s, seeds[r], threads, levels + at);
        }
    });
    return py::make_tuple(std::move(rounded), std::move(scales));
}

template <class Float>
py::array choose_by_chance_of(const Array<Float>& flat, const Array<Float>& table, std::uint64_t seed, int threads) {
    require_vector(flat, "flat");
    require_vector(table, "table");
    require(2 <= table.size() && table.size() <= 65536, "a table has 2 to 65536 entries");
    const Float *x = flat.data(), *t = table.data();
    const Index n = flat.size(), entries = table.size();
    return levels_by(n, entries - 1,
                     [&](auto* levels) { choose_by_chance(x, n, t, entries, seed, threads, levels); });
}

template <class Float, class Level>
Array<Float> look_up_of(const Array<Float>& table, const Array<Level>& levels, int threads) {
    require_vector(table, "table");
    require_vector(levels, "levels");
    const Float* t = table.data();
    const Level* l = levels.data();
    const Index entries = table.size(), n = levels.size();
    Array<Float> values(n);
    Float* to = values.mutable_data();
    {
        py::gil_scoped_release released;
        look_up(t, entries, l, n, threads, to);
    }
    return values;
}

template <class Float, class Level>
Array<Float> look_up_runs_of(const Array<Float>& table, const Array<Level>& levels, const std::vector<Index>& counts,
                             const Array<Float>& scales) {
    require_vector(table, "table");
    require_vector(levels, "levels");
    require_vector(scales, "scales");
    require(sum_of(counts) == levels.size(), "the counts are not as many as the levels");
    require(static_cast<Index>(counts.size()) == scales.size(), "there must be a scale for each run");
    const Float *t = table.data(), *s = scales.data();
    const Level* l = levels.data();
    const Index entries = table.size();
    Array<Float> values(levels.size());
    Float* to = values.mutable_data();
    {
        py::gil_scoped_release released;
        look_up_runs(t, entries, l, counts, s, to);
    }
    return values;
}

struct Table {
    const Row* rows;
    Index messages;
    Index count = 0;        // indices of all rows
    Index fixed_bytes = 0;  // of the fields of all rows
};

// A table from another rank may say anything.
Table table_of(const Array<Index>& table) {
    constexpr Index most = Index{1} << 56;  // indices, so that bits can be counted
    require(table.ndim() == 2 && table.shape(1) == 4, "the table must have four columns");
    Table result{reinterpret_cast<const Row*>(table.data()), table.shape(0)};
    Index bits = 0;
    for (Index m = 0; m < result.messages; ++m) {
        const Row& row = result.rows[m];
        require(0 <= row.count && row.count <= most - result.count, "the table's counts are impossible");
        require(0 <= row.parameter && row.parameter <= kMaxWidth, "a field has 0 to 31 bits");
        require(0 <= row.numel && row.numel < Index{1} << 62, "a tensor has 0 to 2^62 elements");
        result.count += row.count;
        bits += row.count * row.parameter;
    }
    result.fixed_bytes = (bits + 7) / 8;
    return result;
}

template <class Place>
py::tuple encode_indices_of(const Array<Place>& indices, const Array<Index>& rows) {
    require_vector(indices, "indices");
    const Table table = table_of(rows);
    require(indices.size() == table.count, "the table's counts are not as many as the indices");
    const Index most = unary_bytes_at_most(table.rows, table.messages);
    Bytes unary(most), fixed(table.fixed_bytes);
    const Place* from = indices.data();
    std::uint8_t *u = unary.mutable_data(), *f = fixed.mutable_data();
    std::vector<Index> bits(table.messages);
    {
        py::gil_scoped_release released;
        encode_indices(from, table.rows, table.messages, u, most, f, table.fixed_bytes, bits.data());
    }
    const Index written = (std::accumulate(bits.begin(), bits.end(), Index{0}) + 7) / 8;
    return py::make_tuple(unary[py::slice(0, written, 1)], std::move(fixed), std::move(bits));
}

template <class Place>
Array<Place> decode_indices_of(const Bytes& unary, const Bytes& fixed, const Array<Index>& rows) {
    require_vector(unary, "unary");
    require_vector(fixed, "fixed");
    const Table table = table_of(rows);
    require(table.fixed_bytes == fixed.size(), "the table asks for other fields than there are");
    Array<Place> indices(table.count);
    const std::uint8_t *u = unary.data(), *f = fixed.data();
    const std::size_t unary_bytes = unary.size(), fixed_bytes = fixed.size();
    Place* to = indices.mutable_data();
    {
        py::gil_scoped_release released;
        decode_indices(u, unary_bytes, f, fixed_bytes, table.rows, table.messages, to);
    }
    return indices;
}

void require_bits(int bits, int most) {
    require(1 <= bits && bits <= most, "levels have 1 to " + std::to_string(most) + " bits, not " + std::to_string(bits));
}

// Of one run, which begins with a byte of its own, as each does.
Index packed_bytes(Index count, int bits) { return (count * bits + 7) / 8; }

template <class Level>
Bytes pack_levels_of(const std::vector<Array<Level>>& runs, int bits) {
    require_bits(bits, 16);
    Index size = 0;
    for (const auto& levels : runs) {
        require_vector(levels, "levels");
        size += packed_bytes(levels.size(), bits);
    }
    Bytes packed(size);
    std::uint8_t* to = packed.mutable_data();
    {
        py::gil_scoped_release released;
        for (const auto& levels : runs) {
            pack_levels(levels.data(), levels.size(), bits, to);
            to += packed_bytes(levels.size(), bits);
        }
    }
    return packed;
}

py::array unpack_levels_of(const Bytes& packed, int bits, const std::vector<Index>& counts) {
    require_vector(packed, "packed");
    require_bits(bits, 16);
    const Index sum = sum_of(counts);
    Index size = 0;
    for (const Index count : counts) size += packed_bytes(count, bits);
    require(packed.size() == size, "the packed bytes are not as many as the levels take");
    const std::uint8_t* from = packed.data();
    return levels_by(sum, (1 << bits) - 1, [&](auto* levels) {
        for (const Index count : counts) {
            unpack_levels(from, count, bits, levels);
            from += packed_bytes(count, bits);
            levels += count;
        }
    });
}

template <class Float, class Place>
void bind_sums(py::module_& module) {
    module.def("add_at", &add_at_of<Float, Place>, "flat"_a.noconvert(), "indices"_a.noconvert(),
               "values"_a.noconvert(), "alpha"_a);
    module.def("sum_at", &sum_at_of<Float, Place>, "flats"_a.noconvert(), "indices"_a.noconvert(),
               "values"_a.noconvert(), "counts"_a, "divisor"_a, "threads"_a);
    module.def("subtract_at", &subtract_at_of<Float, Place>, "flats"_a.noconvert(), "indices"_a.noconvert(),
               "values"_a.noconvert(), "counts"_a, "divisor"_a);
}

template <class Float, class Place>
void bind_split(py::module_& module, const char* name) {
    module.def(name, &split_top_k_of<Float, Place>, "flats"_a.noconvert(), "others"_a.noconvert(),
               "outs"_a.noconvert(), "ks"_a, "threads"_a, "unit"_a);
}

template <class Float>
void bind_floats(py::module_& module) {
    module.def("top_k", &top_k_of<Float>, "flat"_a.noconvert(), "k"_a, "threads"_a, "unit"_a);
    bind_split<Float, std::int32_t>(module, "split_top_k32");
    bind_split<Float, std::int64_t>(module, "split_top_k64");
    module.def("is_finite", &is_finite_of<Float>, "flat"_a.noconvert(), "threads"_a);
    module.def("none_is", &none_is_of<Float>, "vectors"_a.noconvert(), "number"_a);
    bind_sums<Float, std::int32_t>(module);
    bind_sums<Float, std::int64_t>(module);
    module.def("hadamard", &hadamard_of<Float>, "flat"_a.noconvert(), "divisor"_a);
    module.def("round_by_chance", &round_by_chance_of<Float>, "flat"_a.noconvert(), "offset"_a, "steps"_a.noconvert(),
               "bucket"_a, "least"_a, "most"_a, "seed"_a, "threads"_a);
    module.def("round_to_largest", &round_to_largest_of<Float>, "flat"_a.noconvert(), "s"_a, "seed"_a, "threads"_a);
    module.def("round_runs_to_largest", &round_runs_to_largest_of<Float>, "flat"_a.noconvert(), "counts"_a, "s"_a,
               "seeds"_a, "threads"_a);
    module.def("choose_by_chance", &choose_by_chance_of<Float>, "flat"_a.noconvert(), "table"_a.noconvert(), "seed"_a,
               "threads"_a);
    module.def("look_up", &look_up_of<Float, std::uint8_t>, "table"_a.noconvert(), "levels"_a.noconvert(),
               "threads"_a);
    module.def("look_up", &look_up_of<Float, std::int32_t>, "table"_a.noconvert(), "levels"_a.noconvert(),
               "threads"_a);
    module.def("look_up", &look_up_of<Float, Index>, "table"_a.noconvert(), "levels"_a.noconvert(), "threads"_a);
    module.def("look_up_runs", &look_up_runs_of<Float, std::uint8_t>, "table"_a.noconvert(), "levels"_a.noconvert(),
               "counts"_a, "scales"_a.noconvert());
    module.def("look_up_runs", &look_up_runs_of<Float, std::int32_t>, "table"_a.noconvert(), "levels"_a.noconvert(),
               "counts"_a, "scales"_a.noconvert());
    module.def("look_up_runs", &look_up_runs_of<Float, Index>, "table"_a.noconvert(), "levels"_a.noconvert(),
               "counts"_a, "scales"_a.noconvert());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    py::enum_<VectorUnit>(module, "VectorUnit")
        .value("AVX512", VectorUnit::avx512)
        .value("AVX2", VectorUnit::avx2)
        .value("PORTABLE", VectorUnit::portable);
    module.def("vector_units", &vector_units);
    bind_floats<float>(module);
    bind_floats<double>(module);
    module.def("random_subset", &random_subset_of, "seed"_a, "numel"_a, "count"_a);
    module.def("random_signs", &random_signs_of, "seed"_a, "n"_a, "threads"_a);
    module.def("uniform32", &uniform_of<float>, "seed"_a, "n"_a, "threads"_a);
    module.def("uniform64", &uniform_of<double>, "seed"_a, "n"_a, "threads"_a);
    module.def("encode_indices", &encode_indices_of<std::int32_t>, "indices"_a.noconvert(), "table"_a.noconvert());
    module.def("encode_indices", &encode_indices_of<std::int64_t>, "indices"_a.noconvert(), "table"_a.noconvert());
    module.def("decode_indices32", &decode_indices_of<std::int32_t>, "unary"_a.noconvert(), "fixed"_a.noconvert(),
               "table"_a.noconvert());
    module.def("decode_indices64", &decode_indices_of<std::int64_t>, "unary"_a.noconvert(), "fixed"_a.noconvert(),
               "table"_a.noconvert());
    module.def("none_is", &none_is_of<std::uint8_t>, "vectors"_a.noconvert(), "number"_a);
    module.def("none_is", &none_is_of<std::int32_t>, "vectors"_a.noconvert(), "number"_a);
    module.def("none_is", &none_is_of<Index>, "vectors"_a.noconvert(), "number"_a);
    module.def("pack_levels", &pack_levels_of<std::uint8_t>, "runs"_a.noconvert(), "bits"_a);
    module.def("pack_levels", &pack_levels_of<std::int32_t>, "runs"_a.noconvert(), "bits"_a);
    module.def("pack_levels", &pack_levels_of<Index>, "runs"_a.noconvert(), "bits"_a);
    module.def("unpack_levels", &unpack_levels_of, "packed"_a.noconvert(), "bits"_a, "counts"_a);
}
