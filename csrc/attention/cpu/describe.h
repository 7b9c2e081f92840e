// From the operators' arguments to what the kernels read: whether they fit, where they lie, copies where a kernel could
// not read them as they are.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../../cpu/tensors.h"
#include "kernels.h"

namespace nearpeak::attention {

// As in kernels/nearpeak/attention/operator.py.
constexpr int64_t kMaxHeadDim = 576;

using OptionalTensor = std::optional<Tensor>;

// What becomes of the scores: what a program makes of them, and what is added.
struct Terms {
    OptionalTensor mask, bias, alibi_slopes, sinks, score_program;
    std::optional<std::vector<Tensor>> score_tensors;
};

struct Options {
    std::optional<int64_t> window_left, window_right;
    double scale;
    std::optional<double> softcap;
    OptionalTensor dropout_seed;
    double dropout_p;
};

// Where the sequences of a batch begin and end: see `sequences_of`.
struct Bounds {
    OptionalTensor query_starts, key_starts, key_ends;

    bool given() const { return query_starts || key_starts || key_ends; }
};

inline Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

inline bool serves(int64_t head_dim) { return head_dim >= 1 && head_dim <= kMaxHeadDim; }

inline bool fits(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options) {
    if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4 || !query.is_cpu() || !same_kind(key, query) ||
        !same_kind(value, query)) {
        return false;
    }
    const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
    return std::equal(v.begin(), v.begin() + 3, k.begin()) && k[0] == q[0] && k[3] == q[3] && serves(q[3]) &&
           serves(v[3]) && (k[1] == 0 ? q[1] == 0 : q[1] % k[1] == 0) && dense_last(query) && dense_last(key) &&
           dense_last(value) && drops_rightly(options.dropout_seed, options.dropout_p) &&
           (!options.softcap || (*options.softcap > 0 && std::isfinite(*options.softcap)));
}

// Of (batch, heads, query length, key length), each size but the last may be 1.
inline bool is_of_pairs(const Tensor& tensor, const Tensor& query, const Tensor& key) {
    if (tensor.dim() != 4 || tensor.size(3) != key.size(2) || !tensor.is_cpu()) return false;
    for (int dim = 0; dim < 3; ++dim) {
        if (tensor.size(dim) != 1 && tensor.size(dim) != query.size(dim)) return false;
    }
    return true;
}

inline bool is_of_heads(const Tensor& tensor, const Tensor& query, bool or_batch) {
    const bool batched = or_batch && tensor.dim() == 2 && tensor.size(0) == query.size(0);
    return (tensor.dim() == 1 || batched) && tensor.size(tensor.dim() - 1) == query.size(1) &&
           same_kind(tensor, query, true);
}

inline bool fit(const Terms& terms, const Tensor& query, const Tensor& key) {
    const auto& [mask, bias, alibi_slopes, sinks, score_program, score_tensors] = terms;
    if (mask && !(is_of_pairs(*mask, query, key) && mask->scalar_type() == torch::headeronly::ScalarType::Bool)) {
        return false;
    }
    // Programs count in 32 bits.
    if (score_program && std::max(query.size(2), key.size(2)) > std::numeric_limits<int32_t>::max()) return false;
    return (!bias || (is_of_pairs(*bias, query, key) && same_kind(*bias, query, true))) &&
           (!alibi_slopes || is_of_heads(*alibi_slopes, query, true)) && (!sinks || is_of_heads(*sinks, query, false));
}

// The tensor itself, or a copy whose last dimension is dense.
inline Tensor made_dense_last(const Tensor& tensor) {
    return tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) == 1
               ? tensor
               : torch::stable::contiguous(tensor);
}

inline void make_readable(Terms& terms) {
    using torch::headeronly::ScalarType;
    for (OptionalTensor* pairs : {&terms.mask, &terms.bias}) {
        if (*pairs) *pairs = made_dense_last(**pairs);
    }
    for (OptionalTensor* heads : {&terms.alibi_slopes, &terms.sinks}) {
        if (*heads) *heads = made_contiguous(torch::stable::to(**heads, ScalarType::Float));
    }
}

// 0 along dimensions of size 1.
inline Strides broadcast_strides(const Tensor& tensor) {
    const auto stride = [&](int dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
    return {stride(0), stride(1), stride(2)};
}

// The numbers of a tensor of int32 or int64 in one dimension.
inline std::vector<int64_t> numbers_of(const Tensor& tensor) {
    using torch::headeronly::ScalarType;
    const auto dtype = tensor.scalar_type();
    require(tensor.is_cpu() && tensor.dim() == 1 && (dtype == ScalarType::Int || dtype == ScalarType::Long),
            "attention");
    const Tensor numbers = made_contiguous(torch::stable::to(tensor, ScalarType::Long));
    const auto* first = static_cast<const int64_t*>(numbers.const_data_ptr());
    return {first, first + numbers.numel()};
}

// Batch entries, each with all its keys or those from key_starts to key_ends; or with query_starts the sequences of a
// packed batch, whose keys end where the next one's begin unless key_ends says otherwise.
inline std::vector<Sequence> sequences_of(const Tensor& query, const Tensor& key, const Bounds& bounds) {
    const int64_t queries = query.size(2), keys = key.size(2);
    std::vector<Sequence> sequences;
    if (!bounds.given()) {
        for (int64_t batch = 0; batch < query.size(0); ++batch) sequences.push_back({batch, 0, queries, 0, keys, 0});
        return sequences;
    }
    std::vector<int64_t> query_starts, starts, ends;
    const bool packed = bounds.query_starts.has_value();
    if (packed) query_starts = numbers_of(*bounds.query_starts);
    const int64_t count = packed ? static_cast<int64_t>(query_starts.size()) - 1 : query.size(0);
    starts = bounds.key_starts ? numbers_of(*bounds.key_starts) : std::vector<int64_t>(std::max<int64_t>(count, 0), 0);
    if (bounds.key_ends) {
        ends = numbers_of(*bounds.key_ends);
    } else if (packed && !starts.empty()) {
        ends.assign(starts.begin() + 1, starts.end());
    } else {
        ends.assign(starts.size(), keys);
    }
    require(count >= 0 && static_cast<int64_t>(starts.size()) == count + packed &&
                static_cast<int64_t>(ends.size()) == count &&
                (!packed || (query.size(0) == 1 && query_starts.front() == 0 && query_starts.back() == queries)),
            "attention");
    for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = packed ? query_starts[i] : 0, end = packed ? query_starts[i + 1] : queries;
        require(begin <= end && starts[i] >= 0 && starts[i] <= ends[i] && ends[i] <= keys, "attention");
        sequences.push_back({packed ? 0 : i, begin, end - begin, starts[i], ends[i] - starts[i], 0});
    }
    return sequences;
}

// Sets what both directions need of a call. `terms` are readable; they and `sequences` outlive the call.
inline void describe(Call& p, const Tensor& query, const Tensor& key, const Tensor& value, const Terms& terms,
                     const Options& options, const std::vector<Sequence>& sequences) {
    constexpr int64_t kOpen = int64_t{1} << 60;
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.value = value.const_data_ptr();
    p.query_strides = strides_of(query);
    p.key_strides = strides_of(key);
    p.value_strides = strides_of(value);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.query_length = query.size(2);
    p.head_dim = query.size(3);
    p.value_dim = value.size(3);
    p.sequences = sequences.data();
    p.sequence_count = static_cast<int64_t>(sequences.size());
    p.key_heads = key.size(1);
    p.key_length = key.size(2);
    p.scale = static_cast<float>(options.scale);
    p.softcap = static_cast<float>(options.softcap.value_or(0.0));
    p.window_left = options.window_left ? std::clamp(*options.window_left, -kOpen, kOpen) : kOpen;
    p.window_right = options.window_right ? std::clamp(*options.window_right, -kOpen, kOpen) : kOpen;
    p.dtype = dtype_of(query);
    p.dropout = dropout_of(options.dropout_seed, options.dropout_p);
    if (terms.mask) p.mask = {terms.mask->const_data_ptr(), broadcast_strides(*terms.mask), Dtype{}};
    if (terms.bias) p.bias = {terms.bias->const_data_ptr(), broadcast_strides(*terms.bias), dtype_of(*terms.bias)};
    if (terms.alibi_slopes) {
        p.alibi_slopes = static_cast<const float*>(terms.alibi_slopes->const_data_ptr());
        p.alibi_batch_stride = terms.alibi_slopes->dim() == 2 ? p.heads : 0;
    }
    if (terms.sinks) p.sinks = static_cast<const float*>(terms.sinks->const_data_ptr());
}

}  // namespace nearpeak::attention
