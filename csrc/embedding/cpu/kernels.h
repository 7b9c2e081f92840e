// Embeddings: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/column_sums.h"
#include "../../cpu/dropout.h"
#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"
#include "../../cpu/rows.h"

namespace nearpeak::embedding {

// Which row of a table each token takes: ids[token % period], or without ids token % period itself.
struct Lookup {
    const int64_t* ids;
    int64_t period;

    int64_t operator()(int64_t token) const {
        const int64_t place = token < period ? token : token % period;
        return ids ? ids[place] : place;
    }
};

struct Table {
    const void* data;
    int64_t stride;  // elements from one row to the next; rows are dense
    Lookup lookup;

    int64_t row_of(int64_t token) const { return lookup(token) * stride; }
};

// Of words, positions and segments; the last two may be absent.
constexpr int kMostTables = 3;

struct Call {
    Table tables[kMostTables];
    int table_count;
    float scale;  // of the first table's rows
    bool normalises;
    float eps;
    const void *norm_weight, *norm_bias;  // (width,), or null
    Dropout dropout;
    int64_t tokens, width;
    Dtype dtype, norm_dtype;  // of tables and results; of the norm's weight and bias
};

struct Forward : Call {
    void* y;  // (tokens, width), dense
};

struct Backward : Call {
    const void* grad;
    Rows grad_rows;
    void* d_hidden;  // (tokens, width), dense
};

// d_table[row] = scale * the sum of d_hidden[token] over the tokens that took the row, in their order. Each row has a
// chain of them: first[row], next[first[row]] and so on; -1 ends it.
struct TableGradient {
    const void* d_hidden;
    Rows d_hidden_rows;
    const int64_t *first, *next;
    void* d_table;  // (rows, width), dense
    int64_t width;
    float scale;
    Dtype dtype;
};

// Columns that one row's gradient is summed in at once.
constexpr int64_t kGradientColumns = 256;

// Whether so many tokens took the row that its columns are worth spreading over tasks.
inline bool is_long_chain(const TableGradient& p, int64_t row) {
    constexpr int64_t kLongChain = 256;
    int64_t count = 0;
    for (int64_t token = p.first[row]; token >= 0 && count <= kLongChain; token = p.next[token]) ++count;
    return count > kLongChain;
}

struct Kernels {
    // Tokens [begin, end). `scratch` holds padded(width) floats where the call normalises.
    void (*forward)(const Forward&, int64_t begin, int64_t end, float* scratch);
    // Tokens [begin, end); adds their gradients of the norm's weight and bias to the sums. `scratch` holds
    // 2 padded(width) floats where the call normalises.
    void (*backward)(const Backward&, int64_t begin, int64_t end, ColumnSums sums, float* scratch);
    // total[column] = sum of all parts' column, for columns [begin, end), in the norm's type.
    void (*sum_parts)(const Backward&, Parts parts, void* total, int64_t begin, int64_t end);
    // Rows [begin, end) but for those whose chain is long; and of one row at most kGradientColumns columns.
    void (*table_gradient)(const TableGradient&, int64_t begin, int64_t end);
    void (*row_gradient)(const TableGradient&, int64_t row, int64_t first_column, int64_t last_column);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::embedding
