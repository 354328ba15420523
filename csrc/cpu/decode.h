// Decode: few query rows over a long cache, bound by the cache's bytes. The key length is cut into splits
// that run side by side and are combined by their log-sum-exp; a split reads all groups of its keys, in the
// order in which they lie in memory.
//
// Shape legend: s query length, h heads, g groups, e head size, n keys of a block, r query rows of a group
// (heads of the group x s).
#pragma once

#include <cstdlib>

#include "forward.h"
#include "rows.h"

namespace sharedproj::cpu::SHAREDPROJ_ISA {

constexpr int64_t kSplitKeys = 512;
// From this many query rows per group on, lane blocks (which compute kWidth rows at once) are the faster.
constexpr int kLaneRows = 10;
// Keys read twice should lie in the nearest cache the second time.
constexpr int64_t kBlockBytes = 32 << 10;
constexpr int64_t kAgainBytes = 8 << 10;        // how far ahead of the reads memory is fetched again
constexpr int kMostRows = kWidth >= 8 ? 8 : 4;  // query rows of a register tile

template <class Input>
struct DecodeContext {
  const DecodeParams* params;
  int64_t splits, split_keys;
  float *partial_out, *partial_lse;  // [b, splits, h, s, e] and [b, splits, h, s]
};

inline int64_t decode_length(const DecodeParams& p, int64_t batch) {
  return p.seqlens_k == nullptr ? p.max_seqlen_k : p.seqlens_k[batch];
}

// Groups that are read together: all, where their heads lie in one run or fill whole register tiles, else
// one.
inline int groups_together(const DecodeParams& p) {
  const int64_t rows = p.heads / p.groups * p.seqlen_q;
  int piece = kMostRows;
  while (rows % piece != 0) piece /= 2;
  const bool all = p.key_strides.seq == p.groups * p.key_strides.head || p.groups * piece >= kWidth;
  return static_cast<int>(all ? p.groups : 1);
}

// First of the keys from `first` on, up to the end of their page.
template <class Input>
SHAREDPROJ_INLINE const Input* cache_row(const DecodeParams& p, const void* base, const Strides& strides,
                                         int64_t batch, int64_t first, int64_t group) {
  if (p.block_table == nullptr) return row_at(static_cast<const Input*>(base), strides, batch, first, group);
  const int64_t page = p.block_table[batch * p.table_stride + first / p.page_size];
  return row_at(static_cast<const Input*>(base), strides, page, first % p.page_size, group);
}

// Queries of a split's groups, the running states of their rows, and a block's scores and weights.
template <class Input>
struct RowTask {
  int rows, groups, lanes;  // query rows of a group, groups read together, vector lanes of all their rows
  int padded;               // elements of a row, in whole chunks
  Input* queries;           // [groups + kWidth, rows, padded]: the first groups again behind the last
  RowStates states;
  float* scores;
  uint32_t* weights;  // floats, or pairs of bf16

  static int64_t bytes(const DecodeParams& p, int groups) {
    const int64_t rows = p.heads / p.groups * p.seqlen_q, all = rows * groups + kWidth,
                  padded = p.head_size + 32;
    return all * (16 + 4 * padded + 8 * kKeys) +
           (groups + kWidth) * rows * padded * static_cast<int64_t>(sizeof(Input)) + 1024;
  }

  static RowTask take(Scratch& scratch, const DecodeParams& p, int groups) {
    RowTask task;
    task.rows = static_cast<int>(p.heads / p.groups * p.seqlen_q);
    task.groups = groups;
    task.lanes = round_up(task.rows * groups, kWidth);
    task.padded = round_up(p.head_size, RowReader<Input>::chunk);
    task.queries = scratch.take<Input>(static_cast<int64_t>(groups + kWidth) * task.rows * task.padded);
    task.states = {scratch.take<float>(task.lanes), scratch.take<float>(task.lanes),
                   scratch.take<float>(task.lanes), scratch.take<int32_t>(task.lanes),
                   scratch.take<float>(static_cast<int64_t>(task.lanes) * task.padded)};
    task.scores = scratch.take<float>(static_cast<int64_t>(task.lanes) * kKeys + kWidth);
    task.weights = scratch.take<uint32_t>(static_cast<int64_t>(task.lanes) * kKeys);
    return task;
  }

  // For groups [first_group, first_group + groups); returns the number of keys that every row sees.
  int64_t reset(const DecodeParams& p, int64_t batch, int64_t first_group) {
    const int s = static_cast<int>(p.seqlen_q);
    const int64_t length = decode_length(p, batch);
    std::memset(states.out, 0, sizeof(float) * lanes * padded);
    int64_t least = length;
    for (int m = 0; m < lanes; ++m) {
      const int64_t seen = m % s + 1 + length - s;
      states.maximum[m] = -__builtin_inff();
      states.sum[m] = 0.0f;
      states.limit[m] = static_cast<int32_t>(m < rows * groups && seen > 0 ? seen : 0);
      if (m < rows * groups && seen < least) least = seen;
    }
    std::memset(queries, 0, sizeof(Input) * (groups + kWidth) * rows * padded);
    for (int m = 0; m < (groups + kWidth) * rows; ++m) {
      const int64_t r = first_group * rows + m % (groups * rows);
      std::memcpy(queries + static_cast<int64_t>(m) * padded,
                  row_at(static_cast<const Input*>(p.query), p.query_strides, batch, r % s, r / s),
                  sizeof(Input) * p.head_size);
    }
    return least;
  }
};

// Calls body(r, Constant<n>) for n of the rows from r on, until all are done.
template <int most, class Body>
SHAREDPROJ_INLINE void in_pieces(int rows, Body body) {
  int r = 0;
  if constexpr (most >= 8)
    for (; r + 8 <= rows; r += 8) body(r, Constant<8>{});
  for (; r + 4 <= rows; r += 4) body(r, Constant<4>{});
  for (; r + 2 <= rows; r += 2) body(r, Constant<2>{});
  if (r < rows) body(r, Constant<1>{});
}

// Fetches for the reads of a block: the rows at `next`, laid out by `strides`, of `part` of their `parts`
// equal parts, the block's keys one after the other in memory where that is possible.
inline Ahead ahead_of(const char* next, const Strides& strides, int64_t element, int e, int groups, int count,
                      int part, int parts, bool by_group) {
  const int64_t row = e * element / parts, seq = strides.seq * element, head = strides.head * element;
  const int lines = static_cast<int>((row + 63) / 64);
  if (groups > 1 && seq == groups * head && head == e * element) {  // one run
    next += part * row * groups * count;
    return by_group ? Ahead{next, row, count * row, lines} : Ahead{next, groups * row, row, lines};
  }
  if (seq == e * element) return {next + part * row * count, row, head, lines};  // a run of each group
  return {next + part * row, seq, head, lines};
}

// A split in which every group has few query rows. Each block's keys are scored in one pass in memory order
// and are in a near cache when they are weighed; meanwhile all of the next block is fetched: half of it
// during each, or the keys during the first and the values during the second.
template <class Input>
inline void decode_rows(const DecodeContext<Input>& context, int64_t batch, int64_t begin, int64_t end,
                        float* out, float* lse, Scratch scratch) {
  const DecodeParams& p = *context.params;
  const int e = p.head_size, together = groups_together(p);
  const bool tied = p.value == nullptr;
  const int64_t length = decode_length(p, batch);
  constexpr int64_t element = sizeof(Input);
  RowTask<Input> task = RowTask<Input>::take(scratch, p, together);
  int step = kKeys;
  while (step > 16 && step * together * e * element > kBlockBytes) step /= 2;
  RowBlock<Input> keys = {nullptr, p.key_strides.seq, p.key_strides.head, together, 0, kAgainBytes, 0};
  const bool by_group = task.rows >= kGroupRows && together > 1;
  if (by_group)
    keys.again = element * keys.head * (kAgainBytes / (step * e * element) + 1);
  else if (!keys.one_run())
    keys.again = element * keys.seq * (kAgainBytes / (together * e * element) + 1);
  for (int64_t group = 0; group < p.groups; group += together) {
    const int64_t seen_by_all = task.reset(p, batch, group);
    for (int64_t first = begin; first < end; first += step) {
      const int count = static_cast<int>(end - first < step ? end - first : step);
      keys.rows = cache_row<Input>(p, p.key, p.key_strides, batch, first, group);
      keys.count = count;
      const void* value = tied ? p.key : p.value;
      const Strides& strides = tied ? p.key_strides : p.value_strides;
      const Input* values = cache_row<Input>(p, value, strides, batch, first, group);
      if (!tied && strides.seq == keys.seq && strides.head == keys.head)
        keys.other = element * (values - keys.rows);
      const int64_t next = first + step < length ? first + step : first;
      const auto ahead = [&](const void* base, const Strides& strides, int part) {
        const Input* rows = cache_row<Input>(p, base, strides, batch, next, group);
        return ahead_of(reinterpret_cast<const char*>(rows), strides, element, e, together, count,
                        tied ? part : 0, tied ? 2 : 1, part == 1 || by_group);
      };
      const Ahead ahead_keys = ahead(p.key, p.key_strides, 0), ahead_values = ahead(value, strides, 1);
      in_pieces<kMostRows>(task.rows, [&](int r, auto several) SHAREDPROJ_INLINED {
        const auto with = [&](auto chunks) SHAREDPROJ_INLINED {
          score_rows<Input, several.value, chunks.value>(task.scores + r, task.queries + r * task.padded,
                                                         task.padded, task.rows, keys, e, ahead_keys);
        };
        if (task.padded == 2 * RowReader<Input>::chunk)
          with(Constant<2>{});
        else if (task.padded == 4 * RowReader<Input>::chunk)
          with(Constant<4>{});
        else
          with(Constant<0>{});
      });
      softmax_rows<Input>(task.weights, task.scores, task.rows * together, count, first,
                          first + count > seen_by_all, p.scale * kLog2e, task.states);
      for (int g = 0; g < together; ++g) {
        in_pieces<4>(task.rows, [&](int r, auto several) SHAREDPROJ_INLINED {
          const int row = g * task.rows + r;
          weigh_rows<Input, several.value>(task.states.out + static_cast<int64_t>(row) * task.padded,
                                           task.padded, task.states.rescale + row, task.weights + row,
                                           task.lanes, values + g * strides.head, strides.seq, count, e,
                                           ahead_values.row(0, g), ahead_values.seq, ahead_values.lines);
        });
      }
    }
    for (int m = 0; m < task.rows * together; ++m) {
      const int64_t row = group * task.rows + m;
      const float sum = task.states.sum[m], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const float* sums = task.states.out + static_cast<int64_t>(m) * task.padded;
      for (int k = 0; k < e; ++k) out[row * e + k] = sums[row_position<Input>(k)] * inverse;
      lse[row] = sum == 0.0f ? -__builtin_inff() : task.states.maximum[m] * kLn2 + __builtin_logf(sum);
    }
  }
}

// Fetches the rows of the next block, a few lines for each register tile of this one.
struct FetchRows {
  const char* row;
  int64_t stride, row_bytes;
  int rows;
  int64_t offset = 0;
  SHAREDPROJ_INLINE void operator()() {
    for (int line = 0; line < 24 && rows > 0; ++line) {
      __builtin_prefetch(row + offset, 0, 2);
      offset += 64;
      if (offset >= row_bytes) {
        offset = 0;
        row += stride;
        --rows;
      }
    }
  }
};

// A split in which a group's query rows fill lane blocks.
template <class Input>
inline void decode_lanes(const DecodeContext<Input>& context, int64_t batch, int64_t begin, int64_t end,
                         float* out, float* lse, Scratch scratch) {
  const DecodeParams& p = *context.params;
  const int e = p.head_size, heads_per_group = p.heads / p.groups, s = static_cast<int>(p.seqlen_q);
  const int rows = heads_per_group * s, count = (rows + kLanes - 1) / kLanes;
  const int64_t length = decode_length(p, batch);
  LaneBlock* blocks = scratch.take<LaneBlock>(count);
  for (int l = 0; l < count; ++l) blocks[l] = LaneBlock::take(scratch, e / kPerUnit<Input>, e, kLanes);
  float* scores = scratch.take<float>(kKeys * kLanes);
  uint32_t* packed = scratch.take<uint32_t>(kKeys * kLanes);
  const auto key_storage = KeyStorage<Input>::take(scratch, e),
             value_storage = KeyStorage<Input>::take(scratch, e);
  const bool tied = p.value == nullptr;
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int l = 0; l < count; ++l) {
      LaneBlock& block = blocks[l];
      const int valid = rows - l * kLanes < kLanes ? rows - l * kLanes : kLanes,
                lanes = round_up(valid, kWidth);
      const Input* sources[kLanes];
      block.reset(e, lanes, length);
      for (int m = 0; m < valid; ++m) {
        const int r = l * kLanes + m;
        const int64_t i = r % s, head = group * heads_per_group + r / s;
        sources[m] = row_at(static_cast<const Input*>(p.query), p.query_strides, batch, i, head);
        block.set_limit(m, i + 1 + length - s);
      }
      pack_lanes(block.query, sources, valid, lanes, e);
    }
    for (int64_t first = begin; first < end; first += kKeys) {
      const int valid = static_cast<int>(end - first < kKeys ? end - first : kKeys);
      const KeyBlock key = key_block(cache_row<Input>(p, p.key, p.key_strides, batch, first, group),
                                     p.key_strides.seq, valid, e, tied, key_storage);
      const KeyBlock value =
          tied ? key
               : key_block(cache_row<Input>(p, p.value, p.value_strides, batch, first, group),
                           p.value_strides.seq, valid, e, true, value_storage);
      const int64_t next = first + kKeys < end ? first + kKeys : first;
      FetchRows fetch{
          reinterpret_cast<const char*>(cache_row<Input>(p, p.key, p.key_strides, batch, next, group)),
          p.key_strides.seq * static_cast<int64_t>(sizeof(Input)), e * static_cast<int64_t>(sizeof(Input)),
          static_cast<int>(end - next < kKeys ? end - next : kKeys)};
      for (int l = 0; l < count; ++l) {
        if (blocks[l].greatest_limit <= first) continue;
        const int left = rows - l * kLanes;
        const float scale = p.scale * kLog2e;
        if constexpr (kColumns >= 3)
          if (left > 2 * kWidth)
            attend<Input, 3>(blocks[l], key, value, first, valid, e, scale, scores, packed, fetch);
        if (left > kWidth && (left <= 2 * kWidth || kColumns < 3))
          attend<Input, 2>(blocks[l], key, value, first, valid, e, scale, scores, packed, fetch);
        if (left <= kWidth)
          attend<Input, 1>(blocks[l], key, value, first, valid, e, scale, scores, packed, fetch);
      }
    }
    for (int l = 0; l < count; ++l) {
      const int valid = rows - l * kLanes < kLanes ? rows - l * kLanes : kLanes,
                lanes = round_up(valid, kWidth);
      for (int m = 0; m < valid; ++m) {
        const int64_t r = group * rows + l * kLanes + m;
        const float sum = blocks[l].sum[m], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        for (int k = 0; k < e; ++k)
          out[r * e + k] = blocks[l].out[static_cast<int64_t>(k) * lanes + m] * inverse;
        lse[r] = sum == 0.0f ? -__builtin_inff() : blocks[l].maximum[m] * kLn2 + __builtin_logf(sum);
      }
    }
  }
}

template <class Input>
inline void decode_task(void* opaque, int64_t index, char* memory) {
  const auto& context = *static_cast<const DecodeContext<Input>*>(opaque);
  const DecodeParams& p = *context.params;
  const int64_t batch = index / context.splits, split = index % context.splits;
  const int64_t length = decode_length(p, batch), begin = split * context.split_keys;
  const int64_t end = begin + context.split_keys < length ? begin + context.split_keys : length;
  const int64_t rows = static_cast<int64_t>(p.heads) * p.seqlen_q;
  float* out = context.partial_out + index * rows * p.head_size;
  float* lse = context.partial_lse + index * rows;
  if (begin >= end) {
    for (int64_t r = 0; r < rows; ++r) lse[r] = -__builtin_inff();
    return;
  }
  if (rows / p.groups < kLaneRows) {
    decode_rows(context, batch, begin, end, out, lse, Scratch{memory});
  } else {
    decode_lanes(context, batch, begin, end, out, lse, Scratch{memory});
  }
}

// One head of one sequence: its splits weighted by exp(lse - the greatest).
template <class Input>
inline void combine_task(void* opaque, int64_t index, char* memory) {
  const auto& context = *static_cast<const DecodeContext<Input>*>(opaque);
  const DecodeParams& p = *context.params;
  const int e = p.head_size;
  const int64_t batch = index / p.heads, head = index % p.heads, rows = p.heads * p.seqlen_q;
  float* total = Scratch{memory}.take<float>(e);
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    const int64_t first = batch * context.splits * rows + head * p.seqlen_q + i;
    float top = -__builtin_inff(), sum = 0.0f;
    for (int64_t split = 0; split < context.splits; ++split) {
      const float lse = context.partial_lse[first + split * rows];
      top = lse > top || lse != lse ? lse : top;  // a NaN stays
    }
    std::memset(total, 0, sizeof(float) * e);
    if (top != -__builtin_inff()) {
      for (int64_t split = 0; split < context.splits; ++split) {
        const float lse = context.partial_lse[first + split * rows];
        if (lse == -__builtin_inff()) continue;  // its partial out was not written
        const float weight = __builtin_expf(lse - top);
        const float* partial = context.partial_out + (first + split * rows) * e;
        for (int k = 0; k < e; ++k) total[k] += weight * partial[k];
        sum += weight;
      }
    }
    Input* out = row_at(static_cast<Input*>(p.out), p.out_strides, batch, i, head);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int k = 0; k < e; ++k) from_float(total[k] * inverse, out + k);
    p.lse[(batch * p.heads + head) * p.seqlen_q + i] =
        sum == 0.0f ? -__builtin_inff() : top + __builtin_logf(sum);
  }
}

template <class Input>
inline const char* decode_typed(const DecodeParams& p, Runner run) {
  int64_t longest = 0;
  for (int64_t z = 0; z < p.batch; ++z)
    longest = decode_length(p, z) > longest ? decode_length(p, z) : longest;
  int64_t split_keys = kSplitKeys;
  if (p.num_splits > 0)
    split_keys = ((longest + p.num_splits - 1) / p.num_splits + kKeys - 1) / kKeys * kKeys;
  if (split_keys < kKeys) split_keys = kKeys;
  const int64_t splits = longest == 0 ? 1 : (longest + split_keys - 1) / split_keys;
  const int64_t rows = p.heads * p.seqlen_q, e = p.head_size, group_rows = rows / p.groups;
  DecodeContext<Input> context{&p, splits, split_keys, nullptr, nullptr};
  context.partial_out =
      static_cast<float*>(std::malloc(p.batch * splits * rows * (e + 1) * sizeof(float) + 64));
  if (context.partial_out == nullptr) return "out of memory for the splits' partial results";
  context.partial_lse = context.partial_out + p.batch * splits * rows * e;
  const int64_t by_rows = RowTask<Input>::bytes(p, groups_together(p));
  const int64_t blocks = (group_rows + kLanes - 1) / kLanes;
  const int64_t by_lanes =
      blocks * (static_cast<int64_t>(sizeof(LaneBlock)) + 8 * e * kLanes + 16 * kLanes + 512) +
      8 * kKeys * kLanes + 16 * kKeys * e + 512;
  const char* error =
      run(p.batch * splits, by_rows > by_lanes ? by_rows : by_lanes, decode_task<Input>, &context);
  if (error == nullptr) error = run(p.batch * p.heads, 4 * e + 64, combine_task<Input>, &context);
  std::free(context.partial_out);
  return error;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
