// The forward ops of attention.cpp: check the arguments, then cut the work for the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "attention_checks.h"
#include "dispatch.h"
#include "scratch.h"

namespace {

constexpr int64_t PART_ROWS = 128;  // (query, head) pairs of a part: enough to pay for packing keys, few enough for L1

struct Join {
  int64_t first, last;  // the results in Attention::parts that are merged for one query
};
struct Work {
  std::vector<AttentionPart> parts;
  std::vector<Join> joins;
  std::vector<int64_t> join;  // part -> its entry in joins, -1: none
  int64_t num_extents = 0;    // results in Attention::parts
};

int64_t extents(int64_t keys) { return (keys + KEY_EXTENT - 1) / KEY_EXTENT; }

// One query: all kv heads in one part, as the keys lie in memory, unless there are too few parts for the threads; a long
// one in parts of `per_part` extents.
void cut_single(Work& work, const Attention& a, int64_t b, int64_t keys, int64_t per_part, bool whole) {
  const int64_t count = extents(keys);
  if (count <= per_part) {
    const int64_t heads = whole ? a.num_kv_heads : 1;
    for (int64_t k = 0; k < a.num_kv_heads; k += heads) {
      work.parts.push_back({b, 0, 1, k, heads, 0, keys, -1});
      work.join.push_back(-1);
    }
    return;
  }
  for (int64_t e = 0; e < count; e += per_part) {
    const int64_t last = std::min(keys, (e + per_part) * KEY_EXTENT);
    work.parts.push_back({b, 0, 1, 0, a.num_kv_heads, e * KEY_EXTENT, last, work.num_extents + e});
    work.join.push_back(work.joins.size());
  }
  work.joins.push_back({work.num_extents, work.num_extents + count});
  work.num_extents += count;
}

Work cut(const Attention& a, int64_t num_sequences) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto seen = [&](const Sequence& s) {  // keys that its last query sees
    return std::max<int64_t>(0, std::min(s.keys, s.queries + s.offset));
  };
  int64_t total = 0, singles = 0, largest_group = 1;
  for (int64_t b = 0; b < num_sequences; ++b)
    if (a.sequences[b].queries == 1) ++singles, total += extents(seen(a.sequences[b]));
  for (int64_t k = 0; k < a.num_kv_heads; ++k)
    largest_group = std::max(largest_group, a.first_head[k + 1] - a.first_head[k]);
  const int64_t step = std::max<int64_t>(1, PART_ROWS / largest_group);
  const int64_t per_part = std::max<int64_t>(1, total / (4 * threads));
  Work work;
  for (int64_t b = 0; b < num_sequences; ++b) {
    const Sequence& s = a.sequences[b];
    if (s.queries == 1) {
      cut_single(work, a, b, seen(s), per_part, singles >= 4 * threads);
      continue;
    }
    for (int64_t last = s.queries; last > 0; last -= std::min(last, step)) {  // last queries see most keys: first
      const int64_t first = std::max<int64_t>(0, last - step);
      for (int64_t k = 0; k < a.num_kv_heads; ++k) {
        work.parts.push_back({b, first, last - first, k, 1, 0, s.keys, -1});
        work.join.push_back(-1);
      }
    }
  }
  return work;
}

// Runs the parts on the pool; the thread that ends the last part of a join does that.
void run(Attention& a, int64_t num_sequences, const Tensor& q) {
  const Work work = cut(a, num_sequences);
  std::unique_ptr<float[]> own_parts;
  static thread_local std::vector<float> kept_parts;
  const size_t size = work.num_extents * a.num_heads * (padded(a.head_dim) + 2);
  if (size > kept_parts.size() && size <= (4u << 20)) kept_parts.resize(size);
  if (size > kept_parts.size()) own_parts.reset(new float[size]);
  a.parts = own_parts ? own_parts.get() : kept_parts.data();

  int64_t room = 0;
  for (const AttentionPart& p : work.parts) {
    const int64_t heads = a.first_head[p.first_kv_head + p.num_kv_heads] - a.first_head[p.first_kv_head];
    room = std::max(room, attention_room(a.head_dim, p.num_queries * heads));
  }
  std::vector<std::atomic<int64_t>> missing(work.joins.size());
  for (auto& count : missing) count = 0;
  for (const int64_t join : work.join)
    if (join >= 0) ++missing[join];

  const Kernels& k = kernels();
  const bool low = is_bf16(q);
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work.parts.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    Scratch scratch;
    float* const memory = scratch.floats(room);
    for (; first < last; ++first)
      for (size_t i = next++; i < work.parts.size(); i = next++) {
        k.attend(a, work.parts[i], memory, low);
        const int64_t join = work.join[i];
        if (join >= 0 && --missing[join] == 0)
          k.attend_join(a, work.parts[i], work.joins[join].first, work.joins[join].last, memory, low);
      }
  });
}

std::tuple<Tensor, Tensor> attention_paged(const Tensor q, const Tensor keys, const Tensor values, const Tensor chunks,
                                           const Tensor table, const Tensor prefix_table, const Tensor kv_index,
                                           int64_t window, double scale, double soft_cap,
                                           const std::optional<Tensor> slopes) {
  const char* op = "attention_paged";
  check_inputs(op, q, "key_cache", keys, "value_cache", values, 4);
  for (const auto& [name, x, dims] : {std::tuple("chunks", &chunks, 2), std::tuple("block_table", &table, 2),
                                      std::tuple("prefix_table", &prefix_table, 2)})
    check_type(op, name, *x, dims, ScalarType::Long);
  STD_TORCH_CHECK(chunks.size(1) == 4, op, ": chunks must be [B, 4]");
  STD_TORCH_CHECK(table.size(0) == chunks.size(0), op, ": block_table has not one row per chunk");
  STD_TORCH_CHECK(prefix_table.size(0) == chunks.size(0), op, ": prefix_table has not one row per chunk");
  STD_TORCH_CHECK(keys.size(1) > 0, op, ": key_cache has pages without slots");
  check_options(op, window, soft_cap, slopes, q.size(1));
  const Heads heads(op, kv_index, q.size(1), keys.size(2));

  std::vector<Sequence> sequences;
  int64_t rows = 0;
  for (int64_t b = 0; b < chunks.size(0); ++b) {
    const int64_t* c = integers(chunks) + 4 * b;
    STD_TORCH_CHECK(c[0] == rows && c[1] >= 1 && c[1] <= c[2] && c[3] >= 0, op, ": chunk ", b, " is inconsistent");
    rows += c[1];
    check_pages(op, "block_table", table, b, c[2], keys.size(1), keys.size(0));
    check_pages(op, "prefix_table", prefix_table, b, c[3], keys.size(1), keys.size(0));
    sequences.push_back({c[0], c[1], 0, c[2] + c[3], c[3], c[2] + c[3] - c[1]});
  }
  STD_TORCH_CHECK(rows == q.size(0), op, ": chunks hold ", rows, " queries, q ", q.size(0));

  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Attention a = arguments(out, lse, q, keys, values, heads, sequences, window, scale, soft_cap, slopes);
  a.table = integers(table), a.table_width = table.size(1);
  a.prefix_table = integers(prefix_table), a.prefix_width = prefix_table.size(1);
  a.page_size = keys.size(1);
  run(a, sequences.size(), q);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor q, const Tensor k, const Tensor v, const Tensor documents,
                                            const Tensor kv_index, int64_t window, double scale, double soft_cap,
                                            const std::optional<Tensor> slopes) {
  const char* op = "attention_varlen";
  check_inputs(op, q, "k", k, "v", v, 3);
  check_options(op, window, soft_cap, slopes, q.size(1));
  const Heads heads(op, kv_index, q.size(1), k.size(1));
  const std::vector<Sequence> sequences = check_documents(op, documents, q.size(0), k.size(0));
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Attention a = arguments(out, lse, q, k, v, heads, sequences, window, scale, soft_cap, slopes);
  run(a, sequences.size(), q);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def(
      "attention_paged(Tensor q, Tensor key_cache, Tensor value_cache, Tensor chunks, Tensor block_table, "
      "Tensor prefix_table, Tensor kv_index, int window, float scale, float soft_cap, Tensor? slopes) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor documents, Tensor kv_index, int window, float scale, "
      "float soft_cap, Tensor? slopes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("attention_paged", TORCH_BOX(&attention_paged));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
}
