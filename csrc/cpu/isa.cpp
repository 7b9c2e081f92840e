// Finds the instruction sets that this processor can run, chooses the best, and lets Python ask and override.

#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nearpeak {
namespace {

#define NEARPEAK_NAME_OF(isa) #isa,
constexpr const char* kNames[] = {NEARPEAK_ISAS(NEARPEAK_NAME_OF)};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    unsigned eax, ebx, ecx, edx;
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
           (eax & (1u << 5));
}

// Tiles need the operating system's permission, process by process: their 8 KiB of state are saved only if asked.
bool has_amx() {
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kAmxBfloat16 = 1u << 22, kAmxTile = 1u << 24;
    if (!(edx & kAmxBfloat16) || !(edx & kAmxTile)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool ask_processor(const char* name) {
    if (std::strcmp(name, "portable") == 0) return true;
    if (std::strcmp(name, "avx512") == 0) return has_avx512();
    if (std::strcmp(name, "avx512_bf16") == 0) return has_avx512_bf16();
    if (std::strcmp(name, "amx") == 0) return has_amx();
    return has_avx2();  // avx2, and the wide instruction sets' sources compiled for it
}
#else
bool ask_processor(const char* name) { return std::strcmp(name, "portable") == 0; }
#endif

// Asked once: a virtual machine takes 20 us to answer for its processor.
bool supported(int isa) {
    static const std::vector<bool> answers = [] {
        std::vector<bool> each;
        for (const char* name : kNames) each.push_back(ask_processor(name));
        return each;
    }();
    return answers[isa];
}

// Intel's processors multiply pairs of bfloat16 more slowly than the same numbers widened (see pairs.h).
bool pays(const char* name) {
#if defined(__x86_64__)
    return std::strcmp(name, "avx512_bf16") != 0 || !__builtin_cpu_is("intel");
#else
    return true;
#endif
}

int best() {
    int position = 0;
    for (int isa = 0; isa < kCount; ++isa) {
        if (supported(isa) && pays(kNames[isa])) position = isa;
    }
    return position;
}

std::atomic<int>& selection() {
    static std::atomic<int> position{best()};
    return position;
}

std::string join(bool only_supported) {
    std::string text;
    for (int isa = 0; isa < kCount; ++isa) {
        if (!only_supported || supported(isa)) text += std::string(text.empty() ? "" : " ") + kNames[isa];
    }
    return text;
}

}  // namespace

int selected_isa() { return selection().load(std::memory_order_relaxed); }

}  // namespace nearpeak

extern "C" {

__attribute__((visibility("default"))) const char* nearpeak_isa() { return nearpeak::kNames[nearpeak::selected_isa()]; }

__attribute__((visibility("default"))) const char* nearpeak_isas_built() {
    static const std::string text = nearpeak::join(false);
    return text.c_str();
}

__attribute__((visibility("default"))) const char* nearpeak_isas_supported() {
    static const std::string text = nearpeak::join(true);
    return text.c_str();
}

// The family of an AMD processor; 0 for others.
__attribute__((visibility("default"))) int nearpeak_amd_family() {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    return static_cast<int>((eax >> 8 & 0xf) + (eax >> 20 & 0xff));
#else
    return 0;
#endif
}

// 0, or -1 where the name is unknown or this processor cannot run it.
__attribute__((visibility("default"))) int nearpeak_select_isa(const char* name) {
    for (int isa = 0; isa < nearpeak::kCount; ++isa) {
        if (std::strcmp(nearpeak::kNames[isa], name) == 0 && nearpeak::supported(isa)) {
            nearpeak::selection().store(isa);
            return 0;
        }
    }
    return -1;
}
}
