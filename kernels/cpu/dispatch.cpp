// Chooses the instruction set once; ONEMESH_CPU_ISA=<name> forces one that the processor has.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define DECLARE(isa)                                                                                                   \
  extern "C" void attend_##isa(const PagedAttention&, const Part&, bool);                                              \
  extern "C" void linear_##isa(const LinearArgs&, int64_t, int64_t, int64_t, int64_t, bool);                           \
  extern "C" void pack_##isa(void*, const void*, int64_t, int64_t, int64_t, int64_t, bool);                            \
  extern "C" void unpack_##isa(void*, const void*, const int64_t*, int64_t, int64_t, int64_t, bool);                    \
  extern "C" void silu_gate_##isa(void*, const void*, const void*, int64_t, int64_t, bool);                            \
  extern "C" void rms_norm_##isa(void*, const void*, const void*, float, int64_t, int64_t, int64_t, bool);             \
  extern "C" void rotary_##isa(void*, const void*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, bool);
#define KERNELS(isa) Kernels{#isa, attend_##isa, linear_##isa, pack_##isa, unpack_##isa, silu_gate_##isa, rms_norm_##isa, rotary_##isa}

#ifdef ONEMESH_SSE42
DECLARE(sse42)
#endif
#ifdef ONEMESH_AVX2
DECLARE(avx2)
#endif
#ifdef ONEMESH_AVX512
DECLARE(avx512)
#endif
#ifdef ONEMESH_AVX512BF16
DECLARE(avx512bf16)
#endif
DECLARE(generic)

// Best first; the build leaves out what the compiler doesn't know.
static const Kernels ALL[] = {
#ifdef ONEMESH_AVX512BF16
    KERNELS(avx512bf16),
#endif
#ifdef ONEMESH_AVX512
    KERNELS(avx512),
#endif
#ifdef ONEMESH_AVX2
    KERNELS(avx2),
#endif
#ifdef ONEMESH_SSE42
    KERNELS(sse42),
#endif
    KERNELS(generic),
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
  for (const Kernels& one : ALL) {
    if (!has(one.name)) continue;
    if (!wanted || !std::strcmp(wanted, one.name)) return &one;
    known += known.empty() ? one.name : std::string(", ") + one.name;
  }
  throw std::runtime_error("ONEMESH_CPU_ISA=" + std::string(wanted) + " is not one of " + known);
}

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}
