// The CPU kernels of the operators that kernels/nearpeak/attention/operator.py defines: cuts a call into tasks.

#include <cmath>
#include <tuple>
#include <vector>

#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "kernels.h"
#include "mask.h"

namespace nearpeak::attention {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

// As in kernels/nearpeak/attention/operator.py.
constexpr int64_t kMaxHeadDim = 256;
// Up to this many rows the decode kernel is the faster one (Zen 3, float32 and bfloat16, 4096 x 128).
constexpr int64_t kFewRows = 2 * kDecodeRows;
// Fewest keys worth a task of their own, and tasks per thread that let uneven ones even out.
constexpr int64_t kKeysPerSplit = 256, kTasksPerThread = 4;
// Rows of a prefill task: more share one packing of the keys and values, as long as they fit the second-level cache.
constexpr int64_t kMinRows = 32, kMaxRows = 384, kRowElements = 192 * 128;

Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

bool fits(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<double>& softcap) {
    if (query.dim() != 4 || key.dim() != 4 || !query.is_cpu() || !same_kind(key, query) || !same_kind(value, query)) {
        return false;
    }
    const auto q = query.sizes(), k = key.sizes();
    return same_shape(value, key) && k[0] == q[0] && k[3] == q[3] && q[3] >= 1 && q[3] <= kMaxHeadDim &&
           (k[1] == 0 ? q[1] == 0 : q[1] % k[1] == 0) && dense_last(query) && dense_last(key) && dense_last(value) &&
           (!softcap || (*softcap > 0 && std::isfinite(*softcap)));
}

bool is_lse_of(const Tensor& lse, const Tensor& query) {
    const auto sizes = lse.sizes(), of = query.sizes();
    return sizes.size() == 3 && std::equal(sizes.begin(), sizes.end(), of.begin()) && lse.is_cpu() &&
           lse.scalar_type() == torch::headeronly::ScalarType::Float;
}

// Tasks of many rows, those with the most keys first, so that no thread is left alone with a long one.
std::vector<Task> prefill_tasks(const Forward& p) {
    const int64_t pairs = p.batch * p.key_heads;
    const int64_t fitting = std::clamp(kRowElements / p.head_dim, kMinRows, kMaxRows);
    const int64_t spread = divide_up(p.rows() * pairs, threads() * kTasksPerThread);
    const int64_t rows = std::clamp(divide_up(spread, kMinRows) * kMinRows, kMinRows, fitting);
    std::vector<Task> tasks;
    for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t row = 0; row < p.rows(); row += rows) {
            const int64_t end = std::min(row + rows, p.rows());
            const KeyRange keys = allowed_keys(p, row, end);
            tasks.push_back({pair / p.key_heads, pair % p.key_heads, row, end, keys.begin, keys.end});
        }
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.key_end - a.key_begin > b.key_end - b.key_begin; });
    return tasks;
}

void run_prefill(const Forward& p, const Kernels& kernels) {
    const std::vector<Task> tasks = prefill_tasks(p);
    parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
        const Task& task = tasks[index];
        kernels.prefill(p, task, thread_scratch(kernels.prefill_scratch(p, task.row_end - task.row_begin)));
    });
}

// Tasks of few rows, their keys split where there would be fewer tasks than the threads want.
void run_decode(const Forward& p, const Kernels& kernels) {
    const int64_t row_parts = divide_up(p.rows(), kDecodeRows);
    const int64_t whole = p.batch * p.key_heads * row_parts;
    const auto whole_task = [&](int64_t index) {
        const int64_t part = index % row_parts, pair = index / row_parts;
        const int64_t begin = part * kDecodeRows, end = std::min(begin + kDecodeRows, p.rows());
        const KeyRange keys = allowed_keys(p, begin, end);
        return Task{pair / p.key_heads, pair % p.key_heads, begin, end, keys.begin, keys.end};
    };
    const auto run_task = [&](const Task& task, float* partial) {
        kernels.decode(p, task, thread_scratch(kernels.decode_scratch(p, task.row_end - task.row_begin)), partial);
    };
    const int64_t wanted = threads() == 1 ? 1 : divide_up(threads() * kTasksPerThread, whole);
    const int64_t splits = std::clamp<int64_t>(p.key_length / kKeysPerSplit, 1, wanted);
    if (splits == 1) {
        parallel_tasks(whole, [&](int64_t index) { run_task(whole_task(index), nullptr); });
        return;
    }
    const int64_t partial_stride = kDecodeRows * (p.head_dim + 2);
    Tensor partials = empty_floats({whole, splits, partial_stride});
    float* partials_data = static_cast<float*>(partials.mutable_data_ptr());
    parallel_tasks(whole * splits, [&](int64_t index) {
        Task task = whole_task(index / splits);
        const int64_t split = index % splits, begin = task.key_begin, keys = task.key_end - begin;
        task.key_begin = begin + keys * split / splits;
        task.key_end = begin + keys * (split + 1) / splits;
        run_task(task, partials_data + index * partial_stride);
    });
    parallel_tasks(whole, [&](int64_t index) {
        kernels.merge(p, whole_task(index), partials_data + index * splits * partial_stride, splits, partial_stride);
    });
}

// Sets what both directions need of a call.
void describe(Call& p, const Tensor& query, const Tensor& key, const Tensor& value, std::optional<int64_t> window_left,
              std::optional<int64_t> window_right, double scale, std::optional<double> softcap) {
    constexpr int64_t kOpen = int64_t{1} << 60;
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.value = value.const_data_ptr();
    p.query_strides = strides_of(query);
    p.key_strides = strides_of(key);
    p.value_strides = strides_of(value);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.query_length = query.size(2);
    p.head_dim = query.size(3);
    p.key_heads = key.size(1);
    p.key_length = key.size(2);
    p.scale = static_cast<float>(scale);
    p.softcap = static_cast<float>(softcap.value_or(0.0));
    p.window_left = window_left ? std::clamp(*window_left, -kOpen, kOpen) : kOpen;
    p.window_right = window_right ? std::clamp(*window_right, -kOpen, kOpen) : kOpen;
    p.dtype = dtype_of(query);
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     std::optional<int64_t> window_left, std::optional<int64_t> window_right,
                                     double scale, std::optional<double> softcap) {
    require(fits(query, key, value, softcap), "attention");
    Tensor out = empty_laid_out_like(query);
    Tensor lse = empty_floats({query.size(0), query.size(1), query.size(2)});
    Forward p{};
    describe(p, query, key, value, window_left, window_right, scale, softcap);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.out_strides = strides_of(out);
    if (p.batch * p.heads * p.query_length == 0) return {out, lse};
    const Kernels& kernels = *kKernels[selected_isa()];
    if (p.rows() <= kFewRows) {
        run_decode(p, kernels);
    } else {
        run_prefill(p, kernels);
    }
    return {out, lse};
}

// Calls function(task, scratch) with all rows, in parallel, as tasks of kBlockRows: always the same ones, so that
// results do not depend on the number of threads.
template <class Function>
void for_all_rows(const Backward& p, const Kernels& kernels, const Function& function) {
    const int64_t parts = divide_up(p.rows(), kBlockRows);
    parallel_tasks(p.pairs() * parts, [&](int64_t index) {
        const int64_t pair = index / parts, begin = index % parts * kBlockRows;
        const int64_t end = std::min(begin + kBlockRows, p.rows());
        const KeyRange keys = allowed_keys(p, begin, end);
        function(Task{pair / p.key_heads, pair % p.key_heads, begin, end, keys.begin, keys.end},
                 thread_scratch(kernels.rows_scratch(p, end - begin)));
    });
}

// One task per pair and block of keys. All pairs' first keys come before any pair's second: under a causal mask those
// with the most rows first, and as far as can be from the task whose turn is before theirs.
void run_backward(const Backward& p, const Kernels& kernels) {
    for_all_rows(p, kernels, [&](const Task& task, float* scratch) { kernels.prepare_rows(p, task, scratch); });
    const int64_t pairs = p.pairs(), blocks = divide_up(p.key_length, kBlockKeys);
    std::vector<Turn> turns(pairs * blocks);
    parallel_tasks(pairs * blocks, [&](int64_t index) {
        // Also where scratch memory is not to be had: the next task must not wait for ever.
        struct Finish {
            Turn& turn;
            ~Finish() { turn.finish(Turn::kAllRows); }
        } finish{turns[index]};
        const int64_t pair = index % pairs, key = index / pairs * kBlockKeys;
        const int64_t key_end = std::min(key + kBlockKeys, p.key_length);
        const RowRange rows = allowed_rows(p, key, key_end);
        const Task task{
            pair / p.key_heads, pair % p.key_heads, rows.begin / kBlockRows * kBlockRows, rows.end, key, key_end};
        const Turn* before = index < pairs ? nullptr : &turns[index - pairs];
        kernels.backward(p, task, thread_scratch(kernels.backward_scratch(p)), before, &turns[index]);
    });
    for_all_rows(p, kernels, [&](const Task& task, float* scratch) { kernels.finish_rows(p, task, scratch); });
}

// The tensor itself, or a copy whose last dimension is dense.
Tensor made_dense_last(const Tensor& tensor) {
    return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& any_grad_out,
                                                      const std::optional<Tensor>& any_grad_lse, const Tensor& query,
                                                      const Tensor& key, const Tensor& value, const Tensor& any_out,
                                                      const Tensor& any_lse, std::optional<int64_t> window_left,
                                                      std::optional<int64_t> window_right, double scale,
                                                      std::optional<double> softcap) {
    require(fits(query, key, value, softcap) && is_like(any_grad_out, query) && is_like(any_out, query) &&
                is_lse_of(any_lse, query) && (!any_grad_lse || is_lse_of(*any_grad_lse, query)),
            "attention_backward");
    const Tensor grad_out = made_dense_last(any_grad_out), out = made_dense_last(any_out);
    const Tensor lse = made_contiguous(any_lse);
    const std::optional<Tensor> grad_lse =
        any_grad_lse ? std::optional<Tensor>(made_contiguous(*any_grad_lse)) : std::nullopt;
    Tensor d_query = empty_laid_out_like(query), d_key = empty_laid_out_like(key), d_value = empty_laid_out_like(value);
    Backward p{};
    describe(p, query, key, value, window_left, window_right, scale, softcap);
    p.out = out.const_data_ptr();
    p.grad_out = grad_out.const_data_ptr();
    p.lse = static_cast<const float*>(lse.const_data_ptr());
    p.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
    p.d_query = d_query.mutable_data_ptr();
    p.d_key = d_key.mutable_data_ptr();
    p.d_value = d_value.mutable_data_ptr();
    p.out_strides = strides_of(out);
    p.grad_out_strides = strides_of(grad_out);
    p.d_query_strides = strides_of(d_query);
    p.d_key_strides = strides_of(d_key);
    p.d_value_strides = strides_of(d_value);
    if (p.batch * p.key_heads == 0) return {d_query, d_key, d_value};
    const int64_t rows = p.pairs() * p.padded_rows();
    Tensor sums = empty_floats({rows, p.padded_dim()});
    std::vector<RowStatistics> statistics(rows);
    p.d_query_sums = static_cast<float*>(sums.mutable_data_ptr());
    p.statistics = statistics.data();
    run_backward(p, *kKernels[selected_isa()]);
    return {d_query, d_key, d_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("attention", TORCH_BOX(&attention));
    library.impl("attention_inference", TORCH_BOX(&attention));
    library.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace nearpeak::attention
