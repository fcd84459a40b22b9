// Chooses the instruction set once; ONEMESH_CPU_ISA=<name> forces one that the processor has.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define DECLARE(isa)                                                                                                   \
  extern "C" void attend_##isa(const PagedAttention&, const Part&, bool);                                              \
  extern "C" void silu_gate_##isa(void*, const void*, const void*, int64_t, int64_t, bool);                            \
  extern "C" void rms_norm_##isa(void*, const void*, const void*, float, int64_t, int64_t, int64_t, bool);             \
  extern "C" void rotary_##isa(void*, const void*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, bool);
#define KERNELS(isa) Kernels{#isa, attend_##isa, silu_gate_##isa, rms_norm_##isa, rotary_##isa}

#ifdef __x86_64__
DECLARE(sse42)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)

static bool has(const char* isa) {
  __builtin_cpu_init();
  const std::string name = isa;
  if (name == "sse42") return __builtin_cpu_supports("sse4.2");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return name == "avx512" ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
}

static const Kernels ALL[] = {KERNELS(avx512bf16), KERNELS(avx512), KERNELS(avx2), KERNELS(sse42)};
#else
DECLARE(generic)

static bool has(const char*) { return true; }

static const Kernels ALL[] = {KERNELS(generic)};
#endif

static const Kernels* choose() {
  const char* wanted = std::getenv("ONEMESH_CPU_ISA");
  std::string known;
  for (const Kernels& one : ALL) {
    if (!has(one.name)) continue;
    if (!wanted || !std::strcmp(wanted, one.name)) return &one;
    known += known.empty() ? one.name : std::string(", ") + one.name;
  }
  if (wanted) throw std::runtime_error("ONEMESH_CPU_ISA=" + std::string(wanted) + " is not one of " + known);
  throw std::runtime_error("no kernels for this processor");
}

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}
