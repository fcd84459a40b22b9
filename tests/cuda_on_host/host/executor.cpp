// The scheduler. For ThreadSanitizer it is compiled without instrumentation (EXECUTOR_TSAN instead): its own records are
// shared by all fibers on purpose. Whatever touches a kernel's memory is therefore in the headers, not here.
#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif
#ifdef EXECUTOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif
#ifndef __x86_64__
#error "switch_stack and prepare are written for x86-64"
#endif

namespace executor {
Thread* self = nullptr;
dim3 grid_dim, block_dim;
uint3 block_index;

namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t GUARD = 4096, STACK = 128 * 1024;        // per fiber
constexpr size_t SHARED_LIMIT = 163 * 1024;               // a block's on sm_80, the least of our targets
constexpr size_t ARENA = size_t(1) << 30, RED_ZONE = 128;  // of address space; only what is touched is memory
constexpr unsigned NO_SYNC = 1;                           // switching fibers orders nothing

Thread threads[MAX_THREADS];
unsigned num_threads, num_exited, num_at_barrier;
unsigned ready[MAX_THREADS / 32], at_collective[MAX_THREADS / 32];  // a bit per lane
int barrier_sum;
const std::function<void()>* body;
Order order = Order::FORWARD;
uint64_t seed;
std::mt19937_64 draw;

// Fibers outlive a block. ThreadSanitizer takes what one fiber does to be in order, so two sets take turns, and a race
// between a block and the next one shows.
#ifdef EXECUTOR_TSAN
constexpr unsigned SETS = 2;
void* tsan_fibers[SETS][MAX_THREADS];
#else
constexpr unsigned SETS = 1;
#endif
unsigned set = 0;
char* stacks = nullptr;
char* arena = nullptr;
size_t arena_used = 0;
void* dynamic = nullptr;
std::vector<std::pair<int, void*>> arrays;

void* scheduler_stack_pointer;
ASAN(void* scheduler_fake = nullptr; const void* scheduler_bottom = nullptr; size_t scheduler_size = 0;)
TSAN(void* scheduler_fiber; char started, ended, released[1 << 14]; unsigned num_released;)

char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("can't reserve %zu bytes of address space", bytes);
  return static_cast<char*>(p);
}

__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

char* stack_of(const Thread& t) { return stacks + (set * MAX_THREADS + t.number) * (GUARD + STACK) + GUARD; }

void leave() {
  Thread* me = self;
  ASAN(__sanitizer_start_switch_fiber(me->exited ? nullptr : &me->asan, scheduler_bottom, scheduler_size);)
  TSAN(__tsan_switch_to_fiber(scheduler_fiber, NO_SYNC);)
  switch_stack(&me->stack_pointer, scheduler_stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(me->asan, &scheduler_bottom, &scheduler_size);)
}

void resume(Thread& t) {
  self = &t;
  ASAN(__sanitizer_start_switch_fiber(&scheduler_fake, stack_of(t), STACK);)
  TSAN(__tsan_switch_to_fiber(t.tsan, NO_SYNC);)
  switch_stack(&scheduler_stack_pointer, t.stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);)
  self = nullptr;
}

void run_thread() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);)
  TSAN(__tsan_acquire(&started);)
  (*body)();
  TSAN(__tsan_release(&ended);)
  self->exited = true;
  ready[self->number / 32] &= ~(1u << self->lane);
  ++num_exited;
  leave();
  abort();  // never resumed
}

void prepare(unsigned number) {
  Thread& t = threads[number];  // field by field: TSan would note a memset, and kernels read what is here
  t.exited = false;
  t.first_copy = t.num_copies = t.groups = 0;
  t.number = number;
  t.lane = number % 32;
  t.index = {number % block_dim.x, number / block_dim.x % block_dim.y, number / (block_dim.x * block_dim.y)};
  ASAN(__asan_unpoison_memory_region(stack_of(t), STACK);)
  TSAN(if (!tsan_fibers[set][number]) tsan_fibers[set][number] = __tsan_create_fiber(0);)
  TSAN(t.tsan = tsan_fibers[set][number];)
  // Tops are staggered: on the same offset of a page they would all compete for the same lines of the cache.
  auto* top = reinterpret_cast<void**>(stack_of(t) + STACK - number * 320 % 4096 / 16 * 16);
  *--top = nullptr;  // rsp % 16 == 8 at entry
  *--top = reinterpret_cast<void*>(&run_thread);
  t.stack_pointer = top - 6;  // six registers, zero: the stack is fresh or they don't matter
}

// The next thread to run: forward, the first one that can, so that warps run on until all their lanes wait.
Thread* next() {
  const unsigned warps = num_threads / 32, first = order == Order::SEEDED ? unsigned(draw() % warps) : 0;
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = order == Order::REVERSE ? warps - 1 - i : (first + i) % warps;
    unsigned lanes = ready[warp];
    if (!lanes) continue;
    if (order == Order::SEEDED)
      for (uint64_t skip = draw() % unsigned(__builtin_popcount(lanes)); skip; --skip) lanes &= lanes - 1;
    return &threads[warp * 32 + (order == Order::REVERSE ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes))];
  }
  return nullptr;
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && !strcmp(a.op, b.op) && !strcmp(a.file, b.file);
}

bool same_state(const Thread& a, const Thread& b) {
  return a.exited == b.exited && (a.exited || (a.mask == b.mask && same_site(a.site, b.site)));
}

[[noreturn]] void report_deadlock() {
  std::string text = "deadlock:";
  for (unsigned i = 0, j; i < num_threads; i = j) {
    const Thread& t = threads[i];
    for (j = i + 1; j < num_threads && same_state(threads[j], t);) ++j;
    text += "\n  threads " + std::to_string(i) + "-" + std::to_string(j - 1);
    if (t.exited) {
      text += " have exited";
      continue;
    }
    char mask[32] = "";
    if (t.mask) snprintf(mask, sizeof mask, " (mask %08x)", t.mask);
    text += std::string(" wait in ") + t.site.op + mask + " at " + t.site.file + ":" + std::to_string(t.site.line);
  }
  fail("%s", text.c_str());
}

// Whether all threads that `me` waits for stand where it stands.
bool complete(const Thread& me) {
  const unsigned warp = me.number / 32;
  if (!me.mask) {
    if (num_at_barrier != num_threads) return false;
    return std::all_of(threads, threads + num_threads, [&](const Thread& t) { return same_state(t, me); });
  }
  if ((at_collective[warp] & me.mask) != me.mask) return false;
  for (unsigned lanes = me.mask; lanes; lanes &= lanes - 1)
    if (!same_state(threads[warp * 32 + __builtin_ctz(lanes)], me)) return false;
  return true;
}

template <class F>
void for_group(const Thread& me, F f) {
  Thread* warp = threads + me.number / 32 * 32;
  if (me.mask)
    for (unsigned lanes = me.mask; lanes; lanes &= lanes - 1) f(warp[__builtin_ctz(lanes)]);
  else
    std::for_each(threads, threads + num_threads, f);
}

// The meeting of a group; what `orders` has everyone's past before everyone's future.
template <class F>
void meet(bool orders, F last) {
  Thread& me = *self;
  ready[me.number / 32] &= ~(1u << me.lane);
  TSAN(if (orders) __tsan_release(&me.arrived);)
  if (complete(me)) {
    // A fresh address each time: with one for all, a slow thread would also acquire what a fast one released at the
    // next meeting, and a race between the two would be hidden.
    char* address = nullptr;
    TSAN(address = &released[num_released++ % sizeof released];)
    TSAN(if (orders) for_group(me, [](Thread& t) { __tsan_acquire(&t.arrived); });)
    last();
    TSAN(if (orders) __tsan_release(address);)
    for_group(me, [&](Thread& t) {
      t.released = address;
      ready[t.number / 32] |= 1u << t.lane;
    });
    may_switch();  // the last to come need not be the first to go on
  } else {
    leave();
  }
  TSAN(if (orders) __tsan_acquire(me.released);)
}

void* allocate_shared(size_t bytes) {
  char* p = arena + arena_used;
  const size_t span = (bytes + 2 * RED_ZONE - 1) / RED_ZONE * RED_ZONE;
  if (arena_used + span > ARENA) fail("the blocks of one launch took more than %zu bytes of shared memory", ARENA);
  arena_used += span;
  ASAN(__asan_poison_memory_region(p, span); __asan_unpoison_memory_region(p, bytes);)
  for (volatile char *q = p, *end = p + bytes; q < end; ++q) *q = char(0xFF);  // not memset: TSan would note it
  return p;
}

void run_block(const uint3& index, size_t smem) {
  block_index = index;
  num_exited = num_at_barrier = 0;
  arrays.clear();
  set = (set + 1) % SETS;
  for (unsigned i = 0; i < num_threads; ++i) prepare(i);
  for (unsigned w = 0; w < num_threads / 32; ++w) ready[w] = ~0u, at_collective[w] = 0;
  dynamic = smem ? allocate_shared(smem) : nullptr;
  TSAN(__tsan_release(&started);)
  while (num_exited < num_threads) {
    Thread* t = next();
    if (!t) report_deadlock();
    resume(*t);
  }
}

}  // namespace

void set_order(Order o, uint64_t s) {
  order = o;
  seed = s;
}

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  fprintf(stderr, "executor: block (%u,%u,%u)", block_index.x, block_index.y, block_index.z);
  if (self) fprintf(stderr, " thread (%u,%u,%u)", self->index.x, self->index.y, self->index.z);
  fprintf(stderr, ": ");
  vfprintf(stderr, format, values);
  fprintf(stderr, "\n");
  fflush(stderr);
  _exit(FAILED);
}

int block_barrier(int vote, Site site) {
  self->mask = 0;
  self->vote = vote;
  self->site = site;
  ++num_at_barrier;
  meet(true, [] {
    num_at_barrier = 0;
    barrier_sum = std::accumulate(threads, threads + num_threads, 0, [](int sum, Thread& t) { return sum + t.vote; });
  });
  return barrier_sum;
}

void warp_collective(unsigned mask, Exchange exchange, const void* in, void* out, bool orders, Site site) {
  const unsigned warp = self->number / 32;
  if (!(mask >> self->lane & 1))
    fail("lane %u calls %s at %s:%d with mask %08x, which lacks it", self->lane, site.op, site.file, site.line, mask);
  self->mask = mask;
  self->in = in;
  self->out = out;
  self->site = site;
  at_collective[warp] |= 1u << self->lane;
  meet(orders, [&] {
    at_collective[warp] &= ~mask;
    if (exchange) exchange(threads + warp * 32, mask);
  });
}

void may_switch() {
  if (order == Order::SEEDED && draw() % 2) leave();
}

void* dynamic_shared() {
  if (!dynamic) fail("DYN_SHARED in a launch with smem = 0");
  return dynamic;
}

void* shared_array(int key, size_t bytes) {
  for (const auto& [k, p] : arrays)
    if (k == key) return p;
  arrays.emplace_back(key, allocate_shared(bytes));
  return arrays.back().second;
}

void begin_copy(void* to, const void* from, int bytes, Site site) {
  Thread& me = *self;
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) fail("%s at %s:%d: not on a 16-byte border", site.op, site.file, site.line);
  if (bytes < 0 || bytes > 16) fail("%s at %s:%d: %d bytes", site.op, site.file, site.line, bytes);
  if (me.num_copies == std::size(me.copies)) fail("more than %zu copies under way", std::size(me.copies));
  me.copies[(me.first_copy + me.num_copies++) % std::size(me.copies)] = {to, from, bytes, me.groups};
}

void commit_copies() { ++self->groups; }

bool finish_copy(int pending, Copy* copy) {
  Thread& me = *self;
  if (!me.num_copies || me.copies[me.first_copy].group >= me.groups - pending) return false;
  *copy = me.copies[me.first_copy];
  me.first_copy = (me.first_copy + 1) % int(std::size(me.copies));
  --me.num_copies;
  return true;
}

void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()>& kernel) {
  const uint64_t count = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (self) fail("a launch inside a kernel");
  if (!count || count > MAX_THREADS || block.z > 64 || count % 32)
    fail("block (%u,%u,%u) must be whole warps, up to %u threads and 64 in z", block.x, block.y, block.z, MAX_THREADS);
  if (!blocks || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    fail("grid (%u,%u,%u) must be at least 1 and at most 2147483647, 65535, 65535", grid.x, grid.y, grid.z);
  if (smem > SHARED_LIMIT) fail("smem=%zu exceeds %zu", smem, SHARED_LIMIT);
  if (!arena) {
    arena = reserve(ARENA);
    stacks = reserve(SETS * MAX_THREADS * (GUARD + STACK));
    for (size_t i = 0; i < SETS * MAX_THREADS; ++i) mprotect(stacks + i * (GUARD + STACK), GUARD, PROT_NONE);
  }
  num_threads = unsigned(count);
  grid_dim = grid;
  block_dim = block;
  body = &kernel;
  draw.seed(seed);
  TSAN(scheduler_fiber = __tsan_get_current_fiber();)
  std::vector<uint64_t> turns(blocks);
  std::iota(turns.begin(), turns.end(), uint64_t(0));
  if (order == Order::REVERSE) std::reverse(turns.begin(), turns.end());
  if (order == Order::SEEDED) std::shuffle(turns.begin(), turns.end(), draw);
  for (uint64_t i : turns)
    run_block({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)}, smem);
  TSAN(__tsan_acquire(&ended);)  // the next launch comes after this one
  arena_used = 0;
}

}  // namespace executor
