// The ops of rotary.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <tuple>
#include <utility>

#include "calls.h"
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

// cos and sin of position * frequency, times factor, both halves of a row the same.
struct AnglesCall : Call {
  float *cos, *sin;  // [T, 2 half]
  const int64_t* positions;
  const double* frequency;
  double factor;
  int64_t rows, half;

  int64_t most_threads() const override { return threads_for(rows, 64 * half); }  // 64 times the work of an addition
  void work(int64_t thread, int64_t threads) override {
    const Share share(rows, thread, threads);
    for (int64_t t = share.first; t < share.last; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(positions[t]) * frequency[i];
        const int64_t at = 2 * t * half + i;
        cos[at] = cos[at + half] = float(std::cos(angle) * factor);
        sin[at] = sin[at + half] = float(std::sin(angle) * factor);
      }
  }
};

std::tuple<Tensor, Tensor> rotary_angles(const Tensor position, const Tensor frequency, double factor) {
  const char* op = "rotary_angles";
  const Tensor positions = dense(op, "position", position, 1, ScalarType::Long);
  const Tensor frequencies = dense(op, "frequency", frequency, 1, ScalarType::Double);
  const int64_t rows = position.size(0), half = frequency.size(0);
  Tensor cos = new_result(position, {rows, 2 * half}, ScalarType::Float);
  Tensor sin = new_result(position, {rows, 2 * half}, ScalarType::Float);
  auto call = std::make_unique<AnglesCall>();
  call->cos = static_cast<float*>(cos.mutable_data_ptr()), call->sin = static_cast<float*>(sin.mutable_data_ptr());
  call->positions = integers(positions), call->frequency = static_cast<const double*>(frequencies.const_data_ptr());
  call->factor = factor, call->rows = rows, call->half = half;
  run(std::move(call));
  return {cos, sin};
}

Tensor rotary(const Tensor x, const Tensor cos, const Tensor sin, bool inverse) {
  const Tensor from = as_rows("rotary", "x", x, 3);
  const Angles angles("rotary", cos, sin, x, "x");
  Tensor out = new_result(x, {x.size(0), x.size(1), x.size(2)});
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
  Tensor out = new_result(q, {q.size(0), q.size(1), q.size(2)});
  const RotaryArgs args = angles.args(out, qs, 1.0f);
  const PagesArgs pages{key_cache.mutable_data_ptr(), value_cache.mutable_data_ptr(), rows_of(ks), rows_of(vs),
                        integers(places), k.size(1)};
  const int64_t num_slots = key_cache.size(0) * key_cache.size(1);
  run(std::make_unique<RotaryWriteCall>(args, pages, q.size(0), num_slots, is_bf16(q)));
  return out;
}

}  // namespace

void RotaryWriteCall::prepare(int64_t) {
  for (int64_t t = 0; t < rows; ++t)
    STD_TORCH_CHECK(pages.slots[t] >= 0 && pages.slots[t] < num_slots, "rotary_write: slots[", t, "]=", pages.slots[t],
                    " of ", num_slots, " slots");
}

void RotaryWriteCall::work(int64_t thread, int64_t threads) {
  const Share share(rows, thread, threads);
  kernels().rotary_write(q, pages, share.first, share.last, bf16);
}

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("rotary_angles(Tensor position, Tensor frequency, float factor) -> (Tensor, Tensor)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  m.def(
      "rotary_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("rotary_angles", TORCH_BOX(&rotary_angles));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_write", TORCH_BOX(&rotary_write));
}
