// Forward attention: out = softmax(scale * Q KV^T) KV, the key/value tile loaded once and read by both
// products.
//
// Shape legend: b batch, s query length, t key length, h query heads, g groups, e head size. Query [b, s, h,
// e], key/value [b, t, g, e], out [b, s, h, e], lse [b, h, s] or [h, total_q]. A block owns kRows queries of
// one head and walks over the keys in tiles of kKeys, from the last to the first, so that masked tiles come
// first.
#pragma once

#include "shared_kv_attention.h"
#include "shared_kv_tile.cuh"

namespace sharedproj::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <int kHeadSize>
struct ForwardTiling {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRows = 128;
  static constexpr int kKeys = 64;
  static constexpr int kStages = 3;
  static constexpr int kRowTiles = kRows / kWarps / 16;  // of 16 rows, per warp
  // Of the steps over the head size: two row tiles of 128 would spill with all eight.
  static constexpr int kUnroll = kHeadSize == 128 && kRowTiles == 2 ? 4 : kHeadSize / 16;
  static constexpr size_t kSharedBytes = (kRows + kStages * kKeys) * kHeadSize * 2;
};

// One query tile against one head's keys; what the block order decides.
struct ForwardBlock {
  int batch, head, tile;
};

// Blocks start in the order of their number: the longest rows of causal attention first, and among those,
// heads whose keys together fit into the L2 cache (`heads_per_section`).
__device__ __forceinline__ ForwardBlock forward_block(int64_t number, int heads, int64_t batch_heads,
                                                      int tiles, int64_t heads_per_section) {
  const int64_t section = number / (heads_per_section * tiles);
  const int64_t first = section * heads_per_section;
  const int64_t left = batch_heads - first;
  const int64_t width = left < heads_per_section ? left : heads_per_section;
  const int64_t inside = number - first * tiles;
  const int64_t batch_head = first + inside % width;
  return {static_cast<int>(batch_head / heads), static_cast<int>(batch_head % heads),
          tiles - 1 - static_cast<int>(inside / width)};
}

template <class T, int kHeadSize>
__global__ void __launch_bounds__(ForwardTiling<kHeadSize>::kThreads, 2)
    forward_kernel(const __grid_constant__ ForwardParams params, int tiles, int64_t heads_per_section) {
  using Tiling = ForwardTiling<kHeadSize>;
  constexpr int kRows = Tiling::kRows, kKeys = Tiling::kKeys, kStages = Tiling::kStages;
  constexpr int kRowTiles = Tiling::kRowTiles, kThreads = Tiling::kThreads;
  constexpr int kKeyTiles = kKeys / 8, kOutTiles = kHeadSize / 8;
  const Problem& problem = params.problem;

  const ForwardBlock block = forward_block(block_x(), problem.heads, int64_t{problem.batch} * problem.heads,
                                           tiles, heads_per_section);
  int64_t query_start = 0, key_start = 0;
  int s = static_cast<int>(problem.max_seqlen_q), t = static_cast<int>(problem.max_seqlen_k);
  if (problem.cu_seqlens_q != nullptr) {
    query_start = problem.cu_seqlens_q[block.batch];
    key_start = problem.cu_seqlens_k[block.batch];
    s = static_cast<int>(problem.cu_seqlens_q[block.batch + 1] - query_start);
    t = static_cast<int>(problem.cu_seqlens_k[block.batch + 1] - key_start);
  }
  const int row_start = block.tile * kRows;
  if (row_start >= s) return;
  const int group = block.head / (problem.heads / problem.groups);
  const T* query = static_cast<const T*>(params.query) + block.batch * params.query_strides.batch +
                   (query_start + row_start) * params.query_strides.seq +
                   block.head * params.query_strides.head;
  const T* key = static_cast<const T*>(params.key) + block.batch * params.key_strides.batch +
                 key_start * params.key_strides.seq + group * params.key_strides.head;

  // Row i sees keys below i + diagonal when causal; tiles from first_masked on need the mask.
  const int diagonal = t - s + 1;
  int key_end = t, unmasked = t;
  if (problem.causal) {
    key_end = min(t, row_start + kRows - 1 + diagonal);
    unmasked = min(t, row_start + diagonal);
  }
  const int key_tiles = key_end > 0 ? (key_end + kKeys - 1) / kKeys : 0;
  const int first_masked = unmasked > 0 ? unmasked / kKeys : 0;

  T* query_tile = reinterpret_cast<T*>(shared_memory());
  T* key_stages = query_tile + kRows * kHeadSize;
  const auto load_keys = [&](int tile, int stage) {
    load_tile<kHeadSize, kKeys, kThreads>(key_stages + stage * kKeys * kHeadSize,
                                          key + int64_t{tile} * kKeys * params.key_strides.seq,
                                          params.key_strides.seq, t - tile * kKeys, thread_index());
  };
  load_tile<kHeadSize, kRows, kThreads>(query_tile, query, params.query_strides.seq, s - row_start,
                                        thread_index());
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < key_tiles) load_keys(key_tiles - 1 - stage, stage);
    cp_async_commit();
  }

  const int warp_row = warp_index() * kRowTiles * 16;
  const int lane_row = lane_index() / 4, lane_column = lane_index() % 4 * 2;
  const float scale = params.problem.scale * kLog2E;
  float out[kRowTiles][kOutTiles][4] = {};
  float row_max[kRowTiles][2];  // times scale, base 2
  float row_sum[kRowTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;

  int stage = 0;
  for (int tile = key_tiles - 1; tile >= 0; --tile) {
    cp_async_wait<kStages - 2>();
    sync_block();  // this tile has landed for all threads, and all are done with the stage that is filled
                   // next
    const int next_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (tile >= kStages - 1) load_keys(tile - (kStages - 1), next_stage);
    cp_async_commit();
    const T* key_tile = key_stages + stage * kKeys * kHeadSize;
    stage = stage == kStages - 1 ? 0 : stage + 1;

    float scores[kRowTiles][kKeyTiles][4] = {};
#pragma unroll(Tiling::kUnroll)
    for (int k = 0; k < kHeadSize; k += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ldmatrix_x4(a[m], fragment_address<kHeadSize>(query_tile, warp_row + m * 16, k));
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, fragment_address<kHeadSize>(key_tile, n * 8, k));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16x8x16<T>(scores[m][n], a[m], b[0], b[2]);
          mma_16x8x16<T>(scores[m][n + 1], a[m], b[1], b[3]);
        }
      }
    }

    if (tile >= first_masked) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row_start + warp_row + m * 16 + half * 8 + lane_row;
          const int limit = (problem.causal ? min(t, row + diagonal) : t) - tile * kKeys - lane_column;
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            if (n * 8 >= limit) scores[m][n][half * 2] = -INFINITY;
            if (n * 8 + 1 >= limit) scores[m][n][half * 2 + 1] = -INFINITY;
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = scores[m][0][half * 2];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        largest = fmaxf(row_max[m][half], largest * scale);
        // A row that has seen no key yet: 0 keeps -inf - -inf out of the exponents.
        const float shift = largest == -INFINITY ? 0.f : largest;
        const float rescale = exp2_fast(row_max[m][half] - shift);  // exactly 1 where the maximum stays
        row_max[m][half] = largest;
        if (rescale != 1.f) {  // rare after the first tiles
          row_sum[m][half] *= rescale;
#pragma unroll
          for (int n = 0; n < kOutTiles; ++n) {
            out[m][n][half * 2] *= rescale;
            out[m][n][half * 2 + 1] *= rescale;
          }
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], scale, -shift));
            row_sum[m][half] += scores[m][n][i];
          }
        }
      }
    }

#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        a[m][0] = pack2<T>(scores[m][k][0], scores[m][k][1]);
        a[m][1] = pack2<T>(scores[m][k][2], scores[m][k][3]);
        a[m][2] = pack2<T>(scores[m][k + 1][0], scores[m][k + 1][1]);
        a[m][3] = pack2<T>(scores[m][k + 1][2], scores[m][k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, fragment_address<kHeadSize>(key_tile, k * 8, n * 8));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16x8x16<T>(out[m][n], a[m], b[0], b[1]);
          mma_16x8x16<T>(out[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  if (key_tiles == 0)
    sync_block();  // the query tile is overwritten below while copies by other warps may still land

  // Out goes through this warp's own rows of the query tile, which no other warp reads.
  float* lse =
      params.lse + (problem.cu_seqlens_q != nullptr
                        ? block.head * problem.total_q + query_start
                        : (int64_t{block.batch} * problem.heads + block.head) * problem.max_seqlen_q);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      const int row = warp_row + m * 16 + half * 8 + lane_row;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        shared_store(reinterpret_cast<uint32_t*>(query_tile + tile_offset<kHeadSize>(row, n) + lane_column),
                     pack2<T>(out[m][n][half * 2] * inverse, out[m][n][half * 2 + 1] * inverse));
      }
      if (lane_column == 0 && row_start + row < s) {
        lse[row_start + row] = sum == 0.f ? -INFINITY : (row_max[m][half] + log2_fast(sum)) * kLn2;
      }
    }
  }
  sync_warp();
  T* out_rows = static_cast<T*>(params.out) + block.batch * params.out_strides.batch +
                (query_start + row_start) * params.out_strides.seq + block.head * params.out_strides.head;
  constexpr int kChunks = kHeadSize / 8, kWarpRows = kRowTiles * 16;
#pragma unroll
  for (int i = 0; i < kWarpRows * kChunks / 32; ++i) {
    const int index = lane_index() + i * 32;
    const int row = warp_row + index / kChunks, chunk = index % kChunks;
    const uint4 data =
        shared_load(reinterpret_cast<const uint4*>(query_tile + tile_offset<kHeadSize>(row, chunk)));
    if (row_start + row < s) {
      *reinterpret_cast<uint4*>(out_rows + row * params.out_strides.seq + chunk * 8) = data;
    }
  }
}

template <class T, int kHeadSize>
const char* launch_forward(const ForwardParams& params, void* stream) {
  using Tiling = ForwardTiling<kHeadSize>;
  constexpr int64_t kSectionBytes = 16 << 20;  // of keys that the heads of a section share the L2 cache with
  const Problem& problem = params.problem;
  const int64_t tiles = (problem.max_seqlen_q + Tiling::kRows - 1) / Tiling::kRows;
  const int64_t key_bytes = problem.max_seqlen_k * kHeadSize * 2 + 1;
  const int64_t groups_per_section = kSectionBytes / key_bytes > 0 ? kSectionBytes / key_bytes : 1;
  const int64_t heads_per_section = groups_per_section * (problem.heads / problem.groups);
  const Grid grid = {tiles * problem.batch * problem.heads, 1, 1};
  return launch(forward_kernel<T, kHeadSize>, grid, Tiling::kThreads, Tiling::kSharedBytes, stream, params,
                static_cast<int>(tiles), heads_per_section);
}

}  // namespace sharedproj::cuda
