// The table of kernels, made of what an instruction set multiplies with.
#pragma once

#include "../../cpu/arena.h"
#include "kernels.h"

namespace nearpeak::linear::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

// Products has most_few_columns(p), and calls function(product, arena) with what multiplies p:
//
//     with_product(p, block, scratch, function)       a block of it
//     with_few_columns(p, scratch, function)          its few columns
//
// Without scratch memory, the product is not run: it only says how much of it it takes.
template <class Products>
struct Table {
    static int64_t scratch(const Product& p, const Block& block) {
        int64_t floats = 0;
        Products::with_product(p, block, nullptr, [&](auto&, const Arena& arena) { floats = arena.floats(); });
        return floats;
    }

    static void multiply(const Product& p, const Block& block, float* scratch) {
        Products::with_product(p, block, scratch, [](auto& product, const Arena&) { product.run(); });
    }

    static int64_t few_columns_scratch(const Product& p) {
        int64_t floats = 0;
        Products::with_few_columns(p, nullptr, [&](auto&, const Arena& arena) { floats = arena.floats(); });
        return floats;
    }

    static void few_columns(const Product& p, int64_t begin, int64_t end, float* scratch) {
        Products::with_few_columns(p, scratch, [&](auto& columns, const Arena&) { columns.run(begin, end); });
    }

    static constexpr Kernels kernels(void (*round_x)(const Product&, int64_t, int64_t)) {
        return {scratch, multiply, Products::most_few_columns, few_columns_scratch, few_columns, round_x};
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
