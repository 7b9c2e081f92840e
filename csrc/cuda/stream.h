// Where kernels of a tensor run: on its device, in PyTorch's current stream there. In the emulation, on the host.
#pragma once

#include "../cpu/tensors.h"

#ifdef NEARPEAK_EMULATED
#define NEARPEAK_CUDA_KEY CPU  // the dispatch key that the operators register for

namespace nearpeak::cuda {

class OnDeviceOf {
  public:
    explicit OnDeviceOf(const Tensor&) {}
    void* stream() const { return nullptr; }
};

}  // namespace nearpeak::cuda
#else
#include <torch/csrc/stable/accelerator.h>

#define NEARPEAK_CUDA_KEY CUDA

namespace nearpeak::cuda {

class OnDeviceOf {
  public:
    explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
    }
    void* stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_;
};

}  // namespace nearpeak::cuda
#endif
