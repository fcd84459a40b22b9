// What the launchers of planted.cu are told.
#pragma once
#include <cstdint>

struct Planted {
  const float* x;        // or 16-bit elements
  const int64_t* table;  // [sequences, width] pages
  const int64_t* lengths;
  float* out;
  int64_t blocks, width;
  int32_t bug;  // 0: the right program
};
