// Which of a row's weights dropout keeps.
#pragma once

#include "../../cpu/dropout.h"
#include "rows.h"

namespace nearpeak::attention::NEARPEAK_ISA {

inline RowKeys row_keys(const Call& p, const Task& task, int64_t row) {
    const auto [position, head] = place_of(p, task, row);
    return p.dropout.row_keys(task.sequence.batch * p.heads + head, task.sequence.query_begin + position);
}

// Columns are counted in the key tensor.
inline uint32_t column_of(const Task& task, int64_t key) {
    return static_cast<uint32_t>(task.sequence.key_begin + key);
}

// The keys of kLanes rows: row(lane) is the number of each.
struct LaneKeys {
    template <class Row>
    LaneKeys(const Call& p, const Task& task, Row row) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const RowKeys keys = row_keys(p, task, row(lane));
            first[lane] = keys.first;
            second[lane] = keys.second;
        }
    }

    Unsigned first, second;
};

// Drops weights of kLanes rows, from row `row` on, and of the keys from `begin` on. Without dropout it keeps them all.
template <bool kDrops>
class WeightFilter {
  public:
    WeightFilter(const Call& call, const Task& task, int64_t row, int64_t begin)
        : p(call), keys(call, task, [row](int lane) { return row + lane; }), column(column_of(task, begin)) {}

    Float operator()(int64_t k, Float weight) const {
        const Unsigned columns = Unsigned{} + (column + static_cast<uint32_t>(k));
        return select(is_kept(p.dropout, keys.first, keys.second, columns), weight, Float{});
    }

  private:
    const Call& p;
    const LaneKeys keys;
    const uint32_t column;
};

template <>
class WeightFilter<false> {
  public:
    WeightFilter(const Call&, const Task&, int64_t, int64_t) {}
    Float operator()(int64_t, Float weight) const { return weight; }
};

// factors[0 .. end - begin) = what dropout multiplies the weights of keys [begin, end) of a row by; whole vectors are
// written.
inline void dropout_factors(const Call& p, const Task& task, int64_t row, int64_t begin, int64_t end, float* factors) {
    const RowKeys keys = row_keys(p, task, row);
    Unsigned columns = bitcast<Unsigned>(lane_numbers()) + column_of(task, begin);
    for (int64_t k = 0; k < end - begin; k += kLanes, columns += kLanes) {
        const Int kept = is_kept(p.dropout, Unsigned{} + keys.first, Unsigned{} + keys.second, columns);
        store(factors + k, select(kept, broadcast(p.dropout.scale), Float{}));
    }
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
