// The CUDA kernels of the operators that kernels/nearpeak/rotary/operator.py defines.

#include <tuple>

#include "../../cuda/stream.h"
#include "kernels.h"

namespace nearpeak::rotary::cuda {
namespace {

int64_t batch_stride(const Tensor& table) { return table.dim() == 3 && table.size(0) > 1 ? table.stride(0) : 0; }

Heads heads_of(const Tensor& from, const Tensor& to) {
    Heads x{};
    x.from = from.const_data_ptr();
    x.to = to.mutable_data_ptr();
    x.heads = from.size(1);
    x.from_batch = from.stride(0);
    x.from_head = from.stride(1);
    x.from_position = from.stride(2);
    x.to_batch = to.stride(0);
    x.to_head = to.stride(1);
    x.to_position = to.stride(2);
    return x;
}

void run(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse,
         const Tensor& query_out, const Tensor& key_out) {
    if (query.numel() + key.numel() == 0) return;
    const nearpeak::cuda::OnDeviceOf device(query);
    Rotation p{};
    p.query = heads_of(query, query_out);
    p.key = heads_of(key, key_out);
    p.cos = cos.const_data_ptr();
    p.sin = sin.const_data_ptr();
    p.cos_batch = batch_stride(cos);
    p.cos_position = cos.stride(cos.dim() - 2);
    p.sin_batch = batch_stride(sin);
    p.sin_position = sin.stride(sin.dim() - 2);
    p.batch = query.size(0);
    p.sequence = query.size(2);
    p.head_dim = query.size(3);
    p.inverse = inverse;
    p.dtype = dtype_of(query);
    p.table_dtype = dtype_of(cos);
    rotate(p, interleaved, device.stream());
}

std::tuple<Tensor, Tensor> apply_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                        bool interleaved, bool inverse) {
    Tensor query_out = empty_laid_out_like(query), key_out = empty_laid_out_like(key);
    run(query, key, cos, sin, interleaved, inverse, query_out, key_out);
    return {query_out, key_out};
}

void apply_rotary_inplace(Tensor query, Tensor key, const Tensor& cos, const Tensor& sin, bool interleaved,
                          bool inverse) {
    run(query, key, cos, sin, interleaved, inverse, query, key);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak_cuda, NEARPEAK_CUDA_KEY, library) {
    library.impl("apply_rotary", TORCH_BOX(&apply_rotary));
    library.impl("apply_rotary_", TORCH_BOX(&apply_rotary_inplace));
}

}  // namespace nearpeak::rotary::cuda
