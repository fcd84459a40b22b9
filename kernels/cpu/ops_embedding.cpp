// Rows of a table by id, and the gradient of the table.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <vector>

#include "check_rows.h"
#include "dispatch.h"

namespace {

void check_ids(const char* op, const int64_t* ids, int64_t count, int64_t num_rows) {
  for (int64_t t = 0; t < count; ++t)
    STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < num_rows, op, ": ids[", t, "]=", ids[t], " of ", num_rows, " rows");
}

// Copies of rows.
struct EmbeddingCall : Call {
  char* to;
  const char* from;
  const int64_t* ids;
  int64_t count, num_rows, bytes, stride;  // in bytes

  void prepare(int64_t) override { check_ids("embedding", ids, count, num_rows); }
  int64_t most_threads() const override { return threads_for(count, bytes / 4); }
  void work(int64_t thread, int64_t threads) override {
    const Share share(count, thread, threads);
    for (int64_t t = share.first; t < share.last; ++t) std::memcpy(to + t * bytes, from + ids[t] * stride, bytes);
  }
};

Tensor embedding(const Tensor ids, const Tensor weight) {
  const Tensor table = as_rows("embedding", "weight", weight, 2);
  const Tensor all = dense("embedding", "ids", ids, 1, ScalarType::Long);
  Tensor out = new_result(weight, {ids.size(0), weight.size(1)});
  auto call = std::make_unique<EmbeddingCall>();
  const int64_t element = is_bf16(weight) ? 2 : 4;
  call->to = static_cast<char*>(out.mutable_data_ptr());
  call->from = static_cast<const char*>(table.const_data_ptr());
  call->ids = integers(all), call->count = ids.size(0), call->num_rows = weight.size(0);
  call->bytes = weight.size(1) * element, call->stride = table.stride(0) * element;
  run(std::move(call));
  return out;
}

Tensor embedding_backward(const Tensor grad, const Tensor ids, int64_t num_rows) {
  const char* op = "embedding_backward";
  const Tensor grads = as_rows(op, "grad", grad, 2);
  STD_TORCH_CHECK(num_rows >= 0, op, ": num_rows=", num_rows, " is negative");
  const Tensor all = dense(op, "ids", ids, 1, ScalarType::Long);
  const int64_t* id = integers(all);
  check_ids(op, id, ids.size(0), num_rows);
  STD_TORCH_CHECK(ids.size(0) == grad.size(0), op, ": ids has ", ids.size(0), " entries, grad ", grad.size(0), " rows");
  // Tokens by id, ascending within an id.
  std::vector<int64_t> starts(num_rows + 1), tokens(ids.size(0));
  for (int64_t t = 0; t < ids.size(0); ++t) ++starts[id[t] + 1];
  for (int64_t i = 0; i < num_rows; ++i) starts[i + 1] += starts[i];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t t = 0; t < ids.size(0); ++t) tokens[next[id[t]]++] = t;
  Tensor grad_weight = new_result(grad, {num_rows, grad.size(1)});
  const EmbeddingGradArgs args{grad_weight.mutable_data_ptr(), rows_of(grads), starts.data(), tokens.data(),
                               grad.size(1)};
  const Kernels& k = kernels();
  share_rows(num_rows, grad.size(1),
             [&](int64_t first, int64_t last) { k.embedding_backward(args, first, last, is_bf16(grad)); });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("embedding(Tensor ids, Tensor weight) -> Tensor");
  m.def("embedding_backward(Tensor grad, Tensor ids, int num_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
}
