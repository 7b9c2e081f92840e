// Which kernel serves a call of rotary embedding, with how many threads and blocks.

#include <algorithm>
#include <type_traits>

#include "kernels.cuh"

namespace nearpeak::rotary::cuda {
namespace {

// Heads that share one read of the tables, where that leaves blocks for every processor.
constexpr int64_t kHeads = 8;
constexpr int64_t kBlocksPerProcessor = 2;

bool divide(int vector, const Heads& x) {
    const int64_t strides[] = {x.from_batch, x.from_head, x.from_position, x.to_batch, x.to_head, x.to_position};
    return std::all_of(std::begin(strides), std::end(strides), [&](int64_t stride) { return stride % vector == 0; }) &&
           aligned(x.from) && aligned(x.to);
}

// Whether every access of `vector` elements is aligned.
bool vectors_fit(const Call& p, int vector) {
    const int64_t strides[] = {p.rotary_dim / 2, p.rest, p.cos_batch, p.cos_position, p.sin_batch, p.sin_position};
    return std::all_of(std::begin(strides), std::end(strides), [&](int64_t stride) { return stride % vector == 0; }) &&
           aligned(p.cos) && aligned(p.sin) && divide(vector, p.query) && divide(vector, p.key);
}

int64_t divided(int64_t number, int64_t by) { return (number + by - 1) / by; }

template <class T, class C, int V>
void launch_rotation(const Call& call, void* stream) {
    Rotation p{call, 0};
    const int64_t packs = p.rotary_dim / 2 / V, heads = p.query.heads + p.key.heads;
    const unsigned threads = static_cast<unsigned>(std::min<int64_t>(packs, kThreads));
    const dim3 block(threads, kThreads / threads);
    const int64_t blocks = divided(p.batch * p.sequence, block.y);
    p.heads_together = kHeads;
    while (p.heads_together > 1 && divided(heads, p.heads_together) * blocks < kBlocksPerProcessor * processors()) {
        p.heads_together /= 2;
    }
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(divided(heads, p.heads_together)));
    launch(p.interleaved ? rotate_rows<T, C, V, true> : rotate_rows<T, C, V, false>, grid, block, stream, p);
}

}  // namespace

void rotate(const Call& p, void* stream) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const auto with_table = [&](auto* c) {
            using C = std::remove_pointer_t<decltype(c)>;
            if (vectors_fit(p, kWidest<T>)) {
                launch_rotation<T, C, kWidest<T>>(p, stream);
            } else {
                launch_rotation<T, C, 1>(p, stream);
            }
        };
        p.table_dtype == p.dtype ? with_table(t) : with_table(static_cast<float*>(nullptr));
    });
}

}  // namespace nearpeak::rotary::cuda
