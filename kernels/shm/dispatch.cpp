// Chooses the instruction set of the reductions.
#include "arena.h"

using Reduce = void(int, const uint8_t* const*, int, uint8_t*, uint8_t*, size_t);
Reduce reduce_generic, reduce_avx2, reduce_avx512;

namespace {

Reduce* best() {
#ifdef SHM_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return reduce_avx512;
  }
#endif
#ifdef SHM_AVX2
  if (__builtin_cpu_supports("avx2")) return reduce_avx2;
#endif
  return reduce_generic;
}

}  // namespace

void reduce(int type, const uint8_t* const* sources, int n, uint8_t* out, uint8_t* copy, size_t bytes) {
  static Reduce* const chosen = best();
  chosen(type, sources, n, out, copy, bytes);
}

size_t item_bytes(int type) {
  constexpr size_t BYTES[] = {4, 8, 2, 2, 1, 1, 2, 4, 8};
  return BYTES[type / 2];
}
