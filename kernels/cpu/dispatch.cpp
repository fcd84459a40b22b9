// Chooses the instruction set once; ONEMESH_CPU_ISA=<name> forces one that the processor has.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

// Best first; the build leaves out what the compiler doesn't know.
#ifdef ONEMESH_AVX512BF16
extern "C" const Kernels kernels_avx512bf16;
#endif
#ifdef ONEMESH_AVX512
extern "C" const Kernels kernels_avx512;
#endif
#ifdef ONEMESH_AVX2
extern "C" const Kernels kernels_avx2;
#endif
#ifdef ONEMESH_SSE42
extern "C" const Kernels kernels_sse42;
#endif
extern "C" const Kernels kernels_generic;

static const Kernels* const ALL[] = {
#ifdef ONEMESH_AVX512BF16
    &kernels_avx512bf16,
#endif
#ifdef ONEMESH_AVX512
    &kernels_avx512,
#endif
#ifdef ONEMESH_AVX2
    &kernels_avx2,
#endif
#ifdef ONEMESH_SSE42
    &kernels_sse42,
#endif
    &kernels_generic,
};

static bool has(const std::string& isa) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (isa == "sse42") return __builtin_cpu_supports("sse4.2");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa != "generic") {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return isa == "avx512" ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == "generic";
}

static const Kernels* choose() {
  const char* wanted = std::getenv("ONEMESH_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  std::string known;
  for (const Kernels* one : ALL) {
    if (!has(one->name)) continue;
    if (!wanted || !std::strcmp(wanted, one->name)) return one;
    known += known.empty() ? one->name : std::string(", ") + one->name;
  }
  throw std::runtime_error("ONEMESH_CPU_ISA=" + std::string(wanted) + " is not one of " + known);
}

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}
