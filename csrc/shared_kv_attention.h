// Launch interface of the attention kernels: raw pointers only, so that neither side needs the other's
// headers.
//
// Shape legend: b sequences, s query length, t key length, h query heads, g groups (key/value heads),
// e head size. Query [b, s, h, e], key/value [b, t, g, e], out like query, with any strides whose last
// dimension is contiguous. A tied key/value is ONE tensor: `key`; `value` is null then.
// All lengths, strides and offsets are in elements unless a name ends in `bytes`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sharedproj {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Strides {
  int64_t batch;  // 0 for packed sequences; for a paged cache, from page to page
  int64_t seq;
  int64_t head;
};

// What forward and backward have in common. Query i of a sequence with s queries and t keys sees keys up to
// i + t - s when causal (bottom-right alignment); a query without a key gives out 0 and lse -infinity.
struct Problem {
  DType dtype;
  int32_t batch, heads, groups, head_size;
  int64_t max_seqlen_q, max_seqlen_k;  // every sequence's length, or the longest where they are packed
  const int32_t* cu_seqlens_q;  // [b + 1] starts of the packed sequences, in the kernels' memory, or null
  const int32_t* cu_seqlens_k;  // both null or both given
  int64_t total_q;              // packed: rows of the query; else batch * max_seqlen_q
  bool causal;
  float scale;
};

// lse and delta are float: [b, h, s], or [h, total_q] where sequences are packed; natural logarithm.
struct ForwardParams {
  Problem problem;
  const void* query;
  const void* key;
  const void* value;  // null: the key (CUDA: always null)
  void* out;
  float* lse;
  Strides query_strides, key_strides, value_strides, out_strides;
};

struct BackwardParams {
  Problem problem;
  const void* grad_out;
  const float* grad_lse;  // null: zero
  const void* query;
  const void* key;
  const void* value;  // null: the key
  const void* out;
  const float* lse;
  void* grad_query;
  void* grad_key;    // tied: the sum of both roles' gradients
  void* grad_value;  // null where value is
  Strides grad_out_strides, query_strides, key_strides, value_strides, out_strides;
  Strides grad_query_strides, grad_key_strides, grad_value_strides;
  bool deterministic;  // bitwise the same result every time, at some cost
  void* workspace;     // *_workspace_bytes(); contents undefined before and after; 256-byte aligned
};

// Decode: few queries over a long cache. Query i of s sees keys up to i + seqlens_k - s.
struct DecodeParams {
  DType dtype;
  int32_t batch, heads, groups, head_size;
  int64_t seqlen_q;          // s, usually 1
  int64_t max_seqlen_k;      // capacity of the cache per sequence, or of its block table (pages * page_size)
  const int32_t* seqlens_k;  // [b] valid lengths, 0 allowed, at most max_seqlen_k; null: max_seqlen_k each
  float scale;
  const void* query;
  const void* key;    // contiguous: [b, t, g, e]; paged: [pages, page_size, g, e]
  const void* value;  // null: the key
  void* out;
  float* lse;  // [b, h, s]
  Strides query_strides, key_strides, value_strides, out_strides;
  const int32_t* block_table;  // [b, table_stride]: page of each page_size keys; null: contiguous
  int64_t table_stride;
  int32_t page_size;   // a multiple of 64
  int32_t num_pages;   // an entry outside [0, num_pages) gives NaN in its sequence (CUDA) or an error (CPU)
  int32_t num_splits;  // parts that the key length is cut into; 0: chosen for the machine
  void* workspace;     // decode_workspace_bytes(), with the same num_splits; 256-byte aligned
};

// Each returns null, or why the launch was refused or failed (a string that lives for ever).
namespace cuda {
const char* forward(const ForwardParams& params, void* stream);
size_t backward_workspace_bytes(const BackwardParams& params);
const char* backward(const BackwardParams& params, void* stream);
int32_t decode_num_splits(const DecodeParams& params);
size_t decode_workspace_bytes(const DecodeParams& params);
const char* decode(const DecodeParams& params, void* stream);
}  // namespace cuda

namespace cpu {
const char* forward(const ForwardParams& params);
const char* backward(const BackwardParams& params);
const char* decode(const DecodeParams& params);
const char* capability();  // "avx512_bf16", "avx512", "avx2" or "baseline": what dispatch chose
}  // namespace cpu

}  // namespace sharedproj
