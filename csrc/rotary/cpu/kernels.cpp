// a' = a cos - b sin,  b' = b cos + a sin,  for the pairs (a, b) of each head's first rotary_dim elements
//
// One pass over memory. A task's rows of cos and sin are widened once, into the first-level cache, in the order and
// with the signs in which every head then multiplies by them: that takes a quarter of the instructions out of the
// inner loop of bfloat16.

#include "kernels.h"

#include <cstring>
#include <type_traits>

#include "../../cpu/two.h"

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

// One position of kHeads heads, which share its tables.
template <class T>
struct Position {
    const T* from;
    T* to;
    int64_t from_head, to_head;  // from one head to the next
    const float *cos, *sin;
};

// Pairs (x[i], x[i + half]). All is read before any is written: else, where heads lie a power of two apart, processors
// take the next head's loads for readers of what was just stored.
template <int kHeads, class T>
void turn_halves(const Position<T>& at, int64_t half) {
    for_each_two<T>(half, [&](int64_t i, auto lanes, int) {
        const auto c = load(at.cos + i, kept(lanes)), s = load(at.sin + i, kept(lanes));
        decltype(load(at.from, lanes)) a[kHeads], b[kHeads];
        for (int head = 0; head < kHeads; ++head) {
            const T* from = at.from + head * at.from_head + i;
            a[head] = load(from, lanes);
            b[head] = load(from + half, lanes);
        }
        for (int head = 0; head < kHeads; ++head) {
            T* to = at.to + head * at.to_head + i;
            store(to, a[head] * c - b[head] * s, lanes);
            store(to + half, b[head] * c + a[head] * s, lanes);
        }
    });
}

// Pairs (x[2i], x[2i + 1]): x * cos + neighbours * sin.
template <int kHeads, class T>
void turn_pairs(const Position<T>& at, int64_t half) {
    for_each_vector(2 * half, [&](int64_t i, auto lanes, int) {
        const Float c = load(at.cos + i), s = load(at.sin + i);
        Float x[kHeads];
        for (int head = 0; head < kHeads; ++head) x[head] = load(at.from + head * at.from_head + i, lanes);
        for (int head = 0; head < kHeads; ++head) {
            const Float neighbours = swap_lanes<1>(x[head], std::make_index_sequence<kLanes>());
            store(at.to + head * at.to_head + i, x[head] * c + neighbours * s, lanes);
        }
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

// Heads that share a load of the tables: as many as registers hold beside them.
constexpr int64_t kTogether = kLanes == 16 ? 4 : 2;

template <int kHeads, class T>
void turn_position(const Call& p, const Heads& x, int64_t batch, int64_t head, int64_t position, const Tables& tables) {
    const Position<T> at{
        static_cast<const T*>(x.from) + batch * x.from_batch + head * x.from_head + position * x.from_position,
        static_cast<T*>(x.to) + batch * x.to_batch + head * x.to_head + position * x.to_position,
        x.from_head,
        x.to_head,
        tables.cos,
        tables.sin};
    if (p.interleaved) {
        turn_pairs<kHeads>(at, p.rotary_dim / 2);
    } else {
        turn_halves<kHeads>(at, p.rotary_dim / 2);
    }
    if (p.rest == 0) return;
    for (int64_t each = 0; each < kHeads; ++each) {
        std::memcpy(at.to + each * at.to_head + p.rotary_dim, at.from + each * at.from_head + p.rotary_dim,
                    p.rest * sizeof(T));
    }
}

// Walks heads and positions in the order in which memory holds them.
template <class T>
void turn_heads(const Call& p, const Heads& x, int64_t batch, int64_t begin, int64_t end, float* scratch) {
    const int64_t together = x.heads / kTogether * kTogether;
    const auto turn = [&](int64_t head, int64_t position) {
        const Tables tables = tables_at(p, scratch, position - begin);
        if (head < together) return turn_position<kTogether, T>(p, x, batch, head, position, tables);
        turn_position<1, T>(p, x, batch, head, position, tables);
    };
    const auto next = [&](int64_t head) { return head < together ? head + kTogether : head + 1; };
    if (x.from_head < x.from_position) {
        for (int64_t position = begin; position < end; ++position) {
            for (int64_t head = 0; head < x.heads; head = next(head)) turn(head, position);
        }
    } else {
        for (int64_t head = 0; head < x.heads; head = next(head)) {
            for (int64_t position = begin; position < end; ++position) turn(head, position);
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
