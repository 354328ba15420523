// Decode: few queries over a long cache whose key length is cut into splits, then a combination of the
// splits.
//
// Shape legend: b batch, s query length, t cache length, h query heads, g groups, e head size, p splits.
// Query [b, s, h, e], cache [b, t, g, e] or pages [pages, page_size, g, e], partial out [p, b, h, s, e] and
// partial lse [p, b, h, s] in float. The h / g * s queries of one group are rows of the products, 16 to a row
// tile; a block takes kRowTiles of them over one split. Each warp has 16 of a tile's 64 keys, loads them
// itself and keeps its own softmax: no barrier until the four are merged.
#pragma once

#include "shared_kv_attention.h"
#include "shared_kv_tile.cuh"

namespace sharedproj::cuda {

constexpr int kMaxSplits = 256;
constexpr int kDecodeKeys = 64;  // of a tile; a page holds whole tiles
constexpr float kDecodeLog2E = 1.4426950408889634f, kDecodeLn2 = 0.6931471805599453f;

template <int kHeadSize, int kRowTiles>
struct DecodeTiling {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 4;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kMergeStride = kHeadSize + 8;  // floats; staggers the banks of rows
  static constexpr size_t kQueryBytes = kRows * kHeadSize * 2;
  static constexpr size_t kStageBytes = size_t{kStages} * kDecodeKeys * kHeadSize * 2;
  static constexpr size_t kMergeBytes = size_t{kWarps} * kRows * kMergeStride * 4;
  static constexpr size_t kStatisticsBytes =
      size_t{kWarps} * kRows * 2 * 4;  // maximum and sum per warp and row
  static constexpr size_t kStreamBytes = kStageBytes > kMergeBytes ? kStageBytes : kMergeBytes;
  static constexpr size_t kSharedBytes = kQueryBytes + kStreamBytes + kStatisticsBytes;
};

struct DecodePlan {
  int splits, row_blocks;
  float* partial_out;  // null: one split writes the results itself
  float* partial_lse;
};

template <class T, int kHeadSize, int kRowTiles>
__global__ void __launch_bounds__(DecodeTiling<kHeadSize, kRowTiles>::kThreads)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodePlan plan) {
  using Tiling = DecodeTiling<kHeadSize, kRowTiles>;
  constexpr int kStages = Tiling::kStages, kRows = Tiling::kRows, kThreads = Tiling::kThreads;
  constexpr int kWarps = Tiling::kWarps, kOutTiles = kHeadSize / 8, kMergeStride = Tiling::kMergeStride;

  const int split = block_x(), group = block_y() / plan.row_blocks, batch = block_z();
  const int row_start = block_y() % plan.row_blocks * kRows;
  const int heads_per_group = params.heads / params.groups, s = static_cast<int>(params.seqlen_q);
  const int rows = heads_per_group * s;
  const int capacity = static_cast<int>(params.max_seqlen_k);
  const int length = params.seqlens_k != nullptr ? max(0, min(params.seqlens_k[batch], capacity)) : capacity;
  const int tiles = (length + kDecodeKeys - 1) / kDecodeKeys;
  const int tiles_per_split = (tiles + plan.splits - 1) / plan.splits;
  const int first_tile = split * tiles_per_split;
  const int tile_count = max(0, min(tiles, first_tile + tiles_per_split) - first_tile);

  // Row r is query r / heads_per_group of head r % heads_per_group of the group.
  T* query_tile = reinterpret_cast<T*>(shared_memory());
  const T* query = static_cast<const T*>(params.query) + batch * params.query_strides.batch +
                   int64_t{group} * heads_per_group * params.query_strides.head;
  for (int index = thread_index(); index < kRows * kHeadSize / 8; index += kThreads) {
    const int row = index / (kHeadSize / 8), chunk = index % (kHeadSize / 8), r = row_start + row;
    cp_async_16(query_tile + tile_offset<kHeadSize>(row, chunk),
                query + r / heads_per_group * params.query_strides.seq +
                    r % heads_per_group * params.query_strides.head + chunk * 8,
                r < rows);
  }
  cp_async_commit();

  // Each warp fills and reads rows [16 warp, 16 warp + 16) of every stage.
  uint8_t* stream = shared_memory() + Tiling::kQueryBytes;
  T* key_stages = reinterpret_cast<T*>(stream) + warp_index() * 16 * kHeadSize;
  const T* key = static_cast<const T*>(params.key) + group * params.key_strides.head;
  // Row blocks after the first find the keys in the L2 cache.
  const uint64_t policy = plan.row_blocks == 1 ? evict_first_policy() : evict_normal_policy();
  // The next tile to load: where it starts, and for pages its row in the table and what precedes it in its
  // page.
  bool bad_page = false;
  int position = first_tile * kDecodeKeys;
  const bool paged = params.block_table != nullptr;
  const int32_t* page =
      paged ? params.block_table + batch * params.table_stride + position / params.page_size : nullptr;
  int in_page = paged ? position % params.page_size : 0;
  const auto load_keys = [&](int stage) {
    int valid = length - position - warp_index() * 16;
    int64_t offset;
    if (paged) {
      const int32_t number = *page;
      const bool inside = number >= 0 && number < params.num_pages;
      bad_page |= !inside;
      valid = inside ? valid : 0;
      offset = number * params.key_strides.batch + in_page * params.key_strides.seq;
      in_page += kDecodeKeys;
      if (in_page == params.page_size) {
        in_page = 0;
        ++page;
      }
    } else {
      offset = batch * params.key_strides.batch + position * params.key_strides.seq;
    }
    position += kDecodeKeys;
    load_tile<kHeadSize, 16, 32>(key_stages + stage * kDecodeKeys * kHeadSize,
                                 key + offset + warp_index() * 16 * params.key_strides.seq,
                                 params.key_strides.seq, valid, lane_index(), policy);
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tile_count) load_keys(i);
    cp_async_commit();
  }

  cp_async_wait<kStages - 1>();
  sync_block();
  uint32_t a[kRowTiles][kHeadSize / 16][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      ldmatrix_x4(a[m][k], fragment_address<kHeadSize>(query_tile, m * 16, k * 16));
    }
  }

  const int lane_row = lane_index() / 4, lane_column = lane_index() % 4 * 2;
  const float scale = params.scale * kDecodeLog2E;
  float out[kRowTiles][kOutTiles][4] = {};
  float row_max[kRowTiles][2];  // times scale, base 2
  float row_sum[kRowTiles][2] = {};
  int row_limit[kRowTiles][2];  // keys that the row sees
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[m][half] = -INFINITY;
      const int r = row_start + m * 16 + half * 8 + lane_row;
      row_limit[m][half] = min(length, r / heads_per_group + length - s + 1);
    }
  }
  const int unmasked = length - s + 1;  // keys that every row sees

  for (int i = 0; i < tile_count; ++i) {
    cp_async_wait<kStages - 2>();
    sync_warp();
    if (i + kStages - 1 < tile_count) load_keys((i + kStages - 1) % kStages);
    cp_async_commit();
    const T* key_tile = key_stages + i % kStages * kDecodeKeys * kHeadSize;

    float scores[kRowTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      uint32_t b[4];
      ldmatrix_x4(b, fragment_address<kHeadSize>(key_tile, 0, k * 16));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16x8x16<T>(scores[m][0], a[m][k], b[0], b[2]);
        mma_16x8x16<T>(scores[m][1], a[m][k], b[1], b[3]);
      }
    }

    const int start = (first_tile + i) * kDecodeKeys + warp_index() * 16;
    if (start + 16 > unmasked) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int limit = row_limit[m][half] - start - lane_column;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
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
        const int j = half * 2;
        float largest =
            fmaxf(fmaxf(scores[m][0][j], scores[m][0][j + 1]), fmaxf(scores[m][1][j], scores[m][1][j + 1]));
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        largest = fmaxf(row_max[m][half], largest * scale);
        const float shift = largest == -INFINITY ? 0.f : largest;
        const float rescale = exp2_fast(row_max[m][half] - shift);
        row_max[m][half] = largest;
        if (rescale !=
            1.f) {  // rare after the first tiles; the products are what a tile costs beside its loads
          row_sum[m][half] *= rescale;
#pragma unroll
          for (int n = 0; n < kOutTiles; ++n) {
            out[m][n][j] *= rescale;
            out[m][n][j + 1] *= rescale;
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          scores[m][n][j] = exp2_fast(fmaf(scores[m][n][j], scale, -shift));
          scores[m][n][j + 1] = exp2_fast(fmaf(scores[m][n][j + 1], scale, -shift));
          row_sum[m][half] += scores[m][n][j] + scores[m][n][j + 1];
        }
      }
    }

    uint32_t p[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      p[m][0] = pack2<T>(scores[m][0][0], scores[m][0][1]);
      p[m][1] = pack2<T>(scores[m][0][2], scores[m][0][3]);
      p[m][2] = pack2<T>(scores[m][1][0], scores[m][1][1]);
      p[m][3] = pack2<T>(scores[m][1][2], scores[m][1][3]);
    }
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, fragment_address<kHeadSize>(key_tile, 0, n * 8));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16x8x16<T>(out[m][n], p[m], b[0], b[1]);
        mma_16x8x16<T>(out[m][n + 1], p[m], b[2], b[3]);
      }
    }
  }
  cp_async_wait<0>();

  // Merge: every warp scales its part to the common maximum, the sums go over the four parts in shared
  // memory.
  float* merge = reinterpret_cast<float*>(stream);
  float* maxima = reinterpret_cast<float*>(stream + Tiling::kStreamBytes);
  float* sums = maxima + kWarps * kRows;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum[m][half] += shuffle_xor(row_sum[m][half], 1);
      row_sum[m][half] += shuffle_xor(row_sum[m][half], 2);
      const int row = m * 16 + half * 8 + lane_row;
      if (lane_column == 0) {
        shared_store(maxima + warp_index() * kRows + row, row_max[m][half]);
        shared_store(sums + warp_index() * kRows + row, bad_page ? NAN : row_sum[m][half]);
      }
    }
  }
  sync_block();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane_row;
      float largest = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared_load(maxima + w * kRows + row));
      const float factor = largest == -INFINITY ? 0.f : exp2_fast(row_max[m][half] - largest);
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        const float2 pair = {out[m][n][half * 2] * factor, out[m][n][half * 2 + 1] * factor};
        shared_store(reinterpret_cast<float2*>(merge + (warp_index() * kRows + row) * kMergeStride + n * 8 +
                                               lane_column),
                     pair);
      }
    }
  }
  sync_block();

  // A warp takes 8 rows x 16 columns at a time, four columns to a lane. Rows 1 and 2 of each four change
  // places, which puts the eight lanes that are served together into different banks.
  const int quad = lane_index() / 4;
  const int lane_merge_row = (quad & 4) | (quad & 1) << 1 | (quad & 2) >> 1;
  for (int item = warp_index(); item < kRows / 8 * (kHeadSize / 16); item += kWarps) {
    const int row = item / (kHeadSize / 16) * 8 + lane_merge_row, r = row_start + row;
    const int column = item % (kHeadSize / 16) * 16 + lane_index() % 4 * 4;
    float largest = -INFINITY, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared_load(maxima + w * kRows + row));
    const float shift = largest == -INFINITY ? 0.f : largest;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_fast(shared_load(maxima + w * kRows + row) - shift);
      sum += shared_load(sums + w * kRows + row) * weight;
      const float4 part =
          shared_load(reinterpret_cast<const float4*>(merge + (w * kRows + row) * kMergeStride + column));
      total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
    }
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    total = {total.x * inverse, total.y * inverse, total.z * inverse, total.w * inverse};
    const float lse = sum == 0.f ? -INFINITY : (largest + log2_fast(sum)) * kDecodeLn2;
    if (r >= rows) continue;
    const int query_index = r / heads_per_group, head = group * heads_per_group + r % heads_per_group;
    const int64_t out_row = (int64_t{batch} * params.heads + head) * s + query_index;
    if (plan.partial_out == nullptr) {
      T* out_pointer = static_cast<T*>(params.out) + batch * params.out_strides.batch +
                       query_index * params.out_strides.seq + head * params.out_strides.head + column;
      *reinterpret_cast<uint2*>(out_pointer) = {pack2<T>(total.x, total.y), pack2<T>(total.z, total.w)};
      if (column == 0) params.lse[out_row] = lse;
    } else {
      const int64_t partial_row = int64_t{split} * params.batch * params.heads * s + out_row;
      *reinterpret_cast<float4*>(plan.partial_out + partial_row * kHeadSize + column) = total;
      if (column == 0) plan.partial_lse[partial_row] = lse;
    }
  }
}

// One warp combines one row of the output: out = sum of exp(lse_p - lse) out_p over the splits.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(128) decode_combine_kernel(const __grid_constant__ DecodeParams params,
                                                             const __grid_constant__ DecodePlan plan) {
  const int64_t rows = int64_t{params.batch} * params.heads * params.seqlen_q;
  const int64_t row = int64_t{block_x()} * 4 + warp_index();
  if (row >= rows) return;
  float largest = -INFINITY;
  bool invalid = false;
  for (int split = lane_index(); split < plan.splits; split += 32) {
    const float lse = plan.partial_lse[split * rows + row];
    largest = fmaxf(largest, lse);
    invalid |= lse != lse;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
  const float shift = largest == -INFINITY ? 0.f : largest;
  float sum = 0.f;
  for (int split = lane_index(); split < plan.splits; split += 32) {
    sum += exp2_fast((plan.partial_lse[split * rows + row] - shift) * kDecodeLog2E);
  }
  if (invalid) sum = NAN;  // a split met a page outside the cache
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const float lse = sum == 0.f ? -INFINITY : shift + log2_fast(sum) * kDecodeLn2;
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;

  constexpr int kPairs = kHeadSize / 2, kSteps = (kPairs + 31) / 32;
  float2 total[kSteps] = {};
  for (int split = 0; split < plan.splits; ++split) {
    const int64_t partial_row = split * rows + row;
    const float weight = exp2_fast((plan.partial_lse[partial_row] - shift) * kDecodeLog2E) * inverse;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int pair = lane_index() + i * 32;
      if (pair >= kPairs) continue;
      const float2 part =
          *reinterpret_cast<const float2*>(plan.partial_out + partial_row * kHeadSize + pair * 2);
      total[i].x += weight * part.x;
      total[i].y += weight * part.y;
    }
  }
  const int64_t query_index = row % params.seqlen_q, head = row / params.seqlen_q % params.heads;
  const int64_t batch = row / params.seqlen_q / params.heads;
  T* out = static_cast<T*>(params.out) + batch * params.out_strides.batch +
           query_index * params.out_strides.seq + head * params.out_strides.head;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int pair = lane_index() + i * 32;
    if (pair < kPairs) *reinterpret_cast<uint32_t*>(out + pair * 2) = pack2<T>(total[i].x, total[i].y);
  }
  if (lane_index() == 0) params.lse[row] = lse;
}

inline int64_t decode_row_tiles(const DecodeParams& params) {
  return (params.heads / params.groups * params.seqlen_q + 15) / 16;
}

// Enough blocks for two on each multiprocessor, but no split shorter than two tiles.
inline int choose_num_splits(const DecodeParams& params) {
  const int64_t row_tiles = decode_row_tiles(params), row_blocks = (row_tiles + 1) / 2;
  const int64_t blocks = int64_t{params.batch} * params.groups * row_blocks;
  const int64_t tiles = (params.max_seqlen_k + kDecodeKeys - 1) / kDecodeKeys;
  int64_t splits = blocks > 0 ? 2 * int64_t{multiprocessor_count()} / blocks : 1;
  if (splits > tiles / 2) splits = tiles / 2;
  if (splits > kMaxSplits) splits = kMaxSplits;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

inline int64_t decode_partial_rows(const DecodeParams& params) {
  const int splits = params.num_splits > 0 ? params.num_splits : choose_num_splits(params);
  return splits == 1 ? 0 : int64_t{splits} * params.batch * params.heads * params.seqlen_q;
}

inline size_t decode_workspace(const DecodeParams& params) {
  return static_cast<size_t>(decode_partial_rows(params)) * (params.head_size + 1) * sizeof(float);
}

template <class T, int kHeadSize, int kRowTiles>
const char* launch_decode_rows(const DecodeParams& params, void* stream) {
  using Tiling = DecodeTiling<kHeadSize, kRowTiles>;
  const int64_t rows = int64_t{params.batch} * params.heads * params.seqlen_q;
  if (rows == 0) return nullptr;
  DecodePlan plan = {};
  plan.splits = params.num_splits > 0 ? params.num_splits : choose_num_splits(params);
  plan.row_blocks = static_cast<int>((decode_row_tiles(params) + kRowTiles - 1) / kRowTiles);
  if (plan.splits > 1) {
    plan.partial_out = static_cast<float*>(params.workspace);
    plan.partial_lse = plan.partial_out + decode_partial_rows(params) * kHeadSize;
  }
  const Grid grid = {plan.splits, int64_t{params.groups} * plan.row_blocks, params.batch};
  const char* failed = launch(decode_kernel<T, kHeadSize, kRowTiles>, grid, Tiling::kThreads,
                              Tiling::kSharedBytes, stream, params, plan);
  if (failed != nullptr || plan.splits == 1) return failed;
  return launch(decode_combine_kernel<T, kHeadSize>, Grid{(rows + 3) / 4, 1, 1}, 128, 0, stream, params,
                plan);
}

template <class T, int kHeadSize>
const char* launch_decode(const DecodeParams& params, void* stream) {
  if (decode_row_tiles(params) == 1) return launch_decode_rows<T, kHeadSize, 1>(params, stream);
  return launch_decode_rows<T, kHeadSize, 2>(params, stream);
}

}  // namespace sharedproj::cuda
