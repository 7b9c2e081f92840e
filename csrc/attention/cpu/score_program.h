// Scores of the user's own: runs a score program (kernels/nearpeak/attention/score_mod.py) on vectors of scores.
//
// An instruction is decoded once for up to kVectorsTogether vectors, which hides most of what decoding costs; the
// values of all instructions stay in the first-level cache. What lies across the lanes is the caller's choice: keys of
// one row, rows of one key, or both.
#pragma once

#include <algorithm>
#include <cmath>

#include "score_terms.h"

namespace nearpeak::attention::NEARPEAK_ISA {

constexpr int kVectorsTogether = 4;

// Where the scores of each vector stand. Numbers of queries and keys are those in the tensors.
struct ScorePlaces {
    int32_t batch;
    Int head[kVectorsTogether], query[kVectorsTogether], key[kVectorsTogether];
};

class ScoreRunner {
  public:
    explicit ScoreRunner(const ScoreProgram& program) : program(program) {}

    // scores[0 .. count) become what the program makes of them, in base 2; with slopes, these become its derivative.
    void operator()(const ScorePlaces& places, Float* scores, Float* slopes, int count) {
        const Int batch = broadcast(places.batch);
        for (int i = 0; i < count; ++i) {
            values[0][i] = scores[i];
            set(1, i, batch);
            set(2, i, places.head[i]);
            set(3, i, places.query[i]);
            set(4, i, places.key[i]);
        }
        const int32_t end = slopes ? program.count : program.value_count;
        for (int32_t number = 0; number < end; ++number) {
            run(program.instructions[number], kScoreArguments + number, count);
        }
        for (int i = 0; i < count; ++i) {
            scores[i] = in_base_2(values[program.value][i]);
            if (slopes) slopes[i] = values[program.derivative][i];
        }
    }

  private:
    const ScoreProgram& program;
    Float values[kMostScoreValues][kVectorsTogether];

    Int integers(int32_t value, int i) const { return bitcast<Int>(values[value][i]); }
    void set(int32_t value, int i, Int integers) { values[value][i] = bitcast<Float>(integers); }

    // to = f of one, two or three values, as floats or (with_integers) as integers and truths, which are 0 or -1.
    template <class F>
    void map1(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) values[to][i] = f(values[in.a][i]);
    }
    template <class F>
    void map2(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) values[to][i] = f(values[in.a][i], values[in.b][i]);
    }
    template <class F>
    void compare(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) set(to, i, f(values[in.a][i], values[in.b][i]));
    }
    template <class F>
    void integers1(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) set(to, i, f(integers(in.a, i)));
    }
    template <class F>
    void integers2(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) set(to, i, f(integers(in.a, i), integers(in.b, i)));
    }
    // Lane by lane, for what vectors have no instructions of and no polynomial here.
    template <class F>
    void lanes1(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) {
            for (int lane = 0; lane < kLanes; ++lane) values[to][i][lane] = f(values[in.a][i][lane]);
        }
    }

    static Int chosen(Int condition, Int yes, Int no) { return condition ? yes : no; }

    // e^x of any x.
    static Float exp(Float x) {
        const Float bounded = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
        const Float rounded = bounded * kLog2E + kRounder;
        const Float n = rounded - kRounder;
        const Float rest = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
        Float result = exp2_of_parts(rounded, rest * kLog2E);
        result = select(x > 88.0f, x > 88.72283f ? broadcast(kInfinity) : result * exp_of_positive(x - 88.0f), result);
        result = select(x < -87.0f, Float{}, result);
        return select(x != x, x, result);
    }

    static int32_t floor_divided(int32_t a, int32_t b) {
        if (b == 0) return 0;
        const int64_t quotient = int64_t{a} / b;
        return static_cast<int32_t>(quotient - (int64_t{a} % b != 0 && (a < 0) != (b < 0)));
    }

    static int32_t remainder_of(int32_t a, int32_t b) {
        return b == 0 ? 0 : static_cast<int32_t>(a - int64_t{floor_divided(a, b)} * b);
    }

    template <class F>
    void integer_lanes2(int32_t to, const ScoreInstruction& in, int count, F f) {
        for (int i = 0; i < count; ++i) {
            const Int a = integers(in.a, i), b = integers(in.b, i);
            Int result;
            for (int lane = 0; lane < kLanes; ++lane) result[lane] = f(a[lane], b[lane]);
            set(to, i, result);
        }
    }

    // base + index * stride, or -1 where the index, which may count from the end, lies outside, or one before did.
    void index(int32_t to, const ScoreInstruction& in, int count) {
        const auto size = static_cast<uint32_t>(in.b), stride = static_cast<uint32_t>(in.c);
        for (int i = 0; i < count; ++i) {
            const Int any = integers(in.a, i), base = integers(in.d, i);
            // Without a sign, since overflow of one is not defined; of what lies inside nothing overflows.
            const Unsigned place = bitcast<Unsigned>(any) + (bitcast<Unsigned>(any < 0) & size);
            const Int inside = bitcast<Int>(place < size) & (base >= 0);
            set(to, i, chosen(inside, bitcast<Int>(bitcast<Unsigned>(base) + place * stride), broadcast(int32_t{-1})));
        }
    }

    // An element that does not exist is `outside`.
    template <class T>
    void load_elements(int32_t to, const ScoreInstruction& in, int count, T outside) {
        const ScoreTensor& tensor = program.tensors[in.a];
        const T* data = static_cast<const T*>(tensor.data);
        for (int i = 0; i < count; ++i) {
            const Int places = integers(in.b, i);
            T elements[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const bool exists = places[lane] >= 0 && places[lane] < tensor.count;
                elements[lane] = exists ? data[places[lane]] : outside;
            }
            std::memcpy(&values[to][i], elements, sizeof(elements));
        }
    }

    // One copy for all callers: it is long.
    [[gnu::noinline]] void run(const ScoreInstruction& in, int32_t to, int count) {
        using Op = ScoreOperation;
        const int32_t condition = in.a;
        switch (in.operation) {
            case Op::constant:
                for (int i = 0; i < count; ++i) values[to][i] = broadcast(in.constant);
                return;
            case Op::integer:
                for (int i = 0; i < count; ++i) set(to, i, broadcast(in.a));
                return;
            case Op::load:
                return load_elements<float>(to, in, count, std::numeric_limits<float>::quiet_NaN());
            case Op::load_integer:
                return load_elements<int32_t>(to, in, count, 0);
            case Op::index:
                return index(to, in, count);
            case Op::add:
                return map2(to, in, count, [](Float a, Float b) { return a + b; });
            case Op::subtract:
                return map2(to, in, count, [](Float a, Float b) { return a - b; });
            case Op::multiply:
                return map2(to, in, count, [](Float a, Float b) { return a * b; });
            case Op::divide:
                return map2(to, in, count, [](Float a, Float b) { return a / b; });
            case Op::minimum:  // NaN where one is NaN
                return map2(to, in, count, [](Float a, Float b) { return select((a < b) | (a != a), a, b); });
            case Op::maximum:
                return map2(to, in, count, [](Float a, Float b) { return select((a > b) | (a != a), a, b); });
            case Op::negative:
                return map1(to, in, count, [](Float a) { return -a; });
            case Op::absolute:
                return map1(to, in, count, [](Float a) { return magnitude(a); });
            case Op::exp:
                return map1(to, in, count, [](Float a) { return exp(a); });
            case Op::log:
                return lanes1(to, in, count, [](float a) { return std::log(a); });
            case Op::sqrt:
                return lanes1(to, in, count, [](float a) { return std::sqrt(a); });
            case Op::tanh:
                return map1(to, in, count, [](Float a) { return tanh(a); });
            case Op::sigmoid:
                return map1(to, in, count, [](Float a) { return 1.0f / (1.0f + exp(-a)); });
            case Op::sin:
                return lanes1(to, in, count, [](float a) { return std::sin(a); });
            case Op::cos:
                return lanes1(to, in, count, [](float a) { return std::cos(a); });
            case Op::power:
                for (int i = 0; i < count; ++i) {
                    for (int lane = 0; lane < kLanes; ++lane) {
                        values[to][i][lane] = std::pow(values[in.a][i][lane], values[in.b][i][lane]);
                    }
                }
                return;
            case Op::floor:
                return lanes1(to, in, count, [](float a) { return std::floor(a); });
            case Op::select:
            case Op::select_integers:
                for (int i = 0; i < count; ++i) {
                    values[to][i] = select(integers(condition, i), values[in.b][i], values[in.c][i]);
                }
                return;
            case Op::less:
                return compare(to, in, count, [](Float a, Float b) { return a < b; });
            case Op::less_equal:
                return compare(to, in, count, [](Float a, Float b) { return a <= b; });
            case Op::equal:
                return compare(to, in, count, [](Float a, Float b) { return a == b; });
            default:
                return run_integers(in, to, count);
        }
    }

    [[gnu::noinline]] void run_integers(const ScoreInstruction& in, int32_t to, int count) {
        using Op = ScoreOperation;
        // Without a sign, since overflow of one is not defined.
        const auto wrapping = [&](auto f) {
            integers2(to, in, count,
                      [&](Int a, Int b) { return bitcast<Int>(f(bitcast<Unsigned>(a), bitcast<Unsigned>(b))); });
        };
        switch (in.operation) {
            case Op::add_integers:
                return wrapping([](Unsigned a, Unsigned b) { return a + b; });
            case Op::subtract_integers:
                return wrapping([](Unsigned a, Unsigned b) { return a - b; });
            case Op::multiply_integers:
                return wrapping([](Unsigned a, Unsigned b) { return a * b; });
            case Op::floor_divide:
                return integer_lanes2(to, in, count, floor_divided);
            case Op::remainder:
                return integer_lanes2(to, in, count, remainder_of);
            case Op::minimum_integers:
                return integers2(to, in, count, [](Int a, Int b) { return chosen(a < b, a, b); });
            case Op::maximum_integers:
                return integers2(to, in, count, [](Int a, Int b) { return chosen(a > b, a, b); });
            case Op::negative_integer:
                return integers1(to, in, count, [](Int a) { return bitcast<Int>(0 - bitcast<Unsigned>(a)); });
            case Op::absolute_integer:
                return integers1(to, in, count,
                                 [](Int a) { return chosen(a < 0, bitcast<Int>(0 - bitcast<Unsigned>(a)), a); });
            case Op::less_integers:
                return integers2(to, in, count, [](Int a, Int b) { return a < b; });
            case Op::less_equal_integers:
                return integers2(to, in, count, [](Int a, Int b) { return a <= b; });
            case Op::equal_integers:
                return integers2(to, in, count, [](Int a, Int b) { return a == b; });
            case Op::both:
                return integers2(to, in, count, [](Int a, Int b) { return a & b; });
            case Op::either:
                return integers2(to, in, count, [](Int a, Int b) { return a | b; });
            case Op::one_alone:
                return integers2(to, in, count, [](Int a, Int b) { return a ^ b; });
            case Op::opposite:
                return integers1(to, in, count, [](Int a) { return ~a; });
            case Op::to_float:
                for (int i = 0; i < count; ++i) values[to][i] = to_float(integers(in.a, i));
                return;
            case Op::truth_to_float:
                for (int i = 0; i < count; ++i) values[to][i] = -to_float(integers(in.a, i));
                return;
            case Op::truth_to_integer:
                return integers1(to, in, count, [](Int a) { return -a; });
            case Op::to_integer:
                for (int i = 0; i < count; ++i) {
                    // Of numbers that no integer is near the conversion is not defined.
                    const Float a = values[in.a][i];
                    set(to, i, __builtin_convertvector(select(magnitude(a) < 0x1p30f, a, Float{}), Int));
                }
                return;
            default:
                return;
        }
    }
};

// Places of vectors whose lanes are rows of the task, row_of(lane) each; their keys are the caller's to set.
template <class RowOf>
inline ScorePlaces places_of_lanes(const Call& p, const Task& task, RowOf row_of) {
    ScorePlaces places{static_cast<int32_t>(task.sequence.batch), {}, {}, {}};
    for (int lane = 0; lane < kLanes; ++lane) {
        const auto [position, head] = place_of(p, task, row_of(lane));
        places.head[0][lane] = static_cast<int32_t>(head);
        places.query[0][lane] = static_cast<int32_t>(task.sequence.query_begin + position);
    }
    std::fill_n(places.head + 1, kVectorsTogether - 1, places.head[0]);
    std::fill_n(places.query + 1, kVectorsTogether - 1, places.query[0]);
    return places;
}

// Of one row: scores of the keys from `begin` on, `count` of them in whole vectors; with slopes these too.
inline void modify_row(const Call& p, const Task& task, int64_t row, int64_t begin, int64_t count, float* scores,
                       float* slopes) {
    ScoreRunner run(p.score_program);
    const auto [position, head] = place_of(p, task, row);
    const auto batch = static_cast<int32_t>(task.sequence.batch);
    const Int of_head = broadcast(static_cast<int32_t>(head));
    const Int query = broadcast(static_cast<int32_t>(task.sequence.query_begin + position));
    Int key = lane_numbers() + static_cast<int32_t>(task.sequence.key_begin + begin);
    for (int64_t k = 0; k < count; k += kVectorsTogether * kLanes) {
        const int vectors = static_cast<int>(std::min<int64_t>(kVectorsTogether, (count - k + kLanes - 1) / kLanes));
        ScorePlaces places{batch, {}, {}, {}};
        Float block[kVectorsTogether], slope[kVectorsTogether];
        for (int i = 0; i < vectors; ++i, key += kLanes) {
            places.head[i] = of_head;
            places.query[i] = query;
            places.key[i] = key;
            block[i] = load(scores + k + i * kLanes);
        }
        run(places, block, slopes ? slope : nullptr, vectors);
        for (int i = 0; i < vectors; ++i) {
            store(scores + k + i * kLanes, block[i]);
            if (slopes) store(slopes + k + i * kLanes, slope[i]);
        }
    }
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
