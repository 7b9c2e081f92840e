// a' = a cos - b sin,  b' = b cos + a sin,  for the pairs (a, b) of each head's first rotary_dim elements
//
// One pass over memory. A task's rows of cos and sin are widened once, into the first-level cache, in the order and
// with the signs in which every head then multiplies by them: that takes a quarter of the instructions out of the
// inner loop of bfloat16.

#include "kernels.h"

#include <cstring>
#include <type_traits>

#include "../../cpu/vector.h"

namespace nearpeak::rotary::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

// {x0, x0, x1, x1, ...} from the low or the high half of x.
template <bool kHigh, std::size_t... lane>
Float doubled(Float x, std::index_sequence<lane...>) {
    return __builtin_shufflevector(x, x, ((kHigh ? kLanes / 2 : 0) + static_cast<int>(lane) / 2)...);
}

// One position's tables as `turn_halves` reads them: cos, and sin of the direction.
template <class T, class C>
void prepare_halves(const C* cos, const C* sin, float sign, int64_t half, float* cos_to, float* sin_to) {
    for_each_two<T>(half, [&](int64_t i, auto lanes, int) {
        store(cos_to + i, load(cos + i, lanes), kept(lanes));
        store(sin_to + i, load(sin + i, lanes) * sign, kept(lanes));
    });
}

// And as `turn_pairs` reads them: (cos, cos) and (-sin, sin) per pair.
template <class C>
void prepare_pairs(const C* cos, const C* sin, float sign, int64_t half, float* cos_to, float* sin_to) {
    constexpr auto kAll = std::make_index_sequence<kLanes>();
    Float signs;
    for (int lane = 0; lane < kLanes; ++lane) signs[lane] = lane % 2 ? sign : -sign;
    for_each_vector(half, [&](int64_t i, auto lanes, int) {
        const Float c = load(cos + i, lanes), s = load(sin + i, lanes);
        store(cos_to + 2 * i, doubled<false>(c, kAll));
        store(cos_to + 2 * i + kLanes, doubled<true>(c, kAll));
        store(sin_to + 2 * i, doubled<false>(s, kAll) * signs);
        store(sin_to + 2 * i + kLanes, doubled<true>(s, kAll) * signs);
    });
}

// Pairs (x[i], x[i + half]).
template <class T>
void turn_halves(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
    for_each_two<T>(half, [&](int64_t i, auto lanes, int) {
        const auto a = load(from + i, lanes), b = load(from + half + i, lanes);
        const auto c = load(cos + i, kept(lanes)), s = load(sin + i, kept(lanes));
        store(to + i, a * c - b * s, lanes);
        store(to + half + i, b * c + a * s, lanes);
    });
}

// Pairs (x[2i], x[2i + 1]): x * cos + neighbours * sin.
template <class T>
void turn_pairs(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
    for_each_vector(2 * half, [&](int64_t i, auto lanes, int) {
        const Float x = load(from + i, lanes), neighbours = swap_lanes<1>(x, std::make_index_sequence<kLanes>());
        store(to + i, x * load(cos + i) + neighbours * load(sin + i), lanes);
    });
}

// Rows of the tables in floats, whole vectors.
int64_t row_floats(int64_t rotary_dim) { return (rotary_dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

int64_t scratch(const Call& p, int64_t positions) { return 2 * positions * row_floats(p.rotary_dim); }

struct Tables {
    float *cos, *sin;
};

Tables tables_at(const Call& p, float* scratch, int64_t position) {
    const int64_t row = row_floats(p.rotary_dim);
    return {scratch + 2 * position * row, scratch + (2 * position + 1) * row};
}

template <class T, class C>
void prepare_tables(const Call& p, int64_t batch, int64_t begin, int64_t end, float* scratch) {
    const float sign = p.inverse ? -1.0f : 1.0f;
    for (int64_t position = begin; position < end; ++position) {
        const C* cos = static_cast<const C*>(p.cos) + batch * p.cos_batch + position * p.cos_position;
        const C* sin = static_cast<const C*>(p.sin) + batch * p.sin_batch + position * p.sin_position;
        const Tables to = tables_at(p, scratch, position - begin);
        if (p.interleaved) {
            prepare_pairs(cos, sin, sign, p.rotary_dim / 2, to.cos, to.sin);
        } else {
            prepare_halves<T>(cos, sin, sign, p.rotary_dim / 2, to.cos, to.sin);
        }
    }
}

// Walks heads and positions in the order in which memory holds them.
template <class T>
void turn_heads(const Call& p, const Heads& x, int64_t batch, int64_t begin, int64_t end, float* scratch) {
    const auto turn = p.interleaved ? turn_pairs<T> : turn_halves<T>;
    const auto one = [&](int64_t head, int64_t position) {
        const Tables tables = tables_at(p, scratch, position - begin);
        const T* from =
            static_cast<const T*>(x.from) + batch * x.from_batch + head * x.from_head + position * x.from_position;
        T* to = static_cast<T*>(x.to) + batch * x.to_batch + head * x.to_head + position * x.to_position;
        turn(from, to, tables.cos, tables.sin, p.rotary_dim / 2);
        if (p.rest) std::memcpy(to + p.rotary_dim, from + p.rotary_dim, p.rest * sizeof(T));
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

void rotate(const Call& p, int64_t batch, int64_t begin, int64_t end, float* scratch) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        if (p.table_dtype == p.dtype) {
            prepare_tables<T, T>(p, batch, begin, end, scratch);
        } else {
            prepare_tables<T, float>(p, batch, begin, end, scratch);
        }
        turn_heads<T>(p, p.query, batch, begin, end, scratch);
        turn_heads<T>(p, p.key, batch, begin, end, scratch);
    });
}

}  // namespace

const Kernels kernels = {scratch, rotate};

}  // namespace nearpeak::rotary::NEARPEAK_ISA
