// The CPU kernels of the operators that kernels/nearpeak/embedding/operator.py defines.

#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include "../../cpu/row_parts.h"
#include "../../cpu/scratch.h"
#include "kernels.h"

namespace nearpeak::embedding {
namespace {

using Optional = std::optional<Tensor>;

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

bool is_int64(const Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Long;
}

bool are_rows_of(const Tensor& ids, int64_t rows) {
    const int64_t* data = static_cast<const int64_t*>(ids.const_data_ptr());
    return std::all_of(data, data + ids.numel(), [&](int64_t id) { return id >= 0 && id < rows; });
}

struct Arguments {
    Tensor ids, weight;
    Optional positions, position_ids, segments, segment_ids, norm_weight, norm_bias;
    double scale;
    std::optional<double> eps;
    Optional dropout_seed;
    double dropout_p;
};

// A call, and the dense tensors that it points into.
class Described {
  public:
    explicit Described(const Arguments& a) {
        const bool tables = a.weight.dim() == 2 && a.weight.is_cpu() && is_table(a.positions, a.weight) &&
                            is_table(a.segments, a.weight) && is_int64(a.ids);
        fits = tables && a.weight.size(1) > 0 && are_options(a) && drops_rightly(a.dropout_seed, a.dropout_p);
        if (!fits) return;
        call.tokens = a.ids.numel();
        call.width = a.weight.size(1);
        add_table(a.weight, a.ids, 0);
        if (a.positions) add_table(*a.positions, a.position_ids, a.ids.dim() == 0 ? 1 : a.ids.sizes().back());
        if (a.segments) add_table(*a.segments, a.segment_ids, 1);
        call.scale = static_cast<float>(a.scale);
        call.normalises = a.eps.has_value();
        call.eps = static_cast<float>(a.eps.value_or(0.0));
        call.norm_weight = parameter(a.norm_weight);
        call.norm_bias = parameter(a.norm_bias);
        call.dropout = dropout_of(a.dropout_seed, a.dropout_p);
        call.dtype = dtype_of(a.weight);
        call.norm_dtype = dtype_of(a.norm_weight ? *a.norm_weight : a.norm_bias ? *a.norm_bias : a.weight);
    }

    bool fits;
    Call call{};

  private:
    static bool is_table(const Optional& table, const Tensor& weight) {
        return !table || (table->dim() == 2 && table->size(1) == weight.size(1) && same_kind(*table, weight));
    }

    static bool are_options(const Arguments& a) {
        if ((!a.eps && (a.norm_weight || a.norm_bias)) || (a.position_ids && !a.positions) ||
            (a.segment_ids && !a.segments)) {
            return false;
        }
        if (a.norm_weight && a.norm_bias && a.norm_weight->scalar_type() != a.norm_bias->scalar_type()) return false;
        return is_parameter_of(a.norm_weight, a.weight) && is_parameter_of(a.norm_bias, a.weight);
    }

    const void* parameter(const Optional& any) { return any ? keep(made_contiguous(*any)).const_data_ptr() : nullptr; }

    const Tensor& keep(Tensor tensor) {
        kept.push_back(std::move(tensor));
        return kept.back();
    }

    // Without ids the rows are counted, again from 0 after `period` tokens.
    void add_table(const Tensor& any, const Optional& ids_any, int64_t period) {
        const Tensor& table = keep(dense_last(any) ? any : made_contiguous(any));
        Lookup lookup{nullptr, period};
        if (ids_any) {
            fits = fits && is_int64(*ids_any);
            if (!fits) return;
            const Tensor& ids = keep(made_contiguous(*ids_any));
            lookup = {static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel()};
            fits = (ids.numel() > 0 ? call.tokens % ids.numel() == 0 : call.tokens == 0) &&
                   are_rows_of(ids, table.size(0));
        } else {
            fits = fits && (call.tokens == 0 || period <= table.size(0));
        }
        call.tables[call.table_count++] = {table.const_data_ptr(), table.stride(0), lookup};
    }

    std::deque<Tensor> kept;  // whose elements stay where they are as it grows
};

Tensor embedding(const Tensor& ids, const Tensor& weight, Optional positions, Optional position_ids, Optional segments,
                 Optional segment_ids, Optional norm_weight, Optional norm_bias, double scale,
                 std::optional<double> eps, Optional dropout_seed, double dropout_p, int64_t padding_idx, bool sparse) {
    const Described described({ids, weight, std::move(positions), std::move(position_ids), std::move(segments),
                               std::move(segment_ids), std::move(norm_weight), std::move(norm_bias), scale, eps,
                               std::move(dropout_seed), dropout_p});
    require(described.fits, "embedding");
    int64_t sizes[kMaxDims];
    const int dims = static_cast<int>(ids.dim());
    require(dims < kMaxDims, "embedding");
    std::copy_n(ids.sizes().begin(), dims, sizes);
    sizes[dims] = weight.size(1);
    Tensor y = empty_like_dtype(weight, sizes, dims + 1);
    const Forward p{described.call, y.mutable_data_ptr()};
    const Kernels* kernels = kKernels[selected_isa()];
    torch::stable::parallel_for(0, p.tokens, rows_per_thread(p.width), [&](int64_t begin, int64_t end) {
        kernels->forward(p, begin, end, thread_scratch(p.normalises ? padded(p.width) : 0));
    });
    return y;
}

std::tuple<Tensor, Tensor, Tensor> hidden_gradient(const Tensor& grad, const Tensor& ids, const Tensor& weight,
                                                   Optional positions, Optional position_ids, Optional segments,
                                                   Optional segment_ids, Optional norm_weight, Optional norm_bias,
                                                   double scale, std::optional<double> eps, Optional dropout_seed,
                                                   double dropout_p) {
    Tensor d_norm_weight = empty_gradient_of(norm_weight, weight), d_norm_bias = empty_gradient_of(norm_bias, weight);
    const bool has_weight = norm_weight.has_value(), has_bias = norm_bias.has_value();
    const Described described({ids, weight, std::move(positions), std::move(position_ids), std::move(segments),
                               std::move(segment_ids), std::move(norm_weight), std::move(norm_bias), scale, eps,
                               std::move(dropout_seed), dropout_p});
    require(described.fits && same_kind(grad, weight) && grad.dim() > 0 && grad.dim() < kMaxDims &&
                grad.sizes().back() == weight.size(1) && grad.numel() == ids.numel() * weight.size(1),
            "embedding_hidden_gradient");
    Tensor d_hidden = empty_like_dtype(grad, {described.call.tokens, described.call.width});
    const RowsOf grad_rows(grad);
    const Backward p{described.call, grad_rows.data(), grad_rows.rows, d_hidden.mutable_data_ptr()};
    const Kernels* kernels = kKernels[selected_isa()];
    run_in_parts(
        p.tokens, p.width, has_weight ? &d_norm_weight : nullptr, has_bias ? &d_norm_bias : nullptr,
        [&](int64_t begin, int64_t end, ColumnSums sums) {
            kernels->backward(p, begin, end, sums, thread_scratch(p.normalises ? 2 * padded(p.width) : 0));
        },
        [&](Parts parts, void* total, int64_t begin, int64_t end) { kernels->sum_parts(p, parts, total, begin, end); });
    return {d_hidden, d_norm_weight, d_norm_bias};
}

// The tokens of each row, in their order: first[row], then next[token] until it is -1.
struct Chains {
    Chains(Lookup lookup, int64_t tokens, int64_t rows, int64_t padding_row) : first(rows, -1), next(tokens) {
        for (int64_t token = tokens - 1; token >= 0; --token) {
            const int64_t row = lookup(token);
            if (row == padding_row) continue;
            next[token] = first[row];
            first[row] = token;
        }
    }

    std::vector<int64_t> first, next;
};

// Rows of one task.
constexpr int64_t kGradientRows = 64;

void run_table_gradient(const TableGradient& p, int64_t rows) {
    const Kernels* kernels = kKernels[selected_isa()];
    parallel_tasks(divide_up(rows, kGradientRows), [&](int64_t task) {
        kernels->table_gradient(p, task * kGradientRows, std::min((task + 1) * kGradientRows, rows));
    });
    std::vector<int64_t> long_rows;
    for (int64_t row = 0; row < rows; ++row) {
        if (is_long_chain(p, row)) long_rows.push_back(row);
    }
    const int64_t column_blocks = divide_up(p.width, kGradientColumns);
    parallel_tasks(static_cast<int64_t>(long_rows.size()) * column_blocks, [&](int64_t task) {
        const int64_t column = task % column_blocks * kGradientColumns;
        kernels->row_gradient(p, long_rows[task / column_blocks], column, std::min(column + kGradientColumns, p.width));
    });
}

Tensor table_gradient(const Tensor& d_hidden, const Tensor& ids_any, int64_t rows, double scale, int64_t padding_idx) {
    const bool fits = d_hidden.is_cpu() && d_hidden.dim() == 2 && is_int64(ids_any) && rows >= 0 &&
                      (ids_any.numel() > 0 ? d_hidden.size(0) % ids_any.numel() == 0 : d_hidden.size(0) == 0);
    require(fits, "embedding_table_gradient");
    const Tensor ids = made_contiguous(ids_any);
    require(are_rows_of(ids, rows), "embedding_table_gradient");
    const Lookup lookup{static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel()};
    const Chains chains(lookup, d_hidden.size(0), rows, padding_idx);
    const int64_t width = d_hidden.size(1);
    Tensor d_table = empty_like_dtype(d_hidden, {rows, width});
    const RowsOf d_hidden_rows(d_hidden);
    const TableGradient p{d_hidden_rows.data(),      d_hidden_rows.rows,         chains.first.data(),
                          chains.next.data(),        d_table.mutable_data_ptr(), width,
                          static_cast<float>(scale), dtype_of(d_hidden)};
    run_table_gradient(p, rows);
    return d_table;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("embedding", TORCH_BOX(&embedding));
    library.impl("embedding_inference", TORCH_BOX(&embedding));
    library.impl("embedding_hidden_gradient", TORCH_BOX(&hidden_gradient));
    library.impl("embedding_table_gradient", TORCH_BOX(&table_gradient));
}

}  // namespace nearpeak::embedding
