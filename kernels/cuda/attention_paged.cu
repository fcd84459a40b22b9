// Attention over cached pages or packed documents: which kernel takes which shape.
#include "attention_mma.cuh"
#include "attention_rows.cuh"

namespace {

template <class T>
int attention(const AttentionPagedArgs& a, cudaStream_t stream) {
  int error;
  const bool borders = on_borders(static_cast<const T*>(a.key_cache), a.head_dim) &&
                       on_borders(static_cast<const T*>(a.value_cache), a.head_dim) &&
                       reinterpret_cast<uintptr_t>(a.q) % 4 == 0 && reinterpret_cast<uintptr_t>(a.out) % 4 == 0;
  if constexpr (sizeof(T) == 2) {
    if (borders && a.head_dim == 64) error = launch_mma<T, 64>(a, stream);
    else if (borders && a.head_dim == 128) error = launch_mma<T, 128>(a, stream);
    else error = launch_rows<T>(a, stream);
  } else {
    error = launch_rows<T>(a, stream);
  }
  return error ? error : launch_merges<T>(a, stream);
}

}  // namespace

extern "C" int onemesh_cuda_attention_paged(const AttentionPagedArgs* args, void* stream) {
  if (args->head_dim < 1 || args->head_dim > MAX_HEAD_DIM || args->page_size < 1) return cudaErrorInvalidValue;
  if (!args->num_heads) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return attention<decltype(x)>(*args, cudaStream_t(stream)); });
}
