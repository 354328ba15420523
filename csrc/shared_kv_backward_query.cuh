// grad_query without atomics, for the deterministic mode: S and dP are computed a second time,
// query-stationary.
//
// Shape legend: as in shared_kv_backward_tiles.cuh. With m query rows and n keys of a tile: S = Q KV^T and
// dP = dO KV^T [m, n], then grad_query += dS KV [m, e].
#pragma once

#include "shared_kv_backward_tiles.cuh"

namespace sharedproj::cuda {

template <int kHeadSize>
struct BackwardQueryShape {
  static constexpr int kQueryRows = 64, kKeyRows = 64, kThreads = 128;
  static constexpr int kTileSize = 64 * kHeadSize;
  static constexpr int kSharedBytes = 4 * kTileSize * 2;  // two stages of keys, query, grad_out
};

// A block owns 64 queries of a head, each of its 4 warps 16 of them, and walks over the keys that they see.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(128, 2) backward_query_kernel(const BackwardArguments p) {
  using Shape = BackwardQueryShape<kHeadSize>;
  constexpr int kQueryRows = Shape::kQueryRows, kKeyRows = Shape::kKeyRows, kThreads = Shape::kThreads;

  // Causal: the last queries see most keys, so they start first.
  const int query_start = (grid_x() - 1 - block_x()) * kQueryRows;
  const int head = block_y(), batch = block_z();
  const int warp = warp_index(), lane = lane_index();
  const Sequence queries = sequence_of(p.cu_seqlens_q, batch, p.max_seqlen_q);
  const Sequence keys = sequence_of(p.cu_seqlens_k, batch, p.max_seqlen_k);
  if (query_start >= queries.length) return;

  const int diagonal = keys.length - queries.length;
  const int seen = query_start + kQueryRows + diagonal;  // causal: keys that the last query of the tile sees
  const int key_end = p.causal && seen < keys.length ? seen : keys.length;
  const int tiles = key_end > 0 ? (key_end + kKeyRows - 1) / kKeyRows : 0;

  T* key_tiles = reinterpret_cast<T*>(shared_memory());
  T* query_tile = key_tiles + 2 * Shape::kTileSize;
  T* grad_tile = key_tiles + 3 * Shape::kTileSize;
  const T* key = thread_source<kHeadSize, kThreads>(
      first_row(static_cast<const T*>(p.key), p.key_strides, batch, keys, head / (p.heads / p.groups)),
      p.key_strides.seq);

  const auto load_keys = [&](int tile) {
    const int row = tile * kKeyRows;
    load_rows<kHeadSize, kKeyRows, kThreads>(key_tiles + tile % 2 * Shape::kTileSize,
                                             key + row * p.key_strides.seq, p.key_strides.seq,
                                             keys.length - row);
    cp_async_commit();
  };

  float2 terms[2] = {{INFINITY, 0.f}, {INFINITY, 0.f}};
  const int first_query = query_start + warp * 16 + lane / 4;
  if (tiles > 0) {
    const int valid = queries.length - query_start;
    const T* query = first_row(static_cast<const T*>(p.query), p.query_strides, batch, queries, head) +
                     query_start * p.query_strides.seq;
    const T* grad = first_row(static_cast<const T*>(p.grad_out), p.grad_out_strides, batch, queries, head) +
                    query_start * p.grad_out_strides.seq;
    load_rows<kHeadSize, kQueryRows, kThreads>(query_tile,
                                               thread_source<kHeadSize, kThreads>(query, p.query_strides.seq),
                                               p.query_strides.seq, valid);
    load_rows<kHeadSize, kQueryRows, kThreads>(
        grad_tile, thread_source<kHeadSize, kThreads>(grad, p.grad_out_strides.seq), p.grad_out_strides.seq,
        valid);
    load_keys(0);
    const float2* row_terms = p.row_terms + (head * p.query_fragments + queries.fragment) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first_query + i * 8 < queries.length) terms[i] = row_terms[first_query + i * 8];
    }
  }

  float grad_query[kHeadSize / 8][4] = {};
  const int rows_offset = rows_first<kHeadSize>(), columns_offset = columns_first<kHeadSize>();
  for (int tile = 0; tile < tiles; ++tile) {
    const int key_start = tile * kKeyRows;
    const T* key_tile = key_tiles + tile % 2 * Shape::kTileSize;
    cp_async_wait<0>();
    sync_block();  // this tile is visible; every warp is done with the other stage
    if (tile + 1 < tiles) load_keys(tile + 1);

    float score[kKeyRows / 8][4] = {}, grad_score[kKeyRows / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      uint32_t a[4], grad_a[4], b[4];
      const int offset = warp * 16 * kHeadSize + tile_advance<kHeadSize>(rows_offset, 2 * k);
      ldmatrix_x4(a, query_tile + offset);
      ldmatrix_x4(grad_a, grad_tile + offset);
#pragma unroll
      for (int j = 0; j < kKeyRows / 16; ++j) {
        ldmatrix_x4(b, key_tile + j * 16 * kHeadSize + tile_advance<kHeadSize>(columns_offset, 2 * k));
        mma_16x8x16<T>(score[2 * j], a, b[0], b[1]);
        mma_16x8x16<T>(score[2 * j + 1], a, b[2], b[3]);
        mma_16x8x16<T>(grad_score[2 * j], grad_a, b[0], b[1]);
        mma_16x8x16<T>(grad_score[2 * j + 1], grad_a, b[2], b[3]);
      }
    }

    const bool boundary =
        key_start + kKeyRows > keys.length || (p.causal && key_start + kKeyRows - 1 > query_start + diagonal);
    uint32_t ds_fragment[kKeyRows / 16][4];
#pragma unroll
    for (int n = 0; n < kKeyRows / 8; ++n) {
      float grads[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grads[i] = probability(score[n][i], p.scale_log2, terms[i / 2].x) *
                   (grad_score[n][i] * p.scale - terms[i / 2].y);
      }
      if (boundary) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int last = p.causal ? first_query + i / 2 * 8 + diagonal : keys.length - 1;
          if (key_start + n * 8 + lane % 4 * 2 + i % 2 > last) grads[i] = 0.f;
        }
      }
      ds_fragment[n / 2][n % 2 * 2] = pack2<T>(grads[0], grads[1]);
      ds_fragment[n / 2][n % 2 * 2 + 1] = pack2<T>(grads[2], grads[3]);
    }

#pragma unroll
    for (int j = 0; j < kKeyRows / 16; ++j) {
#pragma unroll
      for (int n = 0; n < kHeadSize / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, key_tile + j * 16 * kHeadSize + tile_advance<kHeadSize>(rows_offset, 2 * n));
        mma_16x8x16<T>(grad_query[2 * n], ds_fragment[j], b[0], b[1]);
        mma_16x8x16<T>(grad_query[2 * n + 1], ds_fragment[j], b[2], b[3]);
      }
    }
  }

  T* target = first_row(static_cast<T*>(p.grad_query), p.grad_query_strides, batch, queries, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_query + half * 8;
    if (row >= queries.length) break;
    T* columns = target + row * p.grad_query_strides.seq + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; ++n) {
      *reinterpret_cast<uint32_t*>(columns + n * 8) =
          pack2<T>(grad_query[n][half * 2], grad_query[n][half * 2 + 1]);
    }
  }
}

}  // namespace sharedproj::cuda
