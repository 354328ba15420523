// Operand panels and the register tile that all CPU kernels are made of.
//
// Shape legend: e head size, n keys of a block, m lanes (query rows of a block), k contraction in 32-bit
// units. Every product is computed transposed, C[i, m] += A[i, k] B[k, m], with m across the vector lanes:
// softmax statistics are then lane-wise, and a key block is used as it lies, row-major, for the scores. A
// unit is one float, or two bf16 along the contraction where the processor multiplies pairs.
#pragma once

#include "../shared_kv_attention.h"
#include "kernels.h"
#include "vector.h"

namespace sharedproj::cpu::SHAREDPROJ_ISA {

template <int number>
struct Constant {
  static constexpr int value = number;
};

constexpr int kLanes = kWidth * kColumns;  // query rows of a lane block
constexpr int kKeys = 64;                  // keys of a block

template <class Input>
constexpr bool kPairs = kHasPairs && sizeof(Input) == 2;
template <class Input>
constexpr int kPerUnit = kPairs<Input> ? 2 : 1;

struct Scratch {
  char* position;
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(position);
    position += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }
};

template <bool pairs>
SHAREDPROJ_INLINE Vector dot(Vector c, Units a, Units b) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) return dot_pairs(c, a, b);
#endif
  return fma(as_vector(a), as_vector(b), c);
}

// The left operand: unit (i, k) lies at base + i * row + k * step (bytes).
struct Left {
  const char* base;
  int64_t row, step;
};

// acc[i][c] += sum over k of left(i, k) * right[k * right_step + c * kWidth ...]
template <int rows, int columns, bool pairs>
SHAREDPROJ_INLINE void multiply(Vector (&acc)[rows][columns], Left left, const uint32_t* right,
                                int64_t right_step, int count) {
#pragma GCC unroll 1
  for (int k = 0; k < count; ++k) {
    Units b[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) b[c] = load_units(right + c * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Units a = broadcast_unit(left.base + r * left.row);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) acc[r][c] = dot<pairs>(acc[r][c], a, b[c]);
    }
    left.base += left.step;
    right += right_step;
  }
}

// Rows of the register tile: a narrow one needs more of them to hide the latency of its additions.
template <int columns>
constexpr int kTileRows = columns == 1 ? 2 * kRows : kRows;

template <int rows, int columns>
SHAREDPROJ_INLINE void clear(Vector (&acc)[rows][columns]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) acc[r][c] = zero();
}

template <int rows, int columns, bool pairs>
SHAREDPROJ_INLINE void product_tile(float* out, int64_t out_step, Left left, const uint32_t* right,
                                    int64_t right_step, int depth, Vector factor) {
  Vector acc[rows][columns];
  clear(acc);
  multiply<rows, columns, pairs>(acc, left, right, right_step, depth);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) store(out + r * out_step + c * kWidth, mul(acc[r][c], factor));
}

// Called once per register tile, to spread the fetching of later data over the work.
struct NoFetch {
  SHAREDPROJ_INLINE void operator()() {}
};

// out[i, m] = factor * sum over k, for i in [0, count); count is a multiple of kRows.
template <int columns, bool pairs, class Fetch = NoFetch>
inline void product(float* out, int64_t out_step, int count, Left left, const uint32_t* right,
                    int64_t right_step, int depth, float factor, Fetch&& fetch = {}) {
  constexpr int tall = kTileRows<columns>;
  const Vector scale = broadcast(factor);
  int i = 0;
  for (; i + tall <= count; i += tall) {
    fetch();
    product_tile<tall, columns, pairs>(out + i * out_step, out_step,
                                       {left.base + i * left.row, left.row, left.step}, right, right_step,
                                       depth, scale);
  }
  if (tall > kRows && i < count)
    product_tile<kRows, columns, pairs>(out + i * out_step, out_step,
                                        {left.base + i * left.row, left.row, left.step}, right, right_step,
                                        depth, scale);
}

template <int rows, int columns, bool pairs>
SHAREDPROJ_INLINE void accumulate_tile(float* out, int64_t out_step, Left left, const uint32_t* right,
                                       int64_t right_step, int depth, const float* rescale) {
  Vector acc[rows][columns];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      acc[r][c] = load(out + r * out_step + c * kWidth);
      if (rescale != nullptr) acc[r][c] = mul(acc[r][c], load(rescale + c * kWidth));
    }
  multiply<rows, columns, pairs>(acc, left, right, right_step, depth);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) store(out + r * out_step + c * kWidth, acc[r][c]);
}

// out[i, m] = rescale[m] * out[i, m] + sum over k; rescale null: 1.
template <int columns, bool pairs, class Fetch = NoFetch>
inline void accumulate(float* out, int64_t out_step, int count, Left left, const uint32_t* right,
                       int64_t right_step, int depth, const float* rescale, Fetch&& fetch = {}) {
  constexpr int tall = kTileRows<columns>;
  int i = 0;
  for (; i + tall <= count; i += tall) {
    fetch();
    accumulate_tile<tall, columns, pairs>(out + i * out_step, out_step,
                                          {left.base + i * left.row, left.row, left.step}, right, right_step,
                                          depth, rescale);
  }
  if (tall > kRows && i < count)
    accumulate_tile<kRows, columns, pairs>(out + i * out_step, out_step,
                                           {left.base + i * left.row, left.row, left.step}, right, right_step,
                                           depth, rescale);
}

// One unit of a row, element index k * kPerUnit.
template <class Input>
SHAREDPROJ_INLINE uint32_t unit_at(const Input* row, int k) {
  uint32_t unit;
  if constexpr (kPairs<Input>) {
    std::memcpy(&unit, row + 2 * k, 4);
  } else {
    const float value = to_float(row[k]);
    std::memcpy(&unit, &value, 4);
  }
  return unit;
}

// panel[k, m] = unit k of row m: rows turned into lanes. Rows from `valid` on are zero.
template <class Input>
inline void pack_lanes(uint32_t* panel, const Input* const* rows, int valid, int lanes, int head_size) {
  const int units = head_size / kPerUnit<Input>;
  for (int m = 0; m < valid; ++m) {
    const Input* row = rows[m];
    for (int k = 0; k < units; ++k) panel[static_cast<int64_t>(k) * lanes + m] = unit_at(row, k);
  }
  for (int m = valid; m < lanes; ++m)
    for (int k = 0; k < units; ++k) panel[static_cast<int64_t>(k) * lanes + m] = 0;
}

// panel[j, e] = the elements e of rows j * kPerUnit and following, as one unit: rows as contraction.
// Rows from `valid` up to `count` are zero; elements from head_size up to `width` too.
template <class Input>
inline void pack_rows(uint32_t* panel, const Input* const* rows, int valid, int count, int head_size,
                      int width) {
  for (int j = 0; j < count / kPerUnit<Input>; ++j) {
    uint32_t* out = panel + static_cast<int64_t>(j) * width;
    if constexpr (kPairs<Input>) {
      const bool has_low = 2 * j < valid, has_high = 2 * j + 1 < valid;
      if (has_low && has_high) {
        const uint16_t* low = &rows[2 * j]->bits;
        const uint16_t* high = &rows[2 * j + 1]->bits;
        for (int e = 0; e < head_size; ++e) out[e] = low[e] | (static_cast<uint32_t>(high[e]) << 16);
      } else if (has_low) {
        const uint16_t* low = &rows[2 * j]->bits;
        for (int e = 0; e < head_size; ++e) out[e] = low[e];
      } else {
        for (int e = 0; e < head_size; ++e) out[e] = 0;
      }
    } else {
      for (int e = 0; e < head_size; ++e) out[e] = j < valid ? unit_at(rows[j], e) : 0u;
    }
    for (int e = head_size; e < width; ++e) out[e] = 0;
  }
}

// A block of keys (or values) as left operand of both products: `rows` with i the key and k along the head,
// `columns` with i along the head and k the key.
struct KeyBlock {
  Left rows, columns;
};

template <class Input>
struct KeyStorage {
  Input* copied_rows;      // [kKeys, e]
  uint32_t* packed_units;  // [kKeys / kPerUnit, e]
  static KeyStorage take(Scratch& scratch, int head_size) {
    return {scratch.take<Input>(kKeys * head_size), scratch.take<uint32_t>(kKeys * head_size)};
  }
};

// Keys `first` to first + valid of one head. Full blocks of floats, and the rows of bf16 pairs, are used
// where they lie; everything else is copied, zero-padded to kKeys.
template <class Input>
inline KeyBlock key_block(const Input* base, int64_t stride, int valid, int head_size, bool needs_columns,
                          KeyStorage<Input> storage) {
  const Input* rows[kKeys];
  for (int n = 0; n < valid; ++n) rows[n] = base + n * stride;
  KeyBlock block;
  // Rows a multiple of 4 KiB apart share one cache set: a copy costs less than their evictions.
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(Input));
  const bool direct = valid == kKeys && bytes % 4096 != 0;
  constexpr bool wide = sizeof(Input) == 4;
  if constexpr (kPairs<Input> || wide) {
    if (direct) {
      block.rows = {reinterpret_cast<const char*>(base), bytes, 4};
    } else {
      for (int n = 0; n < kKeys; ++n) {
        Input* out = storage.copied_rows + n * head_size;
        if (n < valid) {
          std::memcpy(out, rows[n], sizeof(Input) * head_size);
        } else {
          std::memset(out, 0, sizeof(Input) * head_size);
        }
      }
      block.rows = {reinterpret_cast<const char*>(storage.copied_rows),
                    static_cast<int64_t>(sizeof(Input)) * head_size, 4};
    }
  }
  if constexpr (wide) {
    block.columns = {block.rows.base, 4, block.rows.row};
  } else {
    if (!kPairs<Input> || needs_columns)
      pack_rows(storage.packed_units, rows, valid, kKeys, head_size, head_size);
    const char* packed = reinterpret_cast<const char*>(storage.packed_units);
    block.columns = {packed, 4, static_cast<int64_t>(head_size) * 4};
    if constexpr (!kPairs<Input>) block.rows = {packed, static_cast<int64_t>(head_size) * 4, 4};
  }
  return block;
}

// One sequence of a batch: its first rows in the packed tensors (0 where each has its own batch index).
struct Sequence {
  int64_t query_start, key_start, s, t;
};

inline Sequence sequence(const Problem& problem, int64_t index) {
  if (problem.cu_seqlens_q == nullptr) return {0, 0, problem.max_seqlen_q, problem.max_seqlen_k};
  const int64_t q = problem.cu_seqlens_q[index], k = problem.cu_seqlens_k[index];
  return {q, k, problem.cu_seqlens_q[index + 1] - q, problem.cu_seqlens_k[index + 1] - k};
}

template <class T>
SHAREDPROJ_INLINE T* row_at(T* base, const Strides& strides, int64_t batch, int64_t position, int64_t head) {
  return base + batch * strides.batch + position * strides.seq + head * strides.head;
}

// Index of a row's lse: [b, h, s], packed [h, total_q].
inline int64_t lse_index(const Problem& problem, int64_t batch, int64_t start, int64_t i, int64_t head) {
  if (problem.cu_seqlens_q == nullptr) return (batch * problem.heads + head) * problem.max_seqlen_q + i;
  return head * problem.total_q + start + i;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
