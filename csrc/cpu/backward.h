// Attention backward: five products per pair of blocks, key/value gradients summed in one accumulator when
// tied.
//
// Shape legend: e head size, w e rounded up to whole vectors, n keys of a block, m lanes. As in forward.h,
// the query rows of all heads that share a group are one list; a task takes a range of it over all keys,
// holds grad_query of its rows and adds to its own grad_key [t, w], so that no two tasks write the same
// element. Tasks are cut by shape alone: the result is bitwise the same for any number of threads.
#pragma once

#include <cstdlib>

#include "panels.h"

namespace sharedproj::cpu::SHAREDPROJ_ISA {

constexpr int kBackwardBlocks = 4;
constexpr int kSuperBlock = kBackwardBlocks * kLanes;  // query rows that share a key block's panels

struct BackwardBlock {
  uint32_t *query, *grad_out;            // [units of e, m]: contraction along the head
  uint32_t *query_rows, *grad_out_rows;  // [units of m, w]: contraction along the rows
  float* grad_query;                     // [e, m]
  float *lse_log2, *delta;
  int32_t* limit;
  int64_t least_limit, greatest_limit;
  int lanes;
};

// out[n, w] += p[n, m] grad_out[m, w] + ds[n, m] query[m, w]; either pair may be left out (null).
template <int columns, bool pairs>
inline void accumulate_keys(float* out, int64_t width, int count, int64_t row, const char* p,
                            const uint32_t* grad_out, const char* ds, const uint32_t* query, int depth) {
  for (int i = 0; i < count; i += kRows) {
    Vector acc[kRows][columns];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) acc[r][c] = load(out + (i + r) * width + c * kWidth);
    if (p != nullptr) multiply<kRows, columns, pairs>(acc, {p + i * row, row, 4}, grad_out, width, depth);
    if (ds != nullptr) multiply<kRows, columns, pairs>(acc, {ds + i * row, row, 4}, query, width, depth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) store(out + (i + r) * width + c * kWidth, acc[r][c]);
  }
}

template <bool pairs>
inline void accumulate_all_keys(float* out, int width, int count, int64_t row, const char* p,
                                const uint32_t* grad_out, const char* ds, const uint32_t* query, int depth) {
  for (int w = 0; w < width;) {
    const int left = (width - w) / kWidth;
    if constexpr (kColumns >= 3) {
      if (left == 3 || left >= 5) {
        accumulate_keys<3, pairs>(out + w, width, count, row, p, grad_out + w, ds, query + w, depth);
        w += 3 * kWidth;
        continue;
      }
    }
    if (left >= 2) {
      accumulate_keys<2, pairs>(out + w, width, count, row, p, grad_out + w, ds, query + w, depth);
      w += 2 * kWidth;
    } else {
      accumulate_keys<1, pairs>(out + w, width, count, row, p, grad_out + w, ds, query + w, depth);
      w += kWidth;
    }
  }
}

// Work space of one pair of blocks.
template <class Input>
struct BackwardTile {
  float *scores, *grad_weights;           // [n, m]
  Input *weight_rows, *grad_rows;         // [n, m]: left operands of the key gradient
  [[maybe_unused]] uint32_t* grad_units;  // [units of n, m]: right operand of the query gradient
};

// scores and grad_weights -> weights and score gradients, in the layouts that the products take.
template <class Input, int columns>
inline void softmax_backward(const BackwardBlock& block, const BackwardTile<Input>& tile, int64_t first,
                             int valid, float scale) {
  constexpr int lanes = columns * kWidth;
  const bool masked = block.least_limit < first + valid;
  const Vector factor = broadcast(scale);
  for (int c = 0; c < columns; ++c) {
    const int32_t* limit = block.limit + c * kWidth;
    const Vector lse = load(block.lse_log2 + c * kWidth), delta = load(block.delta + c * kWidth);
    const auto weight = [&](int n) SHAREDPROJ_INLINED {
      const Vector p = exp2(sub(load(tile.scores + n * lanes + c * kWidth), lse));
      return masked ? where_below(limit, static_cast<int32_t>(first + n), p, zero()) : p;
    };
    const auto gradient = [&](int n, Vector p) SHAREDPROJ_INLINED {
      const Vector dp = load(tile.grad_weights + n * lanes + c * kWidth);
      return mul(mul(p, factor), sub(dp, delta));
    };
    const auto put = [&](int n, Vector p, Vector ds) SHAREDPROJ_INLINED {
#if defined(__AVX512BF16__)
      if constexpr (kPairs<Input>) {
        narrow(tile.weight_rows + n * lanes + c * kWidth, p);
        narrow(tile.grad_rows + n * lanes + c * kWidth, ds);
        return;
      }
#endif
      store(tile.scores + n * lanes + c * kWidth, p);
      store(tile.grad_weights + n * lanes + c * kWidth, ds);
    };
    for (int n = 0; n < valid; n += 2) {
      const Vector p0 = weight(n), ds0 = gradient(n, p0);
      put(n, p0, ds0);
      Vector ds1 = zero();
      if (n + 1 < valid) {
        const Vector p1 = weight(n + 1);
        ds1 = gradient(n + 1, p1);
        put(n + 1, p1, ds1);
      }
#if defined(__AVX512BF16__)
      if constexpr (kPairs<Input>)
        store_units(tile.grad_units + (n / 2) * lanes + c * kWidth, pair(ds0, ds1));
#endif
    }
    for (int n = valid; n < round_up(valid, kRows); ++n) put(n, zero(), zero());
  }
}

template <class Input, int columns>
inline void backward_pair(const BackwardBlock& block, const KeyBlock& keys, const KeyBlock& values,
                          const BackwardTile<Input>& tile, int64_t first, int valid, int e, int width,
                          float scale, float* grad_key, float* grad_value) {
  constexpr int lanes = columns * kWidth, per_unit = kPerUnit<Input>;
  constexpr bool pairs = kPairs<Input>;
  const int count = round_up(valid, kRows), units = e / per_unit;
  product<columns, pairs>(tile.scores, lanes, count, keys.rows, block.query, lanes, units, scale * kLog2e);
  product<columns, pairs>(tile.grad_weights, lanes, count, values.rows, block.grad_out, lanes, units, 1.0f);
  softmax_backward<Input, columns>(block, tile, first, valid, scale);
  const char *p, *ds;
  const uint32_t* ds_units;
  if constexpr (pairs) {
    p = reinterpret_cast<const char*>(tile.weight_rows);
    ds = reinterpret_cast<const char*>(tile.grad_rows);
    ds_units = tile.grad_units;
  } else {
    p = reinterpret_cast<const char*>(tile.scores);
    ds = reinterpret_cast<const char*>(tile.grad_weights);
    ds_units = reinterpret_cast<const uint32_t*>(tile.grad_weights);
  }
  accumulate<columns, pairs>(block.grad_query, lanes, e, keys.columns, ds_units, lanes,
                             (valid + per_unit - 1) / per_unit, nullptr);
  const int64_t row = lanes * 4 / per_unit;
  float* grad_keys = grad_key + first * width;
  if (grad_value == nullptr) {
    accumulate_all_keys<pairs>(grad_keys, width, count, row, p, block.grad_out_rows, ds, block.query_rows,
                               lanes / per_unit);
  } else {
    accumulate_all_keys<pairs>(grad_keys, width, count, row, nullptr, block.query_rows, ds, block.query_rows,
                               lanes / per_unit);
    accumulate_all_keys<pairs>(grad_value + first * width, width, count, row, p, block.grad_out_rows, nullptr,
                               block.grad_out_rows, lanes / per_unit);
  }
}

template <class Input>
struct BackwardContext {
  const BackwardParams* params;
  int64_t chunks;      // ranges of query rows per sequence and group
  int64_t max_padded;  // longest t, rounded up to whole blocks
  int width;
  float* partial;  // [b, g, chunks, 1 or 2, max_padded, w]; null with one chunk: in the task's scratch
  int64_t gradients() const { return params->value == nullptr ? 1 : 2; }
  int64_t partial_size() const { return gradients() * max_padded * width; }
};

// The block's panels, lse and delta from the inputs.
template <class Input>
inline void load_backward_block(BackwardBlock& block, const BackwardParams& p, const Sequence& seq,
                                int64_t batch, int64_t group, int64_t first_row, int valid, int width) {
  const Problem& problem = p.problem;
  const int e = problem.head_size, lanes = block.lanes;
  const int64_t heads_per_group = problem.heads / problem.groups;
  const Input *queries[kLanes], *grads[kLanes];
  block.least_limit = seq.t;
  block.greatest_limit = 0;
  for (int m = 0; m < lanes; ++m) {
    if (m >= valid) {
      block.lse_log2[m] = __builtin_inff();
      block.delta[m] = 0.0f;
      block.limit[m] = 0;
      continue;
    }
    const int64_t row = first_row + m, i = row % seq.s, head = group * heads_per_group + row / seq.s;
    const int64_t position = seq.query_start + i;
    queries[m] = row_at(static_cast<const Input*>(p.query), p.query_strides, batch, position, head);
    grads[m] = row_at(static_cast<const Input*>(p.grad_out), p.grad_out_strides, batch, position, head);
    const Input* out = row_at(static_cast<const Input*>(p.out), p.out_strides, batch, position, head);
    const int64_t at = lse_index(problem, batch, seq.query_start, i, head);
    float delta = 0.0f;
    for (int k = 0; k < e; ++k) delta += to_float(grads[m][k]) * to_float(out[k]);
    const float lse = p.lse[at];
    const bool empty = lse == -__builtin_inff();
    block.delta[m] = empty ? 0.0f : delta - (p.grad_lse == nullptr ? 0.0f : p.grad_lse[at]);
    block.lse_log2[m] = empty ? __builtin_inff() : lse * kLog2e;  // weights of a row without a key: 0
    int64_t limit = problem.causal ? i + 1 + seq.t - seq.s : seq.t;
    limit = limit < 0 ? 0 : limit;
    block.limit[m] = static_cast<int32_t>(limit);
    if (limit < block.least_limit) block.least_limit = limit;
    if (limit > block.greatest_limit) block.greatest_limit = limit;
  }
  pack_lanes(block.query, queries, valid, lanes, e);
  pack_lanes(block.grad_out, grads, valid, lanes, e);
  pack_rows(block.query_rows, queries, valid, lanes, e, width);
  pack_rows(block.grad_out_rows, grads, valid, lanes, e, width);
  std::memset(block.grad_query, 0, sizeof(float) * e * lanes);
}

// Rows of a float accumulator, summed over its chunks, into a gradient's own dtype and strides.
template <class Input>
inline void write_key_gradient(Input* out, const Strides& strides, const Sequence& seq, int64_t batch,
                               int64_t group, const float* partial, int64_t chunks, int64_t chunk_step,
                               int width, int e, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    Input* row = row_at(out, strides, batch, seq.key_start + n, group);
    for (int k = 0; k < e; ++k) {
      float value = partial[n * width + k];
      for (int64_t c = 1; c < chunks; ++c) value += partial[c * chunk_step + n * width + k];
      from_float(value, row + k);
    }
  }
}

template <class Input>
inline void write_key_gradients(const BackwardContext<Input>& context, const float* partial, int64_t batch,
                                int64_t group, int64_t begin, int64_t end) {
  const BackwardParams& p = *context.params;
  const Sequence seq = sequence(p.problem, batch);
  const int e = p.problem.head_size;
  end = end < seq.t ? end : seq.t;
  write_key_gradient(static_cast<Input*>(p.grad_key), p.grad_key_strides, seq, batch, group, partial,
                     context.chunks, context.partial_size(), context.width, e, begin, end);
  if (p.value != nullptr)
    write_key_gradient(static_cast<Input*>(p.grad_value), p.grad_value_strides, seq, batch, group,
                       partial + context.max_padded * context.width, context.chunks, context.partial_size(),
                       context.width, e, begin, end);
}

template <class Input>
inline void backward_task(void* opaque, int64_t index, char* memory) {
  const auto& context = *static_cast<const BackwardContext<Input>*>(opaque);
  const BackwardParams& p = *context.params;
  const Problem& problem = p.problem;
  const int e = problem.head_size, width = context.width, heads_per_group = problem.heads / problem.groups;
  const int64_t pair = index / context.chunks;
  const int64_t chunk = context.chunks - 1 - index % context.chunks;  // later rows see more keys
  const int64_t batch = pair / problem.groups, group = pair % problem.groups;
  const Sequence seq = sequence(problem, batch);
  const int64_t all_rows = seq.s * heads_per_group;

  Scratch scratch{memory};
  float* accumulator = context.partial == nullptr
                           ? scratch.take<float>(context.partial_size())
                           : context.partial + (pair * context.chunks + chunk) * context.partial_size();
  const int64_t used = (seq.t + kKeys - 1) / kKeys * kKeys * width;
  float* grad_value = p.value == nullptr ? nullptr : accumulator + context.max_padded * width;
  std::memset(accumulator, 0, sizeof(float) * used);
  if (grad_value != nullptr) std::memset(grad_value, 0, sizeof(float) * used);

  BackwardBlock blocks[kBackwardBlocks];
  for (BackwardBlock& block : blocks) {
    constexpr int per_unit = kPerUnit<Input>;
    block.query = scratch.take<uint32_t>(static_cast<int64_t>(e) / per_unit * kLanes);
    block.grad_out = scratch.take<uint32_t>(static_cast<int64_t>(e) / per_unit * kLanes);
    block.query_rows = scratch.take<uint32_t>(static_cast<int64_t>(kLanes) / per_unit * width);
    block.grad_out_rows = scratch.take<uint32_t>(static_cast<int64_t>(kLanes) / per_unit * width);
    block.grad_query = scratch.take<float>(static_cast<int64_t>(e) * kLanes);
    block.lse_log2 = scratch.take<float>(kLanes);
    block.delta = scratch.take<float>(kLanes);
    block.limit = scratch.take<int32_t>(kLanes);
  }
  BackwardTile<Input> tile;
  tile.scores = scratch.take<float>(kKeys * kLanes);
  tile.grad_weights = scratch.take<float>(kKeys * kLanes);
  tile.weight_rows = scratch.take<Input>(kKeys * kLanes);
  tile.grad_rows = scratch.take<Input>(kKeys * kLanes);
  tile.grad_units = scratch.take<uint32_t>(kKeys * kLanes);
  const auto key_storage = KeyStorage<Input>::take(scratch, e),
             value_storage = KeyStorage<Input>::take(scratch, e);
  const Input* keys = row_at(static_cast<const Input*>(p.key), p.key_strides, batch, seq.key_start, group);
  const bool tied = p.value == nullptr;
  const Input* values =
      tied ? nullptr
           : row_at(static_cast<const Input*>(p.value), p.value_strides, batch, seq.key_start, group);

  const int64_t super_blocks = (all_rows + kSuperBlock - 1) / kSuperBlock;
  const int64_t begin = super_blocks * chunk / context.chunks,
                end = super_blocks * (chunk + 1) / context.chunks;
  for (int64_t super_block = begin; super_block < end; ++super_block) {
    const int64_t first_row = super_block * kSuperBlock;
    const int rows =
        static_cast<int>(all_rows - first_row < kSuperBlock ? all_rows - first_row : kSuperBlock);
    int count = 0;
    int64_t greatest = 0;
    for (int row = 0; row < rows; row += kLanes, ++count) {
      const int valid = rows - row < kLanes ? rows - row : kLanes;
      blocks[count].lanes = round_up(valid, kWidth);
      load_backward_block<Input>(blocks[count], p, seq, batch, group, first_row + row, valid, width);
      if (blocks[count].greatest_limit > greatest) greatest = blocks[count].greatest_limit;
    }
    for (int64_t first = 0; first < greatest; first += kKeys) {
      const int valid = static_cast<int>(seq.t - first < kKeys ? seq.t - first : kKeys);
      const KeyBlock key =
          key_block(keys + first * p.key_strides.seq, p.key_strides.seq, valid, e, true, key_storage);
      const KeyBlock value = tied ? key
                                  : key_block(values + first * p.value_strides.seq, p.value_strides.seq,
                                              valid, e, false, value_storage);
      for (int l = 0; l < count; ++l) {
        const BackwardBlock& block = blocks[l];
        if (block.greatest_limit <= first) continue;
        const auto pair_of = [&](auto columns) {
          backward_pair<Input, columns.value>(block, key, value, tile, first, valid, e, width, problem.scale,
                                              accumulator, grad_value);
        };
        if constexpr (kColumns >= 3)
          if (block.lanes == 3 * kWidth) pair_of(Constant<3>{});
        if (block.lanes == 2 * kWidth) pair_of(Constant<2>{});
        if (block.lanes == kWidth) pair_of(Constant<1>{});
      }
    }
    for (int l = 0; l < count; ++l) {
      const BackwardBlock& block = blocks[l];
      for (int m = 0; m < block.lanes && l * kLanes + m < rows; ++m) {
        const int64_t row = first_row + l * kLanes + m, i = row % seq.s;
        const int64_t head = group * heads_per_group + row / seq.s;
        Input* out =
            row_at(static_cast<Input*>(p.grad_query), p.grad_query_strides, batch, seq.query_start + i, head);
        for (int k = 0; k < e; ++k)
          from_float(block.grad_query[static_cast<int64_t>(k) * block.lanes + m], out + k);
      }
    }
  }
  if (context.partial == nullptr) write_key_gradients(context, accumulator, batch, group, 0, seq.t);
}

constexpr int64_t kReduceRows = 256;

template <class Input>
inline void reduce_task(void* opaque, int64_t index, char*) {
  const auto& context = *static_cast<const BackwardContext<Input>*>(opaque);
  const int64_t parts = (context.max_padded + kReduceRows - 1) / kReduceRows;
  const int64_t pair = index / parts, part = index % parts, groups = context.params->problem.groups;
  write_key_gradients(context, context.partial + pair * context.chunks * context.partial_size(),
                      pair / groups, pair % groups, part * kReduceRows, (part + 1) * kReduceRows);
}

// Ranges of query rows per sequence and group: enough tasks for many threads, none too short to pay for its
// own key gradient, and no more than 256 MiB of these. A matter of shape only, so that results don't depend
// on threads.
inline int64_t backward_chunks(const Problem& problem, int64_t partial_bytes) {
  const int64_t pairs = static_cast<int64_t>(problem.batch) * problem.groups;
  const int64_t rows = problem.max_seqlen_q * (problem.heads / problem.groups);
  int64_t chunks = 64 / (pairs > 0 ? pairs : 1);
  const int64_t by_rows = rows / (2 * kSuperBlock);
  const int64_t by_memory = (int64_t{256} << 20) / (partial_bytes * (pairs > 0 ? pairs : 1) + 1);
  if (chunks > by_rows) chunks = by_rows;
  if (chunks > by_memory) chunks = by_memory;
  return chunks < 1 ? 1 : chunks;
}

template <class Input>
inline const char* backward_typed(const BackwardParams& p, Runner run) {
  const Problem& problem = p.problem;
  const int64_t e = problem.head_size, width = round_up(problem.head_size, kWidth);
  const int64_t padded = (problem.max_seqlen_k + kKeys - 1) / kKeys * kKeys;
  BackwardContext<Input> context{&p, 1, padded, static_cast<int>(width), nullptr};
  context.chunks = backward_chunks(problem, context.partial_size() * 4);
  const int64_t pairs = static_cast<int64_t>(problem.batch) * problem.groups;
  int64_t bytes = kBackwardBlocks * (12 * e * kLanes + 8 * kLanes * width + 12 * kLanes + 8 * 64) +
                  20 * kKeys * kLanes + 16 * kKeys * e + 10 * 64;
  if (context.chunks == 1) {
    bytes += context.partial_size() * 4 + 64;
  } else {
    context.partial = static_cast<float*>(std::malloc(pairs * context.chunks * context.partial_size() * 4));
    if (context.partial == nullptr) return "out of memory for the key gradient's partial sums";
  }
  const char* error = run(pairs * context.chunks, bytes, backward_task<Input>, &context);
  if (error == nullptr && context.partial != nullptr)
    error = run(pairs * ((padded + kReduceRows - 1) / kReduceRows), 0, reduce_task<Input>, &context);
  std::free(context.partial);
  return error;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
