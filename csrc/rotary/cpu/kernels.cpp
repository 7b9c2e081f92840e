// a' = a cos - b sin,  b' = b cos + a sin,  for the pairs (a, b) of each head's elements
//
// One pass over memory; cos and sin of a position are read from memory once and from the cache for the other heads.

#include "kernels.h"

#include <type_traits>

#include "../../cpu/vector.h"

namespace nearpeak::rotary::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

// Pairs (x[i], x[i + half]).
template <class T, class C>
void rotate_halves(const T* from, T* to, const C* cos, const C* sin, float sign, int64_t half) {
    for_each_two<T>(half, [&](int64_t i, auto lanes, int) {
        const auto a = load(from + i, lanes), b = load(from + half + i, lanes);
        const auto c = load(cos + i, lanes), s = load(sin + i, lanes) * sign;
        store(to + i, a * c - b * s, lanes);
        store(to + half + i, b * c + a * s, lanes);
    });
}

// {x0, x0, x1, x1, ...} from the low or the high half of x.
template <bool kHigh, std::size_t... lane>
Float doubled(Float x, std::index_sequence<lane...>) {
    return __builtin_shufflevector(x, x, ((kHigh ? kLanes / 2 : 0) + static_cast<int>(lane) / 2)...);
}

// Pairs (x[2i], x[2i + 1]): x * cos + swapped(x) * (-sin, sin), on vectors of whole pairs.
template <class T, class C>
void rotate_interleaved(const T* from, T* to, const C* cos, const C* sin, float sign, int64_t half) {
    constexpr auto kAll = std::make_index_sequence<kLanes>();
    Float signs;
    for (int lane = 0; lane < kLanes; ++lane) signs[lane] = lane % 2 ? sign : -sign;
    const auto rotated = [&](Float x, Float c, Float s) { return x * c + swap_lanes<1>(x, kAll) * (s * signs); };
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Float c = load(cos + i), s = load(sin + i);
        const Float first = load(from + 2 * i), second = load(from + 2 * i + kLanes);
        store(to + 2 * i, rotated(first, doubled<false>(c, kAll), doubled<false>(s, kAll)), AllLanes{});
        store(to + 2 * i + kLanes, rotated(second, doubled<true>(c, kAll), doubled<true>(s, kAll)), AllLanes{});
    }
    for (; i < half; i += kLanes / 2) {
        const int64_t pairs = half - i < kLanes / 2 ? half - i : kLanes / 2;
        const Float c = doubled<false>(load(cos + i, pairs), kAll), s = doubled<false>(load(sin + i, pairs), kAll);
        store(to + 2 * i, rotated(load(from + 2 * i, 2 * pairs), c, s), 2 * pairs);
    }
}

template <class T, class C>
void rotate_head(const Rotation& p, const T* from, T* to, const C* cos, const C* sin) {
    const float sign = p.inverse ? -1.0f : 1.0f;
    if (p.interleaved) {
        rotate_interleaved(from, to, cos, sin, sign, p.head_dim / 2);
    } else {
        rotate_halves(from, to, cos, sin, sign, p.head_dim / 2);
    }
}

// Walks heads and positions in the order in which memory holds them.
template <class T, class C>
void rotate_heads(const Rotation& p, const Heads& x, int64_t batch, int64_t begin, int64_t end) {
    const auto one = [&](int64_t head, int64_t position) {
        rotate_head(
            p, static_cast<const T*>(x.from) + batch * x.from_batch + head * x.from_head + position * x.from_position,
            static_cast<T*>(x.to) + batch * x.to_batch + head * x.to_head + position * x.to_position,
            static_cast<const C*>(p.cos) + batch * p.cos_batch + position * p.cos_position,
            static_cast<const C*>(p.sin) + batch * p.sin_batch + position * p.sin_position);
    };
    if (x.from_head < x.from_position) {
        for (int64_t position = begin; position < end; ++position) {
            for (int64_t head = 0; head < x.heads; ++head) one(head, position);
        }
    } else {
        for (int64_t head = 0; head < x.heads; ++head) {
            for (int64_t position = begin; position < end; ++position) one(head, position);
        }
    }
}

void rotate(const Rotation& p, int64_t batch, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        if (p.table_dtype == p.dtype) {
            rotate_heads<T, T>(p, p.query, batch, begin, end);
            rotate_heads<T, T>(p, p.key, batch, begin, end);
        } else {
            rotate_heads<T, float>(p, p.query, batch, begin, end);
            rotate_heads<T, float>(p, p.key, batch, begin, end);
        }
    });
}

}  // namespace

const Kernels kernels = {rotate};

}  // namespace nearpeak::rotary::NEARPEAK_ISA
