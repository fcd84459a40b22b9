// The ops of linear.cpp: checks the arguments, then hands out panels or rows.
#include <sys/mman.h>
#include <unistd.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "calls.h"
#include "checks.h"
#include "dispatch.h"
#include "scratch.h"

namespace {

void check_packed(const char* op, const char* name, const Tensor& packed, int64_t out_width, int64_t in_width) {
  check_floats(op, name, packed, 4);
  const int64_t per_unit = is_bf16(packed) ? 2 : 1;
  STD_TORCH_CHECK(packed.size(0) == panels_of(out_width) && packed.size(1) == (in_width + per_unit - 1) / per_unit &&
                      packed.size(2) == PANEL && packed.size(3) == per_unit,
                  op, ": ", name, " is not of a weight [", out_width, ", ", in_width, "]");
}

// Asks for huge pages under memory that isn't touched yet: weights are read 10 to 20% faster. Only advice: what fails
// changes nothing. Neighbours on the first and last page get it too, so that areas of several weights become one.
void advise_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t SMALLEST = 512 << 10;  // the allocator maps what is larger for itself
  if (bytes < SMALLEST) return;
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Tensor empty_packed(const Tensor like, int64_t out_width, int64_t in_width) {
  check_floats("empty_packed", "like", like, like.dim());
  STD_TORCH_CHECK(out_width >= 0 && in_width >= 0, "empty_packed: negative size");
  const int64_t per_unit = is_bf16(like) ? 2 : 1;
  const int64_t units = (in_width + per_unit - 1) / per_unit;
  Tensor out = new_result(like, {panels_of(out_width), units, PANEL, per_unit});
  advise_huge_pages(out.mutable_data_ptr(), panels_of(out_width) * units * PANEL * 4);
  return out;
}

// Packs w, of any strides of which one is 1, into the panels from row `first` on.
void pack_rows(Tensor packed, const Tensor w, int64_t first) {
  const char* op = "pack_rows";
  STD_TORCH_CHECK(w.dim() == 2, op, ": w has ", w.dim(), " dimensions, not 2");
  STD_TORCH_CHECK(is_bf16(w) || w.scalar_type() == ScalarType::Float, op, ": w must be float32 or bfloat16");
  const int64_t n = w.size(0), k = w.size(1);
  const bool by_rows = k <= 1 || w.stride(1) == 1;
  STD_TORCH_CHECK(by_rows || n <= 1 || w.stride(0) == 1, op, ": w has strides ", w.stride(0), ", ", w.stride(1),
                  "; one of them must be 1");
  check_packed(op, "packed", packed, packed.size(0) * PANEL, k);
  STD_TORCH_CHECK(is_bf16(packed) || !is_bf16(w), op, ": w is bfloat16, packed float32");
  STD_TORCH_CHECK(first >= 0 && first % PANEL == 0, op, ": first=", first, " must be a multiple of ", PANEL);
  const int64_t panels = panels_of(n);
  STD_TORCH_CHECK(first / PANEL + panels <= packed.size(0), op, ": ", n, " rows from ", first, " on don't fit");
  const PackArgs args{static_cast<char*>(packed.mutable_data_ptr()) + first * packed.size(1) * 4, w.const_data_ptr(),
                      by_rows ? w.stride(0) : 1, by_rows ? 1 : w.stride(1), n, k, is_bf16(w), is_bf16(packed)};
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) { kernel.pack(args, begin, end); });
}

void check_rows(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", name, " has ", x.dim(), " dimensions, not 2");
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 or bfloat16");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, op, ": ", name, "'s rows are not contiguous");
}

// What an update adds to rows first .. last - 1 of one part: h b^T.
struct Update {
  int64_t part, first, last;
};

// The rows where some part's updates change, from 0 to `rows`.
std::vector<int64_t> cuts(const std::vector<Update>& updates, int64_t rows) {
  std::vector<int64_t> at{0, rows};
  for (const Update& u : updates) at.push_back(u.first), at.push_back(u.last);
  std::sort(at.begin(), at.end());
  at.erase(std::unique(at.begin(), at.end()), at.end());
  return at;
}

// Several linears of one x, their columns side by side: part i is x packed[i]^T (+ bias[i]), `widths[i]` wide. Update j,
// of part updates[3 j], adds h[j] b[j]^T to rows updates[3 j + 1] .. updates[3 j + 2], in the same chains.
Tensor linears(const Tensor x, const std::vector<Tensor> packed, const std::vector<std::optional<Tensor>> bias,
               const std::vector<int64_t> widths, bool float_out, const std::vector<Tensor> h,
               const std::vector<Tensor> b, const std::vector<int64_t> updates) {
  const char* op = "linears";
  const int64_t parts = packed.size(), rows = x.dim() == 2 ? x.size(0) : 0;
  check_rows(op, "x", x);
  STD_TORCH_CHECK(bias.size() == packed.size() && widths.size() == packed.size(), op, ": ", parts, " packed, ", bias.size(),
                  " bias and ", widths.size(), " widths; one of each for every part");
  int64_t width = 0;
  for (int64_t i = 0; i < parts; ++i) {
    check_same(op, "packed", packed[i], x);
    check_packed(op, "packed", packed[i], widths[i], x.size(1));
    if (bias[i]) {
      check_floats(op, "bias", *bias[i], 1);
      check_same(op, "bias", *bias[i], x);
      STD_TORCH_CHECK(bias[i]->size(0) == widths[i], op, ": bias has ", bias[i]->size(0), " entries, not ", widths[i]);
    }
    width += widths[i];
  }
  STD_TORCH_CHECK(h.size() == b.size() && 3 * h.size() == updates.size(), op, ": ", h.size(), " h, ", b.size(), " b and ",
                  updates.size(), " numbers of updates; three for each h and b");
  std::vector<Update> where;
  for (size_t j = 0; j < h.size(); ++j) {
    const Update u{updates[3 * j], updates[3 * j + 1], updates[3 * j + 2]};
    STD_TORCH_CHECK(u.part >= 0 && u.part < parts, op, ": update ", j, " is of part ", u.part, " of ", parts);
    STD_TORCH_CHECK(0 <= u.first && u.first <= u.last && u.last <= rows, op, ": update ", j, " of rows ", u.first, ", ",
                    u.last, " must rise within ", rows, " rows");
    for (const Update& other : where)
      STD_TORCH_CHECK(other.part != u.part || other.last <= u.first || u.last <= other.first || u.first == u.last, op,
                      ": update ", j, " overlaps another of part ", u.part);
    check_rows(op, "h", h[j]);
    check_same(op, "h", h[j], x);
    check_same(op, "b", b[j], x);
    STD_TORCH_CHECK(h[j].size(0) == u.last - u.first, op, ": h[", j, "] has ", h[j].size(0), " rows, not ", u.last - u.first);
    check_packed(op, "b", b[j], widths[u.part], h[j].size(1));
    where.push_back(u);
  }
  const bool bf16 = is_bf16(x);
  const int64_t size = bf16 ? 2 : 4, out_size = float_out ? 4 : size;
  Tensor out = new_result(x, {rows, width}, float_out ? ScalarType::Float : x.scalar_type());
  const std::vector<int64_t> at = cuts(where, rows);
  const int64_t segments = at.size() - 1;
  std::vector<LinearArgs> calls(parts * segments);
  int64_t column = 0;
  for (int64_t i = 0; i < parts; ++i) {
    for (int64_t s = 0; s < segments; ++s) {
      LinearArgs& args = calls[i * segments + s];
      args.out = static_cast<char*>(out.mutable_data_ptr()) + (at[s] * width + column) * out_size;
      args.rows = at[s + 1] - at[s], args.out_stride = width, args.out_width = widths[i];
      args.bias = bias[i] ? bias[i]->const_data_ptr() : nullptr;
      args.products[0] = {static_cast<const char*>(x.const_data_ptr()) + at[s] * x.stride(0) * size, x.stride(0), x.size(1),
                          packed[i].const_data_ptr()};
      args.num_products = 1, args.float_out = float_out || !bf16;
      for (size_t j = 0; j < where.size(); ++j) {
        if (where[j].part != i || where[j].first > at[s] || where[j].last < at[s + 1]) continue;
        const char* from = static_cast<const char*>(h[j].const_data_ptr()) + (at[s] - where[j].first) * h[j].stride(0) * size;
        args.products[args.num_products++] = {from, h[j].stride(0), h[j].size(1), b[j].const_data_ptr()};
      }
    }
    column += widths[i];
  }
  if (!calls.empty()) run(std::make_unique<LinearCall>(std::move(calls), segments, bf16));
  return out;
}

// sum_i x[i] packed[i]^T.
Tensor sum_of_products(const std::vector<Tensor> x, const std::vector<Tensor> packed, int64_t out_width, bool float_out) {
  const char* op = "sum_of_products";
  STD_TORCH_CHECK(!x.empty() && x.size() <= MOST_PRODUCTS && x.size() == packed.size(), op, ": ", x.size(), " x and ",
                  packed.size(), " packed; one to ", MOST_PRODUCTS, " of each");
  LinearArgs args{};
  for (size_t i = 0; i < x.size(); ++i) {
    check_rows(op, "x", x[i]);
    check_same(op, "x", x[i], x[0]);
    check_same(op, "packed", packed[i], x[0]);
    check_packed(op, "packed", packed[i], out_width, x[i].size(1));
    STD_TORCH_CHECK(x[i].size(0) == x[0].size(0), op, ": x[", i, "] has ", x[i].size(0), " rows, x[0] ", x[0].size(0));
    args.products[i] = {x[i].const_data_ptr(), x[i].stride(0), x[i].size(1), packed[i].const_data_ptr()};
  }
  const bool bf16 = is_bf16(x[0]);
  Tensor out = new_result(x[0], {x[0].size(0), out_width}, float_out ? ScalarType::Float : x[0].scalar_type());
  args.out = out.mutable_data_ptr(), args.rows = x[0].size(0), args.out_stride = args.out_width = out_width;
  args.num_products = int(x.size()), args.float_out = float_out || !bf16;
  run(std::make_unique<LinearCall>(std::vector{args}, 1, bf16));
  return out;
}

constexpr int64_t TOKENS = 2048;           // re-laid at a time: the room for it stays small
constexpr int64_t TURNED_BYTES = 8 << 20;  // of the gradient of so many tokens: a vocabulary is wide

// out [N, K] = grad [T, N]^T x [T, K], by chains with rising t; with `accumulate` they go on from what stands in out.
void weight_gradient(Tensor out, const Tensor grad, const Tensor x, bool accumulate) {
  const char* op = "weight_gradient";
  check_rows(op, "grad", grad);
  check_rows(op, "x", x);
  check_same(op, "x", x, grad);
  check_type(op, "out", out, 2, ScalarType::Float);
  const int64_t rows = grad.size(0), n = grad.size(1), k = x.size(1);
  STD_TORCH_CHECK(x.size(0) == rows, op, ": x has ", x.size(0), " rows, grad ", rows);
  STD_TORCH_CHECK(out.size(0) == n && out.size(1) == k, op, ": out must be [", n, ", ", k, "]");
  if (rows == 0 && !accumulate) torch::stable::zero_(out);
  const bool bf16 = is_bf16(x);
  const int64_t per_unit = bf16 ? 2 : 1, step = std::min(rows, TOKENS), units = (step + per_unit - 1) / per_unit;
  const int64_t width = std::min(n, std::max<int64_t>(TURNED_BYTES / (4 * units + 1) / PANEL, 1) * PANEL);
  const Tensor packed = new_result(x, {panels_of(k), units, PANEL, per_unit});
  const Tensor turned = new_result(x, {width, units * per_unit});
  const int64_t size = bf16 ? 2 : 4;
  const Kernels& kernel = kernels();
  for (int64_t t = 0; t < rows; t += step) {
    const int64_t some = std::min(step, rows - t), turned_stride = (some + per_unit - 1) / per_unit * per_unit;
    const PackArgs pack{packed.mutable_data_ptr(), static_cast<const char*>(x.const_data_ptr()) + t * x.stride(0) * size,
                        1, x.stride(0), k, some, bf16, bf16};
    torch::stable::parallel_for(0, panels_of(k), 1, [&](int64_t a, int64_t b) { kernel.pack(pack, a, b); });
    for (int64_t first = 0; first < n; first += width) {
      const int64_t here = std::min(width, n - first);
      const TransposeArgs turn{
          turned.mutable_data_ptr(),
          static_cast<const char*>(grad.const_data_ptr()) + (t * grad.stride(0) + first) * size, grad.stride(0), some};
      torch::stable::parallel_for(0, panels_of(here), 1, [&](int64_t a, int64_t b) {
        kernel.transpose_rows(turn, a * PANEL, std::min(b * PANEL, here), bf16);
      });
      LinearArgs args{};
      args.out = static_cast<float*>(out.mutable_data_ptr()) + first * k;
      args.rows = here, args.out_stride = args.out_width = k;
      args.products[0] = {turned.const_data_ptr(), turned_stride, turned_stride, packed.const_data_ptr()};
      args.num_products = 1, args.float_out = true, args.accumulate = accumulate || t > 0;
      run(std::make_unique<LinearCall>(std::vector{args}, 1, bf16));
    }
  }
}

// Panels [first, last) of the packed transpose [K, N] of a packed weight [N, K] (out_width, in_width).
Tensor turn(const Tensor packed, int64_t out_width, int64_t in_width, int64_t first, int64_t last) {
  const char* op = "turn";
  check_packed(op, "packed", packed, out_width, in_width);
  STD_TORCH_CHECK(0 <= first && first <= last && last <= panels_of(in_width), op, ": panels ", first, " .. ", last,
                  " must rise within ", panels_of(in_width));
  Tensor out = empty_packed(packed, (last - first) * PANEL, out_width);
  const TurnArgs args{out.mutable_data_ptr(), packed.const_data_ptr(), out_width, in_width, first};
  const Kernels& k = kernels();
  torch::stable::parallel_for(first, last, 1, [&](int64_t a, int64_t b) { k.turn(args, a, b, is_bf16(packed)); });
  return out;
}

// Rows of a packed weight; where it is a part of a larger one, zeros for the ids of other parts.
struct GatherCall : Call {
  void* to;
  const void* packed;
  const int64_t* ids;
  int64_t count, out_width, in_width;
  std::optional<int64_t> part;  // the id of its first row there
  bool bf16;

  void prepare(int64_t) override {
    if (part) return;
    for (int64_t t = 0; t < count; ++t)
      STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < out_width, "packed_rows: ids[", t, "]=", ids[t], " of ", out_width, " rows");
  }
  int64_t most_threads() const override { return threads_for(count, 4 * in_width); }  // its elements lie apart
  void work(int64_t thread, int64_t threads) override {
    const Share share(count, thread, threads);
    if (!part) return kernels().gather(to, packed, ids, in_width, share.first, share.last, bf16);
    const int64_t bytes = in_width * (bf16 ? 2 : 4);
    for (int64_t t = share.first; t < share.last; ++t) {
      char* const row = static_cast<char*>(to) + t * bytes;
      if (ids[t] < *part || ids[t] - *part >= out_width) {
        std::memset(row, 0, bytes);
        continue;
      }
      const int64_t id = ids[t] - *part;
      kernels().gather(row, packed, &id, in_width, 0, 1, bf16);
    }
  }
};

Tensor packed_rows(const Tensor ids, const Tensor packed, int64_t out_width, int64_t in_width,
                   std::optional<int64_t> part) {
  STD_TORCH_CHECK(!part || *part >= 0, "packed_rows: part=", *part, " is negative");
  check_type("packed_rows", "ids", ids, 1, ScalarType::Long);
  check_packed("packed_rows", "packed", packed, out_width, in_width);
  Tensor out = new_result(packed, {ids.size(0), in_width});
  auto call = std::make_unique<GatherCall>();
  call->to = out.mutable_data_ptr(), call->packed = packed.const_data_ptr(), call->ids = integers(ids);
  call->count = ids.size(0), call->out_width = out_width, call->in_width = in_width, call->bf16 = is_bf16(packed);
  call->part = part;
  run(std::move(call));
  return out;
}

}  // namespace

void LinearCall::work(int64_t thread, int64_t threads) {
  const std::vector<LinearArgs>& mine = norm_ ? normed(thread, threads) : calls;
  kernels().linear(mine.data(), mine.size() / segments, segments, thread, threads, next(thread, threads), bf16);
}

void LinearCall::panels(int64_t thread, int64_t threads, int64_t first, int64_t last) {
  std::vector<LinearArgs> mine = norm_ ? normed(thread, threads) : calls;
  if (first >= last) return;
  const int64_t size = bf16 ? 2 : 4, column = first * PANEL;
  for (LinearArgs& args : mine) {
    args.out = static_cast<char*>(args.out) + column * (args.float_out ? 4 : size);
    args.out_width = std::min(last * PANEL, args.out_width) - column;
    if (args.bias) args.bias = static_cast<const char*>(args.bias) + column * size;
    for (int p = 0; p < args.num_products; ++p) args.products[p].weight = panel_of(args.products[p], first, bf16);
  }
  kernels().linear(mine.data(), mine.size() / segments, segments, 0, 1, next(thread, threads), bf16);
}

// Of the panels of all parts, side by side, the first one of this thread; many rows are shared in another way, for them
// it is but a guess.
const void* LinearCall::weights(int64_t thread, int64_t threads) const {
  int64_t panels = 0;
  for (size_t i = 0; i < calls.size(); i += segments) panels += panels_of(calls[i].out_width);
  int64_t first = Share(panels, thread, threads).first;
  for (size_t i = 0; i < calls.size(); i += segments) {
    if (first < panels_of(calls[i].out_width)) return panel_of(calls[i].products[0], first, bf16);
    first -= panels_of(calls[i].out_width);
  }
  return nullptr;
}

const Call* LinearCall::precede(const Call* next) {
  next_ = next;
  return this;
}

bool LinearCall::follow(std::unique_ptr<Call>& before) {
  constexpr int64_t MOST_ELEMENTS = 8192;  // that every thread norms: more take longer than waiting for the others
  NormCall* norm = dynamic_cast<NormCall*>(before.get());
  if (!norm || norm->rows * norm->args.width > MOST_ELEMENTS || norm->bf16 != bf16) return false;
  const char* first = static_cast<const char*>(norm->args.out);
  const char* last = first + norm->rows * norm->args.width * (bf16 ? 2 : 4);
  for (const LinearArgs& args : calls) {
    const char* x = static_cast<const char*>(args.products[0].x);
    if (x < first || x >= last) return false;
  }
  before.release();
  norm_.reset(norm);
  return true;
}

// The calls with x in this thread's own memory, normed there; what others will read of it, and of the sum, is written
// by each thread for some rows.
std::vector<LinearArgs> LinearCall::normed(int64_t thread, int64_t threads) {
  const NormArgs& shared = norm_->args;
  const int64_t size = bf16 ? 2 : 4, row = shared.width * size, bytes = (norm_->rows * row + 63) / 64 * 64;
  static thread_local Scratch scratch;
  char* const out = reinterpret_cast<char*>(scratch.floats(bytes / 2));
  NormArgs own = shared;
  own.out = out;
  if (shared.sum) own.sum = out + bytes;
  kernels().norm(own, 0, norm_->rows, bf16);
  const Share share(norm_->rows, thread, threads);
  const int64_t at = share.first * row, some = (share.last - share.first) * row;
  std::memcpy(static_cast<char*>(shared.out) + at, out + at, some);
  if (shared.sum) std::memcpy(static_cast<char*>(shared.sum) + at, out + bytes + at, some);

  std::vector<LinearArgs> mine = calls;
  for (LinearArgs& args : mine)
    args.products[0].x = out + (static_cast<const char*>(args.products[0].x) - static_cast<const char*>(shared.out));
  return mine;
}

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("empty_packed(Tensor like, int out_width, int in_width) -> Tensor");
  m.def("pack_rows(Tensor(a!) packed, Tensor w, int first) -> ()");
  m.def("turn(Tensor packed, int out_width, int in_width, int first, int last) -> Tensor");
  m.def("packed_rows(Tensor ids, Tensor packed, int out_width, int in_width, int? part=None) -> Tensor");
  m.def(
      "linears(Tensor x, Tensor[] packed, Tensor?[] bias, int[] widths, bool float_out, Tensor[] h, Tensor[] b, "
      "int[] updates) -> Tensor");
  m.def("sum_of_products(Tensor[] x, Tensor[] packed, int out_width, bool float_out) -> Tensor");
  m.def("weight_gradient(Tensor(a!) out, Tensor grad, Tensor x, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("empty_packed", TORCH_BOX(&empty_packed));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("turn", TORCH_BOX(&turn));
  m.impl("packed_rows", TORCH_BOX(&packed_rows));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("sum_of_products", TORCH_BOX(&sum_of_products));
  m.impl("weight_gradient", TORCH_BOX(&weight_gradient));
}
