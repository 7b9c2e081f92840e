// Which kernel serves a call of RMSNorm, with how many threads and blocks.

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "kernels.cuh"

namespace nearpeak::norm::cuda {
namespace {

// Packs of a thread forward: 64 bytes in flight. Twice as many spill, and reading a row again from L2 costs less.
constexpr int kForwardPacks = 4;

// Packs of a thread backward, which also keeps a float32 sum for each element: what 64 registers hold without a spill.
template <int V>
constexpr int kBackwardPacks = V == 1 ? 8 : 2;

bool divide(int vector, const Rows& rows) { return rows.inner_stride % vector == 0 && rows.outer_stride % vector == 0; }

// Whether every access of `vector` elements is aligned: widths, strides and pointers (null ones are).
bool vectors_fit(int vector, int64_t width, std::initializer_list<Rows> strides,
                 std::initializer_list<const void*> pointers) {
    return width % vector == 0 &&
           std::all_of(strides.begin(), strides.end(), [&](const Rows& rows) { return divide(vector, rows); }) &&
           std::all_of(pointers.begin(), pointers.end(), aligned);
}

template <int V>
using Vector = std::integral_constant<int, V>;

// Calls function(T*, W*, vector length): the weight is of the input's type, or float32.
template <class Function>
void with_types(Dtype dtype, Dtype weight_dtype, bool vectors, const Function& function) {
    with_type(dtype, [&](auto* t) {
        constexpr int kVector = kWidest<std::remove_pointer_t<decltype(t)>>;
        const auto with_vector = [&](auto* w) {
            vectors ? function(t, w, Vector<kVector>()) : function(t, w, Vector<1>());
        };
        weight_dtype == dtype ? with_vector(t) : with_vector(static_cast<float*>(nullptr));
    });
}

template <class T, class W, int V>
void launch_forward(const Forward& p, void* stream) {
    const int64_t packs = p.width / V;
    if (packs > kForwardPacks * kMostThreads) {
        launch(forward_wide<T, W, V>, static_cast<unsigned>(p.rows), kMostThreads, stream, p);
        return;
    }
    const dim3 block = block_of_rows(threads_of_row(packs, kForwardPacks));
    const unsigned blocks = static_cast<unsigned>((p.rows + block.y - 1) / block.y);
    launch(forward_rows<T, W, V, kForwardPacks>, blocks, block, stream, p);
}

bool backward_vectors(const Backward& p, int vector) {
    return vectors_fit(vector, p.width, {p.grad_rows, p.hidden_rows, p.grad_hidden_rows},
                       {p.grad, p.hidden, p.grad_hidden, p.weight, p.d_hidden});
}

int vector_length(Dtype dtype) { return dtype == Dtype::float32 ? kWidest<float> : kWidest<bfloat16>; }

// How the rows of a backward call are shared out.
struct BackwardGrid {
    bool whole_rows;  // backward_rows serves it; else backward_row_sums and backward_columns do
    dim3 grid, block;
};

template <int V>
BackwardGrid backward_grid(const Backward& p) {
    constexpr int kPacks = kBackwardPacks<V>;
    const int64_t packs = p.width / V;
    const auto clamped = [](int64_t blocks, int64_t most) {
        return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, std::max<int64_t>(1, most)));
    };
    const int64_t resident = static_cast<int64_t>(processors()) * kResidentThreads;
    if (packs <= kPacks * kMostThreads) {
        const dim3 block = block_of_rows(threads_of_row(packs, kPacks));
        return {true, clamped((p.rows + block.y - 1) / block.y, resident / (block.x * block.y)), block};
    }
    const unsigned columns = static_cast<unsigned>((packs + kColumnThreads - 1) / kColumnThreads);
    return {false, dim3(columns, clamped(p.rows, resident / kColumnThreads / columns)), kColumnThreads};
}

BackwardGrid backward_grid(const Backward& p, bool vectors) {
    if (!vectors) return backward_grid<1>(p);
    return p.dtype == Dtype::float32 ? backward_grid<kWidest<float>>(p) : backward_grid<kWidest<bfloat16>>(p);
}

template <class T, class W, int V>
void launch_backward(const Backward& p, void* stream) {
    const BackwardGrid shape = backward_grid<V>(p);
    if (shape.whole_rows) {
        launch(backward_rows<T, W, V, kBackwardPacks<V>>, shape.grid, shape.block, stream, p);
    } else {
        launch(backward_row_sums<T, W, V>, static_cast<unsigned>(p.rows), kMostThreads, stream, p);
        launch(backward_columns<T, W, V>, shape.grid, shape.block, stream, p);
    }
}

}  // namespace

void forward(const Forward& p, void* stream) {
    const bool vectors = vectors_fit(vector_length(p.dtype), p.width, {p.x_rows, p.residual_rows},
                                     {p.x, p.residual, p.weight, p.y, p.hidden});
    with_types(p.dtype, p.weight_dtype, vectors, [&](auto* t, auto* w, auto vector) {
        using T = std::remove_pointer_t<decltype(t)>;
        launch_forward<T, std::remove_pointer_t<decltype(w)>, vector.value>(p, stream);
    });
}

BackwardPlan plan_backward(const Backward& p) {
    const BackwardGrid shape = backward_grid(p, backward_vectors(p, vector_length(p.dtype)));
    return {shape.whole_rows ? shape.grid.x : shape.grid.y, !shape.whole_rows};
}

void backward(const Backward& p, void* stream) {
    with_types(p.dtype, p.weight_dtype, backward_vectors(p, vector_length(p.dtype)),
               [&](auto* t, auto* w, auto vector) {
                   using T = std::remove_pointer_t<decltype(t)>;
                   launch_backward<T, std::remove_pointer_t<decltype(w)>, vector.value>(p, stream);
               });
}

void sum_partials(const PartialSum& p, void* stream) {
    const dim3 grid(static_cast<unsigned>((p.width + kLanes - 1) / kLanes));
    with_type(p.dtype, [&](auto* t) {
        launch(sum_columns<std::remove_pointer_t<decltype(t)>>, grid, dim3(kLanes, kSumLines), stream, p);
    });
}

}  // namespace nearpeak::norm::cuda
