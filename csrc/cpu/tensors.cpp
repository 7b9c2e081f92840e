#include "tensors.h"

#include <sys/mman.h>
#include <unistd.h>

namespace nearpeak {
namespace {

// The outer dimensions (all but the last), outermost in memory first.
std::array<int, kMaxDims> memory_order(const int64_t* strides, int dims) {
    std::array<int, kMaxDims> order{};
    for (int dim = 0; dim < dims; ++dim) order[dim] = dim;
    // Sorted by insertion: std::stable_sort allocates.
    for (int dim = 1; dim < dims - 1; ++dim) {
        for (int at = dim; at > 0 && strides[order[at]] > strides[order[at - 1]]; --at) {
            std::swap(order[at], order[at - 1]);
        }
    }
    return order;
}

// A large new tensor's memory is new to the process, and each page of it costs a fault: 4 KiB at a time, these take
// three times as long as the kernel that writes them (Zen 3, 32 MiB: 14.5 ms, with huge pages 5.2).
void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr int64_t kHugePage = int64_t{2} << 20;
    if (bytes < 2 * kHugePage) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    const auto first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
    // Advice: where the system has no huge pages, nothing changes.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Device {
    int32_t type, index;
};

Device device_of(const Tensor& tensor) {
    Device device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int dims, int32_t dtype, Device device) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
    Tensor tensor(handle);
    if (device.type == aoti_torch_device_type_cpu()) {
        ask_for_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    }
    return tensor;
}

Tensor empty_contiguous(const int64_t* sizes, int dims, int32_t dtype, Device device) {
    int64_t strides[kMaxDims], stride = 1;
    for (int dim = dims - 1; dim >= 0; --dim) {
        strides[dim] = stride;
        stride *= std::max<int64_t>(1, sizes[dim]);
    }
    return empty_strided(sizes, strides, dims, dtype, device);
}

// The rows of `tensor` with its outer dimensions taken in `order`; nothing where they need more than two strides.
std::optional<Rows> find_rows(const Tensor& tensor, const std::array<int, kMaxDims>& order, int dims) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return std::nullopt;
    // Collapse from the innermost outwards into runs of one stride each.
    int64_t run_size[2] = {1, 1}, run_stride[2] = {0, 0};
    int runs = 0;
    for (int position = dims - 2; position >= 0; --position) {
        const int64_t size = sizes[order[position]], stride = strides[order[position]];
        if (size == 1) continue;
        if (runs > 0 && stride == run_stride[runs - 1] * run_size[runs - 1]) {
            run_size[runs - 1] *= size;
            continue;
        }
        if (runs == 2) return std::nullopt;
        run_size[runs] = size;
        run_stride[runs++] = stride;
    }
    return Rows{std::max<int64_t>(1, run_size[0]), run_stride[1], run_stride[0]};
}

}  // namespace

Dtype dtype_of(const Tensor& tensor) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Dtype::float32;
        case ScalarType::BFloat16:
            return Dtype::bfloat16;
        case ScalarType::Half:
            return Dtype::float16;
        default:
            STD_TORCH_CHECK(false, "nearpeak's kernels serve float32, bfloat16 and float16 only");
    }
}

bool same_shape(const Tensor& a, const Tensor& b) {
    const auto sizes = a.sizes(), others = b.sizes();
    return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
}

bool same_kind(const Tensor& tensor, const Tensor& like, bool or_float32) {
    const auto dtype = tensor.scalar_type();
    const bool fits = dtype == like.scalar_type() || (or_float32 && dtype == torch::headeronly::ScalarType::Float);
    return fits && tensor.is_cpu();
}

bool is_like(const Tensor& tensor, const Tensor& like) { return same_shape(tensor, like) && same_kind(tensor, like); }

bool drops_rightly(const std::optional<Tensor>& seed, double p) {
    if (!(p >= 0.0 && p < 1.0)) return false;
    return seed ? seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == torch::headeronly::ScalarType::Long
                : p == 0.0;
}

Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
    return p == 0.0 ? Dropout{} : dropout_of(*static_cast<const int64_t*>(seed->const_data_ptr()), p);
}

bool dense_last(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return sizes.empty() || sizes.back() <= 1 || tensor.strides().back() == 1 || tensor.numel() == 0;
}

bool is_parameter_of(const std::optional<Tensor>& parameter, const Tensor& x) {
    return !parameter ||
           (parameter->dim() == 1 && parameter->size(0) == x.sizes().back() && same_kind(*parameter, x, true));
}

Tensor empty_gradient_of(const std::optional<Tensor>& parameter, const Tensor& x) {
    return parameter ? empty_laid_out_like(*parameter) : empty_like_dtype(x, {0});
}

Tensor empty_laid_out_like(const Tensor& like) { return empty_laid_out_like(like, like.sizes().data()); }

Tensor empty_laid_out_like(const Tensor& like, const int64_t* sizes) {
    const int dims = static_cast<int>(like.dim());
    STD_TORCH_CHECK(dims >= 1 && dims <= kMaxDims, "nearpeak serves tensors of 1 to 16 dimensions");
    const auto order = memory_order(like.strides().data(), dims);
    int64_t strides[kMaxDims], stride = 1;
    for (int position = dims - 1; position >= 0; --position) {
        strides[order[position]] = stride;
        stride *= std::max<int64_t>(1, sizes[order[position]]);
    }
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    return empty_strided(sizes, strides, dims, dtype, device_of(like));
}

Tensor empty_like_dtype(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return empty_like_dtype(like, sizes.begin(), static_cast<int>(sizes.size()));
}

Tensor empty_like_dtype(const Tensor& like, const int64_t* sizes, int dims) {
    STD_TORCH_CHECK(dims <= kMaxDims, "nearpeak serves tensors of at most 16 dimensions");
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    return empty_contiguous(sizes, dims, dtype, device_of(like));
}

Tensor empty_floats(std::initializer_list<int64_t> sizes) {
    return empty_contiguous(sizes.begin(), static_cast<int>(sizes.size()), aoti_torch_dtype_float32(),
                            {aoti_torch_device_type_cpu(), 0});
}

Tensor made_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

RowsOf::RowsOf(const Tensor& any) : tensor(any) {
    const int dims = static_cast<int>(any.dim());
    std::array<int, kMaxDims> order{};
    for (int dim = 0; dim < dims; ++dim) order[dim] = dim;
    auto found = find_rows(tensor, order, dims);
    if (!found) {
        tensor = torch::stable::contiguous(any);
        found = find_rows(tensor, order, dims);
    }
    rows = *found;
}

RowsOf::RowsOf(const Tensor& any, const Tensor& order_of) : tensor(any) {
    const int dims = static_cast<int>(any.dim());
    const auto order = memory_order(order_of.strides().data(), dims);
    auto found = find_rows(tensor, order, dims);
    if (!found) {
        tensor = empty_laid_out_like(order_of);
        torch::stable::copy_(tensor, any);
        found = find_rows(tensor, order, dims);
    }
    rows = *found;
}

int64_t past_cache_bytes() {
    static const int64_t bytes = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
        const int64_t last_cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (last_cache > 0) return last_cache / 2;
#endif
        return int64_t{16} << 20;
    }();
    return bytes;
}

}  // namespace nearpeak
