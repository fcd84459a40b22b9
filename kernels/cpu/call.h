// A kernel call: what an op asks of the threads. It is run at once, and kept if a program is being recorded.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>

class Call {
 public:
  virtual ~Call() = default;

  // Reads and checks the integers among the inputs, which other replays find changed. One thread, before any of the
  // calls it is prepared with works; those have the same `turn`, which is never used again.
  virtual void prepare(int64_t turn) { (void)turn; }

  // Threads that find something to do; known once it is prepared.
  virtual int64_t most_threads() const { return std::numeric_limits<int64_t>::max(); }

  // A thread's share of the work. Which threads there are must not change a bit of the result.
  virtual void work(int64_t thread, int64_t threads) = 0;

  // Where a thread begins to read weights, or null.
  virtual const void* weights(int64_t thread, int64_t threads) const {
    (void)thread, (void)threads;
    return nullptr;
  }

  // `next` is the next call that reads weights: this one may have them brought into the cache. Returns that call as the
  // call before this one sees it.
  virtual const Call* precede(const Call* next) { return next; }

  // The error's number once its work has failed: nothing behind it is done then.
  virtual int error() const { return 0; }

  // Takes the call before it in, if the threads can do both without waiting for each other in between.
  virtual bool follow(std::unique_ptr<Call>& before) {
    (void)before;
    return false;
  }
};

// Does it on torch's threads.
void run(std::unique_ptr<Call> call);

// Whether this thread records: an op must not copy its arguments then, for a replay wouldn't.
bool is_recording();

// Memory for a result, dense and on a line of its own: that of the program while one is recorded.
torch::stable::Tensor new_result(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
                                 torch::headeronly::ScalarType type);
inline torch::stable::Tensor new_result(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_result(like, sizes, like.scalar_type());
}

// Rows of a thread when `threads` share them evenly.
struct Share {
  int64_t first, last;
  Share(int64_t rows, int64_t thread, int64_t threads)
      : first(rows * thread / threads), last(rows * (thread + 1) / threads) {}
};

// Threads worth waking for `rows` rows of `width` elements.
inline int64_t threads_for(int64_t rows, int64_t width) {
  constexpr int64_t ELEMENTS = 1 << 14;  // of a thread
  const int64_t threads = rows * width / ELEMENTS;
  return threads < 1 ? 1 : threads < rows ? threads : rows;
}
