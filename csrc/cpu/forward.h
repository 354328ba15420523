// Attention forward with an online softmax over key blocks.
//
// Shape legend: e head size, n keys of a block, m lanes. The query rows of all heads that share a group are
// one list (head-major), cut into tasks of up to kLaneBlocks * kLanes rows, so that a key block serves them
// all.
#pragma once

#include "panels.h"

namespace sharedproj::cpu::SHAREDPROJ_ISA {

constexpr int kLaneBlocks = 4;

// Running state of one lane block; everything is [.., m].
struct LaneBlock {
  uint32_t* query;  // [units, m]
  float* out;       // [e, m]
  float *maximum, *sum, *rescale;
  int32_t* limit;  // keys that each lane sees; 0 for a lane without a row
  int64_t least_limit, greatest_limit;

  // `units` of a query row.
  static LaneBlock take(Scratch& scratch, int units, int e, int lanes) {
    LaneBlock block;
    block.query = scratch.take<uint32_t>(static_cast<int64_t>(units) * lanes);
    block.out = scratch.take<float>(static_cast<int64_t>(e) * lanes);
    block.maximum = scratch.take<float>(lanes);
    block.sum = scratch.take<float>(lanes);
    block.rescale = scratch.take<float>(lanes);
    block.limit = scratch.take<int32_t>(lanes);
    return block;
  }

  // No lane has a row yet; rows see at most `keys`.
  void reset(int e, int lanes, int64_t keys) {
    least_limit = keys;
    greatest_limit = 0;
    std::memset(out, 0, sizeof(float) * e * lanes);
    std::memset(sum, 0, sizeof(float) * lanes);
    std::memset(limit, 0, sizeof(int32_t) * lanes);
    for (int m = 0; m < lanes; ++m) maximum[m] = -__builtin_inff();
  }

  // Lane m has a row that sees `keys` keys.
  void set_limit(int m, int64_t keys) {
    keys = keys < 0 ? 0 : keys;
    limit[m] = static_cast<int32_t>(keys);
    if (keys < least_limit) least_limit = keys;
    if (keys > greatest_limit) greatest_limit = keys;
  }
};

// scores [n, m] -> weights, in units along n at `weights`; updates maximum, sum and rescale of the lanes.
template <class Input, int columns>
inline void softmax_block(LaneBlock& block, float* scores, [[maybe_unused]] uint32_t* weights, int64_t first,
                          int valid) {
  constexpr int lanes = columns * kWidth;
  const bool masked = block.least_limit < first + valid;
  for (int c = 0; c < columns; ++c) {
    float* column = scores + c * kWidth;
    Vector top = broadcast(-__builtin_inff());
    if (masked) {
      for (int n = 0; n < valid; ++n) {
        const Vector seen = where_below(block.limit + c * kWidth, static_cast<int32_t>(first + n),
                                        load(column + n * lanes), broadcast(-__builtin_inff()));
        store(column + n * lanes, seen);
        top = max(top, seen);
      }
    } else {
      Vector other = top;
      int n = 0;
      for (; n + 1 < valid; n += 2) {
        top = max(top, load(column + n * lanes));
        other = max(other, load(column + (n + 1) * lanes));
      }
      if (n < valid) top = max(top, load(column + n * lanes));
      top = max(top, other);
    }
    const Vector before = load(block.maximum + c * kWidth);
    const Vector after = max(before, top);
    const Vector base = where_finite(after, zero());  // a lane that has seen no key yet: weights 0, not NaN
    const Vector rescale = exp2(sub(before, base));
    store(block.maximum + c * kWidth, after);
    store(block.rescale + c * kWidth, rescale);
    Vector total = zero(), other = zero();
    int n = 0;
    for (; n + 1 < valid; n += 2) {
      const Vector low = exp2(sub(load(column + n * lanes), base));
      const Vector high = exp2(sub(load(column + (n + 1) * lanes), base));
      total = add(total, low);
      other = add(other, high);
#if defined(__AVX512BF16__)
      if constexpr (kPairs<Input>) {
        store_units(weights + (n / 2) * lanes + c * kWidth, pair(low, high));
        continue;
      }
#endif
      store(column + n * lanes, low);
      store(column + (n + 1) * lanes, high);
    }
    if (n < valid) {
      const Vector low = exp2(sub(load(column + n * lanes), base));
      total = add(total, low);
#if defined(__AVX512BF16__)
      if constexpr (kPairs<Input>) store_units(weights + (n / 2) * lanes + c * kWidth, pair(low, zero()));
#endif
      if constexpr (!kPairs<Input>) store(column + n * lanes, low);
    }
    const Vector sum = fma(load(block.sum + c * kWidth), rescale, add(total, other));
    store(block.sum + c * kWidth, sum);
  }
}

template <class Input, int columns, class Fetch = NoFetch>
inline void attend(LaneBlock& block, const KeyBlock& keys, const KeyBlock& values, int64_t first, int valid,
                   int head_size, float scale_log2, float* scores, uint32_t* packed, Fetch&& fetch = {}) {
  constexpr int lanes = columns * kWidth;
  constexpr int per_unit = kPerUnit<Input>;
  product<columns, kPairs<Input>>(scores, lanes, round_up(valid, kRows), keys.rows, block.query, lanes,
                                  head_size / per_unit, scale_log2, fetch);
  softmax_block<Input, columns>(block, scores, packed, first, valid);
  const uint32_t* weights = kPairs<Input> ? packed : reinterpret_cast<const uint32_t*>(scores);
  accumulate<columns, kPairs<Input>>(block.out, lanes, head_size, values.columns, weights, lanes,
                                     (valid + per_unit - 1) / per_unit, block.rescale, fetch);
}

template <class Input>
struct ForwardContext {
  const ForwardParams* params;
  const int64_t* first_task;  // [b + 1], of each sequence's tasks of one group
  int64_t tasks;
};

template <class Input>
inline void forward_task(void* opaque, int64_t index, char* memory) {
  const auto& context = *static_cast<const ForwardContext<Input>*>(opaque);
  const ForwardParams& p = *context.params;
  const Problem& problem = p.problem;
  const int e = problem.head_size, heads_per_group = problem.heads / problem.groups;
  // The last rows see the most keys under a causal mask: they go first.
  const int64_t task = context.tasks - 1 - index;
  const int64_t row_task = task / problem.groups, group = task % problem.groups;
  int64_t batch = 0;
  while (context.first_task[batch + 1] <= row_task) ++batch;
  const Sequence seq = sequence(problem, batch);
  const int64_t first_row = (row_task - context.first_task[batch]) * kLaneBlocks * kLanes;
  const int64_t all_rows = seq.s * heads_per_group;
  const int rows = static_cast<int>(all_rows - first_row < kLaneBlocks * kLanes ? all_rows - first_row
                                                                                : kLaneBlocks * kLanes);

  Scratch scratch{memory};
  const Input* sources[kLanes];
  LaneBlock blocks[kLaneBlocks];
  int columns_of[kLaneBlocks];
  int count = 0;
  int64_t greatest = 0;
  for (int begin = 0; begin < rows; begin += kLanes, ++count) {
    const int valid = rows - begin < kLanes ? rows - begin : kLanes;
    const int columns = (valid + kWidth - 1) / kWidth, lanes = columns * kWidth;
    LaneBlock& block = blocks[count];
    columns_of[count] = columns;
    block = LaneBlock::take(scratch, e / kPerUnit<Input>, e, lanes);
    block.reset(e, lanes, seq.t);
    for (int m = 0; m < valid; ++m) {
      const int64_t row = first_row + begin + m, i = row % seq.s,
                    head = group * heads_per_group + row / seq.s;
      sources[m] =
          row_at(static_cast<const Input*>(p.query), p.query_strides, batch, seq.query_start + i, head);
      block.set_limit(m, problem.causal ? i + 1 + seq.t - seq.s : seq.t);
    }
    if (block.greatest_limit > greatest) greatest = block.greatest_limit;
    pack_lanes(block.query, sources, valid, lanes, e);
  }
  float* scores = scratch.take<float>(kKeys * kLanes);
  uint32_t* packed = scratch.take<uint32_t>(kKeys * kLanes);
  const auto key_storage = KeyStorage<Input>::take(scratch, e),
             value_storage = KeyStorage<Input>::take(scratch, e);
  const Input* keys = row_at(static_cast<const Input*>(p.key), p.key_strides, batch, seq.key_start, group);
  const bool tied = p.value == nullptr;
  const Input* values =
      tied ? nullptr
           : row_at(static_cast<const Input*>(p.value), p.value_strides, batch, seq.key_start, group);

  const float scale_log2 = problem.scale * kLog2e;
  for (int64_t first = 0; first < greatest; first += kKeys) {
    const int valid = static_cast<int>(seq.t - first < kKeys ? seq.t - first : kKeys);
    const KeyBlock key =
        key_block(keys + first * p.key_strides.seq, p.key_strides.seq, valid, e, tied, key_storage);
    const KeyBlock value = tied ? key
                                : key_block(values + first * p.value_strides.seq, p.value_strides.seq, valid,
                                            e, true, value_storage);
    for (int l = 0; l < count; ++l) {
      if (blocks[l].greatest_limit <= first) continue;
      if constexpr (kColumns >= 3)
        if (columns_of[l] == 3)
          attend<Input, 3>(blocks[l], key, value, first, valid, e, scale_log2, scores, packed);
      if (columns_of[l] == 2)
        attend<Input, 2>(blocks[l], key, value, first, valid, e, scale_log2, scores, packed);
      if (columns_of[l] == 1)
        attend<Input, 1>(blocks[l], key, value, first, valid, e, scale_log2, scores, packed);
    }
  }

  for (int l = 0, begin = 0; l < count; ++l, begin += kLanes) {
    const int lanes = columns_of[l] * kWidth;
    const int valid = rows - begin < kLanes ? rows - begin : kLanes;
    for (int m = 0; m < valid; ++m) {
      const int64_t row = first_row + begin + m, i = row % seq.s,
                    head = group * heads_per_group + row / seq.s;
      const float sum = blocks[l].sum[m];
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      Input* out = row_at(static_cast<Input*>(p.out), p.out_strides, batch, seq.query_start + i, head);
      for (int k = 0; k < e; ++k)
        from_float(blocks[l].out[static_cast<int64_t>(k) * lanes + m] * inverse, out + k);
      p.lse[lse_index(problem, batch, seq.query_start, i, head)] =
          sum == 0.0f ? -__builtin_inff() : blocks[l].maximum[m] * kLn2 + __builtin_logf(sum);
    }
  }
}

template <class Input>
inline const char* forward_typed(const ForwardParams& p, Runner run) {
  const Problem& problem = p.problem;
  const int64_t rows_per_task = kLaneBlocks * kLanes, heads_per_group = problem.heads / problem.groups;
  int64_t* first_task = new int64_t[problem.batch + 1];
  first_task[0] = 0;
  for (int64_t z = 0; z < problem.batch; ++z)
    first_task[z + 1] =
        first_task[z] + (sequence(problem, z).s * heads_per_group + rows_per_task - 1) / rows_per_task;
  ForwardContext<Input> context{&p, first_task, first_task[problem.batch] * problem.groups};
  const int64_t e = problem.head_size;
  const int64_t bytes =
      kLaneBlocks * (8 * e * kLanes + 16 * kLanes + 6 * 64) + 8 * kKeys * kLanes + 16 * kKeys * e + 6 * 64;
  const char* error = run(context.tasks, bytes, forward_task<Input>, &context);
  delete[] first_task;
  return error;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
