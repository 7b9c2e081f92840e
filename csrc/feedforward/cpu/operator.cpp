// The CPU kernels of the operators that kernels/nearpeak/feedforward/operator.py defines.

#include <tuple>

#include "../../cpu/tensors.h"
#include "kernels.h"

namespace nearpeak::feedforward {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

// Columns that one step of a row takes at most, and elements that are worth a thread: waking one costs about 5 us.
constexpr int64_t kColumns = 16384, kElementsPerThread = 16384;

bool is_input(const Tensor& x, int64_t activation) { return is_activation(activation) && x.dim() > 0 && x.is_cpu(); }

// One row where all tensors are contiguous: then a step takes as many columns as it likes.
struct Shape {
    int64_t rows, width;
};

Shape shape_of(const Tensor& x, bool contiguous) {
    const int64_t elements = x.numel(), width = x.sizes().back();
    return contiguous ? Shape{1, elements} : Shape{elements / width, width};
}

template <class Kernel>
void for_rows(Shape shape, const Kernel& kernel) {
    const int64_t columns = std::min(kColumns, shape.width), steps = (shape.width + columns - 1) / columns;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / columns);
    torch::stable::parallel_for(0, shape.rows * steps, grain, [&](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; ++step) {
            const int64_t first = step % steps * columns;
            kernel(step / steps, first, std::min(first + columns, shape.width));
        }
    });
}

// Outputs are dense: their rows follow one another.
Rows contiguous_rows(int64_t width) { return {1, width, 0}; }

void run_forward(const Tensor& gate, const Tensor* up, const Tensor& y, Activation activation) {
    if (y.numel() == 0) return;
    const RowsOf x(gate, y);
    std::optional<RowsOf> other;
    if (up) other.emplace(*up, y);
    const bool contiguous = gate.is_contiguous() && (!up || up->is_contiguous()) && y.is_contiguous();
    const Shape shape = shape_of(y, contiguous);
    Call c{};
    c.x = x.data();
    c.x_rows = x.rows;
    if (other) {
        c.up = other->data();
        c.up_rows = other->rows;
    }
    c.y = y.mutable_data_ptr();
    c.y_rows = contiguous_rows(shape.width);
    c.activation = activation;
    c.dtype = dtype_of(gate);
    const Kernels* kernels = kKernels[selected_isa()];
    for_rows(shape, [&](int64_t row, int64_t begin, int64_t end) { kernels->forward(c, row, begin, end); });
}

// Gradients go where d_x and d_up say, which lie in memory as `order` does, row by row `stride` apart.
void run_backward(const Tensor& grad, const Tensor& gate, const Tensor* up, void* d_x, void* d_up, const Tensor& order,
                  bool packed, Activation activation) {
    if (gate.numel() == 0) return;
    const RowsOf g(grad, order), x(gate, order);
    std::optional<RowsOf> other;
    if (up) other.emplace(*up, order);
    const bool contiguous = !packed && grad.is_contiguous() && gate.is_contiguous() && (!up || up->is_contiguous()) &&
                            order.is_contiguous();
    const Shape shape = shape_of(gate, contiguous);
    Call c{};
    c.grad = g.data();
    c.grad_rows = g.rows;
    c.x = x.data();
    c.x_rows = x.rows;
    if (other) {
        c.up = other->data();
        c.up_rows = other->rows;
    }
    c.d_x = d_x;
    c.d_up = d_up;
    c.d_x_rows = c.d_up_rows = contiguous_rows(packed ? 2 * shape.width : shape.width);
    c.activation = activation;
    c.dtype = dtype_of(gate);
    const Kernels* kernels = kKernels[selected_isa()];
    for_rows(shape, [&](int64_t row, int64_t begin, int64_t end) { kernels->backward(c, row, begin, end); });
}

Tensor activation(const Tensor& x, int64_t kind) {
    require(is_input(x, kind), "activation");
    Tensor y = empty_laid_out_like(x);
    run_forward(x, nullptr, y, static_cast<Activation>(kind));
    return y;
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, int64_t kind) {
    require(is_input(x, kind) && is_like(grad, x), "activation_backward");
    Tensor d_x = empty_laid_out_like(x);
    run_backward(grad, x, nullptr, d_x.mutable_data_ptr(), nullptr, d_x, false, static_cast<Activation>(kind));
    return d_x;
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, int64_t kind) {
    require(is_input(gate, kind) && is_like(up, gate), "gated_activation");
    Tensor y = empty_laid_out_like(gate);
    run_forward(gate, &up, y, static_cast<Activation>(kind));
    return y;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                     int64_t kind) {
    require(is_input(gate, kind) && is_like(up, gate) && is_like(grad, gate), "gated_activation_backward");
    Tensor d_gate = empty_laid_out_like(gate), d_up = empty_laid_out_like(gate);
    run_backward(grad, gate, &up, d_gate.mutable_data_ptr(), d_up.mutable_data_ptr(), d_gate, false,
                 static_cast<Activation>(kind));
    return {d_gate, d_up};
}

bool is_packed(const Tensor& packed, int64_t kind) { return is_input(packed, kind) && packed.sizes().back() % 2 == 0; }

// The halves of the last dimension: the gate, and what it multiplies.
std::tuple<Tensor, Tensor> halves(Tensor packed, bool up_first) {
    const int64_t half = packed.sizes().back() / 2, last = packed.dim() - 1;
    Tensor first = torch::stable::narrow(packed, last, 0, half),
           second = torch::stable::narrow(packed, last, half, half);
    return up_first ? std::tuple{second, first} : std::tuple{first, second};
}

Tensor packed_gated_activation(const Tensor& packed, int64_t kind, bool up_first) {
    require(is_packed(packed, kind), "packed_gated_activation");
    const auto [gate, up] = halves(packed, up_first);
    Tensor y = empty_laid_out_like(gate);
    run_forward(gate, &up, y, static_cast<Activation>(kind));
    return y;
}

Tensor packed_gated_activation_backward(const Tensor& grad, const Tensor& packed, int64_t kind, bool up_first) {
    require(is_packed(packed, kind), "packed_gated_activation_backward");
    const auto [gate, up] = halves(packed, up_first);
    require(is_like(grad, gate), "packed_gated_activation_backward");
    Tensor d_packed = empty_laid_out_like(packed);
    char* first = static_cast<char*>(d_packed.mutable_data_ptr());
    char* second = first + gate.sizes().back() * static_cast<int64_t>(gate.element_size());
    if (up_first) std::swap(first, second);
    run_backward(grad, gate, &up, first, second, gate, true, static_cast<Activation>(kind));
    return d_packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("activation", TORCH_BOX(&activation));
    library.impl("activation_inference", TORCH_BOX(&activation));
    library.impl("activation_backward", TORCH_BOX(&activation_backward));
    library.impl("gated_activation", TORCH_BOX(&gated_activation));
    library.impl("gated_activation_inference", TORCH_BOX(&gated_activation));
    library.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
    library.impl("packed_gated_activation", TORCH_BOX(&packed_gated_activation));
    library.impl("packed_gated_activation_inference", TORCH_BOX(&packed_gated_activation));
    library.impl("packed_gated_activation_backward", TORCH_BOX(&packed_gated_activation_backward));
}

}  // namespace nearpeak::feedforward
