// hidden = scale * words[id] + positions[position] + segments[segment]
// y      = dropout(hidden)                  or  dropout(LayerNorm(hidden))
//
// A token's rows are read once. Their sum stays in float32, in the first-level cache, until it is normalised: it is
// written nowhere, and backward makes it again from the tables, which costs less than reading it back would.

#include "kernels.h"

#include <algorithm>
#include <type_traits>

#include "../../cpu/row_norm.h"

namespace nearpeak::embedding::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

template <class T>
const T* row_of(const Table& table, int64_t token) {
    return static_cast<const T*>(table.data) + table.row_of(token);
}

// A token's rows. Those of the next one are fetched while this one's results are written: they lie anywhere.
template <class T>
class Hidden {
  public:
    Hidden(const Call& call, int64_t token) : p(call) {
        for (int table = 0; table < p.table_count; ++table) rows[table] = row_of<T>(p.tables[table], token);
        next = row_of<T>(p.tables[0], std::min(token + 1, p.tokens - 1));
    }

    template <class Lanes>
    auto load_sum(int64_t column, Lanes lanes) const {
        auto hidden = p.scale * load(rows[0] + column, lanes);
        for (int table = 1; table < p.table_count; ++table) hidden = hidden + load(rows[table] + column, lanes);
        return hidden;
    }

    template <class Lanes>
    void fetch_next(int64_t column, Lanes lanes) const {
        fetch(next + column, lanes);
    }

  private:
    const Call& p;
    const T *rows[kMostTables], *next;
};

// Writes the sums to `sums`, and returns their mean.
template <class T>
float sum_rows(const Hidden<T>& hidden, float* sums, int64_t width) {
    return means_over<T, 1, kSums>(width, [&](int64_t column, auto lanes, Float(&totals)[1]) {
        const auto h = hidden.load_sum(column, lanes);
        store(sums + column, h, kept(lanes));
        totals[0] += total_of(h);
    })[0];
}

// What dropout makes of a token's row.
struct Filter {
    Filter(const Call& p, int64_t token) : dropout(p.dropout), keys(dropout.row_keys(0, token)) {}

    template <class Values, class Lanes>
    Values operator()(Values values, int64_t column, Lanes lanes) const {
        return dropout.drops() ? keep(dropout, keys, values, column, lanes) : values;
    }

    const Dropout& dropout;
    const RowKeys keys;
};

template <class T>
void forward_sum(const Forward& p, int64_t token, T* y) {
    const Hidden<T> hidden(p, token);
    const Filter filter(p, token);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        hidden.fetch_next(column, lanes);
        store(y + column, filter(hidden.load_sum(column, lanes), column, lanes), lanes);
    });
}

template <class T>
Means means_of(const float* sums, float shift, int64_t width) {
    const auto [difference, square] =
        means_over<T, 2, kSums>(width, [&](int64_t column, auto lanes, Float(&totals)[2]) {
            const auto d = only(load(sums + column, kept(lanes)) - shift, lanes);
            totals[0] += total_of(d);
            totals[1] += total_of(d * d);
        });
    return {difference, square};
}

template <class T, class W>
void forward_normalised(const Forward& p, int64_t token, T* y, float* sums) {
    const Hidden<T> hidden(p, token);
    const Filter filter(p, token);
    const W *weight = static_cast<const W*>(p.norm_weight), *bias = static_cast<const W*>(p.norm_bias);
    const float mean = sum_rows(hidden, sums, p.width);
    const Normaliser<true> normalise(mean, means_of<T>(sums, mean, p.width), p.eps);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        hidden.fetch_next(column, lanes);
        auto n = normalise(load(sums + column, kept(lanes)));
        if (weight) n = n * load(weight + column, lanes);
        if (bias) n = n + load(bias + column, lanes);
        store(y + column, filter(n, column, lanes), lanes);
    });
}

template <class T>
void backward_sum(const Backward& p, int64_t token, const T* grad, T* d_hidden) {
    const Filter filter(p, token);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        store(d_hidden + column, filter(load(grad + column, lanes), column, lanes), lanes);
    });
}

// `kept_grad` becomes what dropout lets through of the gradient.
template <class T, class W>
RowGradient<true> gradient_of_row(const Backward& p, const T* grad, const Filter& filter, const float* sums, float mean,
                                  float* kept_grad) {
    const W* weight = static_cast<const W*>(p.norm_weight);
    const auto [difference, square, product, gradient] =
        means_over<T, 4, kSums / 2>(p.width, [&](int64_t column, auto lanes, Float(&totals)[4]) {
            const auto d = only(load(sums + column, kept(lanes)) - mean, lanes);
            auto g = filter(load(grad + column, lanes), column, lanes);
            store(kept_grad + column, g, kept(lanes));
            if (weight) g = g * load(weight + column, lanes);
            totals[0] += total_of(d);
            totals[1] += total_of(d * d);
            totals[2] += total_of(d * g);
            totals[3] += total_of(g);
        });
    return {mean, {{difference, square}, product, gradient}, p.eps};
}

template <class T, class W>
void backward_normalised(const Backward& p, int64_t token, const T* grad, T* d_hidden, ColumnSums totals,
                         float* scratch) {
    const Hidden<T> hidden(p, token);
    float *sums = scratch, *kept_grad = scratch + padded(p.width);
    const float mean = sum_rows(hidden, sums, p.width);
    const auto row = gradient_of_row<T, W>(p, grad, Filter(p, token), sums, mean, kept_grad);
    const W* weight = static_cast<const W*>(p.norm_weight);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        hidden.fetch_next(column, lanes);
        const auto h = load(sums + column, kept(lanes)), n = row.normalise(h);
        const auto g = load(kept_grad + column, kept(lanes));
        if (totals.weight) add_to(totals.weight + column, g * n, kept(lanes));
        if (totals.bias) add_to(totals.bias + column, g, kept(lanes));
        store(d_hidden + column, row(weight ? g * load(weight + column, lanes) : g, h, n), lanes);
    });
}

void forward(const Forward& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.norm_dtype, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        for (int64_t token = begin; token < end; ++token) {
            T* y = static_cast<T*>(p.y) + token * p.width;
            if (p.normalises) {
                forward_normalised<T, W>(p, token, y, scratch);
            } else {
                forward_sum(p, token, y);
            }
        }
    });
}

void backward(const Backward& p, int64_t begin, int64_t end, ColumnSums sums, float* scratch) {
    with_types(p.dtype, p.norm_dtype, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        for (int64_t token = begin; token < end; ++token) {
            const T* grad = static_cast<const T*>(p.grad) + p.grad_rows(token);
            T* d_hidden = static_cast<T*>(p.d_hidden) + token * p.width;
            if (p.normalises) {
                backward_normalised<T, W>(p, token, grad, d_hidden, sums, scratch);
            } else {
                backward_sum(p, token, grad, d_hidden);
            }
        }
    });
}

void sum_parts(const Backward& p, Parts parts, void* total, int64_t begin, int64_t end) {
    with_types(p.dtype, p.norm_dtype, [&](auto* t, auto* w) {
        add_up_parts<std::remove_pointer_t<decltype(t)>>(parts, static_cast<decltype(w)>(total), begin, end);
    });
}

// Tokens of one row that are added up before they meet the rest: long sums in float32 lose digits.
constexpr int64_t kSumTokens = 64;

template <class T>
void sum_chain(const TableGradient& p, int64_t row, int64_t first_column, int64_t last_column) {
    const int64_t width = last_column - first_column;
    float total[kGradientColumns] = {}, sums[kGradientColumns];
    for (int64_t token = p.first[row]; token >= 0;) {
        std::fill_n(sums, kGradientColumns, 0.0f);
        for (int64_t count = 0; count < kSumTokens && token >= 0; ++count) {
            const T* from = static_cast<const T*>(p.d_hidden) + p.d_hidden_rows(token) + first_column;
            for_each_two<T>(width, [&](int64_t column, auto lanes, int) {
                add_to(sums + column, load(from + column, lanes), kept(lanes));
            });
            token = p.next[token];
        }
        for (int64_t column = 0; column < kGradientColumns; ++column) total[column] += sums[column];
    }
    T* to = static_cast<T*>(p.d_table) + row * p.width + first_column;
    for_each_two<T>(width, [&](int64_t column, auto lanes, int) {
        store(to + column, p.scale * load(total + column, kept(lanes)), lanes);
    });
}

// A row that one token took, as most rows are that any took.
template <class T>
void scale_one(const TableGradient& p, int64_t row) {
    const T* from = static_cast<const T*>(p.d_hidden) + p.d_hidden_rows(p.first[row]);
    T* to = static_cast<T*>(p.d_table) + row * p.width;
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        store(to + column, p.scale * load(from + column, lanes), lanes);
    });
}

void row_gradient(const TableGradient& p, int64_t row, int64_t first_column, int64_t last_column) {
    with_type(p.dtype,
              [&](auto* t) { sum_chain<std::remove_pointer_t<decltype(t)>>(p, row, first_column, last_column); });
}

// Row after row, as they lie: most of the table is new memory, whose pages no two threads should meet in.
void table_gradient(const TableGradient& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        for (int64_t row = begin; row < end; ++row) {
            if (p.first[row] < 0) {
                std::memset(static_cast<T*>(p.d_table) + row * p.width, 0, p.width * sizeof(T));
            } else if (p.next[p.first[row]] < 0) {
                scale_one<T>(p, row);
            } else if (!is_long_chain(p, row)) {
                for (int64_t column = 0; column < p.width; column += kGradientColumns) {
                    sum_chain<T>(p, row, column, std::min(column + kGradientColumns, p.width));
                }
            }
        }
    });
}

}  // namespace

const Kernels kernels = {forward, backward, sum_parts, table_gradient, row_gradient};

}  // namespace nearpeak::embedding::NEARPEAK_ISA
