// y = hidden * r * (offset + weight),  hidden = x + residual,  r = 1 / sqrt(mean(hidden^2) + eps)
//
// Each row is read twice, from memory for its mean square and from the cache for the result, so that a row costs
// the memory one read and one write. Backward needs two sums over the row, and finds them in one such pass.

#include "kernels.h"

#include <cmath>
#include <type_traits>

#include "../../cpu/vector.h"

namespace nearpeak::norm::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

// Independent sums, of two vectors each, hide the adder's latency: 4 cycles, at 2 additions a cycle.
constexpr int kSums = 4;

// hidden at `column`, rounded as it will be stored, so that backward sees the same numbers.
template <class T, class Lanes>
auto hidden_at(const T* x, const T* residual, int64_t column, Lanes lanes) {
    const auto value = load(x + column, lanes);
    return residual ? rounded_to<T>(value + load(residual + column, lanes)) : value;
}

template <class T, class W, bool kPastCache>
void forward_row(const Forward& p, const T* x, const T* residual, T* y, T* hidden) {
    const W* weight = static_cast<const W*>(p.weight);
    const auto write = [](T* to, auto value, auto lanes) {
        if constexpr (kPastCache) {
            store_past_cache(to, value, lanes);
        } else {
            store(to, value, lanes);
        }
    };
    Float squares[kSums] = {};
    for_each_two<T, kSums>(p.width, [&](int64_t column, auto lanes, int slot) {
        const auto h = hidden_at(x, residual, column, lanes);
        squares[slot] += total_of(h * h);
    });
    const float mean = sum(add_up(squares)) / static_cast<float>(p.width);
    const float r = 1.0f / std::sqrt(mean + p.eps);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        const auto h = hidden_at(x, residual, column, lanes);
        if (hidden) write(hidden + column, h, lanes);
        const auto normalised = h * r;
        write(y + column, weight ? normalised * (p.offset + load(weight + column, lanes)) : normalised, lanes);
    });
}

template <class T, class W>
void forward_rows(const Forward& p, int64_t begin, int64_t end) {
    const auto row_kernel = p.past_cache ? forward_row<T, W, true> : forward_row<T, W, false>;
    for (int64_t row = begin; row < end; ++row) {
        const T* residual = static_cast<const T*>(p.residual);
        T* hidden = static_cast<T*>(p.hidden);
        row_kernel(p, static_cast<const T*>(p.x) + p.x_rows(row), residual ? residual + p.residual_rows(row) : nullptr,
                   static_cast<T*>(p.y) + row * p.width, hidden ? hidden + row * p.width : nullptr);
    }
    if (p.past_cache) fence_stores_past_cache();
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

void forward(const Forward& p, int64_t begin, int64_t end) {
    with_types(p.dtype, p.weight_dtype, [&](auto* t, auto* w) {
        forward_rows<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(w)>>(p, begin, end);
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
