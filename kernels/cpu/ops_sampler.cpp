// The ops of sampler.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "check_rows.h"
#include "dispatch.h"

namespace {

constexpr int64_t LARGEST_VOCAB = 1 << 20;  // a sum of so many weights fits into 63 bits

template <class T>
const T* numbers(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// One number for each of the chosen rows.
void check_numbers(const char* op, const char* name, const Tensor& x, const Tensor& rows, ScalarType type) {
  check_type(op, name, x, 1, type);
  STD_TORCH_CHECK(x.size(0) == rows.size(0), op, ": ", name, " has ", x.size(0), " entries, rows ", rows.size(0));
}

// Logits as rows; `rows` must name some of them.
Tensor checked_rows(const char* op, const Tensor& logits, const Tensor& rows) {
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, op, ": logits must be float32");
  const Tensor dense_rows = as_rows(op, "logits", logits, 2);
  STD_TORCH_CHECK(logits.size(1) >= 1 && logits.size(1) <= LARGEST_VOCAB, op, ": logits have ", logits.size(1),
                  " columns, not 1 to ", LARGEST_VOCAB);
  check_type(op, "rows", rows, 1, ScalarType::Long);
  for (int64_t n = 0; n < rows.size(0); ++n)
    STD_TORCH_CHECK(integers(rows)[n] >= 0 && integers(rows)[n] < logits.size(0), op, ": rows[", n, "]=",
                    integers(rows)[n], " of ", logits.size(0));
  return dense_rows;
}

Tensor draw(const Tensor logits, const Tensor rows, const Tensor temperature, const Tensor top_k, const Tensor top_p,
            const Tensor min_p, const Tensor u) {
  const char* op = "draw";
  const Tensor from = checked_rows(op, logits, rows);
  for (const auto& [name, x] : {std::pair("temperature", &temperature), std::pair("top_p", &top_p),
                                std::pair("min_p", &min_p), std::pair("u", &u)})
    check_numbers(op, name, *x, rows, ScalarType::Double);
  check_numbers(op, "top_k", top_k, rows, ScalarType::Long);
  const int64_t count = rows.size(0);
  for (int64_t n = 0; n < count; ++n) {  // written so that NaN fails
    const double t = numbers<double>(temperature)[n], p = numbers<double>(top_p)[n], m = numbers<double>(min_p)[n];
    STD_TORCH_CHECK(t == 0 || (t >= 1e-9 && t <= 1e6), op, ": temperature[", n, "]=", t, " must be 0 or in 1e-9 .. 1e6");
    STD_TORCH_CHECK(p > 0 && p <= 1, op, ": top_p[", n, "]=", p, " must lie above 0, at most at 1");
    STD_TORCH_CHECK(m >= 0 && m <= 1, op, ": min_p[", n, "]=", m, " must lie in 0 .. 1");
    const double one = numbers<double>(u)[n];
    STD_TORCH_CHECK(one >= 0 && one < 1, op, ": u[", n, "]=", one, " must lie from 0 on below 1");
  }
  Tensor ids = torch::stable::new_empty(rows, {count});
  const DrawArgs args{static_cast<int64_t*>(ids.mutable_data_ptr()), numbers<float>(from), from.stride(0),
                      integers(rows), numbers<double>(temperature), integers(top_k), numbers<double>(top_p),
                      numbers<double>(min_p), numbers<double>(u), logits.size(1)};
  const Kernels& k = kernels();
  share_rows(count, logits.size(1), [&](int64_t first, int64_t last) { k.draw(args, first, last); });
  return ids;
}

std::tuple<Tensor, Tensor, Tensor> logprobs(const Tensor logits, const Tensor rows, const Tensor ids,
                                            const Tensor num_top) {
  const char* op = "logprobs";
  const Tensor from = checked_rows(op, logits, rows);
  check_numbers(op, "ids", ids, rows, ScalarType::Long);
  check_numbers(op, "num_top", num_top, rows, ScalarType::Long);
  const int64_t count = rows.size(0), vocab = logits.size(1);
  int64_t width = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t id = integers(ids)[n], top = integers(num_top)[n];
    STD_TORCH_CHECK(id >= 0 && id < vocab, op, ": ids[", n, "]=", id, " of ", vocab, " columns");
    STD_TORCH_CHECK(top >= 0 && top <= vocab, op, ": num_top[", n, "]=", top, " of ", vocab, " columns");
    width = std::max(width, top);
  }
  Tensor logprob = torch::stable::new_empty(rows, {count}, ScalarType::Double);
  Tensor top_ids = torch::stable::new_empty(rows, {count, width});
  Tensor top_logprobs = torch::stable::new_empty(rows, {count, width}, ScalarType::Double);
  const LogProbArgs args{static_cast<double*>(logprob.mutable_data_ptr()),
                         static_cast<int64_t*>(top_ids.mutable_data_ptr()),
                         static_cast<double*>(top_logprobs.mutable_data_ptr()),
                         numbers<float>(from), from.stride(0), integers(rows), integers(ids), integers(num_top), width,
                         vocab};
  const Kernels& k = kernels();
  share_rows(count, vocab, [&](int64_t first, int64_t last) { k.logprobs(args, first, last); });
  return {logprob, top_ids, top_logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def(
      "draw(Tensor logits, Tensor rows, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor u) -> "
      "Tensor");
  m.def("logprobs(Tensor logits, Tensor rows, Tensor ids, Tensor num_top) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("draw", TORCH_BOX(&draw));
  m.impl("logprobs", TORCH_BOX(&logprobs));
}
