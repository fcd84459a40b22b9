// Messages between two ranks: a queue of cells in the sender's order.
//
// A send copies the message and returns, whether or not the receiver has come: the queue takes as much memory as is
// under way (up to IN_FLIGHT cells) and uses it again, the last returned cell first because it is in the cache.
#include <algorithm>
#include <cstring>

#include "collectives.h"

namespace {

int next_cell(Arena& arena, Stream& s, int to) {
  Flag& received = s.line->received;
  if (s.position - s.reclaimed >= IN_FLIGHT) {
    if (int error = arena.wait_message(received, s.position - IN_FLIGHT + 1, to)) return error;
  }
  for (const uint32_t back = received.value.load(std::memory_order_acquire); s.reclaimed != back; s.reclaimed++) {
    s.spare.push_back(s.descriptors[s.reclaimed % IN_FLIGHT].cell);
  }
  return s.spare.empty() ? arena.add_cell(s, to) : OK;
}

}  // namespace

int send(Arena* arena, const uint8_t* data, uint64_t bytes, int to) {
  Stream& s = arena->outgoing(to);
  std::lock_guard<std::mutex> lock(s.mutex);
  if (int error = arena->check()) return error;
  if (s.line == nullptr) {
    if (int error = arena->open_stream(s, arena->me, to)) return error;
  }
  uint64_t done = 0;
  do {
    if (int error = next_cell(*arena, s, to)) return error;
    const uint32_t cell = s.spare.back();
    s.spare.pop_back();
    const size_t part = std::min<uint64_t>(bytes - done, CELL);
    std::memcpy(s.cells + size_t(cell) * CELL, data + done, part);
    s.descriptors[s.position % IN_FLIGHT] = {bytes, cell};
    arena->post(s.line->sent, ++s.position);
    done += part;
  } while (done < bytes);
  return OK;
}

int receive(Arena* arena, uint8_t* data, uint64_t bytes, int from) {
  Stream& s = arena->incoming(from);
  std::lock_guard<std::mutex> lock(s.mutex);
  if (int error = arena->check()) return error;
  if (s.line == nullptr) {
    if (int error = arena->open_stream(s, from, arena->me)) return error;
  }
  uint64_t done = 0;
  do {
    if (int error = arena->wait_message(s.line->sent, s.position + 1, from)) return error;
    const Descriptor d = s.descriptors[s.position % IN_FLIGHT];
    if (d.message_bytes != bytes) return arena->fail(MISMATCH, from);
    const size_t part = std::min<uint64_t>(bytes - done, CELL);
    std::memcpy(data + done, s.cells + size_t(d.cell) * CELL, part);
    arena->post(s.line->received, ++s.position);
    done += part;
  } while (done < bytes);
  return OK;
}
