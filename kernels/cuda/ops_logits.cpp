// What is made of logits: the loss and its gradient, drawn tokens and log-probabilities.
#include "ops.hpp"

namespace {

constexpr int64_t MAX_VOCABULARY = 1 << 20;

Tensor log_sum_exp(const Tensor logits) {
  const Call call("log_sum_exp", "logits", logits);
  LogSumExpArgs a{};
  a.logits = call.floats("logits", logits, 2, true);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  a.out = static_cast<float*>(out.mutable_data_ptr());
  a.rows = logits.size(0), a.width = logits.size(1), a.stride = logits.stride(0), a.dtype = call.dtype();
  call.run(&onemesh_cuda_log_sum_exp, a);
  return out;
}

Tensor loss_gradient(const Tensor logits, const Tensor lse, const Tensor target, int64_t dtype) {
  const Call call("loss_gradient", "logits", logits);
  LossGradientArgs a{};
  a.logits = call.floats("logits", logits, 2, true);
  a.lse = call.typed<float>("lse", lse, 1, ScalarType::Float);
  a.target = call.longs("target", target, 1);
  call.size("lse", lse, 0, logits.size(0));
  call.size("target", target, 0, logits.size(0));
  a.dtype = call.dtype(), a.out_dtype = int32_t(dtype);
  call.check_that(dtype >= FLOAT32 && dtype <= BFLOAT16 && (a.dtype == FLOAT32 || dtype == a.dtype), "dtype=", dtype,
                  " must be 0, 1 or 2, and that of logits unless those are float32");
  constexpr ScalarType TYPES[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, TYPES[dtype]);
  a.out = out.mutable_data_ptr();
  a.rows = logits.size(0), a.width = logits.size(1), a.stride = logits.stride(0);
  call.run(&onemesh_cuda_loss_gradient, a);
  return out;
}

void check_vocabulary(const Call& call, int64_t width) {
  call.check_that(width >= 1 && width <= MAX_VOCABULARY, "logits has ", width, " columns, not 1 to ", MAX_VOCABULARY);
}

Tensor draw(const Tensor logits, const Tensor rows, const Tensor temperature, const Tensor top_k, const Tensor top_p,
            const Tensor min_p, const Tensor u) {
  const Call call("draw", "logits", logits);
  const auto doubles = [&](const char* name, const Tensor& x) {
    return call.typed<double>(name, x, 1, ScalarType::Double);
  };
  DrawArgs a{};
  a.logits = call.typed<float>("logits", logits, 2, ScalarType::Float);
  a.rows = call.longs("rows", rows, 1);
  a.temperature = doubles("temperature", temperature);
  a.top_k = call.longs("top_k", top_k, 1);
  a.top_p = doubles("top_p", top_p);
  a.min_p = doubles("min_p", min_p);
  a.u = doubles("u", u);
  a.count = rows.size(0), a.width = logits.size(1);
  call.size("temperature", temperature, 0, a.count);
  call.size("top_k", top_k, 0, a.count);
  call.size("top_p", top_p, 0, a.count);
  call.size("min_p", min_p, 0, a.count);
  call.size("u", u, 0, a.count);
  check_vocabulary(call, a.width);
  Tensor ids = torch::stable::new_empty(rows, {a.count});
  a.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  call.run(&onemesh_cuda_draw, a);
  return ids;
}

std::tuple<Tensor, Tensor, Tensor> logprobs(const Tensor logits, const Tensor rows, const Tensor ids,
                                            const Tensor num_top, int64_t most) {
  const Call call("logprobs", "logits", logits);
  LogprobsArgs a{};
  a.logits = call.typed<float>("logits", logits, 2, ScalarType::Float);
  a.rows = call.longs("rows", rows, 1);
  a.ids = call.longs("ids", ids, 1);
  a.num_top = call.longs("num_top", num_top, 1);
  a.count = rows.size(0), a.width = logits.size(1), a.most = most;
  call.size("ids", ids, 0, a.count);
  call.size("num_top", num_top, 0, a.count);
  check_vocabulary(call, a.width);
  call.check_that(most >= 0 && most <= a.width, "most=", most, " must be 0 to ", a.width, ", the columns of logits");
  Tensor found = torch::stable::new_empty(rows, {a.count}, ScalarType::Double);
  Tensor top_ids = torch::stable::new_empty(rows, {a.count, most});
  Tensor top_values = torch::stable::new_empty(rows, {a.count, most}, ScalarType::Double);
  Tensor workspace = torch::stable::new_empty(rows, {a.count, most});
  a.found = static_cast<double*>(found.mutable_data_ptr());
  a.top_ids = static_cast<int64_t*>(top_ids.mutable_data_ptr());
  a.top_values = static_cast<double*>(top_values.mutable_data_ptr());
  a.workspace = static_cast<int64_t*>(workspace.mutable_data_ptr());
  call.run(&onemesh_cuda_logprobs, a);
  return {found, top_ids, top_values};
}

template <class Library>
void implement(Library& m) {
  m.impl("log_sum_exp", TORCH_BOX(&log_sum_exp));
  m.impl("loss_gradient", TORCH_BOX(&loss_gradient));
  m.impl("draw", TORCH_BOX(&draw));
  m.impl("logprobs", TORCH_BOX(&logprobs));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh_cuda, m) {
  m.def("log_sum_exp(Tensor logits) -> Tensor");
  m.def("loss_gradient(Tensor logits, Tensor lse, Tensor target, int dtype) -> Tensor");
  m.def(
      "draw(Tensor logits, Tensor rows, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor u) "
      "-> Tensor");
  m.def("logprobs(Tensor logits, Tensor rows, Tensor ids, Tensor num_top, int most) -> (Tensor, Tensor, Tensor)");
}
ONEMESH_CUDA_IMPL
