// Calls that others can take in (`Call::follow`).
#pragma once
#include <memory>
#include <vector>

#include "call.h"
#include "kernels.h"

// Rows of norm.cpp.
struct NormCall : Call {
  NormArgs args;
  int64_t rows;
  bool bf16;

  NormCall(const NormArgs& of, int64_t num_rows, bool is_bf16) : args(of), rows(num_rows), bf16(is_bf16) {}
  int64_t most_threads() const override { return threads_for(rows, args.width); }
  void work(int64_t thread, int64_t threads) override;
};

// Where a panel of a packed weight begins; a unit has 4 bytes.
inline const char* panel_of(const Product& product, int64_t panel, bool bf16) {
  const int64_t units = (product.in_width * (bf16 ? 2 : 4) + 3) / 4;
  return static_cast<const char*>(product.weight) + panel * PANEL * units * 4;
}

// Linears of one x: calls [parts][segments], parts differ in columns, segments in rows. Behind a norm of few rows every
// thread norms all of them for itself.
struct LinearCall : Call {
  std::vector<LinearArgs> calls;
  int64_t segments;
  bool bf16;

  LinearCall(std::vector<LinearArgs> of, int64_t num_segments, bool is_bf16)
      : calls(std::move(of)), segments(num_segments), bf16(is_bf16) {}
  void work(int64_t thread, int64_t threads) override;
  bool follow(std::unique_ptr<Call>& before) override;
  const void* weights(int64_t thread, int64_t threads) const override;
  const Call* precede(const Call* next) override;

  // A thread's part of every part's panels, which are alike: [first, last) of them.
  void panels(int64_t thread, int64_t threads, int64_t first, int64_t last);

 private:
  std::vector<LinearArgs> normed(int64_t thread, int64_t threads);

  const void* next(int64_t thread, int64_t threads) const { return next_ ? next_->weights(thread, threads) : nullptr; }

  std::unique_ptr<NormCall> norm_;
  const Call* next_ = nullptr;
};

// Rows of rotary.cpp: queries turned, keys turned on their way into the cache.
struct RotaryWriteCall : Call {
  RotaryArgs q;
  PagesArgs pages;
  int64_t rows, num_slots;
  bool bf16;

  RotaryWriteCall(const RotaryArgs& of, const PagesArgs& to, int64_t num_rows, int64_t slots, bool is_bf16)
      : q(of), pages(to), rows(num_rows), num_slots(slots), bf16(is_bf16) {}
  void prepare(int64_t turn) override;  // throws unless the slots are those of the cache
  int64_t most_threads() const override {
    return threads_for(rows, (q.num_heads + 2 * pages.num_kv_heads) * q.head_dim);
  }
  void work(int64_t thread, int64_t threads) override;
};
