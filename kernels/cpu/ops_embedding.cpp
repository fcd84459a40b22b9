// Rows of a table by id, and the gradient of the table.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "check_rows.h"
#include "dispatch.h"

namespace {

Tensor checked_ids(const char* op, const Tensor& ids, int64_t num_rows) {
  const Tensor all = dense(op, "ids", ids, 1, ScalarType::Long);
  for (int64_t t = 0; t < all.size(0); ++t)
    STD_TORCH_CHECK(integers(all)[t] >= 0 && integers(all)[t] < num_rows, op, ": ids[", t, "]=", integers(all)[t],
                    " of ", num_rows, " rows");
  return all;
}

Tensor embedding(const Tensor ids, const Tensor weight) {
  const Tensor table = as_rows("embedding", "weight", weight, 2);
  const Tensor all = checked_ids("embedding", ids, weight.size(0));
  const int64_t* id = integers(all);
  Tensor out = torch::stable::new_empty(weight, {ids.size(0), weight.size(1)});
  const size_t element = is_bf16(weight) ? 2 : 4, bytes = weight.size(1) * element, stride = table.stride(0) * element;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* from = static_cast<const char*>(table.const_data_ptr());
  share_rows(ids.size(0), weight.size(1), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) std::memcpy(to + t * bytes, from + id[t] * stride, bytes);
  });
  return out;
}

Tensor embedding_backward(const Tensor grad, const Tensor ids, int64_t num_rows) {
  const char* op = "embedding_backward";
  const Tensor grads = as_rows(op, "grad", grad, 2);
  STD_TORCH_CHECK(num_rows >= 0, op, ": num_rows=", num_rows, " is negative");
  const Tensor all = checked_ids(op, ids, num_rows);
  const int64_t* id = integers(all);
  STD_TORCH_CHECK(ids.size(0) == grad.size(0), op, ": ids has ", ids.size(0), " entries, grad ", grad.size(0), " rows");
  // Tokens by id, ascending within an id.
  std::vector<int64_t> starts(num_rows + 1), tokens(ids.size(0));
  for (int64_t t = 0; t < ids.size(0); ++t) ++starts[id[t] + 1];
  for (int64_t i = 0; i < num_rows; ++i) starts[i + 1] += starts[i];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t t = 0; t < ids.size(0); ++t) tokens[next[id[t]]++] = t;
  Tensor grad_weight = torch::stable::new_empty(grad, {num_rows, grad.size(1)});
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
