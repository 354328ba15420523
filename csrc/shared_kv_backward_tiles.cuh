// What the backward kernels share: their arguments, addressing of tiles, row terms, fragment-ordered sums.
//
// Shape legend: b sequences, s queries, t keys, h query heads, g groups, e head size. query, out and their
// gradients [b, s, h, e], key and its gradient [b, t, g, e]. A fragment is 16 rows of one sequence and head,
// [16, e].
#pragma once

#include "shared_kv_attention.h"
#include "shared_kv_primitives.cuh"
#include "shared_kv_tile.cuh"

namespace sharedproj::cuda {

struct BackwardArguments {
  const void *query, *key, *out, *grad_out;
  const float *lse, *grad_lse;
  void *grad_query, *grad_key;
  Strides query_strides, key_strides, out_strides, grad_out_strides, grad_query_strides, grad_key_strides;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int heads, groups, max_seqlen_q, max_seqlen_k, splits;
  int64_t total_q;
  int64_t query_fragments, key_fragments;  // of one head, over all sequences
  float scale, scale_log2;
  bool causal;
  float2* row_terms;      // [h, query_fragments, 16]
  float* grad_query_sum;  // [h, query_fragments] fragments, or null: another kernel computes grad_query
  float* grad_key_sum;    // [g, key_fragments] fragments, or null: one block owns each row of grad_key
};

struct Sequence {
  int start;     // first row in a packed tensor, else 0
  int fragment;  // first fragment; sequences never share one
  int length;
};

__device__ __forceinline__ Sequence sequence_of(const int32_t* cu_seqlens, int batch, int max_seqlen) {
  if (cu_seqlens == nullptr) return {0, batch * ((max_seqlen + 15) / 16), max_seqlen};
  const int start = cu_seqlens[batch];
  return {start, start / 16 + batch, cu_seqlens[batch + 1] - start};
}

// First row of a sequence and head.
template <class T>
__device__ __forceinline__ T* first_row(T* tensor, const Strides& strides, int batch,
                                        const Sequence& sequence, int head) {
  return tensor + batch * strides.batch + sequence.start * strides.seq + head * strides.head;
}

// From the offset of a row and chunk to `chunks` further in the row; `chunks` is even and has no bit in
// common with the number of the first chunk.
template <int kHeadSize>
__device__ __forceinline__ int tile_advance(int offset, int chunks) {
  return kHeadSize == 80 ? offset + chunks * 8 : offset ^ (chunks * 8);
}

// This lane's offset for ldmatrix_x4, the 4 matrices covering 16 rows x 16 columns, rows first: an A operand
// as it lies, or transposed two B operands side by side,
template <int kHeadSize>
__device__ __forceinline__ int rows_first() {
  return tile_offset<kHeadSize>(lane_index() % 16, lane_index() / 16);
}
// or columns first: two B operands below each other, or transposed an A operand.
template <int kHeadSize>
__device__ __forceinline__ int columns_first() {
  return tile_offset<kHeadSize>(lane_index() / 16 * 8 + lane_index() % 8, lane_index() / 8 % 2);
}

// Offset of (row, 8 * chunk) in a tile of 32 or 64 columns, in the permuted order of tile_offset.
template <int kColumns>
__device__ __forceinline__ int score_offset(int row, int chunk) {
  static_assert(kColumns == 32 || kColumns == 64, "no conflict-free permutation is known");
  return row * kColumns + (kColumns == 32 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7)) * 8;
}

// The same number, of which the compiler knows nothing: what is computed from it inside a loop stays there,
// instead of in registers that the accumulators need.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Where this thread starts to read a tile whose first row is `rows`. Where the threads cover whole rows that
// is one address per thread, which moves from tile to tile: more would be kept in registers over the main
// loop.
template <int kHeadSize, int kThreads, class T>
__device__ __forceinline__ const T* thread_source(const T* rows, int64_t row_stride,
                                                  int thread = thread_index()) {
  constexpr int kChunks = kHeadSize / 8;
  if (kThreads % kChunks != 0) return rows;
  return rows + thread / kChunks * row_stride + thread % kChunks * 8;
}

// Starts the copies of rows [0, kRows) from thread_source(); rows from `valid_rows` on become zero.
template <int kHeadSize, int kRows, int kThreads, class T>
__device__ __forceinline__ void load_rows(T* tile, const T* source, int64_t row_stride, int valid_rows,
                                          int thread = thread_index()) {
  constexpr int kChunks = kHeadSize / 8, kStep = kThreads / kChunks;
  if constexpr (kThreads % kChunks == 0) {
    static_assert(kStep % 8 == 0, "a step keeps the permutation of chunks");
    const int first = thread / kChunks;
    T* target = tile + tile_offset<kHeadSize>(first, thread % kChunks);
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) {
      cp_async_16(target + row * kHeadSize, source, first < valid_rows - row);
      source += kStep * row_stride;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows * kChunks; i += kThreads) {
      const int index = thread + i, row = index / kChunks, chunk = index % kChunks;
      if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
      cp_async_16(tile + tile_offset<kHeadSize>(row, chunk), source + row * row_stride + chunk * 8,
                  row < valid_rows);
    }
  }
}

// The probability of a key, from its score and the row's lse, both in powers of 2. The bound keeps rounding
// of huge scores from overflowing; lse is +infinity in the row terms of a query without keys, so that this is
// 0.
__device__ __forceinline__ float probability(float score, float scale_log2, float lse_log2) {
  return exp2_fast(fminf(score * scale_log2 - lse_log2, 0.f));
}

// row_terms = (lse in powers of 2, scale * (rowsum(grad_out * out) - grad_lse)): dS = P * (scale * dP -
// second). 8 lanes per row, 32 rows per block; rows past the sequence in its last fragment become (infinity,
// 0).
template <class T, int kHeadSize>
__global__ void __launch_bounds__(256) backward_row_terms_kernel(const BackwardArguments p) {
  const int head = block_y(), batch = block_z();
  const Sequence queries = sequence_of(p.cu_seqlens_q, batch, p.max_seqlen_q);
  const int padded_length = (queries.length + 15) / 16 * 16;
  if (block_x() * 32 >= padded_length) return;
  const int row = block_x() * 32 + thread_index() / 8, part = thread_index() % 8;
  float sum = 0.f;
  if (row < queries.length) {
    const T* out = first_row(static_cast<const T*>(p.out), p.out_strides, batch, queries, head);
    const T* grad = first_row(static_cast<const T*>(p.grad_out), p.grad_out_strides, batch, queries, head);
#pragma unroll
    for (int chunk = part; chunk < kHeadSize / 8; chunk += 8) {
      const uint4 x = *reinterpret_cast<const uint4*>(out + row * p.out_strides.seq + chunk * 8);
      const uint4 y = *reinterpret_cast<const uint4*>(grad + row * p.grad_out_strides.seq + chunk * 8);
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x_low, x_high, y_low, y_high;
        unpack2<T>(xs[i], x_low, x_high);
        unpack2<T>(ys[i], y_low, y_high);
        sum += x_low * y_low + x_high * y_high;
      }
    }
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  sum += shuffle_xor(sum, 4);
  if (part != 0 || row >= padded_length) return;
  float2 terms = {INFINITY, 0.f};
  if (row < queries.length) {
    const int64_t index = p.cu_seqlens_q == nullptr
                              ? (static_cast<int64_t>(batch) * p.heads + head) * p.max_seqlen_q + row
                              : head * p.total_q + queries.start + row;
    const float lse = p.lse[index];
    if (lse != -INFINITY) {
      terms.x = lse * 1.4426950408889634f;
      terms.y = p.scale * (sum - (p.grad_lse == nullptr ? 0.f : p.grad_lse[index]));
    }
  }
  p.row_terms[(head * p.query_fragments + queries.fragment) * 16 + row] = terms;
}

// Sums of fragments are kept as the accumulators of mma lie in a warp, [e / 8, 4 registers, 32 lanes], so
// that an atomic of a warp covers 128 consecutive bytes. This brings them into rows: a warp per fragment, 8
// columns per lane and step.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(256)
    fragments_to_rows_kernel(const float* sums, void* rows, const Strides strides, const int32_t* cu_seqlens,
                             int max_seqlen, int64_t fragments) {
  const int head = block_y(), batch = block_z();
  const Sequence sequence = sequence_of(cu_seqlens, batch, max_seqlen);
  const int fragment = block_x() * 8 + warp_index();
  if (fragment * 16 >= sequence.length) return;
  const float* source = sums + (head * fragments + sequence.fragment + fragment) * (16 * kHeadSize);
  T* target = first_row(static_cast<T*>(rows), strides, batch, sequence, head);
#pragma unroll
  for (int item = lane_index(); item < 2 * kHeadSize; item += 32) {
    const int group = item % 8, column = item / 8 % (kHeadSize / 8), half = item / kHeadSize;
    const int row = fragment * 16 + half * 8 + group;
    const float* part = source + (column * 4 + half * 2) * 32 + group * 4;
    const float4 even = *reinterpret_cast<const float4*>(part);
    const float4 odd = *reinterpret_cast<const float4*>(part + 32);
    if (row < sequence.length) {
      *reinterpret_cast<uint4*>(target + row * strides.seq + column * 8) = uint4{
          pack2<T>(even.x, odd.x), pack2<T>(even.y, odd.y), pack2<T>(even.z, odd.z), pack2<T>(even.w, odd.w)};
    }
  }
}

}  // namespace sharedproj::cuda
