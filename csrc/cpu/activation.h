// The activations of feed-forward layers and of linear layers' epilogues, by the numbers that operators take.
#pragma once

#include <cstdint>

namespace nearpeak {

// As in kernels/nearpeak/activations.py.
enum class Activation { relu, gelu, gelu_tanh, quick_gelu, silu, relu_squared };

inline bool is_activation(int64_t number) {
    return number >= 0 && number <= static_cast<int64_t>(Activation::relu_squared);
}

}  // namespace nearpeak
