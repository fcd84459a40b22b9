// Registers the CUDA kernels with torch through its stable ABI: checks the arguments, then launches on torch's stream.
//
// It needs nothing of torch's CUDA libraries and so links and loads with a torch for CPUs too; there every op refuses its
// first tensor. What lies in device memory isn't looked at: block tables, slots and lists of work are the caller's word.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// An op's arguments, checked one by one; the first tensor decides device and dtype.
class Call {
 public:
  Call(const char* op, const char* name, const Tensor& first) : op_(op), first_name_(name), first_(first) {
    check_device(name, first);
    dtype();
  }

  int32_t dtype() const {
    switch (first_.scalar_type()) {
      case ScalarType::Float: return FLOAT32;
      case ScalarType::Half: return FLOAT16;
      case ScalarType::BFloat16: return BFLOAT16;
      default: STD_TORCH_CHECK(false, op_, ": ", first_name_, " must be float32, float16 or bfloat16"); return 0;
    }
  }

  // Elements of the first tensor's type; rows may have gaps where `gaps`.
  const void* floats(const char* name, const Tensor& x, int64_t dims, bool gaps = false) const {
    check(name, x, dims, gaps);
    STD_TORCH_CHECK(x.scalar_type() == first_.scalar_type(), op_, ": ", name, " has another dtype than ", first_name_);
    return x.const_data_ptr();
  }

  template <class T>
  const T* typed(const char* name, const Tensor& x, int64_t dims, ScalarType type) const {
    check(name, x, dims, false);
    STD_TORCH_CHECK(x.scalar_type() == type, op_, ": ", name, " has the wrong dtype");
    return static_cast<const T*>(x.const_data_ptr());
  }
  const float* angles(const char* name, const Tensor& x) const { return typed<float>(name, x, 2, ScalarType::Float); }
  const int64_t* longs(const char* name, const Tensor& x, int64_t dims) const {
    return typed<int64_t>(name, x, dims, ScalarType::Long);
  }

  void size(const char* name, const Tensor& x, int64_t dim, int64_t wanted) const {
    STD_TORCH_CHECK(x.size(dim) == wanted, op_, ": ", name, " has size ", x.size(dim), " in dim ", dim, ", not ", wanted);
  }

  template <class... Parts>
  void check_that(bool holds, const Parts&... message) const {
    STD_TORCH_CHECK(holds, op_, ": ", message...);
  }

  template <class Args>
  void run(int (*launcher)(const Args*, void*), const Args& args) const {
#ifdef ONEMESH_CUDA_ON_HOST
    const int error = launcher(&args, nullptr);
#else
    const auto device = first_.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const int error = launcher(&args, torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#endif
    STD_TORCH_CHECK(error == 0, op_, ": no kernel for this shape, or it didn't start: cudaError ", error);
  }

 private:
  void check_device(const char* name, const Tensor& x) const {
#ifndef ONEMESH_CUDA_ON_HOST
    STD_TORCH_CHECK(x.is_cuda(), op_, ": ", name, " must be on a CUDA device");
    STD_TORCH_CHECK(x.get_device_index() == first_.get_device_index(), op_, ": ", name, " is on cuda:",
                    x.get_device_index(), ", ", first_name_, " on cuda:", first_.get_device_index());
#endif
  }
  void check(const char* name, const Tensor& x, int64_t dims, bool gaps) const {
    check_device(name, x);
    STD_TORCH_CHECK(x.dim() == dims, op_, ": ", name, " has ", x.dim(), " dimensions, not ", dims);
    if (!gaps) {
      STD_TORCH_CHECK(x.is_contiguous(), op_, ": ", name, " is not contiguous");
      return;
    }
    int64_t inner = 1;  // all but the first dim
    for (int64_t d = dims - 1; d > 0; --d) {
      STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == inner, op_, ": a row of ", name, " is not contiguous");
      inner *= x.size(d);
    }
  }

  const char *op_, *first_name_;
  const Tensor& first_;
};

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor x, std::optional<Tensor> residual, const Tensor weight, double eps) {
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

Tensor rotary_write(const Tensor q, const Tensor k, const Tensor v, const Tensor cos, const Tensor sin, Tensor key_cache,
                    Tensor value_cache, const Tensor slots) {
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

// What attention over pages and over packed documents have in common, but for the keys and the split chunks.
struct Attention {
  AttentionPagedArgs a{};
  Tensor out, lse;
};

Attention prepare(const Call& call, const Tensor& q, const Tensor& chunks, const Tensor& head_starts, const Tensor& heads,
                  const std::optional<Tensor>& slopes, const Tensor& whole, int64_t window, double scale, double softcap) {
  Attention made{{}, torch::stable::empty_like(q), torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float)};
  AttentionPagedArgs& a = made.a;
  call.check_that(q.size(2) >= 1 && q.size(2) <= 256, "q has a head dim that isn't 1 to 256: ", q.size(2));
  call.check_that(window >= 0, "window is negative: ", window);
  a.chunks = call.longs("chunks", chunks, 2);
  call.size("chunks", chunks, 1, 4);
  a.head_starts = call.typed<int32_t>("head_starts", head_starts, 1, ScalarType::Int);
  a.heads = call.typed<int32_t>("heads", heads, 1, ScalarType::Int);
  call.size("heads", heads, 0, q.size(1));
  if (slopes) {
    a.slopes = call.typed<float>("slopes", *slopes, 1, ScalarType::Float);
    call.size("slopes", *slopes, 0, q.size(1));
  }
  a.whole = call.longs("whole", whole, 2);
  call.size("whole", whole, 1, 2);
  a.q = call.floats("q", q, 3);
  a.out = made.out.mutable_data_ptr();
  a.lse = static_cast<float*>(made.lse.mutable_data_ptr());
  a.num_whole = whole.size(0), a.num_heads = q.size(1), a.num_kv_heads = head_starts.size(0) - 1;
  a.head_dim = int32_t(q.size(2)), a.page_size = 1, a.window = int32_t(window);
  a.scale = float(scale), a.softcap = float(softcap), a.dtype = call.dtype();
  return made;
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor q, const Tensor k, const Tensor v, const Tensor documents,
                                            const Tensor head_starts, const Tensor heads, std::optional<Tensor> slopes,
                                            const Tensor whole, int64_t window, double scale, double softcap) {
  const Call call("attention_varlen", "q", q);
  call.floats("q", q, 3);
  Attention made = prepare(call, q, documents, head_starts, heads, slopes, whole, window, scale, softcap);
  made.a.key_cache = call.floats("k", k, 3);
  made.a.value_cache = call.floats("v", v, 3);
  call.size("k", k, 0, q.size(0));
  call.size("k", k, 1, made.a.num_kv_heads);
  call.size("k", k, 2, q.size(2));
  for (int dim = 0; dim < 3; ++dim) call.size("v", v, dim, k.size(dim));
  call.run(&onemesh_cuda_attention_paged, made.a);
  return {made.out, made.lse};
}

std::tuple<Tensor, Tensor> attention_paged(const Tensor q, const Tensor key_cache, const Tensor value_cache,
                                           const Tensor chunks, const Tensor block_table, const Tensor prefix_table,
                                           const Tensor head_starts, const Tensor heads, std::optional<Tensor> slopes,
                                           const Tensor whole, const Tensor split, const Tensor merges,
                                           int64_t partial_rows, int64_t max_split_queries, int64_t window, double scale,
                                           double softcap) {
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

}  // namespace

STABLE_TORCH_LIBRARY(onemesh_cuda, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("gate(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("write_pages(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor k, Tensor v, Tensor slots) -> ()");
  m.def(
      "rotary_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slots) -> Tensor");
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor documents, Tensor head_starts, Tensor heads, Tensor? slopes, "
      "Tensor whole, int window, float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "attention_paged(Tensor q, Tensor key_cache, Tensor value_cache, Tensor chunks, Tensor block_table, "
      "Tensor prefix_table, Tensor head_starts, Tensor heads, Tensor? slopes, Tensor whole, Tensor split, Tensor merges, "
      "int partial_rows, int max_split_queries, int window, float scale, float softcap) -> (Tensor, Tensor)");
}

// The CPU key too, so that a tensor on the CPU is refused by name.
#define ONEMESH_IMPL(KEY)                                      \
  STABLE_TORCH_LIBRARY_IMPL(onemesh_cuda, KEY, m) {            \
    m.impl("rms_norm", TORCH_BOX(&rms_norm));                  \
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));          \
    m.impl("gate", TORCH_BOX(&gate));                          \
    m.impl("rotary", TORCH_BOX(&rotary));                      \
    m.impl("write_pages", TORCH_BOX(&write_pages));            \
    m.impl("rotary_write", TORCH_BOX(&rotary_write));          \
    m.impl("attention_varlen", TORCH_BOX(&attention_varlen));  \
    m.impl("attention_paged", TORCH_BOX(&attention_paged));    \
  }
ONEMESH_IMPL(CUDA)
ONEMESH_IMPL(CPU)
