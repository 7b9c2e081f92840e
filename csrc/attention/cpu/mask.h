// Which keys a row may look at.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace nearpeak::attention {

// Half-open ranges.
struct KeyRange {
    int64_t begin, end;
};
struct RowRange {
    int64_t begin, end;
};

// Keys that the query at `position` may look at: its own position counted from the end of the keys, the window
// around it, and no more than there are.
inline KeyRange allowed_keys(const Call& p, const Sequence& sequence, int64_t position) {
    const int64_t own = position + sequence.key_length - sequence.query_length;
    const int64_t begin = std::clamp<int64_t>(own - p.window_left, 0, sequence.key_length);
    const int64_t end = std::clamp<int64_t>(own + p.window_right + 1, 0, sequence.key_length);
    return {begin, std::max(begin, end)};
}

// Keys that some row in [row_begin, row_end) may look at: both ends of the window only move forward.
inline KeyRange allowed_keys(const Call& p, const Sequence& sequence, int64_t row_begin, int64_t row_end) {
    return {allowed_keys(p, sequence, row_begin / p.group()).begin,
            allowed_keys(p, sequence, (row_end - 1) / p.group()).end};
}

// Rows outside of which none may look at a key in [key_begin, key_end).
inline RowRange allowed_rows(const Call& p, const Sequence& sequence, int64_t key_begin, int64_t key_end) {
    const int64_t shift = sequence.key_length - sequence.query_length;
    const int64_t begin = std::clamp<int64_t>(key_begin - p.window_right - shift, 0, sequence.query_length);
    const int64_t end = std::clamp<int64_t>(key_end + p.window_left - shift, 0, sequence.query_length);
    return {begin * p.group(), std::max(begin, end) * p.group()};
}

}  // namespace nearpeak::attention
