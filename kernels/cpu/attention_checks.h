// Checks of the attention ops' arguments, and the arguments of the kernels made from them.
#pragma once
#include <cmath>
#include <optional>
#include <vector>

#include "attention_args.h"
#include "checks.h"

namespace {

inline void check_inputs(const char* op, const Tensor& q, const char* keys_name, const Tensor& keys,
                         const char* values_name, const Tensor& values, int64_t dims) {
  check_floats(op, "q", q, 3);
  check_floats(op, keys_name, keys, dims);
  check_floats(op, values_name, values, dims);
  check_same(op, keys_name, keys, q);
  check_same(op, values_name, values, q);
  for (int64_t i = 0; i < dims; ++i)
    STD_TORCH_CHECK(keys.size(i) == values.size(i), op, ": ", keys_name, " and ", values_name, " differ in shape");
  STD_TORCH_CHECK(keys.size(dims - 1) == q.size(2), op, ": q has head dim ", q.size(2), ", ", keys_name, " ",
                  keys.size(dims - 1));
  STD_TORCH_CHECK(q.size(2) % 2 == 0, op, ": q has an odd head dim ", q.size(2));
  STD_TORCH_CHECK(q.size(2) >= 2 && q.size(2) <= 256, op, ": q has head dim ", q.size(2), ", not 2 .. 256");
}

inline void check_options(const char* op, int64_t window, double soft_cap, const std::optional<Tensor>& slopes,
                          int64_t num_heads) {
  STD_TORCH_CHECK(window >= 0, op, ": window=", window, " is negative");
  STD_TORCH_CHECK(soft_cap >= 0 && std::isfinite(soft_cap), op, ": soft_cap=", soft_cap, " must be positive, 0 for none");
  if (!slopes) return;
  check_type(op, "slopes", *slopes, 1, ScalarType::Float);
  STD_TORCH_CHECK(slopes->size(0) == num_heads, op, ": slopes has ", slopes->size(0), " entries for ", num_heads,
                  " heads of q");
}

inline void check_pages(const char* op, const char* name, const Tensor& table, int64_t chunk, int64_t keys,
                        int64_t page_size, int64_t pages) {
  const int64_t used = keys / page_size + (keys % page_size != 0);
  STD_TORCH_CHECK(used <= table.size(1), op, ": ", name, " has too few pages for chunk ", chunk);
  for (int64_t i = 0; i < used; ++i) {
    const int64_t page = integers(table)[chunk * table.size(1) + i];
    STD_TORCH_CHECK(page >= 0 && page < pages, op, ": ", name, " of chunk ", chunk, " names page ", page, " of ", pages);
  }
}

// [B, 3]: queries, keys, offset; the queries and keys of the documents follow one another.
inline std::vector<Sequence> check_documents(const char* op, const Tensor& documents, int64_t queries, int64_t keys) {
  check_type(op, "documents", documents, 2, ScalarType::Long);
  STD_TORCH_CHECK(documents.size(1) == 3, op, ": documents must be [B, 3]");
  constexpr int64_t FAR = int64_t(1) << 40;
  std::vector<Sequence> found;
  int64_t query = 0, key = 0;
  for (int64_t b = 0; b < documents.size(0); ++b) {
    const int64_t* d = integers(documents) + 3 * b;
    STD_TORCH_CHECK(d[0] >= 0 && d[0] <= queries - query, op, ": document ", b, " has ", d[0], " queries, q ",
                    queries - query, " more");
    STD_TORCH_CHECK(d[1] >= 0 && d[1] <= keys - key, op, ": document ", b, " has ", d[1], " keys, k ", keys - key,
                    " more");
    STD_TORCH_CHECK(d[2] > -FAR && d[2] < FAR, op, ": offset ", d[2], " of document ", b, " is out of range");
    found.push_back({query, d[0], key, d[1], 0, d[2]});
    query += d[0], key += d[1];
  }
  STD_TORCH_CHECK(query == queries, op, ": documents hold ", query, " queries, q ", queries);
  STD_TORCH_CHECK(key == keys, op, ": documents hold ", key, " keys, k ", keys);
  return found;
}

// Query heads in the order of their kv heads.
struct Heads {
  std::vector<int64_t> order, first;
  Heads(const char* op, const std::vector<int64_t>& of, int64_t num_heads, int64_t num_kv_heads)
      : first(num_kv_heads + 1) {
    STD_TORCH_CHECK(int64_t(of.size()) == num_heads, op, ": kv_index has not one entry per head of q");
    for (int64_t n = 0; n < num_heads; ++n)
      STD_TORCH_CHECK(of[n] >= 0 && of[n] < num_kv_heads, op, ": kv_index[", n, "]=", of[n], " of ", num_kv_heads,
                      " kv heads");
    for (int64_t k = 0; k < num_kv_heads; ++k) {
      for (int64_t n = 0; n < num_heads; ++n)
        if (of[n] == k) order.push_back(n);
      first[k + 1] = order.size();
    }
  }
};

// Sequences and heads are left to fill in.
inline Attention arguments(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& keys, const Tensor& values,
                           int64_t window, double scale, double soft_cap, const std::optional<Tensor>& slopes) {
  Attention a{};
  a.out = out.mutable_data_ptr(), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.q = q.const_data_ptr(), a.keys = keys.const_data_ptr(), a.values = values.const_data_ptr();
  a.slopes = slopes ? static_cast<const float*>(slopes->const_data_ptr()) : nullptr;
  a.num_heads = q.size(1), a.num_kv_heads = keys.size(keys.dim() - 2), a.head_dim = q.size(2);
  a.window = window, a.scale = float(scale), a.soft_cap = float(soft_cap);
  return a;
}

}  // namespace
