// Ops over rows: RMSNorm, gates, rotary embedding and the writing of pages; the embedding and its gradient.
#include "ops.hpp"

namespace {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor x, std::optional<Tensor> residual, const Tensor weight,
                                        double eps) {
  const Call call("rms_norm", "x", x);
  RmsNormArgs a{};
  a.x = call.floats("x", x, 2);
  a.weight = call.floats("weight", weight, 1);
  call.size("weight", weight, 0, x.size(1));
  Tensor out = torch::stable::empty_like(x), sum = residual ? torch::stable::empty_like(x) : x;
  if (residual) {
    a.residual = call.floats("residual", *residual, 2);
    call.size("residual", *residual, 0, x.size(0));
    call.size("residual", *residual, 1, x.size(1));
    a.sum = sum.mutable_data_ptr();
  }
  a.out = out.mutable_data_ptr();
  a.rows = x.size(0), a.width = x.size(1), a.eps = float(eps), a.dtype = call.dtype();
  call.run(&onemesh_cuda_rms_norm, a);
  return {out, sum};
}

Tensor rms_norm(const Tensor x, const Tensor weight, double eps) {
  return std::get<0>(add_rms_norm(x, std::nullopt, weight, eps));
}

Tensor gate(const Tensor gate, const Tensor up, int64_t activation) {
  const Call call("gate", "gate", gate);
  GateArgs a{};
  a.gate = call.floats("gate", gate, 2, true);
  a.up = call.floats("up", up, 2, true);
  call.size("up", up, 0, gate.size(0));
  call.size("up", up, 1, gate.size(1));
  STD_TORCH_CHECK(activation == SILU || activation == GELU_TANH, "gate: activation=", activation, " must be 0 or 1");
  Tensor out = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});  // without the gaps
  a.out = out.mutable_data_ptr();
  a.rows = gate.size(0), a.width = gate.size(1), a.gate_stride = gate.stride(0), a.up_stride = up.stride(0);
  a.activation = int32_t(activation), a.dtype = call.dtype();
  call.run(&onemesh_cuda_gate, a);
  return out;
}

void set_angles(const Call& call, const Tensor& cos, const Tensor& sin, RotaryArgs& a) {
  a.cos = call.angles("cos", cos);
  a.sin = call.angles("sin", sin);
  for (int dim = 0; dim < 2; ++dim) {
    call.size("cos", cos, dim, dim ? a.head_dim : a.rows);
    call.size("sin", sin, dim, dim ? a.head_dim : a.rows);
  }
}

Tensor rotary(const Tensor x, const Tensor cos, const Tensor sin) {
  const Call call("rotary", "x", x);
  RotaryArgs a{};
  a.q = call.floats("x", x, 3, true);
  a.rows = x.size(0), a.num_heads = x.size(1), a.head_dim = x.size(2), a.q_stride = x.stride(0), a.dtype = call.dtype();
  STD_TORCH_CHECK(a.head_dim % 2 == 0, "rotary: x has an odd head dim ", a.head_dim);
  set_angles(call, cos, sin, a);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  a.q_out = out.mutable_data_ptr();
  call.run(&onemesh_cuda_rotary, a);
  return out;
}

void set_pages(const Call& call, const Tensor& k, const Tensor& v, const Tensor& slots, Tensor& keys, Tensor& values,
               RotaryArgs& a) {
  a.k = call.floats("k", k, 3, true);
  a.v = call.floats("v", v, 3, true);
  call.floats("key_cache", keys, 4);
  call.floats("value_cache", values, 4);
  a.slots = call.longs("slots", slots, 1);
  a.rows = k.size(0), a.num_kv_heads = k.size(1), a.head_dim = k.size(2);
  a.k_stride = k.stride(0), a.v_stride = v.stride(0), a.dtype = call.dtype();
  STD_TORCH_CHECK(a.head_dim % 2 == 0, "write_pages: k has an odd head dim ", a.head_dim);
  call.size("slots", slots, 0, a.rows);
  for (int dim = 0; dim < 3; ++dim) call.size("v", v, dim, k.size(dim));
  for (int dim = 2; dim < 4; ++dim) call.size("key_cache", keys, dim, k.size(dim - 1));
  for (int dim = 0; dim < 4; ++dim) call.size("value_cache", values, dim, keys.size(dim));
  a.key_cache = keys.mutable_data_ptr();
  a.value_cache = values.mutable_data_ptr();
}

void write_pages(Tensor key_cache, Tensor value_cache, const Tensor k, const Tensor v, const Tensor slots) {
  const Call call("write_pages", "k", k);
  RotaryArgs a{};
  set_pages(call, k, v, slots, key_cache, value_cache, a);
  call.run(&onemesh_cuda_rotary, a);
}

Tensor rotary_write(const Tensor q, const Tensor k, const Tensor v, const Tensor cos, const Tensor sin,
                    Tensor key_cache, Tensor value_cache, const Tensor slots) {
  const Call call("rotary_write", "q", q);
  RotaryArgs a{};
  set_pages(call, k, v, slots, key_cache, value_cache, a);
  a.q = call.floats("q", q, 3, true);
  call.size("q", q, 0, a.rows);
  call.size("q", q, 2, a.head_dim);
  a.num_heads = q.size(1), a.q_stride = q.stride(0);
  set_angles(call, cos, sin, a);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  a.q_out = out.mutable_data_ptr();
  call.run(&onemesh_cuda_rotary, a);
  return out;
}

Tensor embedding(const Tensor weight, const Tensor ids) {
  const Call call("embedding", "weight", weight);
  EmbeddingArgs a{};
  a.weight = call.floats("weight", weight, 2);
  a.ids = call.longs("ids", ids, 1);
  Tensor out = torch::stable::new_empty(weight, {ids.size(0), weight.size(1)});
  a.out = out.mutable_data_ptr();
  a.rows = ids.size(0), a.width = weight.size(1), a.num_ids = weight.size(0), a.dtype = call.dtype();
  call.run(&onemesh_cuda_embedding, a);
  return out;
}

// Into rows of out, which the caller has cleared; ids rise, places says which row of grad each has.
void embedding_grad(Tensor out, const Tensor grad, const Tensor ids, const Tensor places) {
  const Call call("embedding_grad", "grad", grad);
  EmbeddingGradArgs a{};
  a.grad = call.floats("grad", grad, 2);
  a.ids = call.longs("ids", ids, 1);
  a.places = call.longs("places", places, 1);
  call.floats("out", out, 2);
  call.size("ids", ids, 0, grad.size(0));
  call.size("places", places, 0, grad.size(0));
  call.size("out", out, 1, grad.size(1));
  a.out = out.mutable_data_ptr();
  a.rows = grad.size(0), a.width = grad.size(1), a.num_ids = out.size(0), a.dtype = call.dtype();
  call.run(&onemesh_cuda_embedding_grad, a);
}

template <class Library>
void implement(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("write_pages", TORCH_BOX(&write_pages));
  m.impl("rotary_write", TORCH_BOX(&rotary_write));
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("embedding_grad", TORCH_BOX(&embedding_grad));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("gate(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("write_pages(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor k, Tensor v, Tensor slots) -> ()");
  m.def(
      "rotary_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) "
      "value_cache, Tensor slots) -> Tensor");
  m.def("embedding(Tensor weight, Tensor ids) -> Tensor");
  m.def("embedding_grad(Tensor(a!) out, Tensor grad, Tensor ids, Tensor places) -> ()");
}
ONEMESH_CUDA_IMPL
