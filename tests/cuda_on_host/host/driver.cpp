// Calls kernel launchers as messages on stdin say, each once per order of threads, and writes the buffers to stdout.
//
// Message, integers of 64 bits: function's name (64 bytes), number of runs, buffers, pointers, size of the arguments; per
// run order and seed; per buffer its size; per pointer its offset in the arguments, its buffer, its offset there; the
// arguments; the buffers. Answer, per run: what the launcher returned, then all buffers.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "executor.h"

namespace {

void read_all(void* to, size_t bytes) {
  for (char* p = static_cast<char*>(to); bytes;) {
    const ssize_t n = read(0, p, bytes);
    if (n <= 0) exit(0);  // no more messages
    p += n;
    bytes -= size_t(n);
  }
}

void write_all(const void* from, size_t bytes) {
  for (const char* p = static_cast<const char*>(from); bytes;) {
    const ssize_t n = write(1, p, bytes);
    if (n <= 0) exit(1);
    p += n;
    bytes -= size_t(n);
  }
}

template <class T>
std::vector<T> read_vector(size_t count) {
  std::vector<T> v(count);
  if (count) read_all(v.data(), count * sizeof(T));
  return v;
}

struct Run {
  executor::Order order;
  uint64_t seed;
};
struct Pointer {
  int64_t at, buffer, offset;
};

void answer() {
  char name[64];
  read_all(name, sizeof name);
  const auto counts = read_vector<int64_t>(4);
  const auto runs = read_vector<Run>(counts[0]);
  const auto sizes = read_vector<int64_t>(counts[1]);
  const auto pointers = read_vector<Pointer>(counts[2]);
  auto args = read_vector<char>(counts[3]);
  std::vector<std::vector<char>> contents;
  std::vector<void*> buffers;  // of the exact sizes, so that AddressSanitizer knows their ends
  for (int64_t size : sizes) {
    contents.push_back(read_vector<char>(size));
    buffers.push_back(nullptr);
    if (posix_memalign(&buffers.back(), 256, size)) exit(1);
  }
  for (const Pointer& p : pointers) {
    char* value = static_cast<char*>(buffers[p.buffer]) + p.offset;
    memcpy(args.data() + p.at, &value, sizeof value);
  }
  auto function = reinterpret_cast<int (*)(const void*, void*)>(dlsym(RTLD_DEFAULT, name));
  if (!function) {
    fprintf(stderr, "no function %s\n", name);
    exit(1);
  }
  for (const Run& run : runs) {
    for (size_t i = 0; i < buffers.size(); ++i)
      std::copy(contents[i].begin(), contents[i].end(), static_cast<char*>(buffers[i]));
    executor::set_order(run.order, run.seed);
    const int64_t status = function(args.data(), nullptr);
    write_all(&status, sizeof status);
    for (size_t i = 0; i < buffers.size(); ++i) write_all(buffers[i], sizes[i]);
  }
  for (void* buffer : buffers) free(buffer);
}

}  // namespace

int main() {
  for (;;) answer();
}
