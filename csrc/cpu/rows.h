// Rows of a cache against single query rows, with the head size across the vector lanes: what a decode step
// of few query rows per group takes, where forward.h's lane blocks would mostly be empty.
//
// Shape legend: e head size, n keys of a block, c chunks of a row (one vector of floats, or 32 bf16).
#pragma once

#include "panels.h"

namespace sharedproj::cpu::SHAREDPROJ_ISA {

// Reads a row in chunks; the last one may be part of a vector.
template <class Input>
struct RowReader {
#if defined(__AVX512BF16__)
  static constexpr bool pairs = sizeof(Input) == 2;
#else
  static constexpr bool pairs = false;
#endif
  static constexpr int chunk = pairs ? 2 * kWidth : kWidth;
  static constexpr int vectors = pairs ? 2 : 1;  // accumulators of a chunk: even and odd elements, or all

#if defined(__AVX512F__)
  using Mask = __mmask32;
  static SHAREDPROJ_INLINE Mask mask(int left) { return left >= chunk ? 0xffffffffu : (1u << left) - 1; }
  static SHAREDPROJ_INLINE Units read(const Input* p, Mask mask) {
    if constexpr (pairs) {
      return _mm512_maskz_loadu_epi16(mask, p);
    } else if constexpr (sizeof(Input) == 4) {
      return _mm512_castps_si512(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
    } else {
      const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
      return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    }
  }
#else
  // kWidth divides 8, and every head size is a multiple of 8: no partial chunks.
  using Mask = int;
  static SHAREDPROJ_INLINE Mask mask(int) { return 0; }
  static SHAREDPROJ_INLINE Units read(const Input* p, Mask) {
    const Vector x = widen(p);
    Units units;
    std::memcpy(&units, &x, sizeof(units));
    return units;
  }
#endif

  // acc += weight * row chunk; for pairs acc[0] holds the even elements, acc[1] the odd ones.
  static SHAREDPROJ_INLINE void weigh(Vector* acc, Vector weight, Units row) {
#if defined(__AVX512F__)
    if constexpr (pairs) {
      acc[0] = fma(weight, _mm512_castsi512_ps(_mm512_slli_epi32(row, 16)), acc[0]);
      const __m512i high = _mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      acc[1] = fma(weight, _mm512_castsi512_ps(high), acc[1]);
      return;
    }
#endif
    acc[0] = fma(weight, as_vector(row), acc[0]);
  }
};

// Lane i of the result is the sum of x[i].
SHAREDPROJ_INLINE Vector sums(const Vector (&x)[kWidth]) {
#if defined(__AVX512F__)
  Vector two[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    two[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(two[2 * i]), high = _mm512_castps_pd(two[2 * i + 1]);
    four[i] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const auto halve = [](Vector a, Vector b) SHAREDPROJ_INLINED {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halve(halve(four[0], four[1]), halve(four[2], four[3]));
#elif defined(__AVX2__)
  const Vector low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const Vector high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
  return Vector{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])};
#endif
}

// A block of keys or values, and the pieces of the next one to fetch while it is read: elements [fetch_from,
// fetch_to) of each. A tied block is read twice and fetches half of its successor each time, which keeps the
// memory busy evenly.
template <class Input>
struct RowBlock {
  const Input* rows;
  int64_t stride;
  const Input* const* ahead;
  int fetch_from, fetch_to;
};

// Running state of one query row over the keys seen so far.
struct RowState {
  float maximum, sum;
  float* out;  // chunk by chunk, in RowReader's order
};

// query[r] . keys[n] of kWidth / rows keys, row by row across the lanes.
template <class Input, int rows>
SHAREDPROJ_INLINE Vector score_tile(const Input* const* queries, const RowBlock<Input>& keys, int first,
                                    int e) {
  using Reader = RowReader<Input>;
  constexpr int together = kWidth / rows;
  Vector acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  for (int k = 0; k < e; k += Reader::chunk) {
    const auto mask = Reader::mask(e - k);
    Units q[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) q[r] = Reader::read(queries[r] + k, mask);
#pragma GCC unroll 16
    for (int n = 0; n < together; ++n) {
      const Units row = Reader::read(keys.rows + (first + n) * keys.stride + k, mask);
      if (k >= keys.fetch_from && k < keys.fetch_to) __builtin_prefetch(keys.ahead[first + n] + k, 0, 2);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
        acc[r * together + n] = dot<Reader::pairs>(acc[r * together + n], row, q[r]);
    }
  }
  return sums(acc);
}

// Tiles of kWidth keys in all -> one vector of scores per row. Whole vectors, since a load that spans several
// stores has to wait for them.
template <int rows>
SHAREDPROJ_INLINE void store_scores(float (*scores)[kKeys], int n, const Vector (&tile)[rows], Vector scale) {
#if defined(__AVX512F__)
  if constexpr (rows == 4) {
    const Vector a = _mm512_shuffle_f32x4(tile[0], tile[1], 0x44),
                 b = _mm512_shuffle_f32x4(tile[0], tile[1], 0xee);
    const Vector c = _mm512_shuffle_f32x4(tile[2], tile[3], 0x44),
                 d = _mm512_shuffle_f32x4(tile[2], tile[3], 0xee);
    store(scores[0] + n, mul(_mm512_shuffle_f32x4(a, c, 0x88), scale));
    store(scores[1] + n, mul(_mm512_shuffle_f32x4(a, c, 0xdd), scale));
    store(scores[2] + n, mul(_mm512_shuffle_f32x4(b, d, 0x88), scale));
    store(scores[3] + n, mul(_mm512_shuffle_f32x4(b, d, 0xdd), scale));
    return;
  } else if constexpr (rows == 2) {
    store(scores[0] + n, mul(_mm512_shuffle_f32x4(tile[0], tile[1], 0x44), scale));
    store(scores[1] + n, mul(_mm512_shuffle_f32x4(tile[0], tile[1], 0xee), scale));
    return;
  }
#endif
  constexpr int together = kWidth / rows;
  for (int i = 0; i < rows; ++i) {
    float flat[kWidth];
    store(flat, mul(tile[i], scale));
    for (int r = 0; r < rows; ++r)
      std::memcpy(scores[r] + n + i * together, flat + r * together, sizeof(float) * together);
  }
}

// scores[r][n] = scale * query[r] . keys[n], base-2 logits
template <class Input, int rows>
inline void score_rows(float (*scores)[kKeys], const Input* const* queries, const RowBlock<Input>& keys,
                       int count, int e, float scale_log2) {
  using Reader = RowReader<Input>;
  constexpr int together = kWidth / rows;
  int n = 0;
  for (; n + kWidth <= count; n += kWidth) {
    Vector tile[rows];
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      tile[i] = score_tile<Input, rows>(queries, keys, n + i * together, e);
    }
    store_scores<rows>(scores, n, tile, broadcast(scale_log2));
  }
  for (; n < count; ++n) {
    for (int r = 0; r < rows; ++r) {
      Vector acc = zero();
      for (int k = 0; k < e; k += Reader::chunk) {
        const auto mask = Reader::mask(e - k);
        const Units row = Reader::read(keys.rows + n * keys.stride + k, mask);
        acc = dot<Reader::pairs>(acc, row, Reader::read(queries[r] + k, mask));
      }
      scores[r][n] = sum(acc) * scale_log2;
    }
  }
}

// One row's scores -> weights in place; keys from `limit` on are not seen. Returns the factor for earlier
// sums.
inline float softmax_row(float* scores, int count, int limit, RowState& state) {
  for (int n = limit < 0 ? 0 : limit; n < round_up(count, kWidth); ++n) scores[n] = -__builtin_inff();
  Vector top = load(scores);
  for (int n = kWidth; n < count; n += kWidth) top = max(top, load(scores + n));
  float maximum = greatest(top);
  maximum = state.maximum > maximum ? state.maximum : maximum;
  const float base = maximum == -__builtin_inff() ? 0.0f : maximum;
  const float rescale = state.maximum == base ? 1.0f : first(exp2(broadcast(state.maximum - base)));
  Vector total = zero();
  for (int n = 0; n < count; n += kWidth) {
    const Vector weight = exp2(sub(load(scores + n), broadcast(base)));
    store(scores + n, weight);
    total = add(total, weight);
  }
  state.maximum = maximum;
  state.sum = state.sum * rescale + sum(total);
  return rescale;
}

// out[r] = rescale[r] * out[r] + sum over n of weights[r][n] values[n], on `chunks` chunks from element k on.
template <class Input, int rows, int chunks>
SHAREDPROJ_INLINE void weigh_tile(RowState* states, const float* rescale, const float (*weights)[kKeys],
                                  const RowBlock<Input>& values, int count, int k, int e) {
  using Reader = RowReader<Input>;
  constexpr int vectors = Reader::vectors;
  Vector acc[rows][chunks * vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < chunks * vectors; ++j)
      acc[r][j] = mul(load(states[r].out + k + j * kWidth), broadcast(rescale[r]));
  const auto mask = Reader::mask(e - k - (chunks - 1) * Reader::chunk), full = Reader::mask(Reader::chunk);
  for (int n = 0; n < count; ++n) {
    const Input* row = values.rows + n * values.stride + k;
    Vector weight[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) weight[r] = broadcast(weights[r][n]);
#pragma GCC unroll 8
    for (int j = 0; j < chunks; ++j) {
      const Units units = Reader::read(row + j * Reader::chunk, j + 1 < chunks ? full : mask);
      const int at = k + j * Reader::chunk;
      if (at >= values.fetch_from && at < values.fetch_to) __builtin_prefetch(values.ahead[n] + at, 0, 2);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) Reader::weigh(acc[r] + j * vectors, weight[r], units);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < chunks * vectors; ++j) store(states[r].out + k + j * kWidth, acc[r][j]);
}

template <class Input, int rows>
inline void weigh_rows(RowState* states, const float* rescale, const float (*weights)[kKeys],
                       const RowBlock<Input>& values, int count, int e) {
  using Reader = RowReader<Input>;
  constexpr int accumulators = kWidth == 16 ? 16 : 8;
  constexpr int most = accumulators / (rows * Reader::vectors);
  int k = 0;
  while (k < e) {
    const int left = (e - k + Reader::chunk - 1) / Reader::chunk;
    if constexpr (most >= 8) {
      if (left >= 8) {
        weigh_tile<Input, rows, 8>(states, rescale, weights, values, count, k, e);
        k += 8 * Reader::chunk;
        continue;
      }
    }
    if constexpr (most >= 4) {
      if (left >= 4) {
        weigh_tile<Input, rows, 4>(states, rescale, weights, values, count, k, e);
        k += 4 * Reader::chunk;
        continue;
      }
    }
    if (left >= 2) {
      weigh_tile<Input, rows, 2>(states, rescale, weights, values, count, k, e);
      k += 2 * Reader::chunk;
    } else {
      weigh_tile<Input, rows, 1>(states, rescale, weights, values, count, k, e);
      k += Reader::chunk;
    }
  }
}

// One block of keys for `rows` query rows; limit[r] keys of it are seen by row r.
template <class Input, int rows>
inline void attend_rows(RowState* states, const Input* const* queries, const RowBlock<Input>& keys,
                        const RowBlock<Input>& values, int count, const int* limit, int e, float scale_log2) {
  alignas(64) float scores[rows][kKeys];
  float rescale[rows];
  score_rows<Input, rows>(scores, queries, keys, count, e, scale_log2);
  for (int r = 0; r < rows; ++r) rescale[r] = softmax_row(scores[r], count, limit[r], states[r]);
  weigh_rows<Input, rows>(states, rescale, scores, values, count, e);
}

// Where element k of a row lies in RowState::out.
template <class Input>
SHAREDPROJ_INLINE int row_position(int k) {
  using Reader = RowReader<Input>;
  if constexpr (!Reader::pairs) return k;
  const int within = k % Reader::chunk;
  return k - within + (within % 2) * kWidth + within / 2;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
