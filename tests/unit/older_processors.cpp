// Runs every kernel of a library on fixed inputs and prints a hash of each result, without torch: an emulated processor
// may be too old for torch.
//
//   older_processors LIBRARY...    loaded in this order; the last one has the kernels
//
// First comes the instruction set that the library chose, then lines of kernel, dtype, hash. Kernels that a library
// leaves out (null) are left out here.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t ROWS = 37, WIDTH = 77;  // no multiple of any vector, tile or block

// Float32 or bfloat16 in memory.
class Numbers {
 public:
  Numbers(int64_t count, bool is_bf16) : bytes_(count * (is_bf16 ? 2 : 4)) {}

  // In [-2, 2), always the same ones for a seed.
  static Numbers drawn(uint32_t seed, int64_t count, bool is_bf16 = false) {
    Numbers made(count, is_bf16);
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525 + 1013904223;
      const float x = float(int32_t(seed) >> 8) / (1 << 22);
      char bits[4];
      std::memcpy(bits, &x, 4);
      if (is_bf16) std::memcpy(made.bytes_.data() + 2 * i, bits + 2, 2);
      else std::memcpy(made.bytes_.data() + 4 * i, bits, 4);
    }
    return made;
  }

  operator void*() { return bytes_.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

std::vector<char> bytes(const Numbers& x) { return x.bytes(); }
template <class T>
std::vector<char> bytes(const std::vector<T>& x) {
  const char* data = reinterpret_cast<const char*>(x.data());
  return {data, data + x.size() * sizeof(T)};
}

// A line with the FNV-1a hash of these results.
template <class... T>
void print(const char* kernel, bool is_bf16, const T&... results) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const auto& result : {bytes(results)...})
    for (const char byte : result) hash = (hash ^ uint8_t(byte)) * 0x100000001b3;
  std::printf("%s %s %016llx\n", kernel, is_bf16 ? "bfloat16" : "float32", static_cast<unsigned long long>(hash));
}

void norms(const Kernels& k, bool is_bf16) {
  const int64_t size = ROWS * WIDTH, blocks = (ROWS + NORM_BLOCK - 1) / NORM_BLOCK;
  Numbers x = Numbers::drawn(1, size, is_bf16), delta = Numbers::drawn(2, size, is_bf16);
  Numbers weight = Numbers::drawn(3, WIDTH, is_bf16), out(size, is_bf16), sum(size, is_bf16);
  if (k.norm) {
    k.norm({out, sum, {x, WIDTH}, {delta, WIDTH}, weight, 1e-5f, WIDTH}, 0, ROWS, is_bf16);
    print("norm", is_bf16, out, sum);
  }
  Numbers parts(blocks * WIDTH, false), grad_weight(WIDTH, is_bf16);
  if (k.norm_backward) {
    const NormGradArgs args{out, parts.floats(), {delta, WIDTH}, {x, WIDTH}, {x, WIDTH}, weight, 1e-5f, ROWS, WIDTH};
    k.norm_backward(args, 0, blocks, is_bf16);
    print("norm_backward", is_bf16, out, parts);
  }
  if (k.sum_rows) {
    k.sum_rows(grad_weight, parts.floats(), blocks, WIDTH, is_bf16);
    print("sum_rows", is_bf16, grad_weight);
  }
}

void gates(const Kernels& k, bool is_bf16) {
  const int64_t size = ROWS * WIDTH;
  Numbers gate = Numbers::drawn(4, size, is_bf16), up = Numbers::drawn(5, size, is_bf16);
  Numbers grad = Numbers::drawn(6, size, is_bf16), out(size, is_bf16), other(size, is_bf16);
  for (const bool is_gelu : {false, true}) {
    if (k.gate) {
      k.gate({out, WIDTH, {gate, WIDTH}, {up, WIDTH}, WIDTH, is_gelu}, 0, ROWS, is_bf16);
      print("gate", is_bf16, out);
    }
    if (k.gate_backward) {
      k.gate_backward({out, other, {grad, WIDTH}, {gate, WIDTH}, {up, WIDTH}, WIDTH, is_gelu}, 0, ROWS, is_bf16);
      print("gate_backward", is_bf16, out, other);
    }
  }
}

void rotaries(const Kernels& k, bool is_bf16) {
  const int64_t heads = 3, kv_heads = 2, dim = 22, size = ROWS * heads * dim, kv_size = ROWS * kv_heads * dim;
  Numbers x = Numbers::drawn(7, size, is_bf16), key = Numbers::drawn(8, kv_size, is_bf16);
  Numbers value = Numbers::drawn(9, kv_size, is_bf16), cos = Numbers::drawn(10, ROWS * dim);
  Numbers sin = Numbers::drawn(11, ROWS * dim), out(size, is_bf16), keys(kv_size, is_bf16), values(kv_size, is_bf16);
  const RotaryArgs args{out, {x, heads * dim}, cos.floats(), sin.floats(), heads, dim, 1.0f};
  if (k.rotary) {
    k.rotary(args, 0, ROWS, is_bf16);
    print("rotary", is_bf16, out);
  }
  std::vector<int64_t> slots;
  for (int64_t t = 0; t < ROWS; ++t) slots.push_back(ROWS - 1 - t);
  if (k.rotary_write) {
    const PagesArgs pages{keys, values, {key, kv_heads * dim}, {value, kv_heads * dim}, slots.data(), kv_heads};
    k.rotary_write(args, pages, 0, ROWS, is_bf16);
    print("rotary_write", is_bf16, out, keys, values);
  }
}

void linears(const Kernels& k, bool is_bf16) {
  const int64_t outputs = 101, per_unit = is_bf16 ? 2 : 1, panels = panels_of(outputs);
  const int64_t units = (WIDTH + per_unit - 1) / per_unit, row_units = (ROWS + per_unit - 1) / per_unit;
  Numbers x = Numbers::drawn(12, ROWS * WIDTH, is_bf16), w = Numbers::drawn(13, outputs * WIDTH, is_bf16);
  Numbers bias = Numbers::drawn(14, outputs, is_bf16);
  const int64_t output_units = (outputs + per_unit - 1) / per_unit;
  Numbers packed(panels * units * PANEL * per_unit, is_bf16);
  Numbers turned(panels_of(WIDTH) * output_units * PANEL * per_unit, is_bf16);
  if (k.pack) {
    k.pack({packed, w, 1, outputs, outputs, WIDTH, is_bf16, is_bf16}, 0, panels);  // by columns
    print("pack", is_bf16, packed);
    k.pack({packed, w, WIDTH, 1, outputs, WIDTH, is_bf16, is_bf16}, 0, panels);
    print("pack", is_bf16, packed);
  }
  if (k.turn) {
    k.turn({turned, packed, outputs, WIDTH, 0}, 0, panels_of(WIDTH), is_bf16);
    print("turn", is_bf16, turned);
  }
  const std::vector<int64_t> ids{0, 47, 48, 100, 5};
  Numbers rows(ids.size() * WIDTH, is_bf16);
  if (k.gather) {
    k.gather(rows, packed, ids.data(), WIDTH, 0, ids.size(), is_bf16);
    print("gather", is_bf16, rows);
  }
  if (k.linear) {
    for (const int64_t count : {ROWS, int64_t(1)}) {
      Numbers out(count * outputs, is_bf16);
      const LinearArgs call{out, count, outputs, outputs, bias, {{x, WIDTH, WIDTH, packed}}, 1, false, false};
      k.linear(&call, 1, 1, 0, 1, nullptr, is_bf16);
      print("linear", is_bf16, out);
    }
  }
  Numbers transposed(WIDTH * row_units * per_unit, is_bf16);
  if (k.transpose_rows) {
    k.transpose_rows({transposed, x, WIDTH, ROWS}, 0, WIDTH, is_bf16);
    print("transpose_rows", is_bf16, transposed);
  }
  std::vector<int64_t> starts{0, 20, 20, ROWS}, tokens;
  for (int64_t t = 0; t < ROWS; ++t) tokens.push_back(t < 20 ? t : ROWS + 19 - t);
  Numbers grad(3 * WIDTH, is_bf16);
  if (k.embedding_backward) {
    k.embedding_backward({grad, {x, WIDTH}, starts.data(), tokens.data(), WIDTH}, 0, 3, is_bf16);
    print("embedding_backward", is_bf16, grad);
  }
}

// Three query heads on two kv heads, with a soft cap and slopes.
struct Heads {
  static constexpr int64_t QUERY = 3, KV = 2, DIM = 22;
  std::vector<int64_t> order{0, 2, 1}, first{0, 2, 3};
  std::vector<float> slopes{0.5f, 0.25f, 0.125f};

  Attention arguments(Numbers& out, Numbers& lse, Numbers& q, Numbers& keys, Numbers& values, const Sequence& s) const {
    Attention a{};
    a.out = out, a.lse = lse.floats(), a.q = q, a.keys = keys, a.values = values, a.sequences = &s;
    a.heads = order.data(), a.first_head = first.data(), a.slopes = slopes.data();
    a.num_heads = QUERY, a.num_kv_heads = KV, a.head_dim = DIM;
    a.scale = 0.3f, a.soft_cap = 5;
    return a;
  }
};

// A document: forward and gradients.
void document(const Kernels& k, bool is_bf16) {
  const Heads heads;
  const int64_t size = ROWS * Heads::QUERY * Heads::DIM, kv_size = ROWS * Heads::KV * Heads::DIM;
  Numbers q = Numbers::drawn(15, size, is_bf16), keys = Numbers::drawn(16, kv_size, is_bf16);
  Numbers values = Numbers::drawn(17, kv_size, is_bf16), grad = Numbers::drawn(18, size, is_bf16);
  Numbers out(size, is_bf16), lse(ROWS * Heads::QUERY, false);
  const Sequence s{0, ROWS, 0, ROWS, 0, 0};
  const Attention a = heads.arguments(out, lse, q, keys, values, s);
  std::vector<float> room(attention_room(Heads::DIM, 2 * ROWS) + 2 * backward_room(Heads::DIM, 2));
  const auto part_of = [](int64_t kv_head) { return AttentionPart{0, 0, ROWS, kv_head, 1, 0, ROWS, -1}; };
  if (k.attend) {
    for (int64_t head = 0; head < Heads::KV; ++head) k.attend(a, part_of(head), room.data(), is_bf16);
    print("attend", is_bf16, out, lse);
  }
  Numbers grad_q(size, is_bf16), grad_k(kv_size, is_bf16), grad_v(kv_size, is_bf16);
  const AttentionGrads grads{grad_q, grad_k, grad_v, grad, nullptr};
  for (int64_t head = 0; k.attend_backward && head < Heads::KV; ++head) {
    std::vector<float> sums(2 * ROWS * padded(Heads::DIM));
    k.attend_backward(a, grads, part_of(head), room.data(), sums.data(), nullptr, is_bf16);
    print("attend_backward", is_bf16, grad_q, sums);
    k.attend_backward_finish(a, grads, part_of(head), room.data(), sums.data(), is_bf16);
  }
  if (k.attend_backward_finish) print("attend_backward_finish", is_bf16, grad_k, grad_v);
}

// One query, its keys in two extents that are joined.
void decoding(const Kernels& k, bool is_bf16) {
  const Heads heads;
  const int64_t count = KEY_EXTENT + 70, size = Heads::QUERY * Heads::DIM, kv_size = count * Heads::KV * Heads::DIM;
  Numbers q = Numbers::drawn(19, size, is_bf16), keys = Numbers::drawn(20, kv_size, is_bf16);
  Numbers values = Numbers::drawn(21, kv_size, is_bf16), out(size, is_bf16), lse(Heads::QUERY, false);
  const Sequence s{0, 1, 0, count, 0, count - 1};
  Attention a = heads.arguments(out, lse, q, keys, values, s);
  std::vector<float> room(attention_room(Heads::DIM, Heads::QUERY)), parts(2 * Heads::QUERY * (padded(Heads::DIM) + 2));
  a.parts = parts.data();
  const AttentionPart part{0, 0, 1, 0, Heads::KV, 0, count, 0};
  if (!k.attend || !k.attend_join) return;
  k.attend(a, part, room.data(), is_bf16);
  k.attend_join(a, part, 0, 2, room.data(), is_bf16);
  print("attend_join", is_bf16, out, lse);
}

void losses(const Kernels& k, bool is_bf16) {
  Numbers logits = Numbers::drawn(22, ROWS * WIDTH), lse(ROWS, false), out(ROWS * WIDTH, is_bf16);
  std::vector<int64_t> target;
  for (int64_t t = 0; t < ROWS; ++t) target.push_back(2 * t - 1);
  if (k.log_sum_exp) {
    k.log_sum_exp(lse.floats(), logits.floats(), WIDTH, 0, ROWS);
    print("log_sum_exp", is_bf16, lse);
  }
  if (k.loss_gradient) {
    k.loss_gradient(out, logits.floats(), lse.floats(), target.data(), WIDTH, 0, ROWS, is_bf16);
    print("loss_gradient", is_bf16, out);
  }
}

void draws(const Kernels& k) {
  const int64_t vocab = 1003, most = 5;
  Numbers logits = Numbers::drawn(23, 4 * vocab);
  const std::vector<int64_t> rows{3, 0, 1, 2, 2}, top_k{0, 0, 50, 0, 300}, num_top{0, 1, 2, most, 4};
  const std::vector<double> temperature{0, 0.8, 1, 1.5, 0.5}, top_p{1, 1, 1, 0.9, 0.7}, min_p{0, 0, 0, 0, 0.05};
  const std::vector<double> u{0, 0.5, 0.1, 0.9, 0.3};
  const int64_t count = rows.size();
  std::vector<int64_t> ids(count), top_ids(count * most);
  std::vector<double> logprob(count), top_logprobs(count * most);
  if (k.draw) {
    const DrawArgs args{ids.data(),   logits.floats(), vocab,        rows.data(), temperature.data(),
                        top_k.data(), top_p.data(),    min_p.data(), u.data(),    vocab};
    k.draw(args, 0, count);
    print("draw", false, ids);
  }
  if (k.logprobs) {
    const LogProbArgs args{logprob.data(), top_ids.data(), top_logprobs.data(), logits.floats(), vocab,
                           rows.data(),    ids.data(),     num_top.data(),      most,            vocab};
    k.logprobs(args, 0, count);
    // in float32, for the C library's log may have other last bits where the processor has no fused multiply-add
    const std::vector<float> of_ids(logprob.begin(), logprob.end()), of_top(top_logprobs.begin(), top_logprobs.end());
    print("logprobs", false, top_ids, of_ids, of_top);
  }
}

void run(const Kernels& k) {
  std::printf("%s\n", k.name);
  for (const bool is_bf16 : {false, true})
    for (const auto kernels : {norms, gates, rotaries, linears, document, decoding, losses}) kernels(k, is_bf16);
  draws(k);
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // the last line before a crash is the last kernel that ran
  void* library = nullptr;
  for (int i = 1; i < argc; ++i)
    if (!(library = dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL))) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  const auto kernels = reinterpret_cast<const Kernels& (*)()>(library ? dlsym(library, "_Z7kernelsv") : nullptr);
  if (!kernels) return std::fprintf(stderr, "no library with kernels()\n"), 2;
  try {
    run(kernels());
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
