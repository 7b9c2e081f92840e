// Rows of GGUF's quantised matrices (llama.cpp's), as they lie in the file: blocks with scales of their own.
//
//     q4_0   32 steps,  18 bytes    scale; 4 bits of codes, two a byte                    scale (code - 8)
//     q5_0   32 steps,  22 bytes    scale; 32 fifth bits; 4 bits of codes                 scale (code - 16)
//     q8_0   32 steps,  34 bytes    scale; codes with a sign                              scale code
//     q4_k  256 steps, 144 bytes    scale, minimum; 8 x 6 bits of s and m; 4 bits         scale s code - minimum m
//     q5_k  256 steps, 176 bytes    the same, with fifth bits before the other four       scale s code - minimum m
//     q6_k  256 steps, 210 bytes    4 bits of codes; 2 bits; 16 x 8 bits of s; scale      scale s (code - 32)
//
// Source: the formats' definition, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
#pragma once

#include "row_of_numbers.h"

namespace nearpeak::linear::NEARPEAK_ISA {

inline float half_at(const uint8_t* at) {
    float16 half;
    std::memcpy(&half, at, sizeof(half));
    return to_float(half);
}

// What the formats share. kLine: steps, a power of two, that fill no more than a line of the cache, so that none is
// left out where they are fetched.
template <int64_t kItsSteps, int64_t kItsBytes, int64_t kLine>
struct GgufRow {
    static constexpr int64_t kSteps = kItsSteps, kBytes = kItsBytes;

    const uint8_t* blocks;

    // Where the block with `step` begins.
    const uint8_t* at(int64_t step) const { return blocks + step / kSteps * kBytes; }

    void enter(int64_t) const {}

    [[gnu::always_inline]] void fetch(int64_t step) const {
        if (step % kLine == 0) fetch_line(blocks + step * kBytes / kSteps);
    }
};

struct Q8_0Row : GgufRow<32, 34, 32> {
    static constexpr bool kNeedsSums = false;

    SignedBytes block(int64_t step) const { return bitcast<SignedBytes>(load_block(at(step) + 2)); }
    static Float number(SignedBytes bytes, int j) { return vector_of(bytes, j); }
    Scaled factors(int64_t block) const { return {broadcast(half_at(blocks + block * kBytes) * kUnit)}; }
};

struct Q4_0Row : GgufRow<32, 18, 64> {
    static constexpr bool kNeedsSums = false;

    auto block(int64_t step) const { return HalvesOfBytes::block(at(step) + 2); }
    static Float number(HalvesOfBytes::Block bytes, int j) { return HalvesOfBytes::number(bytes, j); }
    Scaled factors(int64_t block) const { return {broadcast(half_at(blocks + block * kBytes) * kUnit)}; }
};

// A byte of `bits` eight times, and then the next.
template <std::size_t... place>
inline UnsignedBytes eight_times(uint32_t bits, std::index_sequence<place...>) {
    using Wide = uint32_t __attribute__((vector_size(kCodeBlock)));
    const auto all = bitcast<UnsignedBytes>(Wide{} + bits);
    return __builtin_shufflevector(all, all, (place / 16 * 16 + place / 8)...);
}
template <std::size_t... place>
constexpr UnsignedBytes one_of_eight(std::index_sequence<place...>) {
    return UnsignedBytes{static_cast<uint8_t>(1 << place % 8)...};
}

struct Q5_0Row : GgufRow<32, 22, 64> {
    static constexpr bool kNeedsSums = false;

    SignedBytes block(int64_t step) const {
        using Places = std::make_index_sequence<kCodeBlock>;
        uint32_t bits;
        std::memcpy(&bits, at(step) + 2, sizeof(bits));
        const UnsignedBytes fifth = eight_times(bits, Places()) & one_of_eight(Places());
        return with_fifth_bits(load_halves(at(step) + 6), bitcast<SignedBytes>(fifth == 0));
    }
    static Float number(SignedBytes bytes, int j) { return vector_of(bytes, j); }
    Scaled factors(int64_t block) const { return {broadcast(half_at(blocks + block * kBytes) * kUnit)}; }
};

// q4_k and q5_k. 32 bytes hold two blocks' codes.
template <bool kFifthBits>
struct Q45KRow : GgufRow<256, kFifthBits ? 176 : 144, 64> {
    using GgufRow<256, kFifthBits ? 176 : 144, 64>::at;
    static constexpr bool kNeedsSums = true;
    static constexpr int kBlocks = 8, kScales = 4, kFifth = 16, kCodes = kFifthBits ? 48 : 16;  // where they begin
    static constexpr int kMiddle = kFifthBits ? 16 : 8;

    SignedBytes block(int64_t step) const {
        const uint8_t* const from = at(step);
        const int number = static_cast<int>(step / kCodeBlock) % kBlocks;
        const UnsignedBytes low = shifted(load_block(from + kCodes + number / 2 * 32), number % 2 * 4) & 15;
        if constexpr (kFifthBits) {
            const auto bit = static_cast<uint8_t>(1 << number);
            const UnsignedBytes fifth = load_block(from + kFifth) & bit;
            return with_fifth_bits(low, bitcast<SignedBytes>(fifth == 0));
        }
        return bitcast<SignedBytes>(low) - int8_t{kMiddle};
    }
    static Float number(SignedBytes bytes, int j) { return vector_of(bytes, j); }

    // The first four blocks' 6 bits lie in a byte each, the others' in 4 bits and in what those leave free.
    void enter(int64_t block) {
        const uint8_t* const from = at(block * kCodeBlock);
        uint32_t six[3];
        std::memcpy(six, from + kScales, sizeof(six));
        const auto others = [](uint32_t low, uint32_t high) {
            return (low & 0x0f0f0f0fu) | ((high >> 6 & 0x03030303u) << 4);
        };
        const uint32_t scale_bits[] = {six[0] & 0x3f3f3f3fu, others(six[2], six[0])};
        const uint32_t minimum_bits[] = {six[1] & 0x3f3f3f3fu, others(six[2] >> 4, six[1])};
        uint8_t its_scales[kBlocks], its_minima[kBlocks];
        std::memcpy(its_scales, scale_bits, sizeof(its_scales));
        std::memcpy(its_minima, minimum_bits, sizeof(its_minima));
        const float scale = half_at(from), minimum = half_at(from + 2);
        for (int i = 0; i < kBlocks; ++i) {
            const float each = scale * static_cast<float>(its_scales[i]);
            scales[i] = each * kUnit;
            shifts[i] = kMiddle * each - minimum * static_cast<float>(its_minima[i]);
        }
    }
    ScaledAndShifted factors(int64_t block) const {
        return {broadcast(scales[block % kBlocks]), broadcast(shifts[block % kBlocks])};
    }

  private:
    float scales[kBlocks], shifts[kBlocks];  // of the blocks that enter() was for
};

struct Q6KRow : GgufRow<256, 210, 64> {
    static constexpr bool kNeedsSums = false;
    static constexpr int kBlocks = 8, kHigh = 128, kScales = 192, kScale = 208;  // where they begin

    // 16 steps have a scale of their own. Where those lie side by side, it meets their sums.
    struct Block {
        SignedBytes bytes;
        Float first, second;
    };

    // 128 steps have 64 bytes of lower bits, of two quarters each, and 32 bytes of higher bits, of all four.
    Block block(int64_t step) const {
        const uint8_t* const from = at(step);
        const int number = static_cast<int>(step / kCodeBlock) % kBlocks, part = number / 4, quarter = number % 4;
        const UnsignedBytes low = shifted(load_block(from + part * 64 + quarter % 2 * 32), quarter / 2 * 4) & 15;
        const UnsignedBytes high = shifted(load_block(from + kHigh + part * 32), quarter * 2) & 3;
        const auto codes = bitcast<UnsignedBytes>(bitcast<Words>(high) << uint16_t{4}) | low;
        return {bitcast<SignedBytes>(codes) - int8_t{32}, broadcast(scales[2 * number]),
                broadcast(scales[2 * number + 1])};
    }
    static Float number(const Block& block, int j) {
        const Float number = vector_of(block.bytes, j);
        return kSideBySide ? number : number * (j < kBlockVectors / 2 ? block.first : block.second);
    }
    void enter(int64_t block) {
        const uint8_t* const from = at(block * kCodeBlock);
        int8_t its_scales[2 * kBlocks];
        std::memcpy(its_scales, from + kScales, sizeof(its_scales));
        const float scale = half_at(from + kScale) * (kSideBySide ? kUnit : 1.0f);
        for (int i = 0; i < 2 * kBlocks; ++i) scales[i] = scale * static_cast<float>(its_scales[i]);
    }
    Scaled factors(int64_t block) const {
        const int number = static_cast<int>(block % kBlocks);
        if constexpr (!kSideBySide) return {broadcast(1.0f)};
        return {halves_of<0>(broadcast(scales[2 * number]), broadcast(scales[2 * number + 1]))};
    }

  private:
    float scales[2 * kBlocks];  // of the blocks that enter() was for
};

// Calls function(row_of) with what gives a row of `steps` elements of blocks.
template <class Function>
inline void with_gguf_rows(Format format, const uint8_t* blocks, int64_t steps, Function function) {
    const auto with = [&](auto* none) {
        using Row = std::remove_pointer_t<decltype(none)>;
        const int64_t row_bytes = steps / Row::kSteps * Row::kBytes;
        function([blocks, row_bytes](int64_t row) {
            Row its_row{};
            its_row.blocks = blocks + row * row_bytes;
            return its_row;
        });
    };
    switch (format) {
        case Format::q4_0:
            return with(static_cast<Q4_0Row*>(nullptr));
        case Format::q5_0:
            return with(static_cast<Q5_0Row*>(nullptr));
        case Format::q8_0:
            return with(static_cast<Q8_0Row*>(nullptr));
        case Format::q4_k:
            return with(static_cast<Q45KRow<false>*>(nullptr));
        case Format::q5_k:
            return with(static_cast<Q45KRow<true>*>(nullptr));
        default:
            return with(static_cast<Q6KRow*>(nullptr));
    }
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
