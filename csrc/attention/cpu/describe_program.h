// From the arguments that are a score program (kernels/nearpeak/attention/score_instructions.py) to what kernels read.
#pragma once

#include <cstring>
#include <vector>

#include "describe.h"

namespace nearpeak::attention {

// A score program as the kernels read it. Raises where it is none: where an operand is no value before its instruction,
// or a tensor is not there.
class ReadableProgram {
  public:
    explicit ReadableProgram(const Terms& terms) {
        if (!terms.score_program) return;
        if (terms.score_tensors) {
            for (const Tensor& tensor : *terms.score_tensors) add_tensor(tensor);
        }
        const Tensor& rows = *terms.score_program;
        const bool fits = rows.is_cpu() && rows.dim() == 2 && rows.size(0) > 0 && rows.size(1) == kRow &&
                          rows.size(0) - 1 + kScoreArguments <= kMostScoreValues &&
                          rows.scalar_type() == torch::headeronly::ScalarType::Long;
        require(fits, "attention: score_program");
        const Tensor dense = made_contiguous(rows);
        const auto* row = static_cast<const int64_t*>(dense.const_data_ptr());
        const auto count = static_cast<int32_t>(rows.size(0) - 1);
        for (int32_t number = 0; number < count; ++number, row += kRow) add_instruction(row, kScoreArguments + number);
        const int32_t values = kScoreArguments + count;
        require(row[0] >= 0 && row[0] < values && row[1] >= 0 && row[1] < values && row[2] >= 0 && row[2] <= count &&
                    row[0] < kScoreArguments + row[2],
                "attention: score_program");
        instructions.emplace_back();  // so that a program without instructions is one, too
        const auto narrow = [](int64_t number) { return static_cast<int32_t>(number); };
        view = {instructions.data(), tensors.data(), count, narrow(row[2]), narrow(row[0]), narrow(row[1])};
    }

    ReadableProgram(const ReadableProgram&) = delete;  // the view points into it

    ScoreProgram view;

  private:
    static constexpr int64_t kRow = 5;

    void add_tensor(const Tensor& tensor) {
        using torch::headeronly::ScalarType;
        const bool integers = tensor.scalar_type() == ScalarType::Int;
        require(tensor.is_cpu(), "attention: score_tensors");
        kept.push_back(made_contiguous(integers ? tensor : torch::stable::to(tensor, ScalarType::Float)));
        tensors.push_back({kept.back().const_data_ptr(), kept.back().numel()});
        are_integers.push_back(integers);
    }

    void add_instruction(const int64_t* row, int32_t number) {
        using Op = ScoreOperation;
        require(row[0] >= 0 && row[0] < static_cast<int64_t>(Op::end), "attention: score_program");
        const auto operation = static_cast<Op>(row[0]);
        ScoreInstruction made{operation, 0, 0, 0, 0, 0.0f};
        int32_t* const operands[] = {&made.a, &made.b, &made.c, &made.d};
        const auto narrow = [&](int column) { *operands[column] = static_cast<int32_t>(row[1 + column]); };
        const auto value = [&](int column) {
            require(row[1 + column] >= 0 && row[1 + column] < number, "attention: score_program");
            narrow(column);
        };
        if (operation == Op::constant) {
            double constant;
            std::memcpy(&constant, row + 1, sizeof(constant));
            made.constant = static_cast<float>(constant);
        } else if (operation == Op::integer) {
            narrow(0);
        } else if (operation == Op::load || operation == Op::load_integer) {
            const bool exists = row[1] >= 0 && row[1] < static_cast<int64_t>(tensors.size());
            require(exists && are_integers[row[1]] == (operation == Op::load_integer), "attention: score_program");
            narrow(0);
            value(1);
        } else if (operation == Op::index) {
            value(0);
            narrow(1);
            narrow(2);
            value(3);
        } else {
            for (int column = 0; column < 3; ++column) value(column);
        }
        instructions.push_back(made);
    }

    std::vector<ScoreInstruction> instructions;
    std::vector<ScoreTensor> tensors;
    std::vector<bool> are_integers;
    std::vector<Tensor> kept;
};

}  // namespace nearpeak::attention
