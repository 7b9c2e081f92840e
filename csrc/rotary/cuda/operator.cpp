// The CUDA kernels of the operators that kernels/nearpeak/rotary/operator.py defines.

#include <tuple>

#include "../../cuda/stream.h"
#include "../describe.h"
#include "kernels.h"

namespace nearpeak::rotary::cuda {
namespace {

void run(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse,
         int64_t rotary_dim, const Tensor& query_out, const Tensor& key_out) {
    if (query.numel() + key.numel() == 0) return;
    const nearpeak::cuda::OnDeviceOf device(query);
    rotate(describe(query, key, cos, sin, interleaved, inverse, rotary_dim, query_out, key_out), device.stream());
}

std::tuple<Tensor, Tensor> apply_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                        bool interleaved, bool inverse, int64_t rotary_dim) {
    Tensor query_out = empty_laid_out_like(query), key_out = empty_laid_out_like(key);
    run(query, key, cos, sin, interleaved, inverse, rotary_dim, query_out, key_out);
    return {query_out, key_out};
}

void apply_rotary_inplace(Tensor query, Tensor key, const Tensor& cos, const Tensor& sin, bool interleaved,
                          bool inverse, int64_t rotary_dim) {
    run(query, key, cos, sin, interleaved, inverse, rotary_dim, query, key);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak_cuda, NEARPEAK_CUDA_KEY, library) {
    library.impl("apply_rotary", TORCH_BOX(&apply_rotary));
    library.impl("apply_rotary_", TORCH_BOX(&apply_rotary_inplace));
}

}  // namespace nearpeak::rotary::cuda
