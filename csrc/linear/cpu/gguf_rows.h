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

// What the formats share: `unit` is where the unit's bytes begin.
template <int64_t kItsSteps, int64_t kItsBytes>
struct GgufRow {
    static constexpr int kUnitBlocks = kItsSteps == 256 ? 8 : 4;
    static constexpr int64_t kSteps = kItsSteps, kBytes = kItsBytes;
    static constexpr int64_t kUnitBytes = kUnitBlocks * kCodeBlock / kSteps * kBytes;
    static constexpr bool kScalesNumbers = false, kHasHalves = false, kNeedsSums = false, kHasShifts = false;

    const uint8_t* blocks;
    int64_t offset;  // of the unit: the same in all rows, and so in one register

    void enter(int64_t number, int64_t) { offset = number * kUnitBytes; }
    const uint8_t* unit() const { return blocks + offset; }

    [[gnu::always_inline]] void fetch(int64_t bytes) const { fetch_lines<kUnitBytes>(unit() + bytes); }
};

struct Q8_0Row : GgufRow<32, 34> {
    static constexpr int kMiddle = 128;

    UnsignedBytes codes(int i) const { return bitcast<UnsignedBytes>(block(i)) ^ static_cast<uint8_t>(kMiddle); }
    SignedBytes block(int i) const { return bitcast<SignedBytes>(load_block(unit() + i * kBytes + 2)); }
    static Float number(SignedBytes bytes, int j) { return vector_of(bytes, j); }
    Scale coefficients(int i, int64_t) const { return {half_at(unit() + i * kBytes)}; }
};

struct Q4_0Row : GgufRow<32, 18> {
    static constexpr int kMiddle = HalvesOfBytes::kMiddle;

    UnsignedBytes codes(int i) const { return HalvesOfBytes::codes(unit() + i * kBytes + 2); }
    auto block(int i) const { return HalvesOfBytes::block(unit() + i * kBytes + 2); }
    static Float number(HalvesOfBytes::Block bytes, int j) { return HalvesOfBytes::number(bytes, j); }
    Scale coefficients(int i, int64_t) const { return {half_at(unit() + i * kBytes)}; }
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

struct Q5_0Row : GgufRow<32, 22> {
    static constexpr int kMiddle = 16;

    UnsignedBytes codes(int i) const {
        using Places = std::make_index_sequence<kCodeBlock>;
        const uint8_t* const from = unit() + i * kBytes;
        uint32_t bits;
        std::memcpy(&bits, from + 2, sizeof(bits));
        const UnsignedBytes fifth = eight_times(bits, Places()) & one_of_eight(Places());
        return load_halves(from + 6) | (bitcast<UnsignedBytes>(fifth != 0) & uint8_t{16});
    }
    SignedBytes block(int i) const { return numbers_of<kMiddle>(codes(i)); }
    static Float number(SignedBytes bytes, int j) { return vector_of(bytes, j); }
    Scale coefficients(int i, int64_t) const { return {half_at(unit() + i * kBytes)}; }
};

// Eight bytes as numbers, with a sign or without, as T has it.
template <class T>
inline Eight to_eight(const void* bytes) {
    T __attribute__((vector_size(8))) numbers;
    std::memcpy(&numbers, bytes, sizeof(numbers));
    return to_floats(__builtin_convertvector(numbers, EightInts));
}

// q4_k and q5_k. 32 bytes hold two blocks' codes.
template <bool kFifthBits>
struct Q45KRow : GgufRow<256, kFifthBits ? 176 : 144> {
    using Base = GgufRow<256, kFifthBits ? 176 : 144>;
    using Base::unit;
    static constexpr bool kHasShifts = true;
    static constexpr int kScales = 4, kFifth = 16, kCodes = kFifthBits ? 48 : 16;  // where they begin
    static constexpr int kMiddle = kFifthBits ? 16 : 8;

    UnsignedBytes codes(int i) const {
        const UnsignedBytes low = shifted(load_block(unit() + kCodes + i / 2 * 32), i % 2 * 4) & 15;
        if constexpr (!kFifthBits) return low;
        // The bit to place 4.
        const UnsignedBytes fifth = load_block(unit() + kFifth);
        return low | ((i < 4 ? fifth << static_cast<uint8_t>(4 - i) : fifth >> static_cast<uint8_t>(i - 4)) & 16);
    }
    SignedBytes block(int i) const { return numbers_of<kMiddle>(codes(i)); }
    static Float number(SignedBytes bytes, int j) { return vector_of(bytes, j); }

    // The first four blocks' 6 bits lie in a byte each, the others' in 4 bits and in what those leave free.
    void enter(int64_t number, int64_t group) {
        Base::enter(number, group);
        uint32_t six[3];
        std::memcpy(six, unit() + kScales, sizeof(six));
        const auto others = [](uint32_t low, uint32_t high) {
            return (low & 0x0f0f0f0fu) | ((high >> 6 & 0x03030303u) << 4);
        };
        const uint32_t scale_bits[] = {six[0] & 0x3f3f3f3fu, others(six[2], six[0])};
        const uint32_t minimum_bits[] = {six[1] & 0x3f3f3f3fu, others(six[2] >> 4, six[1])};
        const Eight its_scales = half_at(unit()) * to_eight<uint8_t>(scale_bits);
        its_shifts = static_cast<float>(kMiddle) * its_scales - half_at(unit() + 2) * to_eight<uint8_t>(minimum_bits);
        std::memcpy(scales, &its_scales, sizeof(scales));
    }
    ScaleAndShift coefficients(int i, int64_t) const { return {scales[i], its_shifts[i]}; }
    Eight shifts() const { return its_shifts; }

  private:
    float scales[Base::kUnitBlocks];
    Eight its_shifts;
};

struct Q6KRow : GgufRow<256, 210> {
    // 16 steps have a scale of their own. Where those do not lie side by side, it meets their numbers.
    static constexpr bool kScalesNumbers = !kSideBySide, kHasHalves = true;
    static constexpr int kHigh = 128, kScales = 192, kScale = 208;  // where they begin
    static constexpr int kMiddle = 32;

    struct Block {
        SignedBytes bytes;
        ScaleOfHalves scale;
    };

    // 128 steps have 64 bytes of lower bits, of two quarters each, and 32 bytes of higher bits, of all four.
    UnsignedBytes codes(int i) const {
        const int part = i / 4, quarter = i % 4;
        const UnsignedBytes low = shifted(load_block(unit() + part * 64 + quarter % 2 * 32), quarter / 2 * 4) & 15;
        const UnsignedBytes high = shifted(load_block(unit() + kHigh + part * 32), quarter * 2) & 3;
        return bitcast<UnsignedBytes>(bitcast<Words>(high) << uint16_t{4}) | low;
    }
    Block block(int i) const { return {numbers_of<kMiddle>(codes(i)), coefficients(i, 0)}; }
    static Float number(const Block& block, int j) {
        const Float number = vector_of(block.bytes, j);
        return kScalesNumbers ? number * block.scale.of_half(j >= kBlockVectors / 2).scale : number;
    }
    void enter(int64_t number, int64_t group) {
        GgufRow::enter(number, group);
        for (int half = 0; half < 2; ++half) {
            const uint8_t* const at = unit() + kScales + half * kUnitBlocks;
            const Eight its_scales = half_at(unit() + kScale) * to_eight<int8_t>(at);
            std::memcpy(scales + half * kUnitBlocks, &its_scales, sizeof(its_scales));
        }
    }
    ScaleOfHalves coefficients(int i, int64_t) const { return {scales[2 * i], scales[2 * i + 1]}; }

  private:
    float scales[2 * kUnitBlocks];
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
