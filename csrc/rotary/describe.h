// From the tensors of a call to its description, on any device.
#pragma once

#include "../cpu/tensors.h"
#include "call.h"

namespace nearpeak::rotary {

inline Heads heads_of(const Tensor& from, const Tensor& to) {
    Heads x{};
    x.from = from.const_data_ptr();
    x.to = to.mutable_data_ptr();
    x.heads = from.size(1);
    x.from_batch = from.stride(0);
    x.from_head = from.stride(1);
    x.from_position = from.stride(2);
    x.to_batch = to.stride(0);
    x.to_head = to.stride(1);
    x.to_position = to.stride(2);
    return x;
}

inline int64_t batch_stride(const Tensor& table) { return table.dim() == 3 && table.size(0) > 1 ? table.stride(0) : 0; }

inline Call describe(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved,
                     bool inverse, int64_t rotary_dim, const Tensor& query_out, const Tensor& key_out) {
    Call call{};
    call.query = heads_of(query, query_out);
    call.key = heads_of(key, key_out);
    call.cos = cos.const_data_ptr();
    call.sin = sin.const_data_ptr();
    call.cos_batch = batch_stride(cos);
    call.cos_position = cos.stride(cos.dim() - 2);
    call.sin_batch = batch_stride(sin);
    call.sin_position = sin.stride(sin.dim() - 2);
    call.batch = query.size(0);
    call.sequence = query.size(2);
    call.rotary_dim = rotary_dim;
    call.rest = call.query.to == call.query.from && call.key.to == call.key.from ? 0 : query.size(3) - rotary_dim;
    call.interleaved = interleaved;
    call.inverse = inverse;
    call.dtype = dtype_of(query);
    call.table_dtype = dtype_of(cos);
    return call;
}

}  // namespace nearpeak::rotary
