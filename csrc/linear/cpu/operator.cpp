// The CPU kernels of the operators that kernels/nearpeak/linear/operator.py defines: cuts a product into blocks.

#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "kernels.h"

namespace nearpeak::linear {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

// Multiply-adds that are worth a thread: waking one costs about 5 us.
constexpr int64_t kWorkPerThread = int64_t{1} << 18;
// More than one task per thread lets uneven threads even out; each packs its columns anew.
constexpr int64_t kTasksPerThread = 2;
// Rows of a block are cut at multiples of kRowUnit, so that no cache line of y is written by two threads; more than
// kBlockRows would only make the scratch memory larger.
constexpr int64_t kRowUnit = 32, kBlockRows = 768;
// Columns of a block at least, where there are as many: fewer would not pay for packing the rows.
constexpr int64_t kMinBlockColumns = 64;

// How many tasks a product should be cut into.
int64_t tasks_wanted(const Product& p) {
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    if (threads == 1) return 1;
    const int64_t work = p.rows * p.columns * std::max<int64_t>(p.steps, 1);
    return std::clamp<int64_t>(work / kWorkPerThread, 1, threads * kTasksPerThread);
}

// The size of a part that cuts `total` into about `parts` parts, a multiple of `unit` and at most `most`.
int64_t part_of(int64_t total, int64_t parts, int64_t unit, int64_t most) {
    return std::min(divide_up(divide_up(total, parts), unit) * unit, most);
}

// Every element of `out` is summed in an order of its own, whatever the blocks and threads.
void run_blocks(const Product& p, const Kernels& kernels) {
    const int64_t wanted = tasks_wanted(p);
    const int64_t rows = part_of(p.rows, divide_up(wanted, divide_up(p.columns, kBlockColumns)), kRowUnit, kBlockRows);
    const int64_t row_parts = divide_up(p.rows, rows);
    const int64_t columns = part_of(p.columns, divide_up(wanted, row_parts), kMinBlockColumns, kBlockColumns);
    const int64_t column_parts = divide_up(p.columns, columns);
    parallel_tasks(row_parts * column_parts, [&](int64_t index) {
        const int64_t row = index / column_parts * rows, column = index % column_parts * columns;
        const Block block{row, std::min(row + rows, p.rows), column, std::min(column + columns, p.columns)};
        kernels.multiply(p, block, thread_scratch(kernels.scratch(p, block)));
    });
}

void run_few_columns(const Product& p, const Kernels& kernels) {
    const int64_t rows = part_of(p.rows, tasks_wanted(p), kRowUnit, p.rows);
    parallel_tasks(divide_up(p.rows, rows), [&](int64_t index) {
        kernels.few_columns(p, index * rows, std::min((index + 1) * rows, p.rows),
                            thread_scratch(kernels.few_columns_scratch(p)));
    });
}

int64_t rows_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    int64_t rows = 1;
    for (size_t dim = 0; dim + 1 < sizes.size(); ++dim) rows *= sizes[dim];
    return rows;
}

// New and contiguous: the shape of `like`, but for the last dimension.
Tensor empty_with_width(const Tensor& like, int64_t width) {
    const int dims = static_cast<int>(like.dim());
    STD_TORCH_CHECK(dims <= kMaxDims, "nearpeak serves tensors of at most 16 dimensions");
    int64_t sizes[kMaxDims];
    std::copy_n(like.sizes().data(), dims, sizes);
    sizes[dims - 1] = width;
    return empty_like_dtype(like, sizes, dims);
}

Rows contiguous_rows(int64_t width) { return {1, width, 0}; }

void run(Product& p, const RowsOf& left, const RowsOf& right, const Tensor& out) {
    p.left = left.data();
    p.right = right.data();
    p.left_matrix.rows = left.rows;
    p.right_matrix.rows = right.rows;
    p.out = out.mutable_data_ptr();
    p.out_matrix.rows = contiguous_rows(out.sizes().back());
    p.dtype = dtype_of(out);
    const Kernels& kernels = *kKernels[selected_isa()];
    if (p.out_matrix.transposed && p.columns <= kernels.most_few_columns(p.dtype)) {
        run_few_columns(p, kernels);
    } else {
        run_blocks(p, kernels);
    }
}

bool is_weight_of(const Tensor& weight, const Tensor& x) {
    return x.dim() > 0 && x.is_cpu() && weight.dim() == 2 && same_kind(weight, x) && weight.size(1) == x.sizes().back();
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    require(is_weight_of(weight, x) &&
                (!bias || (bias->dim() == 1 && same_kind(*bias, x) && bias->size(0) == weight.size(0))),
            "linear");
    Tensor y = empty_with_width(x, weight.size(0));
    if (y.numel() == 0) return y;
    const std::optional<Tensor> dense_bias = bias ? std::optional<Tensor>(made_contiguous(*bias)) : std::nullopt;
    Product p{};
    p.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
    p.right_matrix.transposed = p.out_matrix.transposed = true;
    p.rows = weight.size(0);
    p.columns = rows_of(x);
    p.steps = weight.size(1);
    run(p, RowsOf(weight), RowsOf(x), y);
    return y;
}

Tensor linear_input_gradient(const Tensor& grad, const Tensor& weight) {
    require(grad.dim() > 0 && grad.is_cpu() && weight.dim() == 2 && same_kind(weight, grad) &&
                weight.size(0) == grad.sizes().back(),
            "linear_input_gradient");
    Tensor d_x = empty_with_width(grad, weight.size(1));
    if (d_x.numel() == 0) return d_x;
    Product p{};
    p.rows = rows_of(grad);
    p.columns = weight.size(1);
    p.steps = weight.size(0);
    run(p, RowsOf(grad), RowsOf(weight), d_x);
    return d_x;
}

bool have_same_rows(const Tensor& a, const Tensor& b) {
    const auto sizes = a.sizes(), others = b.sizes();
    return sizes.size() == others.size() && std::equal(sizes.begin(), sizes.end() - 1, others.begin());
}

Tensor linear_weight_gradient(const Tensor& grad, const Tensor& x) {
    require(grad.dim() > 0 && grad.is_cpu() && same_kind(x, grad) && have_same_rows(grad, x), "linear_weight_gradient");
    Tensor d_weight = empty_like_dtype(x, {grad.sizes().back(), x.sizes().back()});
    if (d_weight.numel() == 0) return d_weight;
    Product p{};
    p.left_matrix.transposed = true;
    p.rows = d_weight.size(0);
    p.columns = d_weight.size(1);
    p.steps = rows_of(x);
    run(p, RowsOf(grad), RowsOf(x), d_weight);
    return d_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("linear", TORCH_BOX(&linear));
    library.impl("linear_inference", TORCH_BOX(&linear));
    library.impl("linear_input_gradient", TORCH_BOX(&linear_input_gradient));
    library.impl("linear_weight_gradient", TORCH_BOX(&linear_weight_gradient));
}

}  // namespace nearpeak::linear
