// The ops of attention.cpp: checks the arguments, then cuts the work for the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dispatch.h"

namespace {

constexpr int64_t QUERIES = 32;  // of a longer chunk, per part

void check_pages(const char* name, const Tensor& table, int64_t chunk, int64_t keys, int64_t page_size, int64_t pages) {
  const int64_t used = (keys + page_size - 1) / page_size;
  STD_TORCH_CHECK(used <= table.size(1), "attention_paged: ", name, " has too few pages for chunk ", chunk);
  for (int64_t i = 0; i < used; ++i) {
    const int64_t page = integers(table)[chunk * table.size(1) + i];
    STD_TORCH_CHECK(page >= 0 && page < pages, "attention_paged: ", name, " of chunk ", chunk, " names page ", page,
                    " of ", pages);
  }
}

// Work for the threads: decoding requests whole where there are enough of them, else by kv head; longer chunks by kv
// head and queries, last queries (which see most keys) first.
std::vector<Part> parts(const int64_t* chunks, int64_t num_chunks, int64_t num_kv_heads) {
  int64_t singles = 0;
  for (int64_t b = 0; b < num_chunks; ++b) singles += chunks[4 * b + 1] == 1;
  const bool whole = singles >= 4 * int64_t(torch::stable::get_num_threads());
  std::vector<Part> found;
  for (int64_t b = 0; b < num_chunks; ++b) {
    const int64_t queries = chunks[4 * b + 1];
    const int64_t heads = queries == 1 && whole ? num_kv_heads : 1;
    for (int64_t last = queries; last > 0; last -= std::min(last, QUERIES)) {
      const int64_t first = last > QUERIES ? last - QUERIES : 0;
      for (int64_t k = 0; k < num_kv_heads; k += heads) found.push_back({b, first, last - first, k, heads});
    }
  }
  return found;
}

std::tuple<Tensor, Tensor> attention_paged(const Tensor q, const Tensor keys, const Tensor values, const Tensor chunks,
                                           const Tensor table, const Tensor prefix_table, const Tensor heads,
                                           int64_t window, double scale) {
  const char* op = "attention_paged";
  check_floats(op, "q", q, 3);
  check_floats(op, "key_cache", keys, 4);
  check_floats(op, "value_cache", values, 4);
  check_same(op, "key_cache", keys, q);
  check_same(op, "value_cache", values, q);
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(keys.size(i) == values.size(i), op, ": key_cache and value_cache differ in shape");
  STD_TORCH_CHECK(keys.size(3) == q.size(2), op, ": q has head dim ", q.size(2), ", the cache ", keys.size(3));
  for (const auto& [name, x, dims] : {std::tuple("chunks", &chunks, 2), std::tuple("block_table", &table, 2),
                                      std::tuple("prefix_table", &prefix_table, 2), std::tuple("kv_index", &heads, 1)})
    check_type(op, name, *x, dims, ScalarType::Long);
  STD_TORCH_CHECK(chunks.size(1) == 4, op, ": chunks must be [B, 4]");
  STD_TORCH_CHECK(table.size(0) == chunks.size(0), op, ": block_table has not one row per chunk");
  STD_TORCH_CHECK(prefix_table.size(0) == chunks.size(0), op, ": prefix_table has not one row per chunk");
  STD_TORCH_CHECK(heads.size(0) == q.size(1), op, ": kv_index has not one entry per head of q");
  STD_TORCH_CHECK(q.size(2) % 2 == 0, op, ": q has an odd head dim ", q.size(2));
  STD_TORCH_CHECK(q.size(1) <= 1024, op, ": q has more than 1024 heads");
  STD_TORCH_CHECK(keys.size(1) > 0, op, ": key_cache has pages without slots");
  for (int64_t n = 0; n < q.size(1); ++n)
    STD_TORCH_CHECK(integers(heads)[n] >= 0 && integers(heads)[n] < keys.size(2), op, ": kv_index[", n, "]=",
                    integers(heads)[n], " of ", keys.size(2), " kv heads");
  int64_t rows = 0;
  for (int64_t b = 0; b < chunks.size(0); ++b) {
    const int64_t* c = integers(chunks) + 4 * b;
    STD_TORCH_CHECK(c[0] == rows && c[1] >= 1 && c[1] <= c[2] && c[3] >= 0, op, ": chunk ", b, " is inconsistent");
    rows += c[1];
    check_pages("block_table", table, b, c[2], keys.size(1), keys.size(0));
    check_pages("prefix_table", prefix_table, b, c[3], keys.size(1), keys.size(0));
  }
  STD_TORCH_CHECK(rows == q.size(0), op, ": chunks hold ", rows, " queries, q ", q.size(0));

  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const PagedAttention args{out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()), q.const_data_ptr(),
                            keys.const_data_ptr(), values.const_data_ptr(), integers(chunks), integers(table),
                            integers(prefix_table), integers(heads), chunks.size(0), table.size(1),
                            prefix_table.size(1), q.size(1), keys.size(2), q.size(2), keys.size(1), window,
                            float(scale)};
  const std::vector<Part> work = parts(args.chunks, args.num_chunks, args.num_kv_heads);
  const Kernels& k = kernels();
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first)
      for (size_t i = next++; i < work.size(); i = next++) k.attend(args, work[i], is_bf16(q));
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def(
      "attention_paged(Tensor q, Tensor key_cache, Tensor value_cache, Tensor chunks, Tensor block_table, "
      "Tensor prefix_table, Tensor kv_index, int window, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) { m.impl("attention_paged", TORCH_BOX(&attention_paged)); }
