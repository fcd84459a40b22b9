// The ops of rotary.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "check_rows.h"
#include "dispatch.h"

namespace {

struct Angles {
  Tensor cos, sin;

  Angles(const char* op, const Tensor& all_cos, const Tensor& all_sin, const Tensor& x, const char* name)
      : cos(dense(op, "cos", all_cos, 2, ScalarType::Float)), sin(dense(op, "sin", all_sin, 2, ScalarType::Float)) {
    for (const auto& [which, angle] : {std::pair("cos", &cos), std::pair("sin", &sin)})
      STD_TORCH_CHECK(angle->size(0) == x.size(0) && angle->size(1) == x.size(2), op, ": ", which, " doesn't fit ", name);
    STD_TORCH_CHECK(x.size(2) % 2 == 0, op, ": the head dim ", x.size(2), " is odd");
  }

  RotaryArgs args(Tensor& out, const Tensor& x, float sign) const {
    return {out.mutable_data_ptr(), rows_of(x), static_cast<const float*>(cos.const_data_ptr()),
            static_cast<const float*>(sin.const_data_ptr()), x.size(1), x.size(2), sign};
  }
};

Tensor rotary(const Tensor x, const Tensor cos, const Tensor sin, bool inverse) {
  const Tensor from = as_rows("rotary", "x", x, 3);
  const Angles angles("rotary", cos, sin, x, "x");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const RotaryArgs args = angles.args(out, from, inverse ? -1.0f : 1.0f);
  const Kernels& k = kernels();
  share_rows(x.size(0), x.size(1) * x.size(2),
             [&](int64_t first, int64_t last) { k.rotary(args, first, last, is_bf16(x)); });
  return out;
}

Tensor rotary_write(const Tensor q, const Tensor k, const Tensor v, const Tensor cos, const Tensor sin,
                    Tensor key_cache, Tensor value_cache, const Tensor slots) {
  const char* op = "rotary_write";
  const Tensor qs = as_rows(op, "q", q, 3), ks = as_rows(op, "k", k, 3), vs = as_rows(op, "v", v, 3);
  const Angles angles(op, cos, sin, q, "q");
  check_same(op, "k", k, q);
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2), op, ": k and q differ in tokens or head dim");
  check_shape(op, "v", v, "k", k);
  for (const auto& [name, cache] : {std::pair("key_cache", &key_cache), std::pair("value_cache", &value_cache)}) {
    check_floats(op, name, *cache, 4);
    check_same(op, name, *cache, q);
    STD_TORCH_CHECK(cache->size(2) == k.size(1) && cache->size(3) == k.size(2), op, ": ", name, " doesn't fit k");
  }
  check_shape(op, "value_cache", value_cache, "key_cache", key_cache);
  const Tensor places = dense(op, "slots", slots, 1, ScalarType::Long);
  STD_TORCH_CHECK(slots.size(0) == q.size(0), op, ": slots has ", slots.size(0), " entries for ", q.size(0), " tokens");
  const int64_t num_slots = key_cache.size(0) * key_cache.size(1);
  for (int64_t t = 0; t < slots.size(0); ++t)
    STD_TORCH_CHECK(integers(places)[t] >= 0 && integers(places)[t] < num_slots, op, ": slots[", t, "]=",
                    integers(places)[t], " of ", num_slots, " slots");
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const RotaryArgs args = angles.args(out, qs, 1.0f);
  const PagesArgs pages{key_cache.mutable_data_ptr(), value_cache.mutable_data_ptr(), rows_of(ks), rows_of(vs),
                        integers(places), k.size(1)};
  const Kernels& table = kernels();
  share_rows(q.size(0), (q.size(1) + 2 * k.size(1)) * q.size(2),
             [&](int64_t first, int64_t last) { table.rotary_write(args, pages, first, last, is_bf16(q)); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  m.def(
      "rotary_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_write", TORCH_BOX(&rotary_write));
}
