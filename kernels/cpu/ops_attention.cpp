// The forward ops of attention.cpp: check the arguments, then cut the work for the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_checks.h"
#include "calls.h"
#include "dispatch.h"
#include "scratch.h"

namespace {

// (query, head) pairs of a part of a chunk: as many share what packing keys costs as leave each thread a few parts;
// beyond MANY_ROWS that is little, and each thread must be left more.
constexpr int64_t LEAST_ROWS = 24, MANY_ROWS = 192, MOST_ROWS = 384;

struct Join {
  int64_t first, last;  // the results in Attention::parts that are merged for one query
  int64_t parts;        // that write them
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
  int64_t parts = 0;
  for (int64_t e = 0; e < count; e += per_part, ++parts) {
    const int64_t last = std::min(keys, (e + per_part) * KEY_EXTENT);
    work.parts.push_back({b, 0, 1, 0, a.num_kv_heads, e * KEY_EXTENT, last, work.num_extents + e});
    work.join.push_back(work.joins.size());
  }
  work.joins.push_back({work.num_extents, work.num_extents + count, parts});
  work.num_extents += count;
}

Work cut(const Attention& a, int64_t num_sequences) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto seen = [&](const Sequence& s) {  // keys that its last query sees
    return std::max<int64_t>(0, std::min(s.keys, s.queries + s.offset));
  };
  int64_t total = 0, singles = 0, queries = 0;
  for (int64_t b = 0; b < num_sequences; ++b)
    if (a.sequences[b].queries == 1) ++singles, total += extents(seen(a.sequences[b]));
    else queries += a.sequences[b].queries;
  const int64_t share = queries * a.first_head[a.num_kv_heads] / threads;
  const int64_t rows = std::max(std::clamp(share / 4, LEAST_ROWS, MANY_ROWS), std::min(share / 12, MOST_ROWS));
  const int64_t per_part = std::max<int64_t>(1, total / (4 * threads));
  Work work;
  for (int64_t b = 0; b < num_sequences; ++b) {
    const Sequence& s = a.sequences[b];
    if (s.queries == 1) {
      cut_single(work, a, b, seen(s), per_part, singles >= 4 * threads);
      continue;
    }
    // last queries see most keys: first
    std::vector<int64_t> left(a.num_kv_heads, s.queries);
    for (bool more = true; more;) {
      more = false;
      for (int64_t k = 0; k < a.num_kv_heads; ++k) {
        const int64_t group = a.first_head[k + 1] - a.first_head[k];
        const int64_t some = std::min(left[k], std::max<int64_t>(1, rows / std::max<int64_t>(1, group)));
        if (some == 0) continue;
        work.parts.push_back({b, left[k] -= some, some, k, 1, 0, s.keys, -1});
        work.join.push_back(-1);
        more = true;
      }
    }
  }
  return work;
}

// Whose tables of pages say where keys lie; integers that a replay finds changed.
struct Pages {
  Tensor chunks, table, prefix_table;  // [B, 4], [B, M], [B, M']
  int64_t queries, page_size, num_pages;
};

// What all layers of a step have in common: who attends to what, and how that is cut for the threads.
struct Plan {
  std::optional<Pages> pages;  // none: the sequences never change
  Heads heads;
  int64_t head_dim;
  std::vector<Sequence> sequences;
  Work work;
  std::unique_ptr<float[]> parts;  // Attention::parts, of any contents
  size_t size = 0;                 // of parts
  int64_t room = 0, turn = -1;

  Plan(Heads of, int64_t dim) : heads(std::move(of)), head_dim(dim) {}

  bool is_same(const Plan& other) const {
    return pages && other.pages && is_same(pages->chunks, other.pages->chunks) &&
           is_same(pages->table, other.pages->table) && is_same(pages->prefix_table, other.pages->prefix_table) &&
           pages->queries == other.pages->queries && pages->page_size == other.pages->page_size &&
           pages->num_pages == other.pages->num_pages && heads.order == other.heads.order &&
           heads.first == other.heads.first && head_dim == other.head_dim;
  }

  void prepare(int64_t now) {
    if (turn == now) return;
    if (pages) read_pages();
    Attention a{};
    a.sequences = sequences.data(), a.first_head = heads.first.data(), a.num_kv_heads = heads.first.size() - 1;
    work = cut(a, sequences.size());
    room = 0;
    for (const AttentionPart& p : work.parts) {
      const int64_t some = heads.first[p.first_kv_head + p.num_kv_heads] - heads.first[p.first_kv_head];
      room = std::max(room, attention_room(head_dim, p.num_queries * some));
    }
    const size_t wanted = work.num_extents * heads.order.size() * (padded(head_dim) + 2);
    if (size < wanted) parts.reset(new float[size = wanted]);
    turn = now;
  }

  // Layers that write to the same slots have them checked once in a turn.
  bool has_checked(const int64_t* slots, int64_t now) const { return checked == std::pair(slots, now); }

  // A part reads all keys but those it writes, so each sequence's must be its last.
  void check_slots(RotaryWriteCall& rotary, int64_t now) {
    const int64_t* const slots = rotary.pages.slots;
    rotary.prepare(now);
    const int64_t size = pages->page_size, width = pages->table.size(1);
    for (size_t b = 0; b < sequences.size(); ++b) {
      const int64_t last = sequences[b].keys - sequences[b].prefix - 1;
      const int64_t slot = integers(pages->table)[b * width + last / size] * size + last % size;
      STD_TORCH_CHECK(slots[b] == slot, "rotary_write: slots[", b, "]=", slots[b], " is not that of the last key, ", slot,
                      ", as it was when recorded");
    }
    checked = {slots, now};
  }

 private:
  static bool is_same(const Tensor& a, const Tensor& b) {
    return a.const_data_ptr() == b.const_data_ptr() && a.size(0) == b.size(0) && a.size(1) == b.size(1);
  }

  std::pair<const int64_t*, int64_t> checked{nullptr, -1};  // slots, turn

  void read_pages() {
    const char* op = "attention_paged";
    sequences.clear();
    int64_t rows = 0;
    for (int64_t b = 0; b < pages->chunks.size(0); ++b) {
      const int64_t* c = integers(pages->chunks) + 4 * b;
      STD_TORCH_CHECK(c[0] == rows && c[1] >= 1 && c[1] <= c[2] && c[3] >= 0, op, ": chunk ", b, " is inconsistent");
      rows += c[1];
      check_pages(op, "block_table", pages->table, b, c[2], pages->page_size, pages->num_pages);
      check_pages(op, "prefix_table", pages->prefix_table, b, c[3], pages->page_size, pages->num_pages);
      sequences.push_back({c[0], c[1], 0, c[2] + c[3], c[3], c[2] + c[3] - c[1]});
    }
    STD_TORCH_CHECK(rows == pages->queries, op, ": chunks hold ", rows, " queries, q ", pages->queries);
  }
};

// Parts of attention.cpp, whoever is free takes the next; the thread that ends the last part of a join does that. Behind
// the call that turns queries and keys, of one query a sequence, a part turns what it needs for itself.
struct AttentionCall : Call {
  // what `prepare` touches comes first: every layer's lies elsewhere in memory, and has left the caches since
  std::shared_ptr<Plan> plan;
  std::atomic<size_t> next{0};
  std::vector<std::atomic<int64_t>> missing;  // parts of each join
  std::unique_ptr<RotaryWriteCall> rotary;
  const int64_t* slots = nullptr;  // of `rotary`
  Attention args;                  // without what is the plan's
  bool bf16;

  AttentionCall(const Attention& of, std::shared_ptr<Plan> by, bool is_bf16) : plan(std::move(by)), args(of), bf16(is_bf16) {}

  void prepare(int64_t turn) override {
    plan->prepare(turn);
    next.store(0, std::memory_order_relaxed);
    if (missing.size() != plan->work.joins.size()) missing = std::vector<std::atomic<int64_t>>(plan->work.joins.size());
    for (size_t i = 0; i < missing.size(); ++i) missing[i].store(plan->work.joins[i].parts, std::memory_order_relaxed);
    if (slots && !plan->has_checked(slots, turn)) plan->check_slots(*rotary, turn);
  }

  int64_t most_threads() const override { return plan->work.parts.size(); }

  void work(int64_t, int64_t) override {
    const Kernels& k = kernels();
    const Work& work = plan->work;
    Scratch scratch;
    float* const memory = scratch.floats(plan->room);
    std::vector<char>& turned = queries();
    Attention own = args;
    own.sequences = plan->sequences.data(), own.parts = plan->parts.get();
    own.heads = plan->heads.order.data(), own.first_head = plan->heads.first.data();
    for (size_t i = next++; i < work.parts.size(); i = next++) {
      const AttentionPart& part = work.parts[i];
      if (rotary) own.q = turn(part, turned);
      k.attend(own, part, memory, bf16);
      const int64_t join = work.join[i];
      if (join >= 0 && --missing[join] == 0)
        k.attend_join(own, part, work.joins[join].first, work.joins[join].last, memory, bf16);
    }
  }

  bool follow(std::unique_ptr<Call>& before) override {
    RotaryWriteCall* turns = dynamic_cast<RotaryWriteCall*>(before.get());
    if (!turns || !plan->pages || turns->q.out != args.q || turns->pages.keys != args.keys ||
        turns->pages.values != args.values || plan->pages->chunks.size(0) != turns->rows)
      return false;
    before.release();
    rotary.reset(turns);
    slots = turns->pages.slots;
    return true;
  }

 private:
  static std::vector<char>& queries() {
    static thread_local std::vector<char> kept;
    return kept;
  }

  // Turns the queries of a part's sequence into `to`; with the last key, that key. Returns q as if all were there.
  const void* turn(const AttentionPart& part, std::vector<char>& to) const {
    const Kernels& k = kernels();
    const Sequence& s = plan->sequences[part.sequence];
    const int64_t size = bf16 ? 2 : 4, row = args.num_heads * args.head_dim * size, t = s.first_query;
    if (int64_t(to.size()) < row) to.resize(row);
    const auto at = [&](const Rows& rows) { return static_cast<const char*>(rows.data) + t * rows.stride * size; };
    RotaryArgs q = rotary->q;
    q.out = to.data(), q.x.data = at(q.x), q.cos += t * q.head_dim, q.sin += t * q.head_dim;
    k.rotary(q, 0, 1, bf16);
    if (part.last_key == s.keys) {
      const PagesArgs& pages = rotary->pages;
      const int64_t first = part.first_kv_head * args.head_dim * size, some = part.num_kv_heads * args.head_dim * size;
      const int64_t place = pages.slots[t] * pages.num_kv_heads * args.head_dim * size + first;
      const RotaryArgs key{static_cast<char*>(pages.keys) + place, {at(pages.k) + first, 0}, q.cos, q.sin,
                           part.num_kv_heads, args.head_dim, 1.0f};
      k.rotary(key, 0, 1, bf16);
      std::memcpy(static_cast<char*>(pages.values) + place, at(pages.v) + first, some);
      if (part.first_kv_head == 0) std::memcpy(static_cast<char*>(rotary->q.out) + t * row, to.data(), row);
    }
    return to.data() - t * row;
  }
};

// The plan of the last call with pages in this recording, which the layers behind it share.
std::shared_ptr<Plan> shared(std::shared_ptr<Plan> plan) {
  static thread_local std::weak_ptr<Plan> last;
  if (!is_recording()) return plan;
  if (const std::shared_ptr<Plan> other = last.lock(); other && other->is_same(*plan)) return other;
  last = plan;
  return plan;
}

std::tuple<Tensor, Tensor> attention_paged(const Tensor q, const Tensor keys, const Tensor values, const Tensor chunks,
                                           const Tensor table, const Tensor prefix_table, const std::vector<int64_t> kv_index,
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
  auto plan = std::make_shared<Plan>(Heads(op, kv_index, q.size(1), keys.size(2)), q.size(2));
  plan->pages = Pages{chunks, table, prefix_table, q.size(0), keys.size(1), keys.size(0)};

  Tensor out = new_result(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = new_result(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Attention a = arguments(out, lse, q, keys, values, window, scale, soft_cap, slopes);
  a.table = integers(table), a.table_width = table.size(1);
  a.prefix_table = integers(prefix_table), a.prefix_width = prefix_table.size(1);
  a.page_size = keys.size(1);
  run(std::make_unique<AttentionCall>(a, shared(std::move(plan)), is_bf16(q)));
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor q, const Tensor k, const Tensor v, const Tensor documents,
                                            const std::vector<int64_t> kv_index, int64_t window, double scale, double soft_cap,
                                            const std::optional<Tensor> slopes) {
  const char* op = "attention_varlen";
  check_inputs(op, q, "k", k, "v", v, 3);
  check_options(op, window, soft_cap, slopes, q.size(1));
  auto plan = std::make_shared<Plan>(Heads(op, kv_index, q.size(1), k.size(1)), q.size(2));
  plan->sequences = check_documents(op, documents, q.size(0), k.size(0));
  Tensor out = new_result(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = new_result(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Attention a = arguments(out, lse, q, k, v, window, scale, soft_cap, slopes);
  run(std::make_unique<AttentionCall>(a, std::move(plan), is_bf16(q)));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def(
      "attention_paged(Tensor q, Tensor key_cache, Tensor value_cache, Tensor chunks, Tensor block_table, "
      "Tensor prefix_table, int[] kv_index, int window, float scale, float soft_cap, Tensor? slopes) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor documents, int[] kv_index, int window, float scale, "
      "float soft_cap, Tensor? slopes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("attention_paged", TORCH_BOX(&attention_paged));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
}
