// What the operators need of PyTorch's stable ABI: dtypes, layouts and parallel loops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>

#include "dropout.h"
#include "dtype.h"
#include "rows.h"

namespace nearpeak {

using torch::stable::Tensor;

constexpr int kMaxDims = 16;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Dtype dtype_of(const Tensor& tensor);

// What every operator checks before its kernel runs, at some 20 ns each. The message is for callers of torch.ops:
// the public functions in Python then check again and raise what names the argument.
inline void require(bool fits, const char* operator_name) {
    STD_TORCH_CHECK(fits, "nearpeak::", operator_name, ": the arguments do not fit its documentation");
}
bool same_shape(const Tensor& a, const Tensor& b);
// On the CPU and of the dtype of `like`, or else of float32 where `or_float32`.
bool same_kind(const Tensor& tensor, const Tensor& like, bool or_float32 = false);
bool is_like(const Tensor& tensor, const Tensor& like);  // in shape and kind
bool dense_last(const Tensor& tensor);

// Whether a parameter over x's last dimension, of x's dtype or float32, is not given or fits.
bool is_parameter_of(const std::optional<Tensor>& parameter, const Tensor& x);
// For its gradient, a new tensor like it; without the parameter an empty one.
Tensor empty_gradient_of(const std::optional<Tensor>& parameter, const Tensor& x);

// Whether p is a probability below 1, and the seed one int64 on the CPU wherever p is above 0.
bool drops_rightly(const std::optional<Tensor>& seed, double p);
Dropout dropout_of(const std::optional<Tensor>& seed, double p);

// A new tensor of `sizes` on like's device, dense, the outer dimensions in the order of like's strides (largest
// outermost, equal ones in order of position) and the last innermost; operators.py's empty_laid_out_like is the same
// rule.
Tensor empty_laid_out_like(const Tensor& like);
Tensor empty_laid_out_like(const Tensor& like, const int64_t* sizes);

// New contiguous tensors: of like's dtype on its device, and of float32 on the CPU.
Tensor empty_like_dtype(const Tensor& like, std::initializer_list<int64_t> sizes);
Tensor empty_like_dtype(const Tensor& like, const int64_t* sizes, int dims);
Tensor empty_floats(std::initializer_list<int64_t> sizes);

// The tensor itself where it is contiguous: asking PyTorch's dispatcher costs 0.5 us even then.
Tensor made_contiguous(const Tensor& tensor);

// `tensor` and where its rows begin: in their logical order, or in the memory order of the dense tensor `order`, of the
// same shape. A tensor whose strides are not of Rows' kind, or whose last dimension is not dense, is copied first.
struct RowsOf {
    explicit RowsOf(const Tensor& tensor);
    RowsOf(const Tensor& tensor, const Tensor& order);

    Tensor tensor;
    Rows rows;

    const void* data() const { return tensor.const_data_ptr(); }
};

// Runs task(0) .. task(count - 1) over PyTorch's threads, each taking the next as it becomes free: tasks may differ
// in cost, as causal attention's do.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
    if (workers <= 1) {
        for (int64_t index = 0; index < count; ++index) task(index);
        return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t index = next++; index < count; index = next++) task(index);
        }
    });
}

// Outputs from this size on are written past the caches: they would not stay there, and each line would be read
// before it is written.
int64_t past_cache_bytes();

}  // namespace nearpeak
