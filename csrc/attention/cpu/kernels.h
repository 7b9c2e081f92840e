// Attention: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/dropout.h"
#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"
#include "../../cpu/turn.h"

namespace nearpeak::attention {

// (batch, heads, length, head_dim), dense in the last dimension; strides in elements.
struct Strides {
    int64_t batch, head, position;
};

// (batch, heads, query length, key length), dense in the last dimension; strides are 0 where it broadcasts.
struct PairTensor {
    const void* data;  // null for none
    Strides strides;
    Dtype dtype;
};

// Queries and keys that belong together: a batch entry, or in a packed batch one of the sequences that lie in it one
// behind the other. Rows, positions and keys are counted from its own first ones.
struct Sequence {
    int64_t batch, query_begin, query_length, key_begin, key_length;
    int64_t padded_begin;  // of a key head's rows, in what backward keeps of every row
};

// A block of keys that a block of queries sees: its number, and which of the masks' bits say what of it, -1 for all.
struct BlockEntry {
    int32_t block, part;
};

// See block_mask.h.
struct BlockTables {
    const int64_t* starts;      // (batch or 1, heads or 1, blocks of queries + 1) of entries; null for no block mask
    const BlockEntry* entries;  // in ascending order of blocks of keys
    const uint8_t* bits;        // (parts, rows, keys), bytes of 0 and 1
    int64_t batch_stride, head_stride;  // of starts; 0 where they broadcast
    int64_t rows, keys;                 // of a block
};

// The operations of score programs, numbered as in kernels/nearpeak/attention/score_instructions.py.
enum class ScoreOperation : int32_t {
    constant,
    integer,
    load,
    load_integer,
    index,
    add,
    subtract,
    multiply,
    divide,
    minimum,
    maximum,
    negative,
    absolute,
    exp,
    log,
    sqrt,
    tanh,
    sigmoid,
    sin,
    cos,
    power,
    floor,
    select,
    less,
    less_equal,
    equal,
    add_integers,
    subtract_integers,
    multiply_integers,
    floor_divide,
    remainder,
    minimum_integers,
    maximum_integers,
    negative_integer,
    absolute_integer,
    less_integers,
    less_equal_integers,
    equal_integers,
    select_integers,
    both,
    either,
    one_alone,
    opposite,
    to_float,
    truth_to_float,
    truth_to_integer,
    to_integer,
    end
};

struct ScoreInstruction {
    ScoreOperation operation;
    int32_t a, b, c, d;  // values before it, or what the operation takes them for
    float constant;
};

struct ScoreTensor {
    const void* data;  // floats or int32
    int64_t count;
};

// Values 0 to 4 are the score, batch entry, head, query and key; each instruction makes the next.
constexpr int32_t kScoreArguments = 5, kMostScoreValues = 96;

struct ScoreProgram {
    const ScoreInstruction* instructions = nullptr;
    const ScoreTensor* tensors = nullptr;
    int32_t count = 0, value_count = 0;  // instructions in all, and those that the new score alone needs
    int32_t value = 0, derivative = 0;   // which values these are
};

// What both directions need.
struct Call {
    const void* query;
    const void* key;
    const void* value;
    Strides query_strides, key_strides, value_strides;
    int64_t batch, heads, key_heads, query_length, key_length;  // of the tensors
    const Sequence* sequences;
    int64_t sequence_count;
    int64_t head_dim, value_dim;  // of query and key; of value and out
    float scale;
    float softcap;                      // 0 for none
    int64_t window_left, window_right;  // keys p - left .. p + right of position p; large where open
    Dtype dtype;
    // What score_terms.h adds to the scores. A mask's elements are bytes, whatever its dtype says.
    PairTensor bias, mask;
    const float* alibi_slopes;  // (batch or 1, heads), or null
    int64_t alibi_batch_stride;
    const float* sinks;  // (heads), or null
    Dropout dropout;
    BlockTables blocks;
    ScoreProgram score_program;

    bool has_terms() const { return bias.data || mask.data || alibi_slopes; }
    bool has_program() const { return score_program.instructions; }
    // Whether scores are more than scaled products before they are masked.
    bool shapes_scores() const { return softcap > 0 || has_terms() || has_program(); }
    bool drops() const { return dropout.drops(); }
    // Whether eager operators alone do such a call in PyTorch, forward and backward: then gradients are held against
    // exact softmax, where else against its fused backward's too.
    bool eager_elsewhere() const { return shapes_scores() || sinks || drops() || value_dim != head_dim; }

    // Rows are the (position, head) pairs that share one key head, heads of a position next to each other: so that
    // grouped heads share what is loaded, and a run of rows spans few positions under a causal mask.
    int64_t group() const { return heads / key_heads; }
    int64_t rows(const Sequence& sequence) const { return sequence.query_length * group(); }
    // Pairs of a sequence and a key head.
    int64_t pairs() const { return sequence_count * key_heads; }
};

struct Forward : Call {
    void* out;
    float* lse;  // (batch, heads, query length), contiguous
    Strides out_strides;
};

// What backward needs to know of a row: P = factor 2^(score - lse), dScore = P (dP - delta + grad_lse).
struct RowStatistics {
    float lse, factor;  // in base 2; the factor makes up for what rounding took from it
    float delta;        // rowsum(P dP)
    float grad_lse;
};

// Backward takes a block of rows and a block of keys at a time: multiples of every tile and panel.
//
// A block of keys is packed once and stays in the second-level cache (512 KiB) while all rows that see it pass by, with
// the scores of the two blocks. Longer blocks make longer sums per read and write of a tile of results. Zen 3, float32,
// S 1536, head_dim 64, one thread: 48 x 96 79 % of the peak, 48 x 192 83 %, 72 x 192 84 %, 96 x 192 83 %.
constexpr int64_t kBlockRows = 96, kBlockKeys = 192;

struct Backward : Call {
    const void* out;
    const void* grad_out;
    const float* lse;       // (batch, heads, query length), contiguous
    const float* grad_lse;  // likewise, or null for zeros
    void *d_query, *d_key, *d_value;
    Strides out_strides, grad_out_strides, d_query_strides, d_key_strides, d_value_strides;

    // The bias's gradient in float32, of bias's shape, zeros at first; null where it is not asked for.
    float* d_bias;
    Strides d_bias_strides;

    // Of every pair, and of `padded_rows` rows each: what `prepare_rows` finds out, and the sums of d_query.
    int64_t all_padded_rows;  // of a key head
    RowStatistics* statistics;
    float* d_query_sums;

    int64_t padded_rows(const Sequence& sequence) const {
        return (rows(sequence) + kBlockRows - 1) / kBlockRows * kBlockRows;
    }
    int64_t number_of(const Sequence& sequence, int64_t key_head, int64_t row) const {
        return key_head * all_padded_rows + sequence.padded_begin + row;
    }
    // A multiple of every panel.
    int64_t padded_dim() const { return (head_dim + 31) / 32 * 32; }
};

// So few keys that exact softmax makes hardly any error: in float32, backward then takes no shortcut that shows.
constexpr int64_t kFewKeys = 64;

// Rows of a decode task at most.
constexpr int64_t kDecodeRows = 8;

// Rows [row_begin, row_end) of one sequence and key head, over keys [key_begin, key_end).
struct Task {
    Sequence sequence;
    int64_t key_head, row_begin, row_end, key_begin, key_end;
};

// Rows from `row` on, kBlockRows at most, that a task of backward adds to, and the number of the task that adds to them
// before it (-1 for none).
struct Visit {
    int64_t row, before;
};

// When a task of backward adds to which rows: its number, and the task that comes before it with all its rows (-1 for
// none), or with each visit's.
struct Order {
    Turn* turns;  // of all tasks
    int64_t own, before;
    const Visit* visits;  // with a block mask, the rows that see the task's keys
    int64_t visit_count;
};

struct Kernels {
    // Floats of scratch memory that a task of so many rows needs.
    int64_t (*prefill_scratch)(const Forward&, int64_t rows);
    // Many rows: queries lie across the lanes of a vector.
    void (*prefill)(const Forward&, const Task&, float* scratch);

    int64_t (*decode_scratch)(const Forward&, int64_t rows);
    // Few rows: head_dim lies across the lanes. With `partial`, writes per row the maximum (base 2), the sum and
    // the unscaled output, value_dim + 2 floats, for `merge`; else out and lse.
    void (*decode)(const Forward&, const Task&, float* scratch, float* partial);
    // Rows of `task` from `count` partial results, `partial_stride` floats apart.
    void (*merge)(const Forward&, const Task& task, const float* partials, int64_t count, int64_t partial_stride);

    // Scratch memory of the next two, for a task of so many rows.
    int64_t (*rows_scratch)(const Backward&, int64_t rows);
    // Statistics of the task's rows, and zeros for their sums.
    void (*prepare_rows)(const Backward&, const Task&, float* scratch);
    // d_query of the task's rows from their sums.
    void (*finish_rows)(const Backward&, const Task&, float* scratch);

    int64_t (*backward_scratch)(const Backward&);
    // d_key and d_value of the task's keys, complete, from its rows, which it adds to d_query_sums of those rows, in
    // turn.
    void (*backward)(const Backward&, const Task&, float* scratch, const Order&);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::attention
