// The CPU kernels of the operators that kernels/nearpeak/attention/operator.py defines: cuts a call into tasks.

#include <tuple>
#include <utility>
#include <vector>

#include "../../cpu/caches.h"
#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "describe.h"
#include "describe_blocks.h"
#include "describe_program.h"
#include "key_blocks.h"

namespace nearpeak::attention {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

// Up to this many rows the decode kernel is the faster one (Zen 3, float32 and bfloat16, 4096 x 128).
constexpr int64_t kFewRows = 2 * kDecodeRows;
// Tasks per thread that let uneven ones even out.
constexpr int64_t kTasksPerThread = 4;
// Fewest keys of a decode task. They are split up to so many tasks, whatever the number of threads, on which results
// must not depend.
constexpr int64_t kKeysPerSplit = 256, kDecodeTasks = 32 * kTasksPerThread;
// Rows of a prefill task at least.
constexpr int64_t kMinRows = 32;

// And at most: more share one packing of the keys and values, as long as their queries and sums leave room for those in
// the second-level cache. Two threads, S 4096, head_dim 128, bfloat16 on AMX (2 MiB): 192 rows 1.03 Tflop/s, 768 rows
// 1.40.
int64_t most_rows(const Forward& p) {
    constexpr int64_t kFloatsPerDim = 2, kLeastDim = 64;
    const int64_t share = second_level_cache() * 3 / 8;
    const int64_t dim = std::max({kLeastDim, p.head_dim, p.value_dim});
    return std::max<int64_t>(kMinRows, share / (dim * kFloatsPerDim * static_cast<int64_t>(sizeof(float))));
}

int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Of query's kind and shape, with value's head_dim.
bool is_out_of(const Tensor& out, const Tensor& query, const Tensor& value) {
    const auto sizes = out.sizes(), of = query.sizes();
    return sizes.size() == 4 && std::equal(of.begin(), of.begin() + 3, sizes.begin()) && sizes[3] == value.size(3) &&
           same_kind(out, query);
}

bool is_lse_of(const Tensor& lse, const Tensor& query) {
    const auto sizes = lse.sizes(), of = query.sizes();
    return sizes.size() == 3 && std::equal(sizes.begin(), sizes.end(), of.begin()) && lse.is_cpu() &&
           lse.scalar_type() == torch::headeronly::ScalarType::Float;
}

// Prefill alone knows block masks.
bool has_few_rows(const Forward& p, const Sequence& sequence) {
    return p.rows(sequence) <= kFewRows && !p.blocks.starts;
}

// Tasks of so many rows at most, of all sequences that have few rows, or of all others.
std::vector<Task> tasks_of_rows(const Forward& p, bool few, int64_t rows) {
    std::vector<Task> tasks;
    for (int64_t index = 0; index < p.sequence_count; ++index) {
        const Sequence& sequence = p.sequences[index];
        if (has_few_rows(p, sequence) != few) continue;
        for (int64_t key_head = 0; key_head < p.key_heads; ++key_head) {
            for (int64_t row = 0; row < p.rows(sequence); row += rows) {
                const int64_t end = std::min(row + rows, p.rows(sequence));
                const KeyRange keys = keys_of_rows(p, sequence, key_head, row, end);
                tasks.push_back({sequence, key_head, row, end, keys.begin, keys.end});
            }
        }
    }
    return tasks;
}

void run_prefill(const Forward& p, const Kernels& kernels) {
    int64_t all_rows = 0;
    for (int64_t index = 0; index < p.sequence_count; ++index) {
        if (!has_few_rows(p, p.sequences[index])) all_rows += p.rows(p.sequences[index]) * p.key_heads;
    }
    if (all_rows == 0) return;
    const int64_t spread = divide_up(all_rows, threads() * kTasksPerThread);
    const int64_t rows = std::clamp(divide_up(spread, kMinRows) * kMinRows, kMinRows, most_rows(p));
    std::vector<Task> tasks = tasks_of_rows(p, false, rows);
    // Those with the most keys first, so that no thread is left alone with a long one.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.key_end - a.key_begin > b.key_end - b.key_begin; });
    parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
        const Task& task = tasks[index];
        kernels.prefill(p, task, thread_scratch(kernels.prefill_scratch(p, task.row_end - task.row_begin)));
    });
}

// Keys are split where there are few rows and heads.
void run_decode(const Forward& p, const Kernels& kernels) {
    const std::vector<Task> tasks = tasks_of_rows(p, true, kDecodeRows);
    const int64_t whole = static_cast<int64_t>(tasks.size());
    if (whole == 0) return;
    const auto run_task = [&](const Task& task, float* partial) {
        kernels.decode(p, task, thread_scratch(kernels.decode_scratch(p, task.row_end - task.row_begin)), partial);
    };
    const int64_t splits = std::clamp<int64_t>(p.key_length / kKeysPerSplit, 1, divide_up(kDecodeTasks, whole));
    if (splits == 1) {
        parallel_tasks(whole, [&](int64_t index) { run_task(tasks[index], nullptr); });
        return;
    }
    const int64_t partial_stride = kDecodeRows * (p.value_dim + 2);
    Tensor partials = empty_floats({whole, splits, partial_stride});
    float* partials_data = static_cast<float*>(partials.mutable_data_ptr());
    parallel_tasks(whole * splits, [&](int64_t index) {
        Task task = tasks[index / splits];
        const int64_t split = index % splits, begin = task.key_begin, keys = task.key_end - begin;
        task.key_begin = begin + keys * split / splits;
        task.key_end = begin + keys * (split + 1) / splits;
        run_task(task, partials_data + index * partial_stride);
    });
    parallel_tasks(whole, [&](int64_t index) {
        kernels.merge(p, tasks[index], partials_data + index * splits * partial_stride, splits, partial_stride);
    });
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& query, const Tensor& key, const Tensor& value, Terms terms,
                                       const Options& options, const Bounds& bounds, const BlockTensors* blocks) {
    require(fits(query, key, value, options) && fit(terms, query, key), "attention");
    make_readable(terms);
    const auto sequences = sequences_of(query, key, bounds);
    const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), value.size(3)};
    Tensor out = empty_laid_out_like(query, sizes);
    Tensor lse = empty_floats({sizes[0], sizes[1], sizes[2]});
    Forward p{};
    describe(p, query, key, value, terms, options, sequences);
    const ReadableProgram score_program(terms);
    p.score_program = score_program.view;
    if (blocks) p.blocks = tables_of(*blocks);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.out_strides = strides_of(out);
    if (p.batch * p.heads * p.query_length == 0) return {out, lse};
    const Kernels& kernels = *kKernels[selected_isa()];
    run_decode(p, kernels);
    run_prefill(p, kernels);
    return {out, lse};
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     std::optional<int64_t> window_left, std::optional<int64_t> window_right,
                                     double scale, std::optional<double> softcap, OptionalTensor mask,
                                     OptionalTensor bias, OptionalTensor alibi_slopes, OptionalTensor sinks,
                                     OptionalTensor query_starts, OptionalTensor key_starts, OptionalTensor key_ends,
                                     OptionalTensor dropout_seed, double dropout_p, OptionalTensor score_program,
                                     std::optional<std::vector<Tensor>> score_tensors) {
    return run_forward(query, key, value,
                       {std::move(mask), std::move(bias), std::move(alibi_slopes), std::move(sinks),
                        std::move(score_program), std::move(score_tensors)},
                       {window_left, window_right, scale, softcap, std::move(dropout_seed), dropout_p},
                       {std::move(query_starts), std::move(key_starts), std::move(key_ends)}, nullptr);
}

std::tuple<Tensor, Tensor> attention_blocks(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& block_starts,
    const Tensor& block_entries, const Tensor& block_bits, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, double scale, std::optional<double> softcap, OptionalTensor mask,
    OptionalTensor bias, OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor query_starts,
    OptionalTensor key_starts, OptionalTensor key_ends, OptionalTensor dropout_seed, double dropout_p,
    OptionalTensor score_program, std::optional<std::vector<Tensor>> score_tensors) {
    const BlockTensors blocks = readable_blocks(block_starts, block_entries, block_bits, query, key);
    return run_forward(query, key, value,
                       {std::move(mask), std::move(bias), std::move(alibi_slopes), std::move(sinks),
                        std::move(score_program), std::move(score_tensors)},
                       {window_left, window_right, scale, softcap, std::move(dropout_seed), dropout_p},
                       {std::move(query_starts), std::move(key_starts), std::move(key_ends)}, &blocks);
}

// Calls function(task, scratch) with all rows, in parallel, as tasks of kBlockRows: always the same ones, so that
// results do not depend on the number of threads.
template <class Function>
void for_all_rows(const Backward& p, const Kernels& kernels, const Function& function) {
    std::vector<Task> tasks;
    for (int64_t pair = 0; pair < p.pairs(); ++pair) {
        const Sequence& sequence = p.sequences[pair / p.key_heads];
        for (int64_t row = 0; row < p.rows(sequence); row += kBlockRows) {
            const int64_t end = std::min(row + kBlockRows, p.rows(sequence));
            const KeyRange keys = keys_of_rows(p, sequence, pair % p.key_heads, row, end);
            tasks.push_back({sequence, pair % p.key_heads, row, end, keys.begin, keys.end});
        }
    }
    parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
        const Task& task = tasks[index];
        function(task, thread_scratch(kernels.rows_scratch(p, task.row_end - task.row_begin)));
    });
}

void run_blocks(const Backward& p, const Kernels& kernels, const std::vector<int64_t>& pairs) {
    const std::vector<KeyBlock> blocks = key_blocks(p, pairs);
    std::vector<Turn> turns(blocks.size());
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t index) {
        // Also where scratch memory is not to be had: the next task must not wait for ever.
        struct Finish {
            Turn& turn;
            ~Finish() { turn.finish(Turn::kAllRows); }
        } finish{turns[index]};
        const auto& [task, before, visits] = blocks[index];
        const Order order{turns.data(), index, before, visits.data(), static_cast<int64_t>(visits.size())};
        kernels.backward(p, task, thread_scratch(kernels.backward_scratch(p)), order);
    });
}

// Sets of pairs no two of which add to the same element of the bias's gradient, in a fixed order.
std::vector<std::vector<int64_t>> independent_pairs(const Backward& p) {
    const bool over_batch = p.d_bias && p.d_bias_strides.batch == 0;
    const bool over_heads = p.d_bias && p.d_bias_strides.head == 0;
    std::vector<std::vector<int64_t>> sets((over_batch ? p.sequence_count : 1) * (over_heads ? p.key_heads : 1));
    for (int64_t pair = 0; pair < p.pairs(); ++pair) {
        const int64_t of_batch = over_batch ? pair / p.key_heads : 0, of_heads = over_heads ? pair % p.key_heads : 0;
        sets[of_batch * (over_heads ? p.key_heads : 1) + of_heads].push_back(pair);
    }
    return sets;
}

void run_backward(const Backward& p, const Kernels& kernels) {
    for_all_rows(p, kernels, [&](const Task& task, float* scratch) { kernels.prepare_rows(p, task, scratch); });
    for (const auto& pairs : independent_pairs(p)) run_blocks(p, kernels, pairs);
    for_all_rows(p, kernels, [&](const Task& task, float* scratch) { kernels.finish_rows(p, task, scratch); });
}

// Zeros of the bias's shape in float32, or no elements where its gradient is not asked for.
Tensor zeros_for_bias(const OptionalTensor& bias, bool wanted) {
    if (!wanted) return empty_floats({0});
    Tensor zeros = empty_floats({bias->size(0), bias->size(1), bias->size(2), bias->size(3)});
    torch::stable::zero_(zeros);
    return zeros;
}

// What backward is given beside forward's arguments.
struct Results {
    const Tensor& grad_out;
    const OptionalTensor& grad_lse;
    const Tensor& out;
    const Tensor& lse;
    bool bias_gradient;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> run_gradients(const Results& results, const Tensor& query, const Tensor& key,
                                                         const Tensor& value, Terms terms, const Options& options,
                                                         const Bounds& bounds, const BlockTensors* blocks) {
    const auto& [any_grad_out, any_grad_lse, any_out, any_lse, bias_gradient] = results;
    require(fits(query, key, value, options) && fit(terms, query, key) && is_out_of(any_grad_out, query, value) &&
                is_out_of(any_out, query, value) && is_lse_of(any_lse, query) &&
                (!any_grad_lse || is_lse_of(*any_grad_lse, query)) && (!bias_gradient || terms.bias),
            "attention_backward");
    make_readable(terms);
    auto sequences = sequences_of(query, key, bounds);
    const Tensor grad_out = made_dense_last(any_grad_out), out = made_dense_last(any_out);
    const Tensor lse = made_contiguous(any_lse);
    OptionalTensor grad_lse = any_grad_lse;
    if (grad_lse) grad_lse = made_contiguous(*grad_lse);
    Tensor d_query = empty_laid_out_like(query), d_key = empty_laid_out_like(key), d_value = empty_laid_out_like(value);
    Tensor d_bias = zeros_for_bias(terms.bias, bias_gradient);
    Backward p{};
    describe(p, query, key, value, terms, options, sequences);
    const ReadableProgram score_program(terms);
    p.score_program = score_program.view;
    if (blocks) p.blocks = tables_of(*blocks);
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
    if (bias_gradient) {
        p.d_bias = static_cast<float*>(d_bias.mutable_data_ptr());
        p.d_bias_strides = broadcast_strides(d_bias);
    }
    int64_t keys_of_sequences = 0;
    for (const Sequence& sequence : sequences) keys_of_sequences += sequence.key_length;
    if (keys_of_sequences < p.batch * p.key_length) {
        torch::stable::zero_(d_key);
        torch::stable::zero_(d_value);
    }
    if (p.pairs() > 0) {
        for (Sequence& sequence : sequences) {
            sequence.padded_begin = p.all_padded_rows;
            p.all_padded_rows += p.padded_rows(sequence);
        }
        const int64_t rows = p.key_heads * p.all_padded_rows;
        Tensor sums = empty_floats({rows, p.padded_dim()});
        std::vector<RowStatistics> statistics(rows);
        p.d_query_sums = static_cast<float*>(sums.mutable_data_ptr());
        p.statistics = statistics.data();
        run_backward(p, *kKernels[selected_isa()]);
    }
    if (bias_gradient) d_bias = torch::stable::to(d_bias, terms.bias->scalar_type());
    return {d_query, d_key, d_value, d_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double scale, std::optional<double> softcap, OptionalTensor mask, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor query_starts, OptionalTensor key_starts, OptionalTensor key_ends,
    OptionalTensor dropout_seed, double dropout_p, OptionalTensor score_program,
    std::optional<std::vector<Tensor>> score_tensors, bool bias_gradient) {
    return run_gradients({grad_out, grad_lse, out, lse, bias_gradient}, query, key, value,
                         {std::move(mask), std::move(bias), std::move(alibi_slopes), std::move(sinks),
                          std::move(score_program), std::move(score_tensors)},
                         {window_left, window_right, scale, softcap, std::move(dropout_seed), dropout_p},
                         {std::move(query_starts), std::move(key_starts), std::move(key_ends)}, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_blocks_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& block_starts, const Tensor& block_entries,
    const Tensor& block_bits, std::optional<int64_t> window_left, std::optional<int64_t> window_right, double scale,
    std::optional<double> softcap, OptionalTensor mask, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor query_starts, OptionalTensor key_starts, OptionalTensor key_ends,
    OptionalTensor dropout_seed, double dropout_p, OptionalTensor score_program,
    std::optional<std::vector<Tensor>> score_tensors, bool bias_gradient) {
    const BlockTensors blocks = readable_blocks(block_starts, block_entries, block_bits, query, key);
    return run_gradients({grad_out, grad_lse, out, lse, bias_gradient}, query, key, value,
                         {std::move(mask), std::move(bias), std::move(alibi_slopes), std::move(sinks),
                          std::move(score_program), std::move(score_tensors)},
                         {window_left, window_right, scale, softcap, std::move(dropout_seed), dropout_p},
                         {std::move(query_starts), std::move(key_starts), std::move(key_ends)}, &blocks);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("attention", TORCH_BOX(&attention));
    library.impl("attention_inference", TORCH_BOX(&attention));
    library.impl("attention_backward", TORCH_BOX(&attention_backward));
    library.impl("attention_blocks", TORCH_BOX(&attention_blocks));
    library.impl("attention_blocks_inference", TORCH_BOX(&attention_blocks));
    library.impl("attention_blocks_backward", TORCH_BOX(&attention_blocks_backward));
}

}  // namespace nearpeak::attention
