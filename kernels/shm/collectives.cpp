// The collectives (the rules of steps and slots: arena.h).
//
// What fits into a slot goes in one step: copy in, publish, wait for the others, combine. What is longer goes in chunks,
// so that the copies of one chunk overlap the waiting for another and everything stays in the cache. Sums are taken in
// rank order either way: the bits of an entry depend neither on its place nor on the size.
#include "collectives.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace {

enum Operation : uint64_t { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, BROADCAST, BARRIER };

uint64_t mixed(uint64_t tag, uint64_t value) { return (tag ^ value) * 0x9E3779B97F4A7C15ull + (tag >> 29); }

uint64_t mixed(uint64_t tag, const uint64_t* sizes, int n) {
  for (int r = 0; r < n; r++) tag = mixed(tag, sizes[r]);
  return tag;
}

// One collective of this rank, from its first step on.
class Call {
 public:
  Call(Arena& arena, uint64_t tag, bool large)
      : a_(arena), lock_(arena.mutex), first_(arena.step), tag_(mixed(tag, arena.step)), large_(large) {}

  int begin() {
    if (int error = a_.check()) return error;
    return a_.reserve(first_, large_);
  }

  uint8_t* slot(int rank, uint64_t t) { return a_.slot(rank, first_ + uint32_t(t), large_); }
  uint8_t* own(uint64_t t) { return slot(a_.me, t); }
  int reserve(uint64_t t) { return a_.reserve(first_ + uint32_t(t), large_); }

  void publish(uint64_t t) {
    arriving(t);
    a_.publish(a_.step);
  }

  // In a crowded group: publishes step 0, which the last rank to arrive completes for all of them by `combine`.
  template <class Combine>
  int complete(const Combine& combine) {
    arriving(0);
    if (a_.arrive(a_.step)) {
      const int error = all_same();
      if (error == OK) {
        combine();
        a_.result(a_.step) = tag_;
      }
      a_.release(a_.step);
      return error;
    }
    if (int error = a_.wait_all(a_.step)) return error;
    return a_.result(a_.step) == tag_ ? OK : all_same();
  }

  // Waits until every rank has published step t; the first time compares what they are doing.
  int wait_all(uint64_t t) {
    if (int error = a_.wait_all(first_ + uint32_t(t) + 1)) return error;
    return t == 0 ? all_same() : OK;
  }

  int wait_rank(int rank, uint64_t t) {
    if (int error = a_.wait_rank(rank, first_ + uint32_t(t) + 1)) return error;
    return t == 0 ? same(rank) : OK;
  }

 private:
  void arriving(uint64_t t) {
    if (t == 0) a_.tag(a_.me, first_) = tag_;
    a_.step = first_ + uint32_t(t) + 1;
  }

  int same(int rank) { return a_.tag(rank, first_) == tag_ ? OK : a_.fail(MISMATCH, rank); }

  int all_same() {
    for (int r = 0; r < a_.n; r++) {
      if (int error = same(r)) return error;
    }
    return OK;
  }

  Arena& a_;
  std::lock_guard<std::mutex> lock_;
  uint32_t first_;
  uint64_t tag_;
  bool large_;
};

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// Bytes [at, at + length) of part `index` when `bytes` are cut into parts of `part`.
struct Span {
  Span(uint64_t bytes, uint64_t part, uint64_t index)
      : at(std::min(index * part, bytes)), length(std::min(part, bytes - at)) {}
  uint64_t at, length;
};

// Where processors are shared: the ranks' combination in slot 0, by one of them in less time than by everybody.
int reduce_by_one(Call& call, Arena& a, int type, const uint8_t* x, uint64_t bytes) {
  std::memcpy(call.own(0), x, bytes);
  return call.complete([&] {
    for (int r = 0; r < a.n; r++) a.sources[r] = call.slot(r, 0);
    reduce(type, a.sources.data(), a.n, call.slot(0, 0), nullptr, bytes);
  });
}

int reduce_at_once(Call& call, Arena& a, int type, uint8_t* x, uint64_t bytes) {
  if (a.crowded()) {
    const int error = reduce_by_one(call, a, type, x, bytes);
    if (error == OK) std::memcpy(x, call.slot(0, 0), bytes);
    return error;
  }
  std::memcpy(call.own(0), x, bytes);
  call.publish(0);
  if (int error = call.wait_all(0)) return error;
  for (int r = 0; r < a.n; r++) a.sources[r] = r == a.me ? x : call.slot(r, 0);
  reduce(type, a.sources.data(), a.n, x, nullptr, bytes);
  return OK;
}

// At step t a rank copies chunk t in, reduces its own part of chunk t - 1 and copies the parts of chunk t - 2 out.
int reduce_in_chunks(Call& call, Arena& a, int type, uint8_t* x, uint64_t bytes) {
  const uint64_t unit = 64 * uint64_t(a.n);  // parts begin at cache lines
  const uint64_t most = a.layout.chunk / unit * unit, about = ceil_div(bytes, most);
  const uint64_t chunk = std::min(most, ceil_div(ceil_div(bytes, about), unit) * unit);
  const uint64_t steps = ceil_div(bytes, chunk), part = chunk / a.n;
  auto span = [&](uint64_t t, int r) { return Span(bytes, part, t * a.n + r); };
  for (uint64_t t = 0; t <= steps + 1; t++) {
    if (t <= steps) {
      if (int error = call.reserve(t)) return error;
    }
    for (int r = 0; t < steps && r < a.n; r++) {
      const Span s = span(t, r);
      if (r != a.me) std::memcpy(call.own(t) + r * part, x + s.at, s.length);
    }
    if (t >= 1) {
      if (int error = call.wait_all(t - 1)) return error;
    }
    if (t >= 1 && t <= steps) {
      const Span s = span(t - 1, a.me);
      for (int r = 0; r < a.n; r++) a.sources[r] = r == a.me ? x + s.at : call.slot(r, t - 1) + a.me * part;
      reduce(type, a.sources.data(), a.n, x + s.at, call.own(t) + chunk, s.length);
    }
    if (t <= steps) call.publish(t);
    for (int i = 1; t >= 2 && i < a.n; i++) {
      const int r = (a.me + i) % a.n;
      const Span s = span(t - 2, r);
      std::memcpy(x + s.at, call.slot(r, t - 1) + chunk, s.length);
    }
  }
  return OK;
}

// Bytes a rank shares at a step when everybody reads them.
uint64_t shared_chunk(const Arena& a, bool large) {
  return large ? std::min<uint64_t>(a.layout.chunk, (512u << 10) / a.n / 64 * 64) : a.layout.small_slot;
}

}  // namespace

int all_reduce(Arena* arena, uint8_t* x, uint64_t items, int type) {
  const uint64_t bytes = items * item_bytes(type);
  const bool large = bytes > arena->layout.small_slot;
  Call call(*arena, mixed(mixed(ALL_REDUCE, uint64_t(type)), bytes), large);
  if (int error = call.begin()) return error;
  return large ? reduce_in_chunks(call, *arena, type, x, bytes) : reduce_at_once(call, *arena, type, x, bytes);
}

int reduce_scatter(Arena* arena, const uint8_t* x, uint8_t* out, const uint64_t* rows, uint64_t row_bytes, int type) {
  Arena& a = *arena;
  const uint64_t bytes = std::accumulate(rows, rows + a.n, uint64_t(0)) * row_bytes;
  const uint64_t mine = rows[a.me] * row_bytes, longest = *std::max_element(rows, rows + a.n) * row_bytes;
  const bool large = bytes > a.layout.small_slot;
  const uint64_t part = large ? a.layout.chunk / a.n / 64 * 64 : a.layout.small_slot;
  const uint64_t steps = std::max<uint64_t>(1, ceil_div(longest, part));
  Numbers starts(a.n + 1);
  starts[0] = 0;
  for (int r = 0; r < a.n; r++) starts[r + 1] = starts[r] + rows[r] * row_bytes;
  const auto place = [&](int r) { return large ? r * part : starts[r]; };
  Call call(a, mixed(mixed(mixed(REDUCE_SCATTER, uint64_t(type)), row_bytes), rows, a.n), large);
  if (int error = call.begin()) return error;
  if (a.crowded() && !large) {
    const int error = reduce_by_one(call, a, type, x, bytes);
    if (error == OK) std::memcpy(out, call.slot(0, 0) + starts[a.me], mine);
    return error;
  }
  for (uint64_t t = 0; t <= steps; t++) {
    if (t < steps) {
      if (int error = call.reserve(t)) return error;
      for (int r = 0; r < a.n; r++) {
        const Span s(rows[r] * row_bytes, part, t);
        if (r != a.me) std::memcpy(call.own(t) + place(r), x + starts[r] + s.at, s.length);
      }
      call.publish(t);
    }
    if (t == 0) continue;
    if (int error = call.wait_all(t - 1)) return error;
    const Span s(mine, part, t - 1);
    for (int r = 0; r < a.n; r++) {
      a.sources[r] = r == a.me ? x + starts[r] + s.at : call.slot(r, t - 1) + place(a.me);
    }
    reduce(type, a.sources.data(), a.n, out + s.at, nullptr, s.length);
  }
  return OK;
}

int all_gather(Arena* arena, const uint8_t* x, uint8_t* out, const uint64_t* sizes, uint64_t item_bytes,
               uint64_t count) {
  Arena& a = *arena;
  Numbers starts(a.n + 1);
  starts[0] = 0;
  for (int r = 0; r < a.n; r++) starts[r + 1] = starts[r] + sizes[r] * item_bytes;
  const auto part = [&](int r) { return count * sizes[r] * item_bytes; };
  // bytes [at, at + length) of a rank's part, to their places
  auto put = [&](int r, uint64_t at, uint64_t length, const uint8_t* from) {
    const uint64_t row = sizes[r] * item_bytes;
    for (uint64_t end = at + length, some; at < end; at += some, from += some) {
      some = std::min(end - at, row - at % row);
      std::memcpy(out + at / row * starts[a.n] + starts[r] + at % row, from, some);
    }
  };
  const uint64_t longest = *std::max_element(sizes, sizes + a.n) * item_bytes * count;
  const bool large = longest > a.layout.small_slot;
  const uint64_t chunk = shared_chunk(a, large), steps = std::max<uint64_t>(1, ceil_div(longest, chunk));
  Call call(a, mixed(mixed(mixed(ALL_GATHER, item_bytes), sizes, a.n), count), large);
  if (int error = call.begin()) return error;
  for (uint64_t t = 0; t <= steps; t++) {
    if (t < steps) {
      if (int error = call.reserve(t)) return error;
      const Span s(part(a.me), chunk, t);
      std::memcpy(call.own(t), x + s.at, s.length);
      call.publish(t);
      put(a.me, s.at, s.length, x + s.at);
    }
    if (t == 0) continue;
    if (int error = call.wait_all(t - 1)) return error;
    for (int i = 1; i < a.n; i++) {
      const int r = (a.me + i) % a.n;
      const Span s(part(r), chunk, t - 1);
      put(r, s.at, s.length, call.slot(r, t - 1));
    }
  }
  return OK;
}

int broadcast(Arena* arena, uint8_t* x, uint64_t bytes, int source) {
  Arena& a = *arena;
  const bool large = bytes > a.layout.small_slot;
  const uint64_t chunk = shared_chunk(a, large), steps = std::max<uint64_t>(1, ceil_div(bytes, chunk));
  Call call(a, mixed(mixed(BROADCAST, uint64_t(source)), bytes), large);
  if (int error = call.begin()) return error;
  if (a.me == source) {
    if (int error = a.look()) return error;
  }
  for (uint64_t t = 0; t < steps; t++) {
    const Span s(bytes, chunk, t);
    if (a.me == source) {
      if (int error = call.reserve(t)) return error;
      std::memcpy(call.own(t), x + s.at, s.length);
    } else {
      if (int error = call.wait_rank(source, t)) return error;
      std::memcpy(x + s.at, call.slot(source, t), s.length);
    }
    call.publish(t);
  }
  return OK;
}

int barrier(Arena* arena) {
  Call call(*arena, BARRIER, false);
  if (int error = call.begin()) return error;
  call.publish(0);
  return call.wait_all(0);
}
