// The storage types that kernels serve, and the step from a type known at run time to one known to the compiler.
#pragma once

namespace nearpeak {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace nearpeak

#ifdef NEARPEAK_ISA
#include "vector.h"

namespace nearpeak::NEARPEAK_ISA {

// Calls `function` with a null pointer of the storage type.
template <class Function>
inline void with_type(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::float32:
            return function(static_cast<float*>(nullptr));
        case Dtype::bfloat16:
            return function(static_cast<bfloat16*>(nullptr));
        case Dtype::float16:
            return function(static_cast<float16*>(nullptr));
    }
}

// Likewise with two, of an input and of its parameters, which are of its type or float32.
template <class Function>
inline void with_types(Dtype dtype, Dtype parameter_dtype, Function function) {
    with_type(dtype, [&](auto* t) {
        if (parameter_dtype == dtype) {
            function(t, t);
        } else {
            function(t, static_cast<float*>(nullptr));
        }
    });
}

}  // namespace nearpeak::NEARPEAK_ISA
#endif
