// Linears with both gradients, and low-rank updates of several adapters.
#include <vector>

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

// out += (x a^T) b^T on the rows of the items, with the factors [R_i, K] and [N, R_i] of the item's adapter; x a^T comes to
// the first R_i columns of these rows of hidden.
void lora(Tensor out, Tensor hidden, const Tensor x, std::vector<Tensor> factors_a, std::vector<Tensor> factors_b,
          const Tensor items) {
  const Call call("lora", "x", x);
  LoraArgs a{};
  a.x = call.floats("x", x, 2, true);
  a.out_dtype = call.sum("out", out, 2);
  a.items = call.longs("items", items, 2);
  a.num_adapters = int64_t(factors_a.size());
  call.check_that(a.num_adapters >= 1 && a.num_adapters <= MOST_ADAPTERS, "a has ", a.num_adapters,
                  " factors, not 1 to ", MOST_ADAPTERS);
  call.check_that(factors_b.size() == factors_a.size(), "b has ", factors_b.size(), " factors, a ", a.num_adapters);
  call.floats("hidden", hidden, 2);
  call.size("hidden", hidden, 0, x.size(0));
  call.size("out", out, 0, x.size(0));
  call.size("items", items, 1, 3);
  a.rank = hidden.size(1), a.width_in = x.size(1), a.width_out = out.size(1), a.num_items = items.size(0);
  int64_t factors[3 * MOST_ADAPTERS];
  const auto distance = [&](const void* to, const void* from) {  // both lie on borders of elements
    return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) / int64_t(x.element_size());
  };
  for (int64_t i = 0; i < a.num_adapters; ++i) {
    const void* own_a = call.floats("a", factors_a[i], 2);
    const void* own_b = call.floats("b", factors_b[i], 2);
    const int64_t rank = factors_a[i].size(0);
    call.size("a", factors_a[i], 1, a.width_in);
    call.shape("b", factors_b[i], {a.width_out, rank});
    call.check_that(rank <= a.rank, "hidden has ", a.rank, " columns, a factor in a ", rank, " rows");
    if (!i) a.a = own_a, a.b = own_b;
    factors[3 * i] = distance(own_a, a.a), factors[3 * i + 1] = distance(own_b, a.b), factors[3 * i + 2] = rank;
  }
  a.factors = factors;
  a.hidden = hidden.mutable_data_ptr();
  a.out = out.mutable_data_ptr();
  a.x_stride = x.stride(0), a.out_stride = a.width_out, a.dtype = call.dtype();
  call.run(&onemesh_cuda_lora, a);
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
  m.def("lora(Tensor(a!) out, Tensor(b!) hidden, Tensor x, Tensor[] a, Tensor[] b, Tensor items) -> ()");
}
ONEMESH_CUDA_IMPL
