// The CPU kernels of the operators that kernels/nearpeak/rotary/operator.py defines.

#include <algorithm>
#include <tuple>

#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "../describe.h"
#include "kernels.h"

namespace nearpeak::rotary {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

// A task is a run of positions of one batch entry: long ones, which memory is fast at where heads lie one behind the
// other, as far as cos and sin stay in the second-level cache while the heads pass (32:8 heads of 2048 x 128, Zen 5:
// float32 2.2 ms with 16 positions, 1.0 ms with 64 or 128); but some for each thread, and each worth one (waking it
// costs about 5 us, the time of 16384 elements).
constexpr int64_t kLeastPositions = 16, kMostPositions = 128, kTasksPerThread = 4, kElementsPerTask = 16384;

bool are_heads(const Tensor& query, const Tensor& key) {
    if (query.dim() != 4 || key.dim() != 4 || !query.is_cpu() || !same_kind(key, query)) return false;
    const auto sizes = query.sizes(), key_sizes = key.sizes();
    return key_sizes[0] == sizes[0] && key_sizes[2] == sizes[2] && key_sizes[3] == sizes[3] && dense_last(query) &&
           dense_last(key);
}

// (sequence, width) or (batch or 1, sequence, width), of which the first rotary_dim / 2 columns are read.
bool is_table(const Tensor& table, const Tensor& query, int64_t rotary_dim) {
    const auto sizes = table.sizes(), of = query.sizes();
    const size_t dims = sizes.size();
    return (dims == 2 || (dims == 3 && (sizes[0] == 1 || sizes[0] == of[0]))) && sizes[dims - 2] == of[2] &&
           (sizes[dims - 1] == rotary_dim / 2 || sizes[dims - 1] == rotary_dim) && same_kind(table, query, true) &&
           dense_last(table);
}

bool are_tables(const Tensor& cos, const Tensor& sin, const Tensor& query, int64_t rotary_dim) {
    return is_table(cos, query, rotary_dim) && same_shape(sin, cos) && same_kind(sin, cos) && dense_last(sin);
}

bool fit(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, int64_t rotary_dim) {
    return are_heads(query, key) && rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= query.size(3) &&
           are_tables(cos, sin, query, rotary_dim);
}

// Whether every element has a place of its own.
bool is_writable(const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
        if (strides[dim] == 0 && sizes[dim] > 1) return false;
    }
    return true;
}

void run(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse,
         int64_t rotary_dim, const Tensor& query_out, const Tensor& key_out) {
    const int64_t per_position = (query.size(1) + key.size(1)) * query.size(3);
    if (query.size(0) * query.size(2) * per_position == 0) return;
    const Call p = describe(query, key, cos, sin, interleaved, inverse, rotary_dim, query_out, key_out);
    const int64_t tasks = static_cast<int64_t>(torch::stable::get_num_threads()) * kTasksPerThread;
    const int64_t share = (p.batch * p.sequence + tasks - 1) / tasks;
    const int64_t positions =
        std::max(std::clamp(share, kLeastPositions, kMostPositions), kElementsPerTask / per_position);
    const int64_t runs = (p.sequence + positions - 1) / positions;
    const Kernels* kernels = kKernels[selected_isa()];
    torch::stable::parallel_for(0, p.batch * runs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % runs * positions;
            const int64_t last = std::min(first + positions, p.sequence);
            kernels->rotate(p, task / runs, first, last, thread_scratch(kernels->scratch(p, last - first)));
        }
    });
}

std::tuple<Tensor, Tensor> apply_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                        bool interleaved, bool inverse, int64_t rotary_dim) {
    require(fit(query, key, cos, sin, rotary_dim), "apply_rotary");
    Tensor query_out = empty_laid_out_like(query), key_out = empty_laid_out_like(key);
    run(query, key, cos, sin, interleaved, inverse, rotary_dim, query_out, key_out);
    return {query_out, key_out};
}

void apply_rotary_inplace(Tensor query, Tensor key, const Tensor& cos, const Tensor& sin, bool interleaved,
                          bool inverse, int64_t rotary_dim) {
    require(fit(query, key, cos, sin, rotary_dim) && is_writable(query) && is_writable(key) &&
                (query.numel() == 0 || query.const_data_ptr() != key.const_data_ptr()),
            "apply_rotary_");
    run(query, key, cos, sin, interleaved, inverse, rotary_dim, query, key);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("apply_rotary", TORCH_BOX(&apply_rotary));
    library.impl("apply_rotary_inference", TORCH_BOX(&apply_rotary));
    library.impl("apply_rotary_", TORCH_BOX(&apply_rotary_inplace));
}

}  // namespace nearpeak::rotary
