// The backward op of attention_backward.cpp: checks the arguments, then cuts the work for the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <tuple>
#include <vector>

#include "attention_checks.h"
#include "call.h"
#include "dispatch.h"
#include "scratch.h"

namespace {

constexpr int64_t WHOLE_KEYS = 1024;  // documents up to here are one thread's work per kv head

// The sums [2][keys][width] of one document and kv head that several threads add to, a block of keys when it is its turn.
struct Shared {
  std::unique_ptr<float, decltype(&std::free)> sums{nullptr, &std::free};
  std::vector<int32_t> turns;
  std::atomic<int64_t> missing{0};
};
struct Work {
  std::vector<AttentionPart> parts;
  std::vector<Shared*> shared;  // of a part, null: the thread's own
  std::vector<std::unique_ptr<Shared>> all;
};

Work cut(const Attention& a, const std::vector<Sequence>& sequences) {
  const int64_t width = padded(a.head_dim);
  Work work;
  std::vector<int64_t> longest_first(sequences.size());
  for (size_t b = 0; b < sequences.size(); ++b) longest_first[b] = b;
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](int64_t x, int64_t y) { return sequences[x].queries > sequences[y].queries; });
  for (const int64_t b : longest_first) {
    const Sequence& s = sequences[b];
    for (int64_t k = 0; k < a.num_kv_heads; ++k) {
      const int64_t group = a.first_head[k + 1] - a.first_head[k], step = segment_queries(group);
      if (s.keys <= WHOLE_KEYS || !group || s.queries <= step) {
        work.parts.push_back({b, 0, s.queries, k, 1, 0, s.keys, -1});
        work.shared.push_back(nullptr);
        continue;
      }
      auto one = std::make_unique<Shared>();
      one->sums.reset(static_cast<float*>(std::calloc(2 * s.keys * width, sizeof(float))));
      STD_TORCH_CHECK(one->sums, "attention_varlen_backward: no memory for the sums of ", s.keys, " keys");
      // a block's first turn is that of the first segment which sees it: i + offset >= its first key
      for (int64_t first = 0; first < s.keys; first += KEY_BLOCK)
        one->turns.push_back(int32_t(std::max<int64_t>(0, first - s.offset) / step));
      for (int64_t first = 0; first < s.queries; first += step) {
        work.parts.push_back({b, first, std::min(step, s.queries - first), k, 1, 0, s.keys, -1});
        work.shared.push_back(one.get());
        ++one->missing;
      }
      work.all.push_back(std::move(one));
    }
  }
  return work;
}

void run(const Attention& a, const AttentionGrads& grads, const std::vector<Sequence>& sequences, bool low) {
  const Work work = cut(a, sequences);
  const int64_t width = padded(a.head_dim);
  int64_t group = 1, own_keys = 0;
  for (int64_t k = 0; k < a.num_kv_heads; ++k) group = std::max(group, a.first_head[k + 1] - a.first_head[k]);
  for (size_t i = 0; i < work.parts.size(); ++i)
    if (!work.shared[i]) own_keys = std::max(own_keys, sequences[work.parts[i].sequence].keys);
  const int64_t sums = 2 * own_keys * width;
  int64_t room = 0;
  for (int64_t g = 1; g <= group; ++g) room = std::max(room, backward_room(a.head_dim, g));

  const Kernels& k = kernels();
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work.parts.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    Scratch scratch;
    float* const own = scratch.floats(sums + room);
    for (; first < last; ++first)
      for (size_t i = next++; i < work.parts.size(); i = next++) {
        const AttentionPart& part = work.parts[i];
        Shared* const shared = work.shared[i];
        float* const to = shared ? shared->sums.get() : own;
        if (!shared) std::fill_n(own, 2 * sequences[part.sequence].keys * width, 0.0f);
        k.attend_backward(a, grads, part, own + sums, to, shared ? shared->turns.data() : nullptr, low);
        if (!shared || --shared->missing == 0) k.attend_backward_finish(a, grads, part, own + sums, to, low);
      }
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(
    const std::optional<Tensor> grad_out, const std::optional<Tensor> grad_lse, const Tensor q, const Tensor k,
    const Tensor v, const Tensor out, const Tensor lse, const Tensor documents, const std::vector<int64_t> kv_index, int64_t window,
    double scale, double soft_cap, const std::optional<Tensor> slopes) {
  const char* op = "attention_varlen_backward";
  check_inputs(op, q, "k", k, "v", v, 3);
  check_options(op, window, soft_cap, slopes, q.size(1));
  const Heads heads(op, kv_index, q.size(1), k.size(1));
  const std::vector<Sequence> sequences = check_documents(op, documents, q.size(0), k.size(0));
  for (const auto& [name, x] : {std::pair("out", &out), std::pair("grad_out", grad_out ? &*grad_out : &out)}) {
    check_floats(op, name, *x, 3);
    check_same(op, name, *x, q);
    for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(x->size(i) == q.size(i), op, ": ", name, " and q differ in shape");
  }
  for (const auto& [name, x] : {std::pair("lse", &lse), std::pair("grad_lse", grad_lse ? &*grad_lse : &lse)}) {
    check_type(op, name, *x, 2, ScalarType::Float);
    for (int i = 0; i < 2; ++i) STD_TORCH_CHECK(x->size(i) == q.size(i), op, ": ", name, " doesn't fit q");
  }
  Tensor dq = new_result(q, {q.size(0), q.size(1), q.size(2)}), dk = new_result(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = new_result(v, {v.size(0), v.size(1), v.size(2)});
  Tensor same_out = out, same_lse = lse;  // handles: only read
  Attention a = arguments(same_out, same_lse, q, k, v, window, scale, soft_cap, slopes);
  a.sequences = sequences.data(), a.heads = heads.order.data(), a.first_head = heads.first.data();
  const AttentionGrads grads{dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
                             grad_out ? grad_out->const_data_ptr() : nullptr,
                             grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr};
  run(a, grads, sequences, is_bf16(q));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def(
      "attention_varlen_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor documents, int[] kv_index, int window, float scale, float soft_cap, Tensor? slopes) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
}
