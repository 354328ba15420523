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

// A block of `count` keys of `groups` groups, and what to fetch while it is read: the line `ahead` bytes
// behind each, and the line `other` bytes behind where that is not 0.
template <class Input>
struct RowBlock {
  const Input* rows;
  int64_t seq, head;
  int groups, count;
  int64_t ahead, other;

  // Whether all heads of all keys lie at one stride.
  bool one_run() const { return groups == 1 || seq == groups * head; }
};

SHAREDPROJ_INLINE void fetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// Keeps pointers as running ones: the compiler would compute all of a tile's beforehand and spill them.
#define SHAREDPROJ_STEP(a, b) asm("" : "+r"(a), "+r"(b))

// Scores of kWidth / rows successive keys of `stride`: lane n * rows + r holds query row r of the n-th.
template <class Input, int rows, int chunks>
SHAREDPROJ_INLINE Vector score_tile(const Input* query, int64_t query_stride, int64_t group_stride,
                                    const Input* keys, int64_t stride, int e, int64_t ahead, int64_t other) {
  using Reader = RowReader<Input>;
  constexpr int together = kWidth / rows;
  Vector acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  const auto mask = Reader::mask(e % Reader::chunk == 0 ? Reader::chunk : e % Reader::chunk),
             full = Reader::mask(Reader::chunk);
#pragma GCC unroll 16
  for (int n = 0; n < together; ++n) {
    const auto read = [&](int k, auto mask) SHAREDPROJ_INLINED {
      const Units units = Reader::read(keys + k, mask);
      fetch(reinterpret_cast<const char*>(keys + k) + ahead);
      if (other != 0) fetch(reinterpret_cast<const char*>(keys + k) + other);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
        acc[n * rows + r] =
            dot<Reader::pairs>(acc[n * rows + r], units, Reader::read(query + r * query_stride + k, mask));
    };
#pragma GCC unroll 4
    for (int k = 0; k < (chunks - 1) * Reader::chunk; k += Reader::chunk) read(k, full);
    int k = (chunks - 1) * Reader::chunk;
    if constexpr (chunks == 0)
      for (k = 0; k + Reader::chunk < e; k += Reader::chunk) read(k, full);
    read(k, mask);
    keys += stride;
    query += group_stride;
    SHAREDPROJ_STEP(keys, query);
  }
  return sums(acc);
}

template <class Input>
SHAREDPROJ_INLINE float score(const Input* query, const Input* key, int e) {
  using Reader = RowReader<Input>;
  Vector acc = zero();
  for (int k = 0; k < e; k += Reader::chunk) {
    const auto mask = Reader::mask(e - k);
    acc = dot<Reader::pairs>(acc, Reader::read(key + k, mask), Reader::read(query + k, mask));
  }
  return sum(acc);
}

// scores[(n * groups + g) * all_rows + r] = query[g][r] . keys[n][g] for `rows` of a group's query rows. The
// keys are read once, in the order in which they lie in memory, line by line: read in any other order, the
// memory delivers a third less.
template <class Input, int rows, int chunks>
inline void score_rows(float* scores, const Input* queries, int64_t query_stride, int all_rows,
                       const RowBlock<Input>& keys, int e) {
  constexpr int together = kWidth / rows;
  const bool one_run = keys.one_run();
  const int64_t stride = keys.groups == 1 ? keys.seq : keys.head, group_stride = all_rows * query_stride;
  const int run = one_run ? keys.count * keys.groups : keys.groups;
  for (int key = 0; key < (one_run ? 1 : keys.count); ++key) {
    const Input* first = keys.rows + key * keys.seq;
    float* out = scores + static_cast<int64_t>(key) * keys.groups * all_rows;
    if (run < together) {
      for (int n = 0; n < run; ++n)
        for (int r = 0; r < rows; ++r)
          out[n * all_rows + r] =
              score(queries + n % keys.groups * group_stride + r * query_stride, first + n * stride, e);
      continue;
    }
    for (int next = 0; next < run; next += together) {
      const int n = next + together <= run ? next : run - together;  // the last tile may overlap
      const Vector tile = score_tile<Input, rows, chunks>(queries + n % keys.groups * group_stride,
                                                          query_stride, group_stride, first + n * stride,
                                                          stride, e, keys.ahead, keys.other);
      if (rows == all_rows) {
        store(out + n * rows, tile);
      } else {
        float flat[kWidth];
        store(flat, tile);
        for (int m = 0; m < together; ++m)
          std::memcpy(out + (n + m) * all_rows, flat + m * rows, sizeof(float) * rows);
      }
    }
  }
}

// Running states of query rows over the keys seen so far, lane by lane.
struct RowStates {
  float *maximum, *sum, *rescale;
  int32_t* limit;  // keys that the row sees
  float* out;      // [rows, padded e], chunk by chunk, in RowReader's order
};

// Scores [count, rows] -> weights [count, lanes], and the factors for the earlier sums. Keys from a row's
// limit on are not seen.
inline void softmax_rows(float* weights, const float* scores, int rows, int count, int64_t first, bool masked,
                         float scale_log2, const RowStates& states) {
  const int lanes = round_up(rows, kWidth);
  const Vector scale = broadcast(scale_log2), hidden = broadcast(-__builtin_inff());
  for (int m = 0; m < lanes; m += kWidth) {
    const auto logit = [&](int n) SHAREDPROJ_INLINED {
      const Vector x = mul(load(scores + n * rows + m), scale);
      return masked ? where_below(states.limit + m, static_cast<int32_t>(first + n), x, hidden) : x;
    };
    const Vector before = load(states.maximum + m);
    Vector top = before;
    for (int n = 0; n < count; ++n) top = max(top, logit(n));
    const Vector base = where_finite(top, zero());
    const Vector rescale = exp2(sub(before, base));
    Vector total = zero();  // of this block: a sum over all keys, one by one, loses digits
    for (int n = 0; n < count; ++n) {
      const Vector weight = exp2(sub(logit(n), base));
      total = add(total, weight);
      store(weights + n * lanes + m, weight);
    }
    store(states.maximum + m, top);
    store(states.sum + m, fma(load(states.sum + m), rescale, total));
    store(states.rescale + m, rescale);
  }
}

// out[r] = rescale[r] * out[r] + sum over n of weights[n][r] values[n], on `chunks` chunks from element k on.
template <class Input, int rows, int chunks>
SHAREDPROJ_INLINE void weigh_tile(float* out, int64_t out_stride, const float* rescale, const float* weights,
                                  int lanes, const Input* values, int64_t stride, int count, int k, int e,
                                  const char* ahead, int64_t ahead_step) {
  using Reader = RowReader<Input>;
  constexpr int vectors = Reader::vectors;
  Vector acc[rows][chunks * vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < chunks * vectors; ++j)
      acc[r][j] = mul(load(out + r * out_stride + k + j * kWidth), broadcast(rescale[r]));
  const auto mask = Reader::mask(e - k - (chunks - 1) * Reader::chunk), full = Reader::mask(Reader::chunk);
  for (int n = 0; n < count; ++n) {
    const Input* row = values + n * stride + k;
    fetch(ahead + n * ahead_step);
    Vector weight[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) weight[r] = broadcast(weights[n * lanes + r]);
#pragma GCC unroll 8
    for (int j = 0; j < chunks; ++j) {
      const Units units = Reader::read(row + j * Reader::chunk, j + 1 < chunks ? full : mask);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) Reader::weigh(acc[r] + j * vectors, weight[r], units);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < chunks * vectors; ++j) store(out + r * out_stride + k + j * kWidth, acc[r][j]);
}

// One group's values for `rows` of its query rows. With each key, the line at `ahead` is fetched,
// `ahead_step` bytes further each time.
template <class Input, int rows>
inline void weigh_rows(float* out, int64_t out_stride, const float* rescale, const float* weights, int lanes,
                       const Input* values, int64_t stride, int count, int e, const char* ahead,
                       int64_t ahead_step) {
  using Reader = RowReader<Input>;
  constexpr int accumulators = kWidth == 16 ? 16 : 8;
  constexpr int most = accumulators / (rows * Reader::vectors);
  int k = 0;
  while (k < e) {
    const int left = (e - k + Reader::chunk - 1) / Reader::chunk;
    const auto tile = [&](auto chunks) SHAREDPROJ_INLINED {
      weigh_tile<Input, rows, chunks.value>(out, out_stride, rescale, weights, lanes, values, stride, count,
                                            k, e, ahead, ahead_step);
      k += chunks.value * Reader::chunk;
    };
    if constexpr (most >= 8) {
      if (left >= 8) {
        tile(Constant<8>{});
        continue;
      }
    }
    if constexpr (most >= 4) {
      if (left >= 4) {
        tile(Constant<4>{});
        continue;
      }
    }
    if (left >= 2)
      tile(Constant<2>{});
    else
      tile(Constant<1>{});
  }
}

// Where element k of a row lies in RowStates::out.
template <class Input>
SHAREDPROJ_INLINE int row_position(int k) {
  using Reader = RowReader<Input>;
  if constexpr (!Reader::pairs) return k;
  const int within = k % Reader::chunk;
  return k - within + (within % 2) * kWidth + within / 2;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
