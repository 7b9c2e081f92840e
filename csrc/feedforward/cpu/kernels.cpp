// y = f(x), or y = f(gate) up. Backward computes f again: nothing is saved but the inputs.
//
// One pass over memory, whose bandwidth is the limit: 12 bytes an element gated in float32, for at most 50 instructions
// a vector (GELU).

#include "kernels.h"

#include <type_traits>

#include "../../cpu/activations.h"
#include "../../cpu/two.h"

namespace nearpeak::feedforward::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

template <class F>
ValueAndSlope both_at(Float x) {
    return F::at(x);
}

struct TwoValuesAndSlopes {
    Two value, slope;
};

template <class F>
TwoValuesAndSlopes both_at(Two x) {
    const auto low = F::at(x.low), high = F::at(x.high);
    return {{low.value, high.value}, {low.slope, high.slope}};
}

template <class T>
const T* row_of(const void* tensor, const Rows& rows, int64_t row) {
    return static_cast<const T*>(tensor) + rows(row);
}
template <class T>
T* row_of(void* tensor, const Rows& rows, int64_t row) {
    return static_cast<T*>(tensor) + rows(row);
}

// Flattened: else GCC calls the body once per step, and every constant is loaded anew.
template <class T, class F, bool kGated>
[[gnu::flatten]] void forward_row(const Call& c, int64_t row, int64_t begin, int64_t end) {
    const T* x = row_of<T>(c.x, c.x_rows, row) + begin;
    const T* up = kGated ? row_of<T>(c.up, c.up_rows, row) + begin : nullptr;
    T* y = row_of<T>(c.y, c.y_rows, row) + begin;
    for_each_two<T>(end - begin, [&](int64_t i, auto lanes, int) {
        auto value = both_at<F>(load(x + i, lanes)).value;
        if constexpr (kGated) value = value * load(up + i, lanes);
        store(y + i, value, lanes);
    });
}

template <class T, class F, bool kGated>
[[gnu::flatten]] void backward_row(const Call& c, int64_t row, int64_t begin, int64_t end) {
    const T* x = row_of<T>(c.x, c.x_rows, row) + begin;
    const T* up = kGated ? row_of<T>(c.up, c.up_rows, row) + begin : nullptr;
    const T* grad = row_of<T>(c.grad, c.grad_rows, row) + begin;
    T* d_x = row_of<T>(c.d_x, c.d_x_rows, row) + begin;
    T* d_up = kGated ? row_of<T>(c.d_up, c.d_up_rows, row) + begin : nullptr;
    for_each_two<T>(end - begin, [&](int64_t i, auto lanes, int) {
        const auto [value, slope] = both_at<F>(load(x + i, lanes));
        auto g = load(grad + i, lanes);
        if constexpr (kGated) {
            const auto u = load(up + i, lanes);
            store(d_up + i, g * value, lanes);
            g = g * u;
        }
        store(d_x + i, g * slope, lanes);
    });
}

void forward(const Call& c, int64_t row, int64_t begin, int64_t end) {
    with_type(c.dtype, [&](auto* t) {
        with_activation(c.activation, [&](auto f) {
            using T = std::remove_pointer_t<decltype(t)>;
            const auto run = c.up ? forward_row<T, decltype(f), true> : forward_row<T, decltype(f), false>;
            run(c, row, begin, end);
        });
    });
}

void backward(const Call& c, int64_t row, int64_t begin, int64_t end) {
    with_type(c.dtype, [&](auto* t) {
        with_activation(c.activation, [&](auto f) {
            using T = std::remove_pointer_t<decltype(t)>;
            const auto run = c.up ? backward_row<T, decltype(f), true> : backward_row<T, decltype(f), false>;
            run(c, row, begin, end);
        });
    });
}

}  // namespace

const Kernels kernels = {forward, backward};

}  // namespace nearpeak::feedforward::NEARPEAK_ISA
