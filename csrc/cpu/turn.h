// Lets tasks of one parallel loop add to the same rows in a fixed order, so that sums do not depend on who is faster.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>

namespace nearpeak {

// How far a task has come. A task waits only for tasks of lower number, which parallel_tasks starts first: so the
// lowest one that runs never waits.
class Turn {
  public:
    static constexpr int64_t kAllRows = std::numeric_limits<int64_t>::max();

    // Rows before `row` have got all that this task adds to them.
    void finish(int64_t row) { rows.store(row, std::memory_order_release); }

    void wait_for(int64_t row) const {
        while (rows.load(std::memory_order_acquire) < row) std::this_thread::yield();
    }

  private:
    std::atomic<int64_t> rows{0};
};

}  // namespace nearpeak
