// y = n * (offset + weight) + bias,  n = (hidden - m) * r,  hidden = x + residual
//
//     RMSNorm      m = 0             r = 1 / sqrt(mean(hidden^2) + eps)
//     LayerNorm    m = mean(hidden)  r = 1 / sqrt(mean((hidden - m)^2) + eps)
//
// A row is read from memory once, by the pass that sums over it, and then from the cache, so that it costs the memory
// one read and one write. For LayerNorm that pass sums hidden - shift and its square: exact where the shift is near the
// mean (see kSample).

#include "kernels.h"

#include <algorithm>
#include <type_traits>

#include "../../cpu/past_cache.h"
#include "../../cpu/row_norm.h"

namespace nearpeak::norm::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

// A row's inputs; those of the next row are fetched while this one's outputs are written, which else leaves memory's
// reading side idle.
template <class T>
struct Inputs {
    const T *x, *residual;  // residual is null without kResidual
};

template <class T, bool kResidual, class Lanes>
auto load_hidden(Inputs<T> row, int64_t column, Lanes lanes) {
    auto h = load(row.x + column, lanes);
    // As rounded for storage, so that backward sees the same numbers.
    if constexpr (kResidual) h = rounded_to<T>(h + load(row.residual + column, lanes));
    return h;
}

// x + residual goes to `sum_row`.
template <class T, bool kCentred, bool kResidual>
Means means_of_row(Inputs<T> row, float shift, T* sum_row, int64_t width) {
    const auto [difference, square] = means_over<T, 2, kSums>(width, [&](int64_t column, auto lanes, Float(&sums)[2]) {
        auto d = load_hidden<T, kResidual>(row, column, lanes);
        if constexpr (kResidual) store(sum_row + column, d, lanes);
        if constexpr (kCentred) {
            d = only(d - shift, lanes);
            sums[0] += total_of(d);
        }
        sums[1] += total_of(d * d);
    });
    return {difference, square};
}

// The first shift is the mean of this part of a row, and of no fewer elements: seldom far from the mean of all.
constexpr int64_t kSample = 8, kSmallestSample = 64;

template <class T, bool kResidual>
float mean_of_sample(Inputs<T> row, int64_t width) {
    const int64_t count =
        std::min(width, std::max(kSmallestSample, width / kSample / kSmallestSample * kSmallestSample));
    return means_over<T, 1, kSums>(count, [&](int64_t column, auto lanes, Float(&sums)[1]) {
        sums[0] += total_of(load_hidden<T, kResidual>(row, column, lanes));
    })[0];
}

template <class T, bool kCentred, bool kResidual>
Normaliser<kCentred> normaliser_of_row(Inputs<T> row, T* sum_row, int64_t width, float eps) {
    float shift = kCentred ? mean_of_sample<T, kResidual>(row, width) : 0.0f;
    Means means = means_of_row<T, kCentred, kResidual>(row, shift, sum_row, width);
    if (kCentred && means.need_another_shift()) {
        shift += means.difference;
        means = means_of_row<T, kCentred, false>({kResidual ? sum_row : row.x, nullptr}, shift, nullptr, width);
    }
    return {shift, means, eps};
}

template <bool kCentred, class W, class Lanes>
auto load_weight(const W* weight, float offset, Lanes lanes) {
    const auto loaded = load(weight, lanes);
    if constexpr (kCentred) {
        return loaded;
    } else {
        return offset + loaded;
    }
}

// `sum_row` is where a row that is summed is read back from: the place of the new residual, or scratch memory where
// that is written past the caches, or not at all.
template <class T, class W, bool kCentred, bool kPastCache, bool kResidual>
void forward_row(const Forward& p, Inputs<T> row, Inputs<T> next, T* y, T* hidden, T* sum_row) {
    const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
    const auto normalise = normaliser_of_row<T, kCentred, kResidual>(row, sum_row, p.width, p.eps);
    const bool cast_first = !kCentred && p.cast_first;
    const T* from = kResidual ? sum_row : row.x;
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        fetch(next.x + column, lanes);
        if constexpr (kResidual) fetch(next.residual + column, lanes);
        auto n = normalise(load(from + column, lanes));
        if (weight) {
            if (cast_first) n = rounded_to<T>(n);
            n = n * load_weight<kCentred>(weight + column, p.offset, lanes);
        }
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

template <class T, bool kCentred, class Weighted>
BackwardMeans backward_means(const T* grad, const T* hidden, float shift, int64_t width, const Weighted& weighted) {
    const auto [difference, square, product, gradient] =
        means_over<T, 4, kSums / 2>(width, [&](int64_t column, auto lanes, Float(&sums)[4]) {
            auto d = load(hidden + column, lanes);
            const auto g = weighted(load(grad + column, lanes), column, lanes);
            if constexpr (kCentred) {
                d = only(d - shift, lanes);
                sums[0] += total_of(d);
                sums[3] += total_of(g);
            }
            sums[1] += total_of(d * d);
            sums[2] += total_of(d * g);
        });
    return {{difference, square}, product, gradient};
}

template <class T, bool kCentred, class Weighted>
RowGradient<kCentred> gradient_of_row(const Backward& p, const T* grad, const T* hidden, const Weighted& weighted) {
    float shift = kCentred ? mean_of_sample<T, false>({hidden, nullptr}, p.width) : 0.0f;
    BackwardMeans means = backward_means<T, kCentred>(grad, hidden, shift, p.width, weighted);
    if (kCentred && means.need_another_shift()) {
        shift += means.difference;
        means = backward_means<T, kCentred>(grad, hidden, shift, p.width, weighted);
    }
    return {shift, means, p.eps};
}

template <class T, class W, bool kCentred>
void backward_row(const Backward& p, const T* grad, const T* hidden, const T* grad_hidden, T* d_hidden,
                  ColumnSums sums) {
    const W* weight = static_cast<const W*>(p.weight);
    const auto weighted = [&](auto g, int64_t column, auto lanes) {
        return weight ? g * load_weight<kCentred>(weight + column, p.offset, lanes) : g;
    };
    const auto row = gradient_of_row<T, kCentred>(p, grad, hidden, weighted);
    for_each_two<T>(p.width, [&](int64_t column, auto lanes, int) {
        const auto h = load(hidden + column, lanes), n = row.normalise(h);
        const auto g = load(grad + column, lanes);
        auto d = row(weighted(g, column, lanes), h, n);
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

template <class T, class W, bool kCentred>
void forward_with(const Forward& p, int64_t begin, int64_t end, void* scratch) {
    const auto run =
        p.residual
            ? (p.past_cache ? forward_rows<T, W, kCentred, true, true> : forward_rows<T, W, kCentred, false, true>)
            : (p.past_cache ? forward_rows<T, W, kCentred, true, false> : forward_rows<T, W, kCentred, false, false>);
    run(p, begin, end, static_cast<T*>(scratch));
}

void forward(const Forward& p, int64_t begin, int64_t end, void* scratch) {
    with_types(p.dtype, p.weight_dtype, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        (p.centred ? forward_with<T, W, true> : forward_with<T, W, false>)(p, begin, end, scratch);
    });
}

void backward(const Backward& p, int64_t begin, int64_t end, ColumnSums sums) {
    with_types(p.dtype, p.weight_dtype, [&](auto* t, auto* w) {
        using T = std::remove_pointer_t<decltype(t)>;
        using W = std::remove_pointer_t<decltype(w)>;
        (p.centred ? backward_rows<T, W, true> : backward_rows<T, W, false>)(p, begin, end, sums);
    });
}

void sum_parts(const Backward& p, Parts parts, void* total, int64_t begin, int64_t end) {
    with_types(p.dtype, p.weight_dtype, [&](auto* t, auto* w) {
        add_up_parts<std::remove_pointer_t<decltype(t)>>(parts, static_cast<decltype(w)>(total), begin, end);
    });
}

}  // namespace

const Kernels kernels = {forward, backward, sum_parts};

}  // namespace nearpeak::norm::NEARPEAK_ISA
