// Attention over cached pages and inside packed documents, the merge of two, and the gradients of the latter.
#include "ops.hpp"

namespace {

template <class Args>
void set_scores(const Call& call, int64_t window, double scale, double softcap, Args& a) {
  call.check_that(window >= 0 && window <= 1 << 30, "window=", window, " must be 0, for none, or up to 2^30");
  call.check_that(softcap >= 0, "softcap=", softcap, " must be 0, for none, or positive");
  a.window = int32_t(window), a.scale = float(scale), a.softcap = float(softcap);
}

// The query heads of every kv head, and their slopes.
template <class Args>
void set_heads(const Call& call, const Tensor& q, const Tensor& head_starts, const Tensor& heads,
               const std::optional<Tensor>& slopes, Args& a) {
  a.head_starts = call.typed<int32_t>("head_starts", head_starts, 1, ScalarType::Int);
  a.heads = call.typed<int32_t>("heads", heads, 1, ScalarType::Int);
  call.size("heads", heads, 0, q.size(1));
  call.check_that(head_starts.size(0) >= 1, "head_starts is empty");
  a.num_heads = q.size(1), a.num_kv_heads = head_starts.size(0) - 1;
  if (!slopes) return;
  a.slopes = call.typed<float>("slopes", *slopes, 1, ScalarType::Float);
  call.size("slopes", *slopes, 0, q.size(1));
}

// What attention over pages and over packed documents have in common, but for the keys and the split chunks.
struct Attention {
  AttentionPagedArgs a{};
  Tensor out, lse;
};

Attention prepare(const Call& call, const Tensor& q, const Tensor& chunks, const Tensor& head_starts,
                  const Tensor& heads, const std::optional<Tensor>& slopes, const Tensor& whole, int64_t window,
                  double scale, double softcap) {
  Attention made{{}, torch::stable::empty_like(q),
                 torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float)};
  AttentionPagedArgs& a = made.a;
  call.check_that(q.size(2) >= 1 && q.size(2) <= 256, "q has a head dim that isn't 1 to 256: ", q.size(2));
  set_scores(call, window, scale, softcap, a);
  set_heads(call, q, head_starts, heads, slopes, a);
  a.chunks = call.longs("chunks", chunks, 2);
  call.size("chunks", chunks, 1, 6);
  a.whole = call.longs("whole", whole, 2);
  call.size("whole", whole, 1, 2);
  a.q = call.floats("q", q, 3);
  a.out = made.out.mutable_data_ptr();
  a.lse = static_cast<float*>(made.lse.mutable_data_ptr());
  a.num_whole = whole.size(0), a.head_dim = int32_t(q.size(2)), a.page_size = 1, a.dtype = call.dtype();
  return made;
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor q, const Tensor k, const Tensor v, const Tensor chunks,
                                            const Tensor head_starts, const Tensor heads, std::optional<Tensor> slopes,
                                            const Tensor whole, int64_t window, double scale, double softcap) {
  const Call call("attention_varlen", "q", q);
  call.floats("q", q, 3);
  Attention made = prepare(call, q, chunks, head_starts, heads, slopes, whole, window, scale, softcap);
  made.a.key_cache = call.floats("k", k, 3);
  made.a.value_cache = call.floats("v", v, 3);
  call.shape("k", k, {k.size(0), made.a.num_kv_heads, q.size(2)});
  call.shape("v", v, {k.size(0), made.a.num_kv_heads, q.size(2)});
  call.run(&onemesh_cuda_attention_paged, made.a);
  return {made.out, made.lse};
}

std::tuple<Tensor, Tensor> attention_paged(const Tensor q, const Tensor key_cache, const Tensor value_cache,
                                           const Tensor chunks, const Tensor block_table, const Tensor prefix_table,
                                           const Tensor head_starts, const Tensor heads, std::optional<Tensor> slopes,
                                           const Tensor whole, const Tensor split, const Tensor merges,
                                           int64_t partial_rows, int64_t max_split_queries, int64_t window,
                                           double scale, double softcap) {
  const Call call("attention_paged", "q", q);
  call.floats("q", q, 3);
  Attention made = prepare(call, q, chunks, head_starts, heads, slopes, whole, window, scale, softcap);
  AttentionPagedArgs& a = made.a;
  a.key_cache = call.floats("key_cache", key_cache, 4);
  a.value_cache = call.floats("value_cache", value_cache, 4);
  for (int dim = 0; dim < 4; ++dim) call.size("value_cache", value_cache, dim, key_cache.size(dim));
  call.size("key_cache", key_cache, 2, a.num_kv_heads);
  call.size("key_cache", key_cache, 3, q.size(2));
  call.check_that(key_cache.size(1) > 0, "key_cache has pages without slots");
  a.block_table = call.longs("block_table", block_table, 2);
  a.prefix_table = call.longs("prefix_table", prefix_table, 2);
  call.size("block_table", block_table, 0, chunks.size(0));
  call.size("prefix_table", prefix_table, 0, chunks.size(0));
  a.split = call.longs("split", split, 2);
  a.merges = call.longs("merges", merges, 2);
  call.size("split", split, 1, 3);
  call.size("merges", merges, 1, 2);
  call.check_that(partial_rows >= 0 && max_split_queries >= 0, "partial_rows or max_split_queries is negative");
  Tensor partials = torch::stable::new_empty(q, {partial_rows * q.size(1) * (q.size(2) + 2)}, ScalarType::Float);
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  a.partial_rows = partial_rows, a.max_split_queries = max_split_queries;
  a.num_split = split.size(0), a.num_merges = merges.size(0);
  a.table_width = block_table.size(1), a.prefix_width = prefix_table.size(1);
  a.page_size = int32_t(key_cache.size(1));
  call.run(&onemesh_cuda_attention_paged, a);
  return {made.out, made.lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_grad(const Tensor q, const Tensor k, const Tensor v,
                                                         const Tensor out, const Tensor lse, const Tensor grad_out,
                                                         std::optional<Tensor> grad_lse, const Tensor query_tiles,
                                                         const Tensor key_tiles, const Tensor kv_heads,
                                                         const Tensor head_starts, const Tensor heads,
                                                         std::optional<Tensor> slopes, int64_t window, double scale,
                                                         double softcap) {
  const Call call("attention_varlen_grad", "q", q);
  AttentionVarlenGradArgs a{};
  a.q = call.floats("q", q, 3);
  call.check_that(q.size(1) >= 1, "q has no heads");
  call.check_that(q.size(2) >= 1 && q.size(2) <= 256, "q has a head dim that isn't 1 to 256: ", q.size(2));
  set_scores(call, window, scale, softcap, a);
  set_heads(call, q, head_starts, heads, slopes, a);
  a.k = call.floats("k", k, 3);
  const int64_t T = q.size(0), N = q.size(1), H = q.size(2), S = k.size(0), K = a.num_kv_heads;
  a.v = call.floats("v", v, 3);
  a.out = call.floats("out", out, 3);
  a.grad_out = call.floats("grad_out", grad_out, 3);
  a.lse = call.typed<float>("lse", lse, 2, ScalarType::Float);
  a.kv_heads = call.typed<int32_t>("kv_heads", kv_heads, 1, ScalarType::Int);
  a.query_tiles = call.longs("query_tiles", query_tiles, 2);
  a.key_tiles = call.longs("key_tiles", key_tiles, 2);
  call.shape("k", k, {S, K, H});
  call.shape("v", v, {S, K, H});
  call.shape("out", out, {T, N, H});
  call.shape("grad_out", grad_out, {T, N, H});
  call.shape("lse", lse, {T, N});
  call.size("kv_heads", kv_heads, 0, N);
  call.size("query_tiles", query_tiles, 1, 6);
  call.size("key_tiles", key_tiles, 1, 6);
  if (grad_lse) {
    a.grad_lse = call.typed<float>("grad_lse", *grad_lse, 2, ScalarType::Float);
    call.shape("grad_lse", *grad_lse, {T, N});
  }
  Tensor delta = torch::stable::empty_like(lse);
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k);
  Tensor grad_v = torch::stable::empty_like(v);
  a.delta = static_cast<float*>(delta.mutable_data_ptr());
  a.grad_q = grad_q.mutable_data_ptr(), a.grad_k = grad_k.mutable_data_ptr(), a.grad_v = grad_v.mutable_data_ptr();
  a.rows = T, a.num_query_tiles = query_tiles.size(0), a.num_key_tiles = key_tiles.size(0);
  a.head_dim = int32_t(H), a.dtype = call.dtype();
  call.run(&onemesh_cuda_attention_varlen_grad, a);
  return {grad_q, grad_k, grad_v};
}

// The parts of a merge; first decides the shape.
template <class Args>
void set_parts(const Call& call, const Tensor& first, const Tensor& first_lse, const Tensor& second,
               const Tensor& second_lse, Args& a) {
  a.first = call.floats("first", first, 3);
  a.second = call.floats("second", second, 3);
  call.shape("second", second, {first.size(0), first.size(1), first.size(2)});
  a.first_lse = call.typed<float>("first_lse", first_lse, 2, ScalarType::Float);
  a.second_lse = call.typed<float>("second_lse", second_lse, 2, ScalarType::Float);
  call.shape("first_lse", first_lse, {first.size(0), first.size(1)});
  call.shape("second_lse", second_lse, {first.size(0), first.size(1)});
  a.pairs = first.size(0) * first.size(1), a.head_dim = first.size(2), a.dtype = call.dtype();
}

std::tuple<Tensor, Tensor> attention_merge(const Tensor first, const Tensor first_lse, const Tensor second,
                                           const Tensor second_lse) {
  const Call call("attention_merge", "first", first);
  AttentionMergeArgs a{};
  set_parts(call, first, first_lse, second, second_lse, a);
  Tensor out = torch::stable::empty_like(first), lse = torch::stable::empty_like(first_lse);
  a.out = out.mutable_data_ptr(), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  call.run(&onemesh_cuda_attention_merge, a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_merge_grad(const Tensor first, const Tensor first_lse,
                                                                const Tensor second, const Tensor second_lse,
                                                                const Tensor grad_out,
                                                                std::optional<Tensor> grad_lse) {
  const Call call("attention_merge_grad", "first", first);
  AttentionMergeGradArgs a{};
  set_parts(call, first, first_lse, second, second_lse, a);
  a.grad_out = call.floats("grad_out", grad_out, 3);
  call.shape("grad_out", grad_out, {first.size(0), first.size(1), first.size(2)});
  if (grad_lse) {
    a.grad_lse = call.typed<float>("grad_lse", *grad_lse, 2, ScalarType::Float);
    call.shape("grad_lse", *grad_lse, {first.size(0), first.size(1)});
  }
  Tensor grad_first = torch::stable::empty_like(first), grad_second = torch::stable::empty_like(first);
  Tensor grad_first_lse = torch::stable::empty_like(first_lse), grad_second_lse = torch::stable::empty_like(first_lse);
  a.grad_first = grad_first.mutable_data_ptr(), a.grad_second = grad_second.mutable_data_ptr();
  a.grad_first_lse = static_cast<float*>(grad_first_lse.mutable_data_ptr());
  a.grad_second_lse = static_cast<float*>(grad_second_lse.mutable_data_ptr());
  call.run(&onemesh_cuda_attention_merge_grad, a);
  return {grad_first, grad_first_lse, grad_second, grad_second_lse};
}

template <class Library>
void implement(Library& m) {
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_paged", TORCH_BOX(&attention_paged));
  m.impl("attention_varlen_grad", TORCH_BOX(&attention_varlen_grad));
  m.impl("attention_merge", TORCH_BOX(&attention_merge));
  m.impl("attention_merge_grad", TORCH_BOX(&attention_merge_grad));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh_cuda, m) {
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor chunks, Tensor head_starts, Tensor heads, Tensor? "
      "slopes, Tensor whole, int window, float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "attention_paged(Tensor q, Tensor key_cache, Tensor value_cache, Tensor chunks, Tensor block_table, Tensor "
      "prefix_table, Tensor head_starts, Tensor heads, Tensor? slopes, Tensor whole, Tensor split, Tensor merges, "
      "int partial_rows, int max_split_queries, int window, float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "attention_varlen_grad(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad_out, Tensor? "
      "grad_lse, Tensor query_tiles, Tensor key_tiles, Tensor kv_heads, Tensor head_starts, Tensor heads, Tensor? "
      "slopes, int window, float scale, float softcap) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_merge(Tensor first, Tensor first_lse, Tensor second, Tensor second_lse) -> (Tensor, Tensor)");
  m.def(
      "attention_merge_grad(Tensor first, Tensor first_lse, Tensor second, Tensor second_lse, Tensor grad_out, "
      "Tensor? grad_lse) -> (Tensor, Tensor, Tensor, Tensor)");
}
ONEMESH_CUDA_IMPL
