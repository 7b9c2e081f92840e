// y = hidden * r * (offset + weight),  hidden = x + residual,  r = 1 / sqrt(mean(hidden^2) + eps)
//
// Each row is read twice, from memory for its mean square and from the cache for the result, so that a row costs
// the memory one read and one write. Backward needs two sums over the row, and finds them in one such pass.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../../cpu/vector.h"

namespace nearpeak::norm::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

// Independent sums, of two vectors each, hide the adder's latency: 4 cycles, at 2 additions a cycle.
constexpr int kSums = 4;

// A row's inputs; those of the next row are fetched while this one's outputs are written, which else leaves memory's
// reading side idle.
template <class T>
struct Inputs {
    const T *x, *residual;  // residual is null without kResidual
};

// A row that is summed is read back from `sum`: the place of the new residual, or where that is written past the
// caches, scratch memory. It holds the sum as rounded for storage, so that backward sees the same numbers.
template <class T, class W, bool kPastCache, bool kResidual>
void forward_row(const Forward& p, Inputs<T> row, Inputs<T> next, T* y, T* hidden, T* sum_row) {
    const W* weight = static_cast<const W*>(p.weight);
    Float squares[kSums] = {};
    for_each_two<T, kSums>(p.width, [&](int64_t column, auto lanes, int slot) {
        auto h = load(row.x + column, lanes);
        if constexpr (kResidual) {
            h = rounded_to<T>(h + load(row.residual + column, lanes));
            store(sum_row + column, h, lanes);
        }
        squares[slot] += total_of(h * h);
    });
    const float mean = sum(add_up(squares)) / static_cast<float>(p.width);
    const float r = 1.0f / std::sqrt(mean + p.eps);
    const T* from = kResidual ? sum_row : row.x;
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        fetch(next.x + column, lanes);
        if constexpr (kResidual) fetch(next.residual + column, lanes);
        auto normalised = load(from + column, lanes) * r;
        if (weight) normalised = normalised * (p.offset + load(weight + column, lanes));
        if constexpr (kPastCache) {
            if constexpr (kResidual) copy_past_cache(hidden + column, from + column, lanes);
            store_past_cache(y + column, normalised, lanes);
        } else {
            store(y + column, normalised, lanes);
        }
    });
}

template <class T, class W, bool kPastCache, bool kResidual>
void forward_rows(const Forward& p, int64_t begin, int64_t end, T* scratch) {
    const auto inputs = [&](int64_t row) {
        const T* residual = static_cast<const T*>(p.residual);
        return Inputs<T>{static_cast<const T*>(p.x) + p.x_rows(row),
                         kResidual ? residual + p.residual_rows(row) : nullptr};
    };
    for (int64_t row = begin; row < end; ++row) {
        T* hidden = kResidual ? static_cast<T*>(p.hidden) + row * p.width : nullptr;
        forward_row<T, W, kPastCache, kResidual>(p, inputs(row), inputs(std::min(row + 1, end - 1)),
                                                 static_cast<T*>(p.y) + row * p.width, hidden,
                                                 kPastCache ? scratch : hidden);
    }
    if (kPastCache) fence_stores_past_cache();
}

// With g = grad * (offset + weight):  d_hidden = r * (g - hidden * r^2 * mean(g * hidden)) + grad_hidden
template <class T, class W>
void backward_row(const Backward& p, const T* grad, const T* hidden, const T* grad_hidden, T* d_hidden,
                  float* d_weight) {
    const W* weight = static_cast<const W*>(p.weight);
    const auto weighted = [&](auto g, int64_t column, auto lanes) {
        return weight ? g * (p.offset + load(weight + column, lanes)) : g;
    };
    constexpr int kPairs = kSums / 2;
    Float squares[kPairs] = {}, products[kPairs] = {};
    for_each_two<T, kPairs>(p.width, [&](int64_t column, auto lanes, int slot) {
        const auto h = load(hidden + column, lanes);
        squares[slot] += total_of(h * h);
        products[slot] += total_of(h * weighted(load(grad + column, lanes), column, lanes));
    });
    const float width = static_cast<float>(p.width);
    const float r = 1.0f / std::sqrt(sum(add_up(squares)) / width + p.eps);
    const float projection = r * r * (sum(add_up(products)) / width);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        const auto h = load(hidden + column, lanes);
        const auto g = load(grad + column, lanes);
        auto d = r * (weighted(g, column, lanes) - h * projection);
        if (grad_hidden) d = d + load(grad_hidden + column, lanes);
        if (d_weight) {
            store(d_weight + column, load(d_weight + column, lanes) + g * (h * r), lanes);
        }
        store(d_hidden + column, d, lanes);
    });
}

template <class T, class W>
void backward_rows(const Backward& p, int64_t begin, int64_t end, float* d_weight) {
    for (int64_t row = begin; row < end; ++row) {
        const T* grad_hidden = static_cast<const T*>(p.grad_hidden);
        backward_row<T, W>(p, static_cast<const T*>(p.grad) + p.grad_rows(row),
                           static_cast<const T*>(p.hidden) + p.hidden_rows(row),
                           grad_hidden ? grad_hidden + p.grad_hidden_rows(row) : nullptr,
                           static_cast<T*>(p.d_hidden) + row * p.width, d_weight);
    }
}

// The weight is of the input's type, or float32.
template <class Function>
void with_types(Dtype dtype, Dtype weight_dtype, Function function) {
    with_type(dtype, [&](auto* t) {
        if (weight_dtype == dtype) {
            function(t, t);
        } else {
            function(t, static_cast<float*>(nullptr));
        }
    });
}

void forward(const Forward& p, int64_t begin, int64_t end, void* scratch) {
    with_types(p.dtype, p.weight_dtype, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        const auto run = p.residual
                             ? (p.past_cache ? forward_rows<T, W, true, true> : forward_rows<T, W, false, true>)
                             : (p.past_cache ? forward_rows<T, W, true, false> : forward_rows<T, W, false, false>);
        run(p, begin, end, static_cast<T*>(scratch));
    });
}

void backward(const Backward& p, int64_t begin, int64_t end, float* d_weight) {
    with_types(p.dtype, p.weight_dtype, [&](auto* t, auto* w) {
        backward_rows<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(w)>>(p, begin, end, d_weight);
    });
}

void sum_parts(const float* parts, int64_t count, int64_t width, void* total, Dtype dtype, int64_t begin, int64_t end) {
    with_type(dtype, [&](auto* t) {
        auto* to = static_cast<decltype(t)>(total) + begin;
        for_each_vector(end - begin, [&](int64_t column, auto lanes, int) {
            Float value = {};
            for (int64_t part = 0; part < count; ++part) value += load(parts + part * width + begin + column, lanes);
            store(to + column, value, lanes);
        });
    });
}

}  // namespace

const Kernels kernels = {forward, backward, sum_parts};

}  // namespace nearpeak::norm::NEARPEAK_ISA
