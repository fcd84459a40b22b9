// Registers the CPU kernels with torch through its stable ABI: checks the arguments, then hands out the work.
//
// Threads are torch's own: there is no second pool to fight with. Which thread does what never matters to a result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements per thread that are worth a thread
constexpr int64_t QUERIES = 32;     // of a longer chunk, per part

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

void check_dense(const char* op, const char* name, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims, op, ": ", name, " has ", x.dim(), " dimensions, not ", dims);
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " is not contiguous");
}

void check_floats(const char* op, const char* name, const Tensor& x, int64_t dims) {
  check_dense(op, name, x, dims);
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 or bfloat16");
}

void check_same(const char* op, const char* name, const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), op, ": ", name, " has another dtype");
}

void check_type(const char* op, const char* name, const Tensor& x, int64_t dims, ScalarType type) {
  check_dense(op, name, x, dims);
  STD_TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " has the wrong dtype");
}

Tensor silu_gate(const Tensor gate, const Tensor up) {
  check_floats("silu_gate", "gate", gate, 2);
  check_floats("silu_gate", "up", up, 2);
  check_same("silu_gate", "up", up, gate);
  STD_TORCH_CHECK(gate.size(0) == up.size(0) && gate.size(1) == up.size(1), "silu_gate: gate and up differ in shape");
  Tensor out = torch::stable::empty_like(gate);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, gate.numel(), GRAIN, [&](int64_t first, int64_t last) {
    k.silu_gate(out.mutable_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(), first, last, is_bf16(gate));
  });
  return out;
}

Tensor rms_norm(const Tensor x, const Tensor weight, double eps) {
  check_floats("rms_norm", "x", x, 2);
  check_floats("rms_norm", "weight", weight, 1);
  check_same("rms_norm", "weight", weight, x);
  STD_TORCH_CHECK(weight.size(0) == x.size(1), "rms_norm: weight has ", weight.size(0), " entries, x ", x.size(1));
  Tensor out = torch::stable::empty_like(x);
  const Kernels& k = kernels();
  const int64_t width = std::max<int64_t>(x.size(1), 1);
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(GRAIN / width, 1), [&](int64_t first, int64_t last) {
    k.rms_norm(out.mutable_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(), float(eps), x.size(1), first, last,
               is_bf16(x));
  });
  return out;
}

Tensor rotary(const Tensor x, const Tensor cos, const Tensor sin) {
  check_floats("rotary", "x", x, 3);
  for (const auto& [name, angle] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
    check_type("rotary", name, *angle, 2, ScalarType::Float);
    STD_TORCH_CHECK(angle->size(0) == x.size(0) && angle->size(1) == x.size(2), "rotary: ", name, " doesn't fit x");
  }
  STD_TORCH_CHECK(x.size(2) % 2 == 0, "rotary: the head dim ", x.size(2), " is odd");
  Tensor out = torch::stable::empty_like(x);
  const Kernels& k = kernels();
  const int64_t width = std::max<int64_t>(x.size(1) * x.size(2), 1);
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(GRAIN / width, 1), [&](int64_t first, int64_t last) {
    k.rotary(out.mutable_data_ptr(), x.const_data_ptr(), static_cast<const float*>(cos.const_data_ptr()),
             static_cast<const float*>(sin.const_data_ptr()), x.size(1), x.size(2), first, last, is_bf16(x));
  });
  return out;
}

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

const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

void check_pages(const char* name, const Tensor& table, int64_t chunk, int64_t keys, int64_t page_size, int64_t pages) {
  const int64_t used = (keys + page_size - 1) / page_size;
  STD_TORCH_CHECK(used <= table.size(1), "attention_paged: ", name, " has too few pages for chunk ", chunk);
  for (int64_t i = 0; i < used; ++i) {
    const int64_t page = integers(table)[chunk * table.size(1) + i];
    STD_TORCH_CHECK(page >= 0 && page < pages, "attention_paged: ", name, " of chunk ", chunk, " names page ", page,
                    " of ", pages);
  }
}

// Work for the threads: decoding requests whole where there are enough of them, else by kv head; longer chunks by kv
// head and queries, last queries (which see most keys) first.
std::vector<Part> parts(const int64_t* chunks, int64_t num_chunks, int64_t num_kv_heads) {
  int64_t singles = 0;
  for (int64_t b = 0; b < num_chunks; ++b) singles += chunks[4 * b + 1] == 1;
  const bool whole = singles >= 4 * int64_t(torch::stable::get_num_threads());
  std::vector<Part> found;
  for (int64_t b = 0; b < num_chunks; ++b) {
    const int64_t queries = chunks[4 * b + 1];
    const int64_t heads = queries == 1 && whole ? num_kv_heads : 1;
    for (int64_t last = queries; last > 0; last -= std::min(last, QUERIES)) {
      const int64_t first = last > QUERIES ? last - QUERIES : 0;
      for (int64_t k = 0; k < num_kv_heads; k += heads) found.push_back({b, first, last - first, k, heads});
    }
  }
  return found;
}

std::tuple<Tensor, Tensor> attention_paged(const Tensor q, const Tensor keys, const Tensor values, const Tensor chunks,
                                           const Tensor table, const Tensor prefix_table, const Tensor heads,
                                           int64_t window, double scale) {
  const char* op = "attention_paged";
  check_floats(op, "q", q, 3);
  check_floats(op, "key_cache", keys, 4);
  check_floats(op, "value_cache", values, 4);
  check_same(op, "key_cache", keys, q);
  check_same(op, "value_cache", values, q);
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(keys.size(i) == values.size(i), op, ": key_cache and value_cache differ in shape");
  STD_TORCH_CHECK(keys.size(3) == q.size(2), op, ": q has head dim ", q.size(2), ", the cache ", keys.size(3));
  for (const auto& [name, x, dims] : {std::tuple("chunks", &chunks, 2), std::tuple("block_table", &table, 2),
                                      std::tuple("prefix_table", &prefix_table, 2), std::tuple("kv_index", &heads, 1)})
    check_type(op, name, *x, dims, ScalarType::Long);
  STD_TORCH_CHECK(chunks.size(1) == 4, op, ": chunks must be [B, 4]");
  STD_TORCH_CHECK(table.size(0) == chunks.size(0), op, ": block_table has not one row per chunk");
  STD_TORCH_CHECK(prefix_table.size(0) == chunks.size(0), op, ": prefix_table has not one row per chunk");
  STD_TORCH_CHECK(heads.size(0) == q.size(1), op, ": kv_index has not one entry per head of q");
  STD_TORCH_CHECK(q.size(2) % 2 == 0, op, ": q has an odd head dim ", q.size(2));
  STD_TORCH_CHECK(q.size(1) <= 1024, op, ": q has more than 1024 heads");
  STD_TORCH_CHECK(keys.size(1) > 0, op, ": key_cache has pages without slots");
  for (int64_t n = 0; n < q.size(1); ++n)
    STD_TORCH_CHECK(integers(heads)[n] >= 0 && integers(heads)[n] < keys.size(2), op, ": kv_index[", n, "]=",
                    integers(heads)[n], " of ", keys.size(2), " kv heads");
  int64_t rows = 0;
  for (int64_t b = 0; b < chunks.size(0); ++b) {
    const int64_t* c = integers(chunks) + 4 * b;
    STD_TORCH_CHECK(c[0] == rows && c[1] >= 1 && c[1] <= c[2] && c[3] >= 0, op, ": chunk ", b, " is inconsistent");
    rows += c[1];
    check_pages("block_table", table, b, c[2], keys.size(1), keys.size(0));
    check_pages("prefix_table", prefix_table, b, c[3], keys.size(1), keys.size(0));
  }
  STD_TORCH_CHECK(rows == q.size(0), op, ": chunks hold ", rows, " queries, q ", q.size(0));

  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const PagedAttention args{out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()), q.const_data_ptr(),
                            keys.const_data_ptr(), values.const_data_ptr(), integers(chunks), integers(table),
                            integers(prefix_table), integers(heads), chunks.size(0), table.size(1),
                            prefix_table.size(1), q.size(1), keys.size(2), q.size(2), keys.size(1), window,
                            float(scale)};
  const std::vector<Part> work = parts(args.chunks, args.num_chunks, args.num_kv_heads);
  const Kernels& k = kernels();
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first)
      for (size_t i = next++; i < work.size(); i = next++) k.attend(args, work[i], is_bf16(q));
  });
  return {out, lse};
}

std::string isa() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(onemesh, m) {
  m.def("isa() -> str");
  m.def("empty_packed(Tensor like, int out_width, int in_width) -> Tensor");
  m.def("pack_rows(Tensor(a!) packed, Tensor rows, int first) -> ()");
  m.def("packed_rows(Tensor ids, Tensor packed, int out_width, int in_width) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int out_width) -> Tensor");
  m.def("silu_gate(Tensor gate, Tensor up) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def(
      "attention_paged(Tensor q, Tensor key_cache, Tensor value_cache, Tensor chunks, Tensor block_table, "
      "Tensor prefix_table, Tensor kv_index, int window, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("empty_packed", TORCH_BOX(&empty_packed));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("packed_rows", TORCH_BOX(&packed_rows));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("silu_gate", TORCH_BOX(&silu_gate));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("attention_paged", TORCH_BOX(&attention_paged));
}
