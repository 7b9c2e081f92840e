// What a block mask hides of a run of keys from a panel's rows, where some rows see some of them.
//
// Bits lie row by row, and scores key by key with the rows across the lanes: so bits are transposed on the way, but
// only of keys that some row sees and another does not. Of a causal mask that is as many as the panel has positions.
#pragma once

#include "../../cpu/arena.h"
#include "panel.h"
#include "score_terms.h"

namespace nearpeak::attention::NEARPEAK_ISA {

class PanelMask {
  public:
    explicit PanelMask(Arena& arena) : allowed(arena.take<uint8_t>((kPanel + 2) * kStride)) {}

    // Keys [begin, end), kMostKeys at most.
    void look_at(const Call& p, const Task& task, PanelRows rows, int64_t begin, int64_t end) {
        uint8_t* const any = allowed + kPanel * kStride;
        uint8_t* const all = any + kStride;
        first_key = begin;
        row_count = rows.end - rows.begin;
        std::memset(any, 0, kStride);
        std::memset(all, 1, kStride);
        for (int64_t row = 0; row < row_count; ++row) {
            uint8_t* const of_row = allowed + row * kStride;
            write_permissions(p, task, rows.begin + row, begin, end, of_row);
            for (int64_t k = 0; k < end - begin; ++k) {
                any[k] |= of_row[k];
                all[k] &= of_row[k];
            }
        }
    }

    // Of keys [begin, end), those between the first and the last that some row sees.
    KeyRange seen(int64_t begin, int64_t end) const { return hull(allowed + kPanel * kStride, 1, begin, end); }

    // Of keys [begin, end), those between the first and the last that some row does not see.
    KeyRange hidden(int64_t begin, int64_t end) const { return hull(allowed + (kPanel + 1) * kStride, 0, begin, end); }

    // scores[key][row] += -infinity where a row of one half of the panel may not look at a key of [begin, end).
    void hide(int half, int64_t begin, int64_t end, float* scores) const {
        const auto lanes = lanes_of<Permission>(half * kLanes, row_count, [&](int64_t row) {
            return reinterpret_cast<const Permission*>(allowed + row * kStride + begin - first_key);
        });
        for (int64_t k = 0; k < end - begin; k += kLanes) {
            Float block[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                block[lane] = lanes.rows[lane] ? load(lanes.rows[lane] + k) : Float{};
            }
            transpose(block);
            for (int64_t i = 0; i < std::min<int64_t>(kLanes, end - begin - k); ++i) {
                float* const at = scores + (k + i) * kPanel + half * kLanes;
                store(at, load(at) + block[i]);
            }
        }
    }

  private:
    static constexpr int64_t kStride = SeenBlocks::kMostKeys + kLanes;

    uint8_t* const allowed;  // kPanel x keys; then of each key whether any row sees it, and whether all do
    int64_t first_key = 0, row_count = 0;

    KeyRange hull(const uint8_t* keys, uint8_t value, int64_t begin, int64_t end) const {
        while (begin < end && keys[begin - first_key] != value) ++begin;
        while (begin < end && keys[end - 1 - first_key] != value) --end;
        return {begin, end};
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
