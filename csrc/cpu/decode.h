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
constexpr int kLaneRows = 12;

template <class Input>
struct DecodeContext {
  const DecodeParams* params;
  int64_t splits, split_keys;
  float *partial_out, *partial_lse;  // [b, splits, h, s, e] and [b, splits, h, s]
};

inline int64_t decode_length(const DecodeParams& p, int64_t batch) {
  return p.seqlens_k == nullptr ? p.max_seqlen_k : p.seqlens_k[batch];
}

// First of the keys from `first` on, up to the end of their page.
template <class Input>
SHAREDPROJ_INLINE const Input* cache_row(const DecodeParams& p, const void* base, const Strides& strides,
                                         int64_t batch, int64_t first, int64_t group) {
  if (p.block_table == nullptr) return row_at(static_cast<const Input*>(base), strides, batch, first, group);
  const int64_t page = p.block_table[batch * p.table_stride + first / p.page_size];
  return row_at(static_cast<const Input*>(base), strides, page, first % p.page_size, group);
}

// ahead[n]: the piece of the next block to fetch while key n of this one is read. Where the heads of a key
// lie side by side, the block's pieces are walked in memory order over the visits of its groups; else each
// visit fetches its own group's. Without a next block: this block's own keys, which costs nothing.
template <class Input>
inline void pieces_ahead(const Input** ahead, const DecodeParams& p, const void* cache,
                         const Strides& strides, int64_t batch, int64_t first, int64_t end, int64_t group,
                         const Input* rows, int count) {
  for (int n = 0; n < count; ++n) ahead[n] = rows + n * strides.seq;
  if (first >= end) return;
  const int next = static_cast<int>(end - first < count ? end - first : count);
  if (strides.head == p.head_size && strides.seq >= p.groups * strides.head) {
    const Input* row = cache_row<Input>(p, cache, strides, batch, first, 0);
    int64_t key = group * next / p.groups, head = group * next % p.groups;
    row += key * strides.seq;
    for (int n = 0; n < next; ++n) {
      ahead[n] = row + head * strides.head;
      if (++head == p.groups) {
        head = 0;
        row += strides.seq;
      }
    }
  } else {
    const Input* row = cache_row<Input>(p, cache, strides, batch, first, group);
    for (int n = 0; n < next; ++n) ahead[n] = row + n * strides.seq;
  }
}

// A split in which every group has few query rows.
template <class Input>
inline void decode_rows(const DecodeContext<Input>& context, int64_t batch, int64_t begin, int64_t end,
                        float* out, float* lse, Scratch scratch) {
  const DecodeParams& p = *context.params;
  const int e = p.head_size, heads_per_group = p.heads / p.groups, s = static_cast<int>(p.seqlen_q);
  const int padded = round_up(e, RowReader<Input>::chunk);
  const int rows = heads_per_group * s;
  const int64_t length = decode_length(p, batch), all_rows = static_cast<int64_t>(p.groups) * rows;
  RowState* states = scratch.take<RowState>(all_rows);
  const Input** queries = scratch.take<const Input*>(all_rows);
  float* sums_of = scratch.take<float>(all_rows * padded);
  std::memset(sums_of, 0, sizeof(float) * all_rows * padded);
  for (int64_t r = 0; r < all_rows; ++r) {
    states[r] = {-__builtin_inff(), 0.0f, sums_of + r * padded};
    queries[r] = row_at(static_cast<const Input*>(p.query), p.query_strides, batch, r % s, r / s);
  }
  // Short blocks where each key brings all its heads: the next block then fits the nearest caches.
  const bool by_key = p.key_strides.head <= p.key_strides.seq;
  const int step = by_key && p.groups > 1 ? 16 : 32;
  const auto block = [&](int64_t group, int64_t first) {
    const int count = static_cast<int>(end - first < step ? end - first : step);
    const Input *ahead[kKeys], *values_ahead[kKeys];
    const Input* rows_of = cache_row<Input>(p, p.key, p.key_strides, batch, first, group);
    pieces_ahead(ahead, p, p.key, p.key_strides, batch, first + step, end, group, rows_of, count);
    const bool tied = p.value == nullptr;
    const RowBlock<Input> keys = {rows_of, p.key_strides.seq, ahead, 0, tied ? (e + 1) / 2 : e};
    RowBlock<Input> values = {rows_of, p.key_strides.seq, ahead, (e + 1) / 2, e};
    if (!tied) {
      rows_of = cache_row<Input>(p, p.value, p.value_strides, batch, first, group);
      pieces_ahead(values_ahead, p, p.value, p.value_strides, batch, first + step, end, group, rows_of,
                   count);
      values = {rows_of, p.value_strides.seq, values_ahead, 0, e};
    }
    const auto attend_some = [&](int r, auto several) {
      int limit[several.value];
      for (int j = 0; j < several.value; ++j) {
        const int64_t seen = (r + j) % s + 1 + length - s - first;
        limit[j] = static_cast<int>(seen < 0 ? 0 : seen < count ? seen : count);
      }
      const int64_t row = group * rows + r;
      attend_rows<Input, several.value>(states + row, queries + row, keys, values, count, limit, e,
                                        p.scale * kLog2e);
    };
    int r = 0;
    for (; r + 4 <= rows; r += 4) attend_some(r, Constant<4>{});
    for (; r + 2 <= rows; r += 2) attend_some(r, Constant<2>{});
    if (r < rows) attend_some(r, Constant<1>{});
  };
  if (by_key) {
    for (int64_t first = begin; first < end; first += step)
      for (int64_t group = 0; group < p.groups; ++group) block(group, first);
  } else {
    for (int64_t group = 0; group < p.groups; ++group)
      for (int64_t first = begin; first < end; first += step) block(group, first);
  }
  for (int64_t r = 0; r < all_rows; ++r) {
    const RowState& state = states[r];
    const float inverse = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
    for (int k = 0; k < e; ++k) out[r * e + k] = state.out[row_position<Input>(k)] * inverse;
    lse[r] = state.sum == 0.0f ? -__builtin_inff() : state.maximum * kLn2 + __builtin_logf(state.sum);
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
  const int64_t by_rows = rows * (static_cast<int64_t>(sizeof(RowState)) + 8 + 4 * (e + 32)) + 256;
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
