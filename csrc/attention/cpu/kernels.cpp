// out = softmax(scale query key^T) value and its gradients: the choices of type that the kernels in prefill.h, decode.h
// and backward.h need.

#include "kernels.h"

#include <type_traits>

#include "backward.h"
#include "backward_rows.h"
#include "decode.h"
#include "pair_gradients.h"
#include "pair_products.h"
#include "prefill.h"
#include "tile_gradients.h"
#include "tile_products.h"
#include "vector_gradients.h"
#include "vector_products.h"

namespace nearpeak::attention::NEARPEAK_ISA {
namespace {

template <class T>
using VectorsOrPairs = std::conditional_t<kInPairs<T>, PairProducts, VectorProducts<T>>;

template <class T>
using GradientsInVectorsOrPairs = std::conditional_t<kInPairs<T>, PairGradients, VectorGradients<T>>;

#ifdef NEARPEAK_HAS_TILES
template <class T>
using ProductsOf = std::conditional_t<kInTiles<T>, TileProducts, VectorsOrPairs<T>>;
template <class T>
using GradientsOf = std::conditional_t<kInTiles<T>, TileGradients, GradientsInVectorsOrPairs<T>>;
#else
template <class T>
using ProductsOf = VectorsOrPairs<T>;
template <class T>
using GradientsOf = GradientsInVectorsOrPairs<T>;
#endif

template <class T>
using PrefillOf = Prefill<T, ProductsOf<T>>;

template <class T>
using BackwardBlockOf = BackwardBlock<T, GradientsOf<T>>;

int64_t prefill_scratch(const Forward& p, int64_t rows) {
    Arena counting(nullptr);
    const Task task{{}, 0, 0, rows, 0, 0};
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

int64_t rows_scratch(const Backward& p, int64_t rows) {
    Arena counting(nullptr);
    const Task task{{}, 0, 0, rows, 0, 0};
    with_type(p.dtype, [&](auto* t) { BackwardRows<std::remove_pointer_t<decltype(t)>>(p, task, counting); });
    return counting.floats();
}

void prepare_rows(const Backward& p, const Task& task, float* scratch) {
    Arena arena(scratch);
    with_type(p.dtype, [&](auto* t) { BackwardRows<std::remove_pointer_t<decltype(t)>>(p, task, arena).prepare(); });
}

void finish_rows(const Backward& p, const Task& task, float* scratch) {
    Arena arena(scratch);
    with_type(p.dtype, [&](auto* t) { BackwardRows<std::remove_pointer_t<decltype(t)>>(p, task, arena).finish(); });
}

int64_t backward_scratch(const Backward& p) {
    Arena counting(nullptr);
    const Task task{};
    with_type(p.dtype, [&](auto* t) { BackwardBlockOf<std::remove_pointer_t<decltype(t)>>(p, task, counting); });
    return counting.floats();
}

void backward(const Backward& p, const Task& task, float* scratch, const Order& order) {
    Arena arena(scratch);
    with_type(p.dtype,
              [&](auto* t) { BackwardBlockOf<std::remove_pointer_t<decltype(t)>>(p, task, arena).run(order); });
}

}  // namespace

const Kernels kernels = {prefill_scratch, prefill,      decode_scratch, decode,           merge,
                         rows_scratch,    prepare_rows, finish_rows,    backward_scratch, backward};

}  // namespace nearpeak::attention::NEARPEAK_ISA
