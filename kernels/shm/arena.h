#pragma once
// The memory that the ranks of one group on one host share, and how they wait for each other in it.
//
// A collective is a run of steps. At step s a rank writes into its own slot s % SLOTS, then publishes s + 1; whoever
// needs the slot waits for that number. Publishing v also says "I have read everything up to step v - SLOTS + 1", so a
// rank that has seen v of all others may write step v + 1: no flag for "done", no barrier.
//
// All functions return 0 or an `Error`. After the first error the group is broken for good: every later call of every
// rank fails at once.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

enum Error : int {
  OK = 0,
  DEAD = 1,       // a rank's process has ended
  LEFT = 2,       // a rank has closed the group
  TIMEOUT = 3,    // a rank is alive, but hasn't come in time
  MISMATCH = 4,   // ranks called different operations or sizes
  NO_MEMORY = 5,  // the host has no room for the shared memory
  FORKED = 6,     // called in a process forked from a rank
  UNSUITABLE = 7,  // not a contiguous tensor on the CPU, or a dtype that has no sum; nothing has happened
};

constexpr uint32_t SLOTS = 4;
constexpr uint32_t CELL = 128 << 10;    // bytes of a message that travel at a time
constexpr uint32_t IN_FLIGHT = 8 << 10;  // cells between two ranks: 1 GB

struct Flag {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};

struct alignas(128) RankLine {  // written by its rank alone, but for the sleepers
  Flag step;
  std::atomic<uint32_t> left;
  uint64_t tags[SLOTS];  // of the collective that begins at a step: they come with the flag that everybody watches
  alignas(128) std::atomic<int32_t> cpu;  // rarely written: others look at it each time they wait
};

struct Header {
  std::atomic<uint32_t> broken;  // the first Error
  std::atomic<uint32_t> culprit;
  struct alignas(128) Arrivals {
    std::atomic<uint64_t> count;
    uint64_t result;  // tag of the collective that the last to arrive has completed for all
  } arrivals[8];
  alignas(128) Flag all;  // the last step at which every rank has arrived (crowded groups)
};

struct Descriptor {
  uint64_t message_bytes;
  uint32_t cell;
};

struct alignas(128) PairLine {  // messages from one rank to another
  alignas(128) Flag sent;
  alignas(128) Flag received;
};

// One direction of messages, as the rank at one end sees it.
struct Stream {
  std::mutex mutex;
  PairLine* line = nullptr;
  Descriptor* descriptors = nullptr;
  uint8_t* cells = nullptr;
  uint32_t position = 0;   // next cell to send or receive
  uint32_t reclaimed = 0;  // sender: cells back from the receiver
  uint32_t used = 0;       // sender: cells that have memory
  std::vector<uint32_t> spare;
};

struct Layout {
  explicit Layout(int n);
  size_t ranks, pairs, fixed, small, large, descriptors, cells, total;  // offsets; `fixed` ends what all need at once
  uint32_t small_slot, large_slot, chunk;                               // bytes
};

// A number for each rank; those of few ranks cost no allocation.
class Numbers {
 public:
  explicit Numbers(int n) {
    if (n > int(sizeof few_ / sizeof *few_)) many_.resize(n), data_ = many_.data();
  }
  Numbers(const Numbers&) = delete;
  uint64_t& operator[](int i) { return data_[i]; }
  const uint64_t* data() const { return data_; }

 private:
  uint64_t few_[33], *data_ = few_;
  std::vector<uint64_t> many_;
};

struct Arena {
  Arena(int fd, int rank, int size, double timeout_s);
  ~Arena();
  Arena(const Arena&) = delete;

  int me, n;
  Layout layout;
  std::mutex mutex;  // one collective at a time
  uint32_t step = 0;
  std::vector<const uint8_t*> sources;  // by rank: what a collective combines

  // Maps the memory and publishes this rank; nothing else may be called before. False: errno says why.
  bool open();
  // Watches the ranks' processes. All of them say the same of `crowded`. False: errno says why.
  bool watch(const int* pids, bool crowded);

  int check() const;  // FORKED, or the error that broke the group
  int fail(int error, int rank);
  int lost() const { return int(head_->culprit.load()); }

  bool crowded() const { return crowded_; }  // more ranks than processors: one runs while others wait for it

  uint8_t* slot(int rank, uint32_t step, bool large);
  uint64_t& tag(int rank, uint32_t step) { return lines_[rank].tags[step % SLOTS]; }
  int reserve(uint32_t step, bool large);  // this rank's slot may be written afterwards
  void publish(uint32_t value) {
    if (arrive(value)) release(value);
  }
  int wait_all(uint32_t value);

  // The halves of `publish` in a crowded group: whether this rank is the last to arrive, and letting the others go on.
  // Between them that rank is alone, and may leave them a result.
  bool arrive(uint32_t value);
  void release(uint32_t value);
  uint64_t& result(uint32_t value) { return head_->arrivals[value % 8].result; }

  int wait_rank(int rank, uint32_t value);
  int look();  // for calls that wait for nobody: now and then, whether all ranks still run

  Stream& outgoing(int rank) { return outgoing_[rank]; }
  Stream& incoming(int rank) { return incoming_[rank]; }
  int open_stream(Stream& stream, int from, int to);
  int add_cell(Stream& stream, int to);
  int wait_message(Flag& flag, uint32_t value, int rank);
  void post(Flag& flag, uint32_t value);

 private:
  int wait(Flag& flag, uint32_t value, int rank);
  int missing(uint32_t value, int rank);
  bool ended(int rank) const;
  void step_aside(int rank);
  bool needed_here(uint32_t value) const;
  bool commit(size_t offset, size_t bytes);

  int fd_;
  double timeout_s_;
  uint64_t forks_;
  int pid_;
  uint8_t* base_ = nullptr;
  Header* head_ = nullptr;
  RankLine* lines_ = nullptr;
  std::vector<int> pidfds_;
  bool crowded_ = true;
  bool committed_[2] = {false, false};
  uint32_t seen_ = 0;  // all ranks have published this
  double moved_ = 0, looked_ = 0;
  std::unique_ptr<Stream[]> outgoing_, incoming_;
};

// out (and copy, unless null) = the ranks' sources, combined in rank order; out may be one of the sources. `type` is twice
// the place among TYPES of reduce.cpp, plus one for a maximum.
void reduce(int type, const uint8_t* const* sources, int n, uint8_t* out, uint8_t* copy, size_t bytes);
size_t item_bytes(int type);
