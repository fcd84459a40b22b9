// The ops of linear.cpp: checks the arguments, then hands out panels or rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "dispatch.h"

namespace {

int64_t panels_of(int64_t out_width) { return (out_width + PANEL - 1) / PANEL; }

void check_packed(const char* op, const Tensor& packed, int64_t out_width, int64_t in_width) {
  check_floats(op, "packed", packed, 4);
  const int64_t per_unit = is_bf16(packed) ? 2 : 1;
  STD_TORCH_CHECK(packed.size(0) == panels_of(out_width) && packed.size(1) == (in_width + per_unit - 1) / per_unit &&
                      packed.size(2) == PANEL && packed.size(3) == per_unit,
                  op, ": packed is not of a weight [", out_width, ", ", in_width, "]");
}

Tensor empty_packed(const Tensor like, int64_t out_width, int64_t in_width) {
  check_floats("empty_packed", "like", like, like.dim());
  STD_TORCH_CHECK(out_width >= 0 && in_width >= 0, "empty_packed: negative size");
  const int64_t per_unit = is_bf16(like) ? 2 : 1;
  return torch::stable::new_empty(like, {panels_of(out_width), (in_width + per_unit - 1) / per_unit, PANEL, per_unit});
}

void pack_rows(Tensor packed, const Tensor rows, int64_t first) {
  check_floats("pack_rows", "rows", rows, 2);
  check_same("pack_rows", "rows", rows, packed);
  check_packed("pack_rows", packed, packed.size(0) * PANEL, rows.size(1));
  STD_TORCH_CHECK(first >= 0 && first % PANEL == 0, "pack_rows: first=", first, " must be a multiple of ", PANEL);
  const int64_t panel = first / PANEL, panels = panels_of(rows.size(0));
  STD_TORCH_CHECK(panel + panels <= packed.size(0), "pack_rows: ", rows.size(0), " rows from ", first, " on don't fit");
  char* to = static_cast<char*>(packed.mutable_data_ptr()) + panel * packed.size(1) * PANEL * 4;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    k.pack(to, rows.const_data_ptr(), rows.size(0), rows.size(1), begin, end, is_bf16(rows));
  });
}

constexpr int64_t MANY_ROWS = 128;  // from here on threads share rows, below panels

Tensor linear(const Tensor x, const Tensor packed, std::optional<Tensor> bias, int64_t out_width) {
  check_floats("linear", "x", x, 2);
  check_same("linear", "packed", packed, x);
  check_packed("linear", packed, out_width, x.size(1));
  if (bias) {
    check_floats("linear", "bias", *bias, 1);
    check_same("linear", "bias", *bias, x);
    STD_TORCH_CHECK(bias->size(0) == out_width, "linear: bias has ", bias->size(0), " entries, not ", out_width);
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_width});
  const LinearArgs args{out.mutable_data_ptr(), x.const_data_ptr(), packed.const_data_ptr(),
                        bias ? bias->const_data_ptr() : nullptr, out_width, x.size(1)};
  const Kernels& k = kernels();
  const bool by_rows = x.size(0) >= MANY_ROWS;
  const int64_t panels = packed.size(0);
  torch::stable::parallel_for(0, by_rows ? x.size(0) : panels, by_rows ? MANY_ROWS / 4 : 1, [&](int64_t first, int64_t last) {
    if (by_rows) k.linear(args, 0, panels, first, last, is_bf16(x));
    else k.linear(args, first, last, 0, x.size(0), is_bf16(x));
  });
  return out;
}

Tensor packed_rows(const Tensor ids, const Tensor packed, int64_t out_width, int64_t in_width) {
  check_type("packed_rows", "ids", ids, 1, ScalarType::Long);
  check_packed("packed_rows", packed, out_width, in_width);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t t = 0; t < ids.size(0); ++t)
    STD_TORCH_CHECK(id[t] >= 0 && id[t] < out_width, "packed_rows: ids[", t, "]=", id[t], " of ", out_width, " rows");
  Tensor out = torch::stable::new_empty(packed, {ids.size(0), in_width});
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, ids.size(0), 8, [&](int64_t first, int64_t last) {
    k.unpack(out.mutable_data_ptr(), packed.const_data_ptr(), id, in_width, first, last, is_bf16(packed));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("empty_packed(Tensor like, int out_width, int in_width) -> Tensor");
  m.def("pack_rows(Tensor(a!) packed, Tensor rows, int first) -> ()");
  m.def("packed_rows(Tensor ids, Tensor packed, int out_width, int in_width) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int out_width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("empty_packed", TORCH_BOX(&empty_packed));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("packed_rows", TORCH_BOX(&packed_rows));
  m.impl("linear", TORCH_BOX(&linear));
}
