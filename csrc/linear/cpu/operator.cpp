// The CPU kernels of the operators that kernels/nearpeak/linear/operator.py defines: cuts a product into blocks.

#include <memory>
#include <tuple>

#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "kernels.h"

namespace nearpeak::linear {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};
const Kernels* const kQuantizedKernels[] = {NEARPEAK_ISAS(NEARPEAK_QUANTIZED_KERNELS_OF)};

// Multiply-adds that are worth a thread: waking one costs about 5 us.
constexpr int64_t kWorkPerThread = int64_t{1} << 18;
// More than one task per thread lets uneven threads even out; each packs its columns anew.
constexpr int64_t kTasksPerThread = 2;
// Rows of a block are cut at multiples of kRowUnit, so that no cache line of y is written by two threads; more than
// kBlockRows would only make the scratch memory larger.
constexpr int64_t kRowUnit = 32, kBlockRows = 768;
// Columns of a block at least, where there are as many: fewer would not pay for packing the rows.
constexpr int64_t kMinBlockColumns = 64;
// Numbers of x that are worth a task, where it is rounded.
constexpr int64_t kRoundedPerTask = int64_t{1} << 14;

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

// Rounds x, and calls what needs it so.
template <class Function>
void with_rounded_x(Product& p, const Kernels& kernels, Function function) {
    const int64_t size = p.columns * p.steps;
    const auto codes = std::unique_ptr<int8_t[]>(new int8_t[size]);
    const auto scales = std::unique_ptr<float[]>(new float[size >> p.quantized->group_shift]);
    const RoundedX rounded{codes.get(), scales.get()};
    p.rounded = &rounded;
    const int64_t rows = std::max<int64_t>(1, kRoundedPerTask / p.steps);
    if (p.columns <= rows) {
        kernels.round_x(p, 0, p.columns);
    } else {
        parallel_tasks(divide_up(p.columns, rows), [&](int64_t index) {
            kernels.round_x(p, index * rows, std::min((index + 1) * rows, p.columns));
        });
    }
    function();
}

void run(Product& p, const RowsOf& right, const Tensor& out, bool rounds_x = false) {
    p.right = right.data();
    p.right_matrix.rows = right.rows;
    p.out = out.mutable_data_ptr();
    p.out_matrix.rows = contiguous_rows(out.sizes().back());
    p.dtype = dtype_of(out);
    const Kernels& kernels = *(p.quantized ? kQuantizedKernels : kKernels)[selected_isa()];
    const auto multiply = [&] {
        if (p.out_matrix.transposed && p.columns <= kernels.most_few_columns(p)) {
            run_few_columns(p, kernels);
        } else {
            run_blocks(p, kernels);
        }
    };
    if (rounds_x) {
        with_rounded_x(p, kernels, multiply);
    } else {
        multiply();
    }
}

void run(Product& p, const RowsOf& left, const RowsOf& right, const Tensor& out) {
    p.left = left.data();
    p.left_matrix.rows = left.rows;
    run(p, right, out);
}

// y^T of `rows` features, from `steps` features of x.
Product forward_product(int64_t rows, int64_t steps, const Tensor& x, const std::optional<Tensor>& dense_bias) {
    Product p{};
    p.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
    p.right_matrix.transposed = p.out_matrix.transposed = true;
    p.rows = rows;
    p.columns = rows_of(x);
    p.steps = steps;
    return p;
}

std::optional<Tensor> made_dense(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(made_contiguous(*tensor)) : std::nullopt;
}

bool is_bias_of(const std::optional<Tensor>& bias, const Tensor& x, int64_t features) {
    return !bias || (bias->dim() == 1 && same_kind(*bias, x) && bias->size(0) == features);
}

bool is_weight_of(const Tensor& weight, const Tensor& x) {
    return x.dim() > 0 && x.is_cpu() && weight.dim() == 2 && same_kind(weight, x) && weight.size(1) == x.sizes().back();
}

// What an operator with an epilogue is given beyond the others, and its second output.
struct Epilogue {
    std::optional<Activation> activation;
    std::optional<RowsOf> residual;
    Tensor before;

    Epilogue(const Tensor& x, int64_t features, const std::optional<Tensor>& its_residual, std::optional<int64_t> kind,
             bool keep)
        : before(keep ? empty_with_width(x, features) : empty_like_dtype(x, {0})) {
        if (kind) activation = static_cast<Activation>(*kind);
        if (its_residual && its_residual->numel() > 0) residual.emplace(*its_residual);
    }

    void add_to(Product& p) const {
        p.activation = activation ? &*activation : nullptr;
        if (residual) {
            p.residual = residual->data();
            p.residual_rows = residual->rows;
        }
        p.before = before.numel() > 0 ? before.mutable_data_ptr() : nullptr;
    }
};

bool is_epilogue_of(const std::optional<Tensor>& residual, std::optional<int64_t> activation, const Tensor& x,
                    int64_t features) {
    if (activation && !is_activation(*activation)) return false;
    if (!residual) return true;
    const auto sizes = x.sizes(), others = residual->sizes();
    return same_kind(*residual, x) && sizes.size() == others.size() &&
           std::equal(sizes.begin(), sizes.end() - 1, others.begin()) && others.back() == features;
}

bool is_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    return is_weight_of(weight, x) && is_bias_of(bias, x, weight.size(0));
}

Tensor run_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Epilogue* epilogue) {
    Tensor y = empty_with_width(x, weight.size(0));
    if (y.numel() == 0) return y;
    const std::optional<Tensor> dense_bias = made_dense(bias);
    Product p = forward_product(weight.size(0), weight.size(1), x, dense_bias);
    if (epilogue) epilogue->add_to(p);
    run(p, RowsOf(weight), RowsOf(x), y);
    return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    require(is_linear(x, weight, bias), "linear");
    return run_linear(x, weight, bias, nullptr);
}

std::tuple<Tensor, Tensor> linear_epilogue(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, std::optional<int64_t> activation,
                                           bool keep) {
    require(is_linear(x, weight, bias) && is_epilogue_of(residual, activation, x, weight.size(0)), "linear_epilogue");
    const Epilogue epilogue(x, weight.size(0), residual, activation, keep);
    return {run_linear(x, weight, bias, &epilogue), epilogue.before};
}

bool is_matrix(const Tensor& tensor, torch::headeronly::ScalarType dtype, int64_t rows, int64_t columns) {
    return tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == 2 && tensor.size(0) == rows &&
           tensor.size(1) == columns;
}

bool is_quantized_weight_of(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t bits,
                            const Tensor& x) {
    using torch::headeronly::ScalarType;
    if (x.dim() == 0 || !x.is_cpu() || codes.dim() != 2 || scales.dim() != 2 || (bits != 8 && bits != 4)) return false;
    const int64_t rows = codes.size(0), width = x.sizes().back(), groups = scales.size(1);
    return width > 0 && (width == groups << 5 || width == groups << 6 || width == groups << 7) &&
           is_matrix(codes, ScalarType::Byte, rows, width * bits / 8) &&
           is_matrix(scales, ScalarType::Float, rows, groups) &&
           (!zeros || is_matrix(*zeros, ScalarType::Byte, rows, groups));
}

Tensor run_quantized_linear(const Tensor& x, const Quantized& weight, int64_t features,
                            const std::optional<Tensor>& bias, bool rounds_x, const Epilogue* epilogue) {
    Tensor y = empty_with_width(x, features);
    if (y.numel() == 0) return y;
    const std::optional<Tensor> dense_bias = made_dense(bias);
    Product p = forward_product(features, x.sizes().back(), x, dense_bias);
    p.quantized = &weight;
    if (epilogue) epilogue->add_to(p);
    run(p, RowsOf(x), y, rounds_x);
    return y;
}

Tensor run_with_codes(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& bias, int64_t bits, std::optional<int64_t> input_bits,
                      const Epilogue* epilogue) {
    const Tensor dense_codes = made_contiguous(codes), dense_scales = made_contiguous(scales);
    const std::optional<Tensor> dense_zeros = made_dense(zeros);
    const Quantized weight{
        bits == 8 ? Format::bits8 : Format::bits4,
        static_cast<const uint8_t*>(dense_codes.const_data_ptr()),
        static_cast<const float*>(dense_scales.const_data_ptr()),
        dense_zeros ? static_cast<const uint8_t*>(dense_zeros->const_data_ptr()) : nullptr,
        __builtin_ctzll(x.sizes().back() / scales.size(1)),
    };
    return run_quantized_linear(x, weight, codes.size(0), bias, input_bits.has_value(), epilogue);
}

bool is_quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                         const std::optional<Tensor>& bias, int64_t bits, std::optional<int64_t> input_bits) {
    return is_quantized_weight_of(codes, scales, zeros, bits, x) && is_bias_of(bias, x, codes.size(0)) &&
           input_bits.value_or(8) == 8;
}

Tensor quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                        const std::optional<Tensor>& bias, int64_t bits, std::optional<int64_t> input_bits) {
    require(is_quantized_linear(x, codes, scales, zeros, bias, bits, input_bits), "quantized_linear");
    return run_with_codes(x, codes, scales, zeros, bias, bits, input_bits, nullptr);
}

std::tuple<Tensor, Tensor> quantized_linear_epilogue(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                                     const std::optional<Tensor>& zeros,
                                                     const std::optional<Tensor>& bias, int64_t bits,
                                                     const std::optional<Tensor>& residual,
                                                     std::optional<int64_t> activation, bool keep,
                                                     std::optional<int64_t> input_bits) {
    require(is_quantized_linear(x, codes, scales, zeros, bias, bits, input_bits) &&
                is_epilogue_of(residual, activation, x, codes.size(0)),
            "quantized_linear_epilogue");
    const Epilogue epilogue(x, codes.size(0), residual, activation, keep);
    return {run_with_codes(x, codes, scales, zeros, bias, bits, input_bits, &epilogue), epilogue.before};
}

// One of GGUF's types of blocks.
struct GgufType {
    int64_t number;  // in GGUF
    Format format;
    int64_t steps, bytes;  // of a block
};
constexpr GgufType kGgufTypes[] = {
    {2, Format::q4_0, 32, 18},    {6, Format::q5_0, 32, 22},    {8, Format::q8_0, 32, 34},
    {12, Format::q4_k, 256, 144}, {13, Format::q5_k, 256, 176}, {14, Format::q6_k, 256, 210},
};

// The type of blocks that they are as x's weight, or null.
const GgufType* gguf_type_of(const Tensor& blocks, int64_t kind, const Tensor& x) {
    if (x.dim() == 0 || !x.is_cpu() || blocks.dim() != 2) return nullptr;
    const int64_t width = x.sizes().back();
    for (const GgufType& type : kGgufTypes) {
        if (type.number == kind && width > 0 && width % type.steps == 0 &&
            is_matrix(blocks, torch::headeronly::ScalarType::Byte, blocks.size(0), width / type.steps * type.bytes)) {
            return &type;
        }
    }
    return nullptr;
}

std::tuple<Tensor, Tensor> gguf_linear(const Tensor& x, const Tensor& blocks, const std::optional<Tensor>& bias,
                                       int64_t kind, const std::optional<Tensor>& residual,
                                       std::optional<int64_t> activation, bool keep,
                                       std::optional<int64_t> input_bits) {
    const GgufType* const type = gguf_type_of(blocks, kind, x);
    require(type && is_bias_of(bias, x, blocks.size(0)) && is_epilogue_of(residual, activation, x, blocks.size(0)) &&
                input_bits.value_or(8) == 8,
            "gguf_linear");
    const Tensor dense = made_contiguous(blocks);
    const auto* const bytes = static_cast<const uint8_t*>(dense.const_data_ptr());
    const Quantized weight{type->format, bytes, nullptr, nullptr, kBlockShift};
    const Epilogue epilogue(x, blocks.size(0), residual, activation, keep);
    return {run_quantized_linear(x, weight, blocks.size(0), bias, input_bits.has_value(), &epilogue), epilogue.before};
}

bool is_weight_before(const Tensor& weight, const Tensor& grad) {
    return grad.dim() > 0 && grad.is_cpu() && weight.dim() == 2 && same_kind(weight, grad) &&
           weight.size(0) == grad.sizes().back();
}

Tensor run_input_gradient(const Tensor& grad, const Tensor& weight, const Factors* update) {
    Tensor d_x = empty_with_width(grad, weight.size(1));
    if (d_x.numel() == 0) return d_x;
    Product p{};
    p.rows = rows_of(grad);
    p.columns = weight.size(1);
    p.steps = weight.size(0);
    p.update = update;
    run(p, RowsOf(grad), RowsOf(weight), d_x);
    return d_x;
}

Tensor linear_input_gradient(const Tensor& grad, const Tensor& weight) {
    require(is_weight_before(weight, grad), "linear_input_gradient");
    return run_input_gradient(grad, weight, nullptr);
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

Factors factors_of(const RowsOf& left, const RowsOf& right, int64_t steps) {
    return {left.data(), right.data(), left.rows, right.rows, steps};
}

// scale x a^T
Tensor run_scaled(const Tensor& x, const Tensor& a, double scale) {
    Tensor hidden = empty_with_width(x, a.size(0));
    if (hidden.numel() == 0) return hidden;
    Product p = forward_product(a.size(0), a.size(1), x, std::nullopt);
    p.scale = static_cast<float>(scale);
    run(p, RowsOf(a), RowsOf(x), hidden);
    return hidden;
}

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                                               double scale, const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& residual, std::optional<int64_t> activation,
                                               bool keep) {
    require(is_linear(x, weight, bias) && is_weight_of(a, x) && b.dim() == 2 && same_kind(b, x) &&
                b.size(0) == weight.size(0) && b.size(1) == a.size(0) &&
                is_epilogue_of(residual, activation, x, weight.size(0)),
            "lora_linear");
    const Epilogue epilogue(x, weight.size(0), residual, activation, keep);
    Tensor hidden = run_scaled(x, a, scale), y = empty_with_width(x, weight.size(0));
    if (y.numel() == 0) return {y, epilogue.before, hidden};
    const std::optional<Tensor> dense_bias = made_dense(bias);
    Product p = forward_product(weight.size(0), weight.size(1), x, dense_bias);
    epilogue.add_to(p);
    const RowsOf b_rows(b), hidden_rows(hidden);
    const Factors update = factors_of(b_rows, hidden_rows, a.size(0));
    p.update = &update;
    run(p, RowsOf(weight), RowsOf(x), y);
    return {y, epilogue.before, hidden};
}

Tensor lora_input_gradient(const Tensor& grad, const Tensor& weight, const Tensor& hidden_grad, const Tensor& a) {
    require(is_weight_before(weight, grad) && is_weight_before(a, hidden_grad) && same_kind(hidden_grad, grad) &&
                have_same_rows(hidden_grad, grad) && a.size(1) == weight.size(1),
            "lora_input_gradient");
    const RowsOf hidden_rows(hidden_grad), a_rows(a);
    const Factors update = factors_of(hidden_rows, a_rows, a.size(0));
    return run_input_gradient(grad, weight, &update);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("linear", TORCH_BOX(&linear));
    library.impl("linear_inference", TORCH_BOX(&linear));
    library.impl("linear_epilogue", TORCH_BOX(&linear_epilogue));
    library.impl("linear_epilogue_inference", TORCH_BOX(&linear_epilogue));
    library.impl("quantized_linear", TORCH_BOX(&quantized_linear));
    library.impl("quantized_linear_inference", TORCH_BOX(&quantized_linear));
    library.impl("quantized_linear_epilogue", TORCH_BOX(&quantized_linear_epilogue));
    library.impl("quantized_linear_epilogue_inference", TORCH_BOX(&quantized_linear_epilogue));
    library.impl("gguf_linear", TORCH_BOX(&gguf_linear));
    library.impl("gguf_linear_inference", TORCH_BOX(&gguf_linear));
    library.impl("lora_linear", TORCH_BOX(&lora_linear));
    library.impl("lora_linear_inference", TORCH_BOX(&lora_linear));
    library.impl("lora_input_gradient", TORCH_BOX(&lora_input_gradient));
    library.impl("linear_input_gradient", TORCH_BOX(&linear_input_gradient));
    library.impl("linear_weight_gradient", TORCH_BOX(&linear_weight_gradient));
}

}  // namespace nearpeak::linear
