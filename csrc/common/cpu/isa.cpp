#include "common/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef ALRAO_MULTI_ISA
#include <cpuid.h>
#endif

namespace alrao::cpu {
namespace {

#ifdef ALRAO_MULTI_ISA

// F16C, MOVBE and LZCNT belong to x86-64-v3, and not every compiler's __builtin_cpu_supports knows
// them.
bool has_v3_extras() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const bool movbe = ecx & (1u << 22), f16c = ecx & (1u << 29);
  if (!__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx)) return false;
  const bool lzcnt = ecx & (1u << 5);
  return movbe && f16c && lzcnt;
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
Isa best_isa() {
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1") &&
                  __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  has_v3_extras();
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return Isa::v4;
  if (v3) return Isa::v3;
  if (v2) return Isa::v2;
  throw std::runtime_error(
      "alrao_fast: the C++ kernels need an x86-64-v2 processor (SSE4.2, POPCNT), and this is an "
      "older one. "
      "Use the reference: ALRAO_BACKEND=reference.");
}

constexpr Isa kBuilt[] = {Isa::v2, Isa::v3, Isa::v4};

#else

Isa best_isa() { return Isa::plain; }

constexpr Isa kBuilt[] = {Isa::plain};

#endif

Isa requested_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("ALRAO_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  std::string usable;
  for (Isa isa : kBuilt) {
    if (isa > best) continue;
    if (isa_name(isa) == std::string(asked)) return isa;
    usable += std::string(usable.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error("alrao_fast: ALRAO_CPU_ISA is \"" + std::string(asked) +
                           "\"; this build on this machine takes one of: " + usable +
                           ". Unset it to let the best one be chosen.");
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = requested_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::v2:
      return "v2";
    case Isa::v3:
      return "v3";
    case Isa::v4:
      return "v4";
    default:
      return "plain";
  }
}

}  // namespace alrao::cpu
