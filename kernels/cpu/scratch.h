// Memory of one thread, kept between calls up to a size: fresh memory is paid for in page faults.
#pragma once
#include <cstdint>
#include <memory>

namespace {

class Scratch {
 public:
  // Room for so many floats, valid until the same thread asks again; of any contents.
  float* floats(int64_t count) {
    constexpr int64_t KEPT = 1 << 20;
    static thread_local std::unique_ptr<float[]> kept;
    if (count <= KEPT) {
      if (!kept) kept.reset(new float[KEPT]);
      return kept.get();
    }
    own_.reset(new float[count]);
    return own_.get();
  }

 private:
  std::unique_ptr<float[]> own_;
};

}  // namespace
