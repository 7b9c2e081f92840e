// out = softmax(scale query key^T) value, with the choices of type that the kernels in prefill.h and decode.h need.

#include "kernels.h"

#include <type_traits>

#include "decode.h"
#include "prefill.h"
#include "tile_products.h"
#include "vector_products.h"

namespace nearpeak::attention::NEARPEAK_ISA {
namespace {

#ifdef NEARPEAK_HAS_TILES
template <class T>
using ProductsOf = std::conditional_t<std::is_same_v<T, bfloat16>, TileProducts, VectorProducts<T>>;
#else
template <class T>
using ProductsOf = VectorProducts<T>;
#endif

template <class T>
using PrefillOf = Prefill<T, ProductsOf<T>>;

int64_t prefill_scratch(const Forward& p, int64_t rows) {
    Arena counting(nullptr);
    const Task task{0, 0, 0, rows, 0, 0};
    with_type(p.dtype, [&](auto* t) { PrefillOf<std::remove_pointer_t<decltype(t)>>(p, task, counting); });
    return counting.floats();
}

void prefill(const Forward& p, const Task& task, float* scratch) {
    Arena arena(scratch);
    with_type(p.dtype, [&](auto* t) { PrefillOf<std::remove_pointer_t<decltype(t)>>(p, task, arena).run(); });
}

int64_t decode_scratch(const Forward& p, int64_t rows) {
    Arena counting(nullptr);
    DecodeMemory(p, rows, counting);
    return counting.floats();
}

void decode(const Forward& p, const Task& task, float* scratch, float* partial) {
    Arena arena(scratch);
    with_type(p.dtype, [&](auto* t) { Decode<std::remove_pointer_t<decltype(t)>>(p, task, arena).run(partial); });
}

void merge(const Forward& p, const Task& task, const float* partials, int64_t count, int64_t partial_stride) {
    with_type(p.dtype, [&](auto* t) {
        merge_rows<std::remove_pointer_t<decltype(t)>>(p, task, partials, count, partial_stride);
    });
}

}  // namespace

const Kernels kernels = {prefill_scratch, prefill, decode_scratch, decode, merge};

}  // namespace nearpeak::attention::NEARPEAK_ISA
