// Linears with both gradients, and low-rank updates of several adapters.
#include "ops.hpp"

namespace {

// [rows, width], float32 or of the type of `like`.
Tensor result(const Tensor& like, int64_t rows, int64_t width, bool wide) {
  return torch::stable::new_empty(like, {rows, width}, wide ? ScalarType::Float : like.scalar_type());
}

Tensor linear(const Tensor x, const Tensor weight, std::optional<Tensor> bias, bool wide) {
  const Call call("linear", "x", x);
  LinearArgs a{};
  a.x = call.floats("x", x, 2, true);
  a.weight = call.floats("weight", weight, 2);
  call.size("weight", weight, 1, x.size(1));
  if (bias) {
    a.bias = call.floats("bias", *bias, 1);
    call.size("bias", *bias, 0, weight.size(0));
  }
  Tensor out = result(x, x.size(0), weight.size(0), wide);
  a.out = out.mutable_data_ptr();
  a.rows = x.size(0), a.width_in = x.size(1), a.width_out = weight.size(0), a.x_stride = x.stride(0);
  a.dtype = call.dtype(), a.out_dtype = wide ? FLOAT32 : a.dtype;
  call.run(&onemesh_cuda_linear, a);
  return out;
}

Tensor linear_grad_input(const Tensor grad, const Tensor weight, bool wide) {
  const Call call("linear_grad_input", "grad", grad);
  LinearGradInputArgs a{};
  a.grad = call.floats("grad", grad, 2);
  a.weight = call.floats("weight", weight, 2);
  call.size("weight", weight, 0, grad.size(1));
  Tensor out = result(grad, grad.size(0), weight.size(1), wide);
  a.out = out.mutable_data_ptr();
  a.rows = grad.size(0), a.width_in = weight.size(1), a.width_out = grad.size(1);
  a.dtype = call.dtype(), a.out_dtype = wide ? FLOAT32 : a.dtype;
  call.run(&onemesh_cuda_linear_grad_input, a);
  return out;
}

// out += grad^T x
void linear_grad_weight(Tensor out, const Tensor grad, const Tensor x) {
  const Call call("linear_grad_weight", "grad", grad);
  LinearGradWeightArgs a{};
  a.grad = call.floats("grad", grad, 2);
  a.x = call.floats("x", x, 2);
  call.size("x", x, 0, grad.size(0));
  call.typed<float>("out", out, 2, ScalarType::Float);
  call.shape("out", out, {grad.size(1), x.size(1)});
  a.out = static_cast<float*>(out.mutable_data_ptr());
  a.rows = grad.size(0), a.width_in = x.size(1), a.width_out = grad.size(1), a.dtype = call.dtype();
  call.run(&onemesh_cuda_linear_grad_weight, a);
}

// out += (x a^T) b^T on the rows of the items -> x a^T, of which no other row is written.
Tensor lora(Tensor out, const Tensor x, const Tensor factors_a, const Tensor factors_b, const Tensor items) {
  const Call call("lora", "x", x);
  LoraArgs a{};
  a.x = call.floats("x", x, 2, true);
  a.out_dtype = call.sum("out", out, 2);
  a.a = call.floats("a", factors_a, 3);
  a.b = call.floats("b", factors_b, 3);
  a.items = call.longs("items", items, 2);
  a.rank = factors_a.size(1), a.width_in = x.size(1), a.width_out = out.size(1), a.num_items = items.size(0);
  call.size("out", out, 0, x.size(0));
  call.size("a", factors_a, 2, a.width_in);
  call.shape("b", factors_b, {factors_a.size(0), a.width_out, a.rank});
  call.size("items", items, 1, 3);
  Tensor hidden = torch::stable::new_empty(x, {x.size(0), a.rank});
  a.hidden = hidden.mutable_data_ptr();
  a.out = out.mutable_data_ptr();
  a.x_stride = x.stride(0), a.out_stride = a.width_out, a.dtype = call.dtype();
  call.run(&onemesh_cuda_lora, a);
  return hidden;
}

template <class Library>
void implement(Library& m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  m.impl("linear_grad_weight", TORCH_BOX(&linear_grad_weight));
  m.impl("lora", TORCH_BOX(&lora));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh_cuda, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool wide) -> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor weight, bool wide) -> Tensor");
  m.def("linear_grad_weight(Tensor(a!) out, Tensor grad, Tensor x) -> ()");
  m.def("lora(Tensor(a!) out, Tensor x, Tensor a, Tensor b, Tensor items) -> Tensor");
}
ONEMESH_CUDA_IMPL
