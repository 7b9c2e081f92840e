// y = n * (offset + weight) + bias,  n = (hidden - m) * r,  hidden = x + residual
//
//     RMSNorm      m = 0             r = 1 / sqrt(mean(hidden^2) + eps)
//     LayerNorm    m = mean(hidden)  r = 1 / sqrt(mean((hidden - m)^2) + eps)
//
// A row is read from memory once, by its first pass, and then from the cache, so that it costs the memory one read and
// one write. The sums over it take one such pass for RMSNorm. LayerNorm takes two: the first finds the mean as well as
// float32 can hold it, the second sums what differs from that, and thereby corrects it.

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

// The mean over a row of hidden where kCentred, else of hidden^2. x + residual goes to `sum_row`, as rounded for
// storage, so that backward sees the same numbers.
template <class T, bool kCentred, bool kResidual>
float first_mean(Inputs<T> row, T* sum_row, int64_t width) {
    Float sums[kSums] = {};
    for_each_two<T, kSums>(width, [&](int64_t column, auto lanes, int slot) {
        auto h = load(row.x + column, lanes);
        if constexpr (kResidual) {
            h = rounded_to<T>(h + load(row.residual + column, lanes));
            store(sum_row + column, h, lanes);
        }
        if constexpr (kCentred) {
            sums[slot] += total_of(h);
        } else {
            sums[slot] += total_of(h * h);
        }
    });
    return sum(add_up(sums)) / static_cast<float>(width);
}

// n = (hidden - shift) * r - drift. Subtracting the shift, which is nearly the mean, loses nothing, and what the mean
// differs from it is small.
template <bool kCentred>
struct Normaliser {
    float r, shift, drift;

    template <class Values>
    Values operator()(Values hidden) const {
        if constexpr (kCentred) {
            return (hidden - shift) * r - drift;
        } else {
            return hidden * r;
        }
    }
};

// From the means over a row of hidden - shift and of its square.
inline Normaliser<true> normaliser_of(float shift, float difference, float square, float eps) {
    const float variance = std::max(square - difference * difference, 0.0f);
    const float r = 1.0f / std::sqrt(variance + eps);
    return {r, shift, difference * r};
}

inline Normaliser<false> normaliser_of(float square, float eps) { return {1.0f / std::sqrt(square + eps), 0.0f, 0.0f}; }

// Of a row whose first_mean is known.
template <class T, bool kCentred>
Normaliser<kCentred> normaliser_of_row(const T* hidden, float mean, int64_t width, float eps) {
    if constexpr (kCentred) {
        Float differences[kSums] = {}, squares[kSums] = {};
        for_each_two<T, kSums>(width, [&](int64_t column, auto lanes, int slot) {
            const auto d = only(load(hidden + column, lanes) - mean, lanes);
            differences[slot] += total_of(d);
            squares[slot] += total_of(d * d);
        });
        const float count = static_cast<float>(width);
        return normaliser_of(mean, sum(add_up(differences)) / count, sum(add_up(squares)) / count, eps);
    } else {
        return normaliser_of(mean, eps);
    }
}

// `sum_row` is where a row that is summed is read back from: the place of the new residual, or scratch memory where
// that is written past the caches, or not at all.
template <class T, class W, bool kCentred, bool kPastCache, bool kResidual>
void forward_row(const Forward& p, Inputs<T> row, Inputs<T> next, T* y, T* hidden, T* sum_row) {
    const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
    const float mean = first_mean<T, kCentred, kResidual>(row, sum_row, p.width);
    const T* from = kResidual ? sum_row : row.x;
    const auto normalise = normaliser_of_row<T, kCentred>(from, mean, p.width, p.eps);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        fetch(next.x + column, lanes);
        if constexpr (kResidual) fetch(next.residual + column, lanes);
        auto n = normalise(load(from + column, lanes));
        if (weight) n = n * (p.offset + load(weight + column, lanes));
        if constexpr (kCentred) {
            if (bias) n = n + load(bias + column, lanes);
        }
        if constexpr (kPastCache) {
            if constexpr (kResidual) {
                if (hidden) copy_past_cache(hidden + column, from + column, lanes);
            }
            store_past_cache(y + column, n, lanes);
        } else {
            store(y + column, n, lanes);
        }
    });
}

template <class T, class W, bool kCentred, bool kPastCache, bool kResidual>
void forward_rows(const Forward& p, int64_t begin, int64_t end, T* scratch) {
    const auto inputs = [&](int64_t row) {
        const T* residual = static_cast<const T*>(p.residual);
        return Inputs<T>{static_cast<const T*>(p.x) + p.x_rows(row),
                         kResidual ? residual + p.residual_rows(row) : nullptr};
    };
    for (int64_t row = begin; row < end; ++row) {
        T* hidden = p.hidden ? static_cast<T*>(p.hidden) + row * p.width : nullptr;
        forward_row<T, W, kCentred, kPastCache, kResidual>(p, inputs(row), inputs(std::min(row + 1, end - 1)),
                                                           static_cast<T*>(p.y) + row * p.width, hidden,
                                                           p.needs_scratch() ? scratch : hidden);
    }
    if (kPastCache) fence_stores_past_cache();
}

// With g = grad * (offset + weight):  d_hidden = r * (g - mean - n * share) + grad_hidden
template <bool kCentred>
struct RowGradient {
    Normaliser<kCentred> normalise;
    float share, mean;  // of g n and, where kCentred, of g over the row; else mean is 0
};

template <class T, bool kCentred, class Weighted>
RowGradient<kCentred> gradient_of_row(const Backward& p, const T* grad, const T* hidden, const Weighted& weighted) {
    constexpr int kPairs = kSums / 2;
    const float shift = kCentred ? first_mean<T, true, false>({hidden, nullptr}, nullptr, p.width) : 0.0f;
    Float squares[kPairs] = {}, products[kPairs] = {}, differences[kPairs] = {}, gradients[kPairs] = {};
    for_each_two<T, kPairs>(p.width, [&](int64_t column, auto lanes, int slot) {
        auto h = load(hidden + column, lanes);
        if constexpr (kCentred) h = only(h - shift, lanes);
        const auto g = weighted(load(grad + column, lanes), column, lanes);
        squares[slot] += total_of(h * h);
        products[slot] += total_of(h * g);
        if constexpr (kCentred) {
            differences[slot] += total_of(h);
            gradients[slot] += total_of(g);
        }
    });
    const auto mean = [&](const auto& sums) { return sum(add_up(sums)) / static_cast<float>(p.width); };
    if constexpr (kCentred) {
        const auto normalise = normaliser_of(shift, mean(differences), mean(squares), p.eps);
        const float g = mean(gradients);
        return {normalise, mean(products) * normalise.r - g * normalise.drift, g};
    } else {
        const auto normalise = normaliser_of(mean(squares), p.eps);
        return {normalise, mean(products) * normalise.r, 0.0f};
    }
}

template <class Values, class Lanes>
void add_to(float* sums, Values values, Lanes lanes) {
    store(sums, load(sums, lanes) + values, lanes);
}

template <class T, class W, bool kCentred>
void backward_row(const Backward& p, const T* grad, const T* hidden, const T* grad_hidden, T* d_hidden,
                  ColumnSums sums) {
    const W* weight = static_cast<const W*>(p.weight);
    const auto weighted = [&](auto g, int64_t column, auto lanes) {
        return weight ? g * (p.offset + load(weight + column, lanes)) : g;
    };
    const auto row = gradient_of_row<T, kCentred>(p, grad, hidden, weighted);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        const auto n = row.normalise(load(hidden + column, lanes));
        const auto g = load(grad + column, lanes);
        auto d = weighted(g, column, lanes) - n * row.share;
        if constexpr (kCentred) d = d - row.mean;
        d = d * row.normalise.r;
        if (grad_hidden) d = d + load(grad_hidden + column, lanes);
        if (sums.weight) add_to(sums.weight + column, g * n, kept(lanes));
        if constexpr (kCentred) {
            if (sums.bias) add_to(sums.bias + column, g, kept(lanes));
        }
        store(d_hidden + column, d, lanes);
    });
}

template <class T, class W, bool kCentred>
void backward_rows(const Backward& p, int64_t begin, int64_t end, ColumnSums sums) {
    for (int64_t row = begin; row < end; ++row) {
        const T* grad_hidden = static_cast<const T*>(p.grad_hidden);
        backward_row<T, W, kCentred>(p, static_cast<const T*>(p.grad) + p.grad_rows(row),
                                     static_cast<const T*>(p.hidden) + p.hidden_rows(row),
                                     grad_hidden ? grad_hidden + p.grad_hidden_rows(row) : nullptr,
                                     static_cast<T*>(p.d_hidden) + row * p.width, sums);
    }
}

// The weight and the bias are of the input's type, or float32.
template <class Call, class Function>
void with_types(const Call& p, Function function) {
    with_type(p.dtype, [&](auto* t) {
        if (p.weight_dtype == p.dtype) {
            function(t, t);
        } else {
            function(t, static_cast<float*>(nullptr));
        }
    });
}

template <class T, class W, bool kCentred>
void forward_with(const Forward& p, int64_t begin, int64_t end, void* scratch) {
    const auto run =
        p.residual
            ? (p.past_cache ? forward_rows<T, W, kCentred, true, true> : forward_rows<T, W, kCentred, false, true>)
            : (p.past_cache ? forward_rows<T, W, kCentred, true, false> : forward_rows<T, W, kCentred, false, false>);
    run(p, begin, end, static_cast<T*>(scratch));
}

void forward(const Forward& p, int64_t begin, int64_t end, void* scratch) {
    with_types(p, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        (p.centred ? forward_with<T, W, true> : forward_with<T, W, false>)(p, begin, end, scratch);
    });
}

void backward(const Backward& p, int64_t begin, int64_t end, ColumnSums sums) {
    with_types(p, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        (p.centred ? backward_rows<T, W, true> : backward_rows<T, W, false>)(p, begin, end, sums);
    });
}

void sum_parts(const Backward& p, Parts parts, void* total, int64_t begin, int64_t end) {
    with_types(p, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        auto* to = static_cast<decltype(w)>(total) + begin;
        const float* from = parts.sums + begin;
        for_each_two<T>(end - begin, [&](int64_t column, auto lanes, int) {
            auto value = load(from + column, kept(lanes));
            for (int64_t part = 1; part < parts.count; ++part) {
                value = value + load(from + part * parts.stride + column, kept(lanes));
            }
            store(to + column, value, lanes);
        });
    });
}

}  // namespace

const Kernels kernels = {forward, backward, sum_parts};

}  // namespace nearpeak::norm::NEARPEAK_ISA
