// Backward of attention with one key = value tensor: row terms, then the gradients of key and query, then the
// launcher.
//
// Shape legend: as in shared_kv_backward_tiles.cuh. With m query rows and n key rows of a tile, the key
// kernel computes S^T = KV Q^T and dP^T = KV dO^T [n, m], then grad_key += P^T dO + dS^T Q [n, e] and
// grad_query += dS KV [m, e].
#pragma once

#include "shared_kv_backward_query.cuh"
#include "shared_kv_backward_tiles.cuh"

namespace sharedproj::cuda {

template <int kHeadSize>
struct BackwardKeyShape {
  static constexpr int kQueryRows = kHeadSize == 64 ? 64 : 32, kKeyRows = 128, kThreads = 128;
  static constexpr int kScoreColumns = kQueryRows;
  // Of grad_query a warp computes kRowTiles * 16 rows, and every kTurns-th 8 columns of them.
  static constexpr int kRowTiles = kHeadSize == 80 ? 1 : 2, kTurns = 4 * kRowTiles * 16 / kQueryRows;
  static_assert(kHeadSize / 8 % kTurns == 0, "the warps share the columns evenly");
  static constexpr int kQueryBytes = kQueryRows * kHeadSize * 2;
  static constexpr int kTermBytes = kQueryRows * sizeof(float2);
  static constexpr int kStageBytes = 2 * kQueryBytes + kTermBytes;  // query, grad_out, row terms
  static constexpr int kKeyOffset = 2 * kStageBytes;
  static constexpr int kScoreOffset = kKeyOffset + kKeyRows * kHeadSize * 2;
  static constexpr int kSharedBytes = kScoreOffset + kKeyRows * kScoreColumns * 2;
};

// A block owns 128 keys of a group, each of its 4 warps 32 of them, and walks over the query heads of the
// group and the query tiles that see these keys; with splits, over its part of that walk. P^T and dS^T are A
// operands as they lie in registers; only dS goes through shared memory, for grad_query. 32 rows in a warp,
// as each B operand that is read then serves two of them: with 16 the reads of shared memory would take
// longer than the tensor cores (counted, not measured).
template <class T, int kHeadSize>
__global__ void __launch_bounds__(128, 2) backward_key_kernel(const BackwardArguments p) {
  using Shape = BackwardKeyShape<kHeadSize>;
  constexpr int kQueryRows = Shape::kQueryRows, kKeyRows = Shape::kKeyRows, kThreads = Shape::kThreads;
  constexpr int kScoreColumns = Shape::kScoreColumns;

  const int key_start = block_x() / p.splits * kKeyRows, split = block_x() % p.splits;
  const int group = block_y(), batch = block_z();
  const int warp = warp_index(), lane = lane_index();
  const Sequence queries = sequence_of(p.cu_seqlens_q, batch, p.max_seqlen_q);
  const int key_length = sequence_of(p.cu_seqlens_k, batch, p.max_seqlen_k).length;
  if (key_start >= key_length) return;

  const int diagonal = key_length - queries.length;  // causal: query i sees keys up to i + diagonal
  const int first_query =
      p.causal && key_start > diagonal ? (key_start - diagonal) / kQueryRows * kQueryRows : 0;
  const int tiles = (queries.length - first_query + kQueryRows - 1) / kQueryRows;
  const int group_heads = p.heads / p.groups;
  const int64_t steps = static_cast<int64_t>(group_heads) * tiles;
  const int begin = static_cast<int>(steps * split / p.splits);
  const int end = static_cast<int>(steps * (split + 1) / p.splits);

  uint8_t* shared = shared_memory();
  T* key_tile = reinterpret_cast<T*>(shared + Shape::kKeyOffset);
  T* score_tile = reinterpret_cast<T*>(shared + Shape::kScoreOffset);  // dS^T: [key, query]

  // The step that is loaded last.
  int load_start = first_query, load_head = group * group_heads;
  const auto load_step = [&](uint8_t* stage) {
    const int b = opaque(batch), thread = opaque(thread_index());
    const Sequence rows = sequence_of(p.cu_seqlens_q, b, p.max_seqlen_q);
    const int valid = queries.length - load_start;
    T* query_tile = reinterpret_cast<T*>(stage);
    const T* query = first_row(static_cast<const T*>(p.query), p.query_strides, b, rows, load_head) +
                     load_start * p.query_strides.seq;
    const T* grad = first_row(static_cast<const T*>(p.grad_out), p.grad_out_strides, b, rows, load_head) +
                    load_start * p.grad_out_strides.seq;
    load_rows<kHeadSize, kQueryRows, kThreads>(
        query_tile, thread_source<kHeadSize, kThreads>(query, p.query_strides.seq, thread),
        p.query_strides.seq, valid, thread);
    load_rows<kHeadSize, kQueryRows, kThreads>(
        query_tile + kQueryRows * kHeadSize,
        thread_source<kHeadSize, kThreads>(grad, p.grad_out_strides.seq, thread), p.grad_out_strides.seq,
        valid, thread);
    if (thread < Shape::kTermBytes / 16) {
      // Row terms exist to the end of a fragment; zeros do for rows past it, whose grad_out is zero.
      const int pair = thread * 2;
      cp_async_16(stage + 2 * Shape::kQueryBytes + pair * sizeof(float2),
                  p.row_terms + (load_head * p.query_fragments + rows.fragment) * 16 + load_start + pair,
                  pair < (valid + 15) / 16 * 16);
    }
    cp_async_commit();
  };
  const auto advance = [&]() {
    load_start += kQueryRows;
    if (load_start >= queries.length) {
      load_start = first_query;
      load_head += 1;
    }
  };

  float grad_key[2][kHeadSize / 8][4] = {};
  if (begin < end) {
    load_head += begin / tiles;
    load_start += begin % tiles * kQueryRows;
    const T* key = first_row(static_cast<const T*>(p.key), p.key_strides, batch,
                             sequence_of(p.cu_seqlens_k, batch, p.max_seqlen_k), group) +
                   key_start * p.key_strides.seq;
    load_rows<kHeadSize, kKeyRows, kThreads>(key_tile,
                                             thread_source<kHeadSize, kThreads>(key, p.key_strides.seq),
                                             p.key_strides.seq, key_length - key_start);
    load_step(shared + begin % 2 * Shape::kStageBytes);
  }

  const int rows_offset = rows_first<kHeadSize>(), columns_offset = columns_first<kHeadSize>();
  for (int step = begin; step < end; ++step) {
    const uint8_t* stage = shared + step % 2 * Shape::kStageBytes;
    const T* query_tile = reinterpret_cast<const T*>(stage);
    const T* grad_tile = query_tile + kQueryRows * kHeadSize;
    const float2* terms = reinterpret_cast<const float2*>(stage + 2 * Shape::kQueryBytes);
    const int query_start = load_start, head = load_head;
    cp_async_wait<0>();
    sync_block();  // this step's tiles are visible; no warp reads the other stage or the score tile any more
    if (step + 1 < end) {
      advance();
      load_step(shared + (step + 1) % 2 * Shape::kStageBytes);
    }

    // Transposed: rows are this warp's 32 keys, columns the queries.
    float score[2][kQueryRows / 8][4] = {}, grad_score[2][kQueryRows / 8][4] = {};
#pragma unroll 2  // all would need more registers than there are
    for (int k = 0; k < kHeadSize / 16; ++k) {
      uint32_t a[2][4], b[4];
      const T* a_address = key_tile + warp * 32 * kHeadSize + tile_advance<kHeadSize>(rows_offset, 2 * k);
      ldmatrix_x4(a[0], a_address);
      ldmatrix_x4(a[1], a_address + 16 * kHeadSize);
#pragma unroll
      for (int j = 0; j < kQueryRows / 16; ++j) {
        const int offset = j * 16 * kHeadSize + tile_advance<kHeadSize>(columns_offset, 2 * k);
        ldmatrix_x4(b, query_tile + offset);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<T>(score[m][2 * j], a[m], b[0], b[1]);
          mma_16x8x16<T>(score[m][2 * j + 1], a[m], b[2], b[3]);
        }
        ldmatrix_x4(b, grad_tile + offset);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<T>(grad_score[m][2 * j], a[m], b[0], b[1]);
          mma_16x8x16<T>(grad_score[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }

    // In place: score becomes P, grad_score what dS is divided by P.
#pragma unroll
    for (int n = 0; n < kQueryRows / 8; ++n) {
      const float4 term = shared_load(reinterpret_cast<const float4*>(terms + n * 8 + lane % 4 * 2));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = score[i / 4][n][i % 4];
        float& y = grad_score[i / 4][n][i % 4];
        x = probability(x, p.scale_log2, i % 2 == 0 ? term.x : term.z);
        y = y * p.scale - (i % 2 == 0 ? term.y : term.w);
      }
    }
    if (key_start + kKeyRows > key_length ||
        (p.causal && key_start + kKeyRows - 1 > query_start + diagonal)) {
      const int key = key_start + warp * 32 + lane / 4, query = query_start + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kQueryRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int last = p.causal ? query + n * 8 + i % 2 + diagonal : key_length - 1;
          if (key + i / 2 * 8 > last) score[i / 4][n][i % 4] = 0.f;
        }
      }
    }
    uint32_t p_fragment[2][kQueryRows / 16][4], ds_fragment[2][kQueryRows / 16][4];
#pragma unroll
    for (int n = 0; n < kQueryRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = score[i / 2][n] + i % 2 * 2;
        const float* y = grad_score[i / 2][n] + i % 2 * 2;
        p_fragment[i / 2][n / 2][n % 2 * 2 + i % 2] = pack2<T>(x[0], x[1]);
        ds_fragment[i / 2][n / 2][n % 2 * 2 + i % 2] = pack2<T>(x[0] * y[0], x[1] * y[1]);
      }
    }

    if (p.grad_query_sum != nullptr) {
#pragma unroll
      for (int n = 0; n < kQueryRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int offset = score_offset<kScoreColumns>(warp * 32 + lane / 4 + i * 8, n) + lane % 4 * 2;
          shared_store(reinterpret_cast<uint32_t*>(score_tile + offset),
                       ds_fragment[i / 2][n / 2][n % 2 * 2 + i % 2]);
        }
      }
    }

#pragma unroll
    for (int j = 0; j < kQueryRows / 16; ++j) {
#pragma unroll
      for (int n = 0; n < kHeadSize / 16; ++n) {
        const int offset = j * 16 * kHeadSize + tile_advance<kHeadSize>(rows_offset, 2 * n);
        uint32_t b[4];
        ldmatrix_x4_trans(b, grad_tile + offset);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<T>(grad_key[m][2 * n], p_fragment[m][j], b[0], b[1]);
          mma_16x8x16<T>(grad_key[m][2 * n + 1], p_fragment[m][j], b[2], b[3]);
        }
        ldmatrix_x4_trans(b, query_tile + offset);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<T>(grad_key[m][2 * n], ds_fragment[m][j], b[0], b[1]);
          mma_16x8x16<T>(grad_key[m][2 * n + 1], ds_fragment[m][j], b[2], b[3]);
        }
      }
    }

    if (p.grad_query_sum != nullptr) {
      sync_block();  // the score tile holds dS^T of all warps
      constexpr int kRowTiles = Shape::kRowTiles, kTurns = Shape::kTurns, kColumns = kHeadSize / 8 / kTurns;
      const int row_tile = warp / kTurns * kRowTiles, turn = warp % kTurns;
      const int key_offset = tile_offset<kHeadSize>(lane, turn);
      float grad_query[kRowTiles][kColumns][4] = {};
#pragma unroll
      for (int k = 0; k < kKeyRows; k += 32) {
        uint32_t a[kRowTiles][2][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const int row = k + lane / 16 * 8 + lane % 8, chunk = (row_tile + m) * 2 + lane / 8 % 2;
          ldmatrix_x4_trans(a[m][0], score_tile + score_offset<kScoreColumns>(row, chunk));
          ldmatrix_x4_trans(a[m][1], score_tile + score_offset<kScoreColumns>(row + 16, chunk));
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          uint32_t b[4];  // 32 keys x 8 columns
          ldmatrix_x4_trans(b, key_tile + k * kHeadSize + tile_advance<kHeadSize>(key_offset, kTurns * n));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) mma_16x8x16<T>(grad_query[m][n], a[m][0], b[0], b[1]);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) mma_16x8x16<T>(grad_query[m][n], a[m][1], b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const int start = query_start + (row_tile + m) * 16;
        if (start >= queries.length) break;
        const int fragment = sequence_of(p.cu_seqlens_q, opaque(batch), p.max_seqlen_q).fragment + start / 16;
        float* sum =
            p.grad_query_sum + (head * p.query_fragments + fragment) * (16 * kHeadSize) + turn * 128 + lane;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) atomic_add(sum + (n * kTurns * 4 + i) * 32, grad_query[m][n][i]);
        }
      }
    }
  }

  if (p.grad_key_sum != nullptr && begin == end) return;
  const Sequence keys = sequence_of(p.cu_seqlens_k, batch, p.max_seqlen_k);
  T* target = first_row(static_cast<T*>(p.grad_key), p.grad_key_strides, batch, keys, group);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int row = key_start + warp * 32 + m * 16;
    if (row >= keys.length) break;
    if (p.grad_key_sum != nullptr) {
      float* sum =
          p.grad_key_sum + (group * p.key_fragments + keys.fragment + row / 16) * (16 * kHeadSize) + lane;
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) atomic_add(sum + (n * 4 + i) * 32, grad_key[m][n][i]);
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = row + lane / 4 + i * 8;
      if (key >= keys.length) break;
      T* columns = target + key * p.grad_key_strides.seq + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; ++n) {
        *reinterpret_cast<uint32_t*>(columns + n * 8) =
            pack2<T>(grad_key[m][n][i * 2], grad_key[m][n][i * 2 + 1]);
      }
    }
  }
}

// How the workspace is divided and the work split; the same for its size and for the launch.
struct BackwardPlan {
  int splits;
  int64_t query_fragments, key_fragments;
  size_t row_term_bytes, grad_query_bytes, grad_key_bytes;  // each rounded up to 256
  size_t workspace_bytes() const { return row_term_bytes + grad_query_bytes + grad_key_bytes; }
};

inline BackwardPlan plan_backward(const BackwardParams& params) {
  const Problem& problem = params.problem;
  const bool packed = problem.cu_seqlens_q != nullptr;
  const auto rounded = [](int64_t bytes) { return static_cast<size_t>((bytes + 255) / 256 * 256); };
  BackwardPlan plan = {};
  plan.splits = 1;
  plan.query_fragments =
      packed ? problem.total_q / 16 + problem.batch : problem.batch * ((problem.max_seqlen_q + 15) / 16);
  plan.row_term_bytes = rounded(problem.heads * plan.query_fragments * 16 * sizeof(float2));
  if (params.deterministic) return plan;
  const int64_t fragment_bytes = 16 * problem.head_size * sizeof(float);
  plan.grad_query_bytes = rounded(problem.heads * plan.query_fragments * fragment_bytes);

  // Fewer blocks than multiprocessors (MQA, short keys): cut the walk of each over heads and query tiles. A
  // multiprocessor holds two blocks; causal blocks differ in length, so they are cut finer. 8 steps or more
  // pay for adding grad_key.
  using Shape = BackwardKeyShape<64>;
  const int64_t blocks = int64_t{problem.batch} * problem.groups *
                         ((problem.max_seqlen_k + Shape::kKeyRows - 1) / Shape::kKeyRows);
  const int64_t steps =
      problem.heads / problem.groups * ((problem.max_seqlen_q + Shape::kQueryRows - 1) / Shape::kQueryRows);
  const int64_t multiprocessors = multiprocessor_count();
  if (blocks > 0 && blocks < multiprocessors && steps >= 16) {
    const int64_t wanted = (problem.causal ? 4 : 2) * multiprocessors / blocks;
    plan.splits = static_cast<int>(wanted < steps / 8 ? wanted : steps / 8);
  }
  if (plan.splits > 1) {
    // The packed length of the keys is not known on the host: a bound on it.
    plan.key_fragments = problem.batch * ((problem.max_seqlen_k + 15) / 16 + (packed ? 1 : 0));
    plan.grad_key_bytes = rounded(problem.groups * plan.key_fragments * fragment_bytes);
  }
  return plan;
}

template <class T, int kHeadSize>
const char* launch_backward(const BackwardParams& params, void* stream) {
  using KeyShape = BackwardKeyShape<kHeadSize>;
  using QueryShape = BackwardQueryShape<kHeadSize>;
  const Problem& problem = params.problem;
  const BackwardPlan plan = plan_backward(params);
  uint8_t* workspace = static_cast<uint8_t*>(params.workspace);
  uint8_t* sums = workspace + plan.row_term_bytes;

  BackwardArguments arguments = {};
  arguments.query = params.query;
  arguments.key = params.key;
  arguments.out = params.out;
  arguments.grad_out = params.grad_out;
  arguments.lse = params.lse;
  arguments.grad_lse = params.grad_lse;
  arguments.grad_query = params.grad_query;
  arguments.grad_key = params.grad_key;
  arguments.query_strides = params.query_strides;
  arguments.key_strides = params.key_strides;
  arguments.out_strides = params.out_strides;
  arguments.grad_out_strides = params.grad_out_strides;
  arguments.grad_query_strides = params.grad_query_strides;
  arguments.grad_key_strides = params.grad_key_strides;
  arguments.cu_seqlens_q = problem.cu_seqlens_q;
  arguments.cu_seqlens_k = problem.cu_seqlens_k;
  arguments.heads = problem.heads;
  arguments.groups = problem.groups;
  arguments.max_seqlen_q = static_cast<int>(problem.max_seqlen_q);
  arguments.max_seqlen_k = static_cast<int>(problem.max_seqlen_k);
  arguments.splits = plan.splits;
  arguments.total_q = problem.total_q;
  arguments.query_fragments = plan.query_fragments;
  arguments.key_fragments = plan.key_fragments;
  arguments.scale = problem.scale;
  arguments.scale_log2 = problem.scale * 1.4426950408889634f;
  arguments.causal = problem.causal;
  arguments.row_terms = reinterpret_cast<float2*>(workspace);
  if (!params.deterministic) arguments.grad_query_sum = reinterpret_cast<float*>(sums);
  if (plan.splits > 1) arguments.grad_key_sum = reinterpret_cast<float*>(sums + plan.grad_query_bytes);

  const char* error =
      launch(backward_row_terms_kernel<T, kHeadSize>,
             Grid{(problem.max_seqlen_q + 31) / 32, problem.heads, problem.batch}, 256, 0, stream, arguments);
  if (error != nullptr) return error;
  const size_t sum_bytes = plan.grad_query_bytes + plan.grad_key_bytes;
  if (sum_bytes > 0) error = memset_async(sums, 0, sum_bytes, stream);
  if (error != nullptr) return error;

  const int64_t key_tiles = (problem.max_seqlen_k + KeyShape::kKeyRows - 1) / KeyShape::kKeyRows;
  error =
      launch(backward_key_kernel<T, kHeadSize>, Grid{key_tiles * plan.splits, problem.groups, problem.batch},
             KeyShape::kThreads, KeyShape::kSharedBytes, stream, arguments);
  if (error != nullptr) return error;
  if (params.deterministic) {
    const int64_t query_tiles = (problem.max_seqlen_q + QueryShape::kQueryRows - 1) / QueryShape::kQueryRows;
    return launch(backward_query_kernel<T, kHeadSize>, Grid{query_tiles, problem.heads, problem.batch},
                  QueryShape::kThreads, QueryShape::kSharedBytes, stream, arguments);
  }
  error =
      launch(fragments_to_rows_kernel<T, kHeadSize>,
             Grid{(problem.max_seqlen_q + 127) / 128, problem.heads, problem.batch}, 256, 0, stream,
             static_cast<const float*>(arguments.grad_query_sum), params.grad_query,
             params.grad_query_strides, problem.cu_seqlens_q, arguments.max_seqlen_q, plan.query_fragments);
  if (error != nullptr || plan.splits == 1) return error;
  return launch(fragments_to_rows_kernel<T, kHeadSize>,
                Grid{(problem.max_seqlen_k + 127) / 128, problem.groups, problem.batch}, 256, 0, stream,
                static_cast<const float*>(arguments.grad_key_sum), params.grad_key, params.grad_key_strides,
                problem.cu_seqlens_k, arguments.max_seqlen_k, plan.key_fragments);
}

}  // namespace sharedproj::cuda
