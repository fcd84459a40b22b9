#pragma once
// What the ranks of a group do together in shared memory. Tensors are bytes; each function says how many. All return 0
// or an `Error`, and may wait: without Python's lock.
#include <cstdint>

#include "arena.h"

// x = the ranks' combination, on all of them.
int all_reduce(Arena* arena, uint8_t* x, uint64_t items, int type);

// out = part `me` of the ranks' combined x; x is the parts one after another, a part `rows` of `row_bytes` each.
int reduce_scatter(Arena* arena, const uint8_t* x, uint8_t* out, const uint64_t* rows, uint64_t row_bytes, int type);

// Each of out's `count` rows = the ranks' rows of x one after another; their `sizes` in items may differ.
int all_gather(Arena* arena, const uint8_t* x, uint8_t* out, const uint64_t* sizes, uint64_t item_bytes,
               uint64_t count);

// x = that of rank `source`, which doesn't wait until the others have it.
int broadcast(Arena* arena, uint8_t* x, uint64_t bytes, int source);

int barrier(Arena* arena);

// A copy of `data`, on its way to a rank; waits only where IN_FLIGHT cells are.
int send(Arena* arena, const uint8_t* data, uint64_t bytes, int to);

// The next message of a rank, which must have this length.
int receive(Arena* arena, uint8_t* data, uint64_t bytes, int from);
