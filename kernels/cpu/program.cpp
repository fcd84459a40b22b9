// Programs: the kernel calls of a function, recorded once and replayed without Python, by threads that stay awake.
//
// While a program is recorded every op runs as always, and its call is kept. Results live in the program's own memory:
// what was freed is given out again, so a replay uses the same few cache lines over and over. A replay works with the
// addresses of the recording: new inputs are written into the tensors of then.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <tuple>
#include <vector>

#include "call.h"
#include "checks.h"

namespace {

constexpr size_t LINE = 64;  // of the cache

// Memory that is given out in blocks of one size each. A block that is freed waits for two more calls: calls that are
// joined (`Call::follow`) work at the same time, and one must not overwrite what the other still reads.
class Arena {
 public:
  ~Arena() {
    for (void* block : blocks_) std::free(block);
  }
  void* take(size_t size, int64_t calls) {
    while (!freed_.empty() && freed_.front().at + CALLS_JOINED <= calls) {
      free_[freed_.front().size].push_back(freed_.front().block);
      freed_.pop_front();
    }
    std::vector<void*>& some = free_[size];
    if (some.empty()) {
      some.push_back(std::aligned_alloc(LINE, (size + LINE) / LINE * LINE));
      STD_TORCH_CHECK(some.back(), "record: no memory for ", size, " bytes");
      blocks_.push_back(some.back());
    }
    void* block = some.back();
    some.pop_back();
    return block;
  }
  void give(void* block, size_t size, int64_t calls) { freed_.push_back({block, size, calls}); }

 private:
  static constexpr int64_t CALLS_JOINED = 3;
  struct Freed {
    void* block;
    size_t size;
    int64_t at;  // calls recorded by then
  };
  std::vector<void*> blocks_;
  std::map<size_t, std::vector<void*>> free_;
  std::deque<Freed> freed_;
};

// All threads of a region wait for each other. They spin, for what they wait for is a matter of microseconds; each on
// the others' lines of memory, so that a line changes hands but once.
class Barrier {
 public:
  explicit Barrier(int64_t threads) : arrived_(threads) {}
  // By a thread that does the work of the threads [first, last).
  void arrive(int64_t round, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) arrived_[t].round.store(round, std::memory_order_release);
  }
  void wait(int64_t round) const {
    for (const Line& other : arrived_)
      for (int spins = 0; other.round.load(std::memory_order_acquire) < round;)
        if (++spins < SPINS) pause();
        else sched_yield();  // more threads than processors
  }

 private:
  static constexpr int SPINS = 20000;
  static void pause() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }
  struct alignas(64) Line {
    std::atomic<int64_t> round{-1};
  };
  std::vector<Line> arrived_;
};

std::atomic<int64_t> turns{0};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A C function of another library, called by one thread: communication that needs no Python.
struct DirectCall : Call {
  using Function = int (*)(void* handle, void* data, uint64_t count, int kind);  // 0 or an error's number
  Function function;
  void *handle, *data;
  uint64_t count;
  int kind, failed = 0;
  int64_t number;  // among the recording's

  void prepare(int64_t) override { failed = 0; }
  int64_t most_threads() const override { return 1; }
  void work(int64_t, int64_t) override { failed = function(handle, data, count, kind); }
  int error() const override { return failed; }
};

using Failure = std::tuple<int64_t, int64_t>;  // which direct call, its error's number; 0: none

struct Program {
  std::vector<std::unique_ptr<Call>> calls;                  // as recorded, until `finish`
  std::vector<std::vector<std::unique_ptr<Call>>> segments;  // between what the program can't replay
  std::exception_ptr refused;                                // what the last replay's `prepare` threw
  Failure failure{0, 0};                                     // of the last replay
  struct Times {
    int64_t threads = 0;
    std::vector<double> seconds;  // [2][threads][calls]
  };
  std::vector<Times> times;  // of each segment's last replay by the clock
  int64_t recorded = 0;
  std::shared_ptr<Arena> arena = std::make_shared<Arena>();

  // Cuts the calls into segments at these places, and joins those within a segment that can be.
  void finish(const std::vector<int64_t>& cuts) {
    size_t next = 0;
    for (const int64_t cut : cuts) {
      std::vector<std::unique_ptr<Call>>& segment = segments.emplace_back();
      for (; next < size_t(cut); ++next) {
        std::unique_ptr<Call> call = std::move(calls[next]);
        if (!segment.empty() && call->follow(segment.back())) segment.back() = std::move(call);
        else segment.push_back(std::move(call));
      }
    }
    const Call* weights = nullptr;
    for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment)
      for (auto call = segment->rbegin(); call != segment->rend(); ++call) weights = (*call)->precede(weights);
    calls.clear();
    times.resize(segments.size());
  }

  // Runs a segment; by the clock, it notes when each thread began and ended its share of each call. Threads that wait
  // for each other must not throw: all of them stop behind a call that failed.
  Failure replay(int64_t number, bool clock) {
    const auto& segment = segments.at(number);
    const int64_t threads = torch::stable::get_num_threads();
    double* seconds = nullptr;
    if (clock) {
      times[number].threads = threads;
      times[number].seconds.assign(2 * threads * segment.size(), 0.0);
      seconds = times[number].seconds.data();
    }
    const int64_t turn = ++turns;
    for (const auto& call : segment)  // weights have gone through the caches since
      for (size_t at : {size_t(0), LINE}) __builtin_prefetch(reinterpret_cast<const char*>(call.get()) + at);
    for (const auto& call : segment) call->prepare(turn);
    Barrier barrier(threads);
    const Call* failed = nullptr;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const auto useful_for = [&](size_t i) { return i < segment.size() ? std::min(threads, segment[i]->most_threads()) : 0; };
      int64_t useful = useful_for(0);
      for (size_t i = 0; i < segment.size(); ++i) {
        for (int64_t t = first; t < last && t < useful; ++t) {
          double* const begin = seconds ? seconds + t * segment.size() + i : nullptr;
          if (begin) *begin = now();
          segment[i]->work(t, useful);
          if (begin) begin[threads * segment.size()] = now();
        }
        barrier.arrive(i, first, last);
        useful = useful_for(i + 1);  // brings the next call into the cache while others arrive
        barrier.wait(i);
        if (segment[i]->error()) {
          if (first == 0) failed = segment[i].get();
          break;
        }
      }
    });
    if (failed) return {static_cast<const DirectCall&>(*failed).number, failed->error()};
    return {0, 0};
  }
};

thread_local Program* recording = nullptr;

int64_t record_begin() {
  STD_TORCH_CHECK(!recording, "record: this thread records already");
  recording = new Program;
  return reinterpret_cast<int64_t>(recording);
}

// How many calls this thread has recorded.
int64_t recorded() { return recording ? recording->recorded : 0; }

void record_end(const std::vector<int64_t> cuts) {
  STD_TORCH_CHECK(recording, "record: this thread doesn't record");
  Program* program = recording;
  recording = nullptr;
  program->finish(cuts);
}

// Keeps a call that replays make: function(handle, data, count, kind).
void record_direct(int64_t function, int64_t handle, int64_t data, int64_t count, int64_t kind, int64_t number) {
  STD_TORCH_CHECK(recording, "record: this thread doesn't record");
  auto call = std::make_unique<DirectCall>();
  call->function = reinterpret_cast<DirectCall::Function>(function);
  call->handle = reinterpret_cast<void*>(handle), call->data = reinterpret_cast<void*>(data);
  call->count = count, call->kind = int(kind), call->number = number;
  recording->calls.push_back(std::move(call));
  ++recording->recorded;
}

// Why the last replay of a segment didn't reach its end: throws what an input was refused with.
Failure replay_failure(int64_t program) {
  const Program& from = *reinterpret_cast<Program*>(program);
  if (from.refused) std::rethrow_exception(from.refused);
  return from.failure;
}

// [2, threads, calls] in float64, seconds on one clock when each thread began and ended its work on a call in the
// segment's last replay by the clock, 0 where it had none.
Tensor replay_times(const Tensor like, int64_t program, int64_t segment) {
  const Program& from = *reinterpret_cast<Program*>(program);
  const Program::Times& times = from.times.at(segment);
  const int64_t calls = from.segments[segment].size();
  Tensor seconds = torch::stable::new_zeros(like, {2, times.threads, calls}, ScalarType::Double);
  std::copy(times.seconds.begin(), times.seconds.end(), static_cast<double*>(seconds.mutable_data_ptr()));
  return seconds;
}

void forget(int64_t program) { delete reinterpret_cast<Program*>(program); }

}  // namespace

// Runs a segment; whether it reached its end (else `replay_failure` says why). Called through ctypes: torch's way to an op
// reads some hundred lines of memory that the weights have pushed out of the caches since the last step.
extern "C" bool onemesh_replay(void* program, int64_t segment, bool clock) {
  Program& of = *static_cast<Program*>(program);
  of.refused = nullptr;
  try {
    of.failure = of.replay(segment, clock);
  } catch (...) {
    of.refused = std::current_exception();
  }
  return !of.refused && of.failure == Failure{0, 0};
}

bool is_recording() { return recording != nullptr; }

void run(std::unique_ptr<Call> call) {
  call->prepare(++turns);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), call->most_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) call->work(first, threads);
  });
  if (!recording) return;
  recording->calls.push_back(std::move(call));
  ++recording->recorded;
}

// glibc's aligned allocation, which torch's is, looks for room for the alignment too: a freed block is too small for the
// next result of its own size, and a training step leaves a hole behind each. Here all requests of a size are alike.
Tensor new_result(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  size_t size = type == ScalarType::BFloat16 ? 2 : type == ScalarType::Float ? 4 : 8;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  size *= stride;
  if (!recording) {
    void* const room = std::malloc(size + LINE);
    STD_TORCH_CHECK(room, "no memory for ", size, " bytes");
    void* const block = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room) + LINE - 1) / LINE * LINE);
    return torch::stable::from_blob(block, sizes, strides, like.device(), type, [room](void*) { std::free(room); });
  }
  void* block = recording->arena->take(size, recording->recorded);
  return torch::stable::from_blob(block, sizes, strides, like.device(), type,
                                  [arena = recording->arena, program = recording, size](void* data) {
                                    // freed after the recording: nobody will ask for it again
                                    if (recording == program) arena->give(data, size, program->recorded);
                                  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("record_begin() -> int");
  m.def("recorded() -> int");
  m.def("record_end(int[] cuts) -> ()");
  m.def("record_direct(int function, int handle, int data, int count, int kind, int number) -> ()");
  m.def("replay_failure(int program) -> (int, int)");
  m.def("replay_times(Tensor like, int program, int segment) -> Tensor");
  m.def("forget(int program) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CompositeExplicitAutograd, m) {
  m.impl("record_begin", TORCH_BOX(&record_begin));
  m.impl("recorded", TORCH_BOX(&recorded));
  m.impl("record_end", TORCH_BOX(&record_end));
  m.impl("record_direct", TORCH_BOX(&record_direct));
  m.impl("replay_failure", TORCH_BOX(&replay_failure));
  m.impl("forget", TORCH_BOX(&forget));
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) { m.impl("replay_times", TORCH_BOX(&replay_times)); }
