// What the PTX ISA says the instructions of ptx.cuh do. Sums of mma are float32 in rising k; a GPU's order isn't known.
#pragma once

namespace ptx {

struct MmaOperands {
  unsigned a[4], b[2];
  float c[4];
};

EXECUTOR_NO_TSAN inline float half_of(const unsigned* registers, int i, __nv_bfloat16) {
  return __bfloat162float({uint16_t(registers[i / 2] >> i % 2 * 16)});
}
EXECUTOR_NO_TSAN inline float half_of(const unsigned* registers, int i, __half) {
  return __half2float({uint16_t(registers[i / 2] >> i % 2 * 16)});
}

template <class T>
EXECUTOR_NO_TSAN void exchange_mma(executor::Thread* warp, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaOperands*>(warp[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = half_of(in.a, i, T{});
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = half_of(in.b, i, T{});
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaOperands*>(warp[lane].in);
    float* out = static_cast<float*>(warp[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      out[i] = in.c[i] + sum;
    }
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4], T, EXECUTOR_SITE) {
  const MmaOperands in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  float out[4];
  executor::warp_collective(~0u, &exchange_mma<T>, &in, out, false, {"mma.m16n8k16", file_, line_});
  for (int i = 0; i < 4; ++i) d[i] = out[i];
}

template <bool TRANS>
EXECUTOR_NO_TSAN void exchange_ldmatrix(executor::Thread* warp, unsigned) {
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j) {
      unsigned halves[2];
      for (int k = 0; k < 2; ++k) {
        const int row = TRANS ? 2 * (lane % 4) + k : lane / 4, column = TRANS ? lane / 4 : 2 * (lane % 4) + k;
        halves[k] = static_cast<const uint16_t*>(warp[8 * j + row].in)[column];
      }
      static_cast<unsigned*>(warp[lane].out)[j] = halves[0] | halves[1] << 16;
    }
}

// Each lane reads the row that it names, so that a race is reported with the lane's own history.
template <bool TRANS>
void ldmatrix(unsigned (&r)[4], const void* row, executor::Site site) {
  if (uintptr_t(row) % 16) executor::fail("%s at %s:%d: row not on a 16-byte border", site.op, site.file, site.line);
  const uint4 in = *static_cast<const uint4*>(row);
  executor::warp_collective(~0u, &exchange_ldmatrix<TRANS>, &in, r, false, site);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row, EXECUTOR_SITE) {
  ldmatrix<false>(r, row, {"ldmatrix.x4", file_, line_});
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, EXECUTOR_SITE) {
  ldmatrix<true>(r, row, {"ldmatrix.x4.trans", file_, line_});
}

inline void store16(void* to, const unsigned (&words)[4]) {
  *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

// The hardware may write the destination at any moment between issue and wait. Here it is NaN until the wait, the
// latest moment, where the source is read too: whoever looks or changes something earlier shows.
inline void cp_async16(void* to, const void* from, int bytes, EXECUTOR_SITE) {
  executor::begin_copy(to, from, bytes, {"cp.async", file_, line_});
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
}
inline void cp_async_commit() { executor::commit_copies(); }
template <int N>
void cp_async_wait() {
  for (executor::Copy copy; executor::finish_copy(N, &copy);) {
    uint4 value{};
    for (int i = 0; i < copy.bytes; ++i) reinterpret_cast<char*>(&value)[i] = static_cast<const char*>(copy.from)[i];
    *static_cast<uint4*>(copy.to) = value;
  }
}

}  // namespace ptx
