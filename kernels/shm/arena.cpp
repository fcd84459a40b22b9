#include "arena.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstring>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace {

constexpr int PAUSES = 500;        // some us; none where another rank needs the processor
constexpr double YIELD_S = 1e-3;  // an idle virtual processor takes up to a fifth of it to wake
constexpr double YIELD_CROWDED_S = 200e-6;
constexpr long LOOK_NS = 50'000'000;  // how often a sleeper looks whether the others live
constexpr double MOVE_S = 0.02;
constexpr size_t PAGE = 4096;

std::atomic<uint64_t> forks{0};

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

bool reached(const std::atomic<uint32_t>& value, uint32_t wanted) {
  return int32_t(value.load(std::memory_order_acquire) - wanted) >= 0;
}

}  // namespace

Layout::Layout(int n) {
  small_slot = n == 2 ? 64 << 10 : 32 << 10;
  chunk = n == 2 ? 512 << 10 : 256 << 10;
  const uint32_t part = chunk / uint32_t(n) / 64 * 64;
  large_slot = chunk + part;
  ranks = pages(sizeof(Header));
  pairs = ranks + pages(size_t(n) * sizeof(RankLine));
  fixed = pairs + pages(size_t(n) * n * sizeof(PairLine));
  small = fixed;
  large = small + pages(size_t(n) * SLOTS * small_slot);
  descriptors = large + pages(size_t(n) * SLOTS * large_slot);
  cells = descriptors + size_t(n) * n * pages(IN_FLIGHT * sizeof(Descriptor));
  total = cells + size_t(n) * n * IN_FLIGHT * CELL;
}

Arena::Arena(int fd, int rank, int size, double timeout_s)
    : me(rank), n(size), layout(size), sources(size), fd_(fd), timeout_s_(timeout_s), forks_(forks.load()),
      pid_(getpid()) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  outgoing_ = std::make_unique<Stream[]>(size);
  incoming_ = std::make_unique<Stream[]>(size);
}

Arena::~Arena() {
  if (base_ != nullptr) {
    if (getpid() == pid_) {
      lines_[me].left.store(1);
      post(lines_[me].step, lines_[me].step.value.load());
    }
    munmap(base_, layout.descriptors);
  }
  for (int r = 0; r < n; r++) {
    for (Stream* s : {&outgoing_[r], &incoming_[r]}) {
      if (s->cells != nullptr) munmap(s->cells, size_t(IN_FLIGHT) * CELL);
      if (s->descriptors != nullptr) munmap(s->descriptors, pages(IN_FLIGHT * sizeof(Descriptor)));
    }
  }
  for (int pidfd : pidfds_) {
    if (pidfd >= 0) close(pidfd);
  }
  close(fd_);
}

bool Arena::open() {
  if (ftruncate(fd_, off_t(layout.total)) != 0) return false;  // every rank sets the same size
  if (!commit(0, layout.fixed)) return false;
  void* at = mmap(nullptr, layout.descriptors, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (at == MAP_FAILED) return false;
  base_ = static_cast<uint8_t*>(at);
  head_ = reinterpret_cast<Header*>(base_);
  lines_ = reinterpret_cast<RankLine*>(base_ + layout.ranks);
  lines_[me].cpu.store(sched_getcpu());
  return true;
}

bool Arena::watch(const int* pids, bool crowded) {
  pidfds_.assign(n, -1);
  for (int r = 0; r < n; r++) {
    if (r == me) continue;
    pidfds_[r] = int(syscall(SYS_pidfd_open, pids[r], 0));
    if (pidfds_[r] < 0) return false;
  }
  crowded_ = crowded;
  return true;
}

int Arena::check() const {
  if (forks_ != forks.load(std::memory_order_relaxed)) return FORKED;
  return int(head_->broken.load(std::memory_order_relaxed));
}

int Arena::fail(int error, int rank) {
  uint32_t none = 0;
  // the culprit is there before the flag, for whoever fails first; later ones agree with it
  if (head_->broken.load() == 0) head_->culprit.store(uint32_t(rank));
  head_->broken.compare_exchange_strong(none, uint32_t(error));
  return int(head_->broken.load());
}

uint8_t* Arena::slot(int rank, uint32_t step, bool large) {
  const size_t stride = large ? layout.large_slot : layout.small_slot;
  return base_ + (large ? layout.large : layout.small) + (size_t(rank) * SLOTS + step % SLOTS) * stride;
}

int Arena::reserve(uint32_t step, bool large) {
  if (!committed_[large]) {
    const size_t bytes = SLOTS * size_t(large ? layout.large_slot : layout.small_slot);
    if (!commit(size_t(slot(me, 0, large) - base_), bytes)) return fail(NO_MEMORY, me);
    committed_[large] = true;
  }
  return wait_all(step - 1);
}

void Arena::post(Flag& flag, uint32_t value) {
  flag.value.store(value);  // sequentially consistent, like a sleeper's announcement: one of the two sees the other
  if (flag.sleepers.load() != 0) syscall(SYS_futex, &flag.value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

bool Arena::arrive(uint32_t value) {
  RankLine& own = lines_[me];
  const int cpu = sched_getcpu();  // a store would take the line from those who look at it
  if (own.cpu.load(std::memory_order_relaxed) != cpu) own.cpu.store(cpu, std::memory_order_relaxed);
  post(own.step, value);
  return crowded_ && (head_->arrivals[value % 8].count.fetch_add(1) + 1) % uint64_t(n) == 0;
}

// One word to sleep on and one wake for all.
void Arena::release(uint32_t value) { post(head_->all, value); }

int Arena::wait_all(uint32_t value) {
  if (int32_t(seen_ - value) >= 0) return OK;
  if (crowded_) {
    if (int error = wait(head_->all, value, -1)) return error;
  } else {
    for (int i = 1; i < n; i++) {
      if (int error = wait_rank((me + i) % n, value)) return error;
    }
  }
  seen_ = value;
  return OK;
}

int Arena::wait_rank(int rank, uint32_t value) { return wait(lines_[rank].step, value, rank); }

int Arena::look() {
  const double time = now();
  if (time - looked_ < LOOK_NS * 1e-9) return OK;
  looked_ = time;
  for (int r = 0; r < n; r++) {
    if (r != me && ended(r)) return fail(DEAD, r);
  }
  return OK;
}

int Arena::wait_message(Flag& flag, uint32_t value, int rank) { return wait(flag, value, rank); }

int Arena::wait(Flag& flag, uint32_t value, int rank) {
  if (reached(flag.value, value)) return OK;
  if (!crowded_ || (rank < 0 && !needed_here(value))) {
    for (int i = 0; i < PAUSES; i++) {
      pause_cpu();
      if (reached(flag.value, value)) return OK;
    }
  }
  if (!crowded_) step_aside(rank);
  const double started = now(), patience = crowded_ ? YIELD_CROWDED_S : YIELD_S;
  do {
    sched_yield();
    if (reached(flag.value, value)) return OK;
  } while (now() - started < patience);
  const timespec look{0, LOOK_NS};
  int error = OK;
  flag.sleepers.fetch_add(1);
  for (;;) {
    const uint32_t seen = flag.value.load();
    if (int32_t(seen - value) >= 0) break;
    const long woken = syscall(SYS_futex, &flag.value, FUTEX_WAIT, seen, &look, nullptr, 0);
    if (woken == 0 || errno == EAGAIN) continue;
    if ((error = missing(value, rank)) != OK) break;
    if (now() - started > timeout_s_) {
      error = TIMEOUT;
      break;
    }
  }
  flag.sleepers.fetch_sub(1);
  if (reached(flag.value, value)) return OK;  // it came in the end, perhaps just before its rank ended
  if (error == TIMEOUT && rank < 0) {
    for (rank = 0; rank < n - 1 && reached(lines_[rank].step.value, value);) rank++;
  }
  return error == TIMEOUT ? fail(TIMEOUT, rank) : error;
}

// Why a wait for `value` of this rank (-1: of all) is in vain, or OK.
int Arena::missing(uint32_t value, int rank) {
  if (const uint32_t broken = head_->broken.load()) return int(broken);
  bool all_arrived = rank < 0;
  for (int r = 0; r < n; r++) {
    if (r == me || (rank >= 0 ? r != rank : reached(lines_[r].step.value, value))) continue;
    all_arrived = false;
    if (lines_[r].left.load()) return fail(LEFT, r);
    if (ended(r)) return fail(DEAD, r);
  }
  for (int r = 0; all_arrived && r < n; r++) {
    if (r != me && ended(r)) return fail(DEAD, r);  // before it let the others go
  }
  return OK;
}

bool Arena::ended(int rank) const {
  pollfd p{pidfds_[rank], POLLIN, 0};  // a zombie has ended, too
  return poll(&p, 1, 0) > 0;
}

// Whether a rank that hasn't arrived was last on this processor, so that it takes giving it up to go on.
bool Arena::needed_here(uint32_t value) const {
  const int here = sched_getcpu();
  for (int r = 0; r < n; r++) {
    if (r == me || lines_[r].cpu.load(std::memory_order_relaxed) != here) continue;
    if (!reached(lines_[r].step.value, value)) return true;
  }
  return false;
}

// Two ranks that were woken on one core take turns there for ever: each sleeps in turn, so the scheduler sees nothing
// to move. The one that waits goes to a core that no rank of the group is on; it doesn't stay tied to it.
void Arena::step_aside(int rank) {
  const int here = sched_getcpu();
  if (rank < 0 || lines_[rank].cpu.load(std::memory_order_relaxed) != here || now() - moved_ < MOVE_S) return;
  moved_ = now();
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (int r = 0; r < n; r++) {
    const int taken = lines_[r].cpu.load(std::memory_order_relaxed);
    if (r != me && taken >= 0 && taken < CPU_SETSIZE && taken != here) CPU_CLR(taken, &allowed);
  }
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (cpu == here || !CPU_ISSET(cpu, &allowed)) continue;
    cpu_set_t before;
    if (sched_getaffinity(0, sizeof before, &before) != 0) return;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) == 0) sched_setaffinity(0, sizeof before, &before);
    return;
  }
}

// Memory is asked for here, where a refusal is an error, and not by the first write, where it is SIGBUS.
bool Arena::commit(size_t offset, size_t bytes) {
  errno = posix_fallocate(fd_, off_t(offset), off_t(bytes));
  return errno == 0;
}

int Arena::open_stream(Stream& stream, int from, int to) {
  const size_t pair = size_t(from) * n + to, table = pages(IN_FLIGHT * sizeof(Descriptor));
  const size_t bytes = size_t(IN_FLIGHT) * CELL;
  if (!commit(layout.descriptors + pair * table, table)) return fail(NO_MEMORY, me);
  void* descriptors =
      mmap(nullptr, table, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, off_t(layout.descriptors + pair * table));
  if (descriptors == MAP_FAILED) return fail(NO_MEMORY, me);
  stream.descriptors = static_cast<Descriptor*>(descriptors);
  void* cells = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, off_t(layout.cells + pair * bytes));
  if (cells == MAP_FAILED) return fail(NO_MEMORY, me);
  stream.cells = static_cast<uint8_t*>(cells);
  stream.line = reinterpret_cast<PairLine*>(base_ + layout.pairs) + pair;
  return OK;
}

int Arena::add_cell(Stream& stream, int to) {
  const size_t pair = size_t(me) * n + to;
  const size_t offset = layout.cells + (pair * IN_FLIGHT + stream.used) * CELL;
  if (!commit(offset, CELL)) return fail(NO_MEMORY, me);
  stream.spare.push_back(stream.used++);
  return OK;
}
