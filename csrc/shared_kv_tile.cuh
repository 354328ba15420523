// Tiles of [rows, e] 16-bit elements in shared memory: swizzled without padding, filled by cp.async, stored
// from fragments.
//
// Shape legend: e head size. Row r holds its e / 8 chunks of 16 bytes in permuted order, so that eight
// consecutive rows of one column of chunks (what ldmatrix reads at a time) lie in different banks; the row
// stride is e.
#pragma once

#include "shared_kv_primitives.cuh"

namespace sharedproj::cuda {

// Element offset of (row, 8 * chunk). Rows of 64 and 128 elements start at the same bank, rows of 80 at every
// fourth.
template <int kHeadSize>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  static_assert(kHeadSize == 64 || kHeadSize == 80 || kHeadSize == 128,
                "no conflict-free permutation is known");
  const int permuted = kHeadSize == 80 ? chunk ^ ((row >> 2) & 1) : chunk ^ (row & 7);
  return row * kHeadSize + permuted * 8;
}

// Starts the copies of rows [0, kRows) from `global` with `row_stride`; rows from `valid_rows` on become
// zero. Called by kThreads threads, `thread` counts them from 0.
template <int kHeadSize, int kRows, int kThreads, class T, class... Policy>
__device__ __forceinline__ void load_tile(T* tile, const T* global, int64_t row_stride, int valid_rows,
                                          int thread, Policy... policy) {
  constexpr int kChunks = kHeadSize / 8;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies the same number of chunks");
  constexpr int kCopies = kRows * kChunks / kThreads;
  if constexpr (kThreads % kChunks == 0) {  // a thread stays in its column of chunks: one address, then steps
    constexpr int kStep = kThreads / kChunks;
    const int first = thread / kChunks, chunk = thread % kChunks;
    const T* source = global + first * row_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async_16(tile + tile_offset<kHeadSize>(first + i * kStep, chunk), source + i * (kStep * row_stride),
                  first + i * kStep < valid_rows, policy...);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = thread + i * kThreads;
      const int row = index / kChunks, chunk = index % kChunks;
      cp_async_16(tile + tile_offset<kHeadSize>(row, chunk), global + row * row_stride + chunk * 8,
                  row < valid_rows, policy...);
    }
  }
}

// Where lane `lane_index()` points for ldmatrix_x4 on the 16 x 16 elements at (row, column): without trans
// the four registers are an A operand (rows m, columns k); r[0], r[2] and r[1], r[3] are B operands of rows
// 0-7 and 8-15 (n), columns k. With trans r[0], r[1] and r[2], r[3] are B operands of columns 0-7 and 8-15
// (n), rows k.
// `row` is a multiple of 8 and `column` of 16, so that what the lane adds is the same for all fragments of a
// tile.
template <int kHeadSize, class T>
__device__ __forceinline__ const T* fragment_address(const T* tile, int row, int column) {
  const int lane = lane_index(), lane_row = lane % 16;
  if constexpr (kHeadSize == 80) {
    return tile + tile_offset<80>(lane_row, lane / 16) + row * 80 + column;
  } else {
    return tile + lane_row * kHeadSize + ((lane / 16 ^ lane % 8) * 8 ^ column) + row * kHeadSize;
  }
}

}  // namespace sharedproj::cuda
