// Measures the limits over PyTorch's threads with the instruction set in force; called from Python through ctypes.

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../../cpu/tensors.h"
#include "kernels.h"

namespace nearpeak::peaks {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

constexpr int kRepeats = 7;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The highest rate of `kRepeats` runs, each run returning what it did (operations, bytes): a limit is what can be
// reached, and whatever disturbs a run only lowers it.
template <class Run>
double best_rate(const Run& run) {
    double best = 0;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        const double start = now(), done = run();
        best = std::max(best, done / (now() - start));
    }
    return best;
}

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<float, Free>;

constexpr int64_t kLine = 64;

Buffer buffer_of(int64_t floats) {
    Buffer buffer(static_cast<float*>(std::aligned_alloc(kLine, floats * sizeof(float))));
    STD_TORCH_CHECK(buffer, "out of memory while measuring the memory's bandwidth");
    std::fill_n(buffer.get(), floats, 1.0f);
    return buffer;
}

// Runs body(begin, end) on each thread's share of `floats`, in whole cache lines.
template <class Body>
void share(int64_t floats, const Body& body) {
    constexpr int64_t kFloatsPerLine = kLine / static_cast<int64_t>(sizeof(float));
    torch::stable::parallel_for(0, floats / kFloatsPerLine, 1, [&](int64_t begin, int64_t end) {
        body(begin * kFloatsPerLine, end * kFloatsPerLine);
    });
}

}  // namespace
}  // namespace nearpeak::peaks

extern "C" {

// Operations per second in `dtype`, two per multiply-add; of "int8", of bytes.
__attribute__((visibility("default"))) double nearpeak_peak_multiply_add(const char* dtype_name) {
    using namespace nearpeak;
    const Dtype dtype = std::strcmp(dtype_name, "bfloat16") == 0  ? Dtype::bfloat16
                        : std::strcmp(dtype_name, "float16") == 0 ? Dtype::float16
                                                                  : Dtype::float32;
    const bool bytes = std::strcmp(dtype_name, "int8") == 0;
    constexpr int64_t kRounds = 2000000;
    const auto* kernels = peaks::kKernels[selected_isa()];
    const int64_t threads = torch::stable::get_num_threads();
    return peaks::best_rate([&] {
        std::atomic<int64_t> operations{0};
        torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                operations += static_cast<int64_t>(bytes ? kernels->multiply_add_bytes(kRounds)
                                                         : kernels->multiply_add(dtype, kRounds));
        });
        return static_cast<double>(operations);
    });
}

// Bytes per second, read plus written, of copying `bytes` (rounded down to cache lines) past the caches.
__attribute__((visibility("default"))) double nearpeak_peak_copy(int64_t bytes) {
    using namespace nearpeak;
    const int64_t floats = bytes / peaks::kLine * peaks::kLine / 4;
    const auto* kernels = peaks::kKernels[selected_isa()];
    const peaks::Buffer from = peaks::buffer_of(floats), to = peaks::buffer_of(floats);
    return peaks::best_rate([&] {
        peaks::share(floats, [&](int64_t begin, int64_t end) {
            kernels->copy(from.get() + begin, to.get() + begin, end - begin);
        });
        return 8.0 * static_cast<double>(floats);
    });
}

// Bytes per second of reading `bytes` (rounded down to cache lines).
__attribute__((visibility("default"))) double nearpeak_peak_read(int64_t bytes) {
    using namespace nearpeak;
    const int64_t floats = bytes / peaks::kLine * peaks::kLine / 4;
    const auto* kernels = peaks::kKernels[selected_isa()];
    const peaks::Buffer from = peaks::buffer_of(floats);
    std::atomic<float> sink{0};
    return peaks::best_rate([&] {
        peaks::share(floats,
                     [&](int64_t begin, int64_t end) { sink = kernels->read(from.get() + begin, end - begin); });
        return 4.0 * static_cast<double>(floats);
    });
}
}
