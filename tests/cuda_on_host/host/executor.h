// Runs CUDA C++ kernels on the CPU, one block at a time, every CUDA thread a fiber with its own stack.
//
// Fibers change only where threads meet: at block barriers and warp collectives (and, in seeded order, at atomics). So
// a run is repeatable, and three orders (forward, reverse, seeded) show what depends on the order. It models CUDA's
// programming model, not the hardware: no weak memory, no timing.
//
// A mistake that it sees ends the process: the message on stderr, exit code `FAILED`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace executor {

constexpr int FAILED = 3;

enum class Order : int64_t { FORWARD, REVERSE, SEEDED };

// Where in the source a thread waits, and in what.
struct Site {
  const char* op;
  const char* file;
  int line;
};
#define EXECUTOR_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()

// A copy under way: 16 bytes, of them `bytes` from the source.
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

// A CUDA thread. Kernels see the first two fields; the operands are for the exchange of a warp collective.
struct Thread {
  uint3 index;
  unsigned lane;
  const void* in;
  void* out;

  unsigned number;         // within the block
  bool exited;
  unsigned mask;           // lanes it waits for; 0: the whole block
  int vote;
  Site site;
  Copy copies[128];        // a ring, not a vector: ThreadSanitizer would follow its memory from block to block
  int first_copy, num_copies, groups;
  void* stack_pointer;
  void *asan, *tsan;
  char arrived, *released;  // addresses for ThreadSanitizer's happens-before
};

extern Thread* self;
extern dim3 grid_dim, block_dim;
extern uint3 block_index;

// Runs body once per thread of the grid; blocks and threads in the order set by `set_order`.
void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()>& body);
void set_order(Order order, uint64_t seed);
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Shared memory, full of NaN (0xFF in every byte) when a block starts.
void* dynamic_shared();
void* shared_array(int key, size_t bytes);  // one array per key and block

// Waits for all threads of the block at the same line; returns the sum of their votes.
int block_barrier(int vote, Site site);

// Waits for the lanes of `mask` at the same line; the last to come calls `exchange` with the warp's 32 threads. Only a
// collective that `orders` makes what one lane wrote before it visible to the others after it.
using Exchange = void (*)(Thread* warp, unsigned mask);
void warp_collective(unsigned mask, Exchange exchange, const void* in, void* out, bool orders, Site site);

// In seeded order, perhaps lets another thread run.
void may_switch();

void begin_copy(void* to, const void* from, int bytes, Site site);
void commit_copies();
// The next copy of all but the newest `pending` groups, oldest first; false if there is none left.
bool finish_copy(int pending, Copy* copy);

}  // namespace executor
