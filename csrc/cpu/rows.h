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
  static constexpr int vectors = pairs ? 2 : 1;  // accumulators of a chunk
  static constexpr int keys = pairs ? 2 : 1;     // keys of a unit of weights: a float, or a pair of bf16

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

  // acc += weights * chunk at `row` and, for pairs, at the row `stride` behind it if the pair is whole. For
  // pairs acc[0] holds elements 0 to 3 of each 8, acc[1] elements 4 to 7.
  template <int rows, bool whole>
  static SHAREDPROJ_INLINE void weigh(Vector* acc, int64_t acc_stride, const Units (&weights)[rows],
                                      const Input* row, int64_t stride, Mask mask) {
    const Units first = read(row, mask);
#if defined(__AVX512BF16__)
    if constexpr (pairs) {
      const Units second = whole ? read(row + stride, mask) : _mm512_setzero_si512();
      const Units low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        acc[r * acc_stride] = dot_pairs(acc[r * acc_stride], low, weights[r]);
        acc[r * acc_stride + 1] = dot_pairs(acc[r * acc_stride + 1], high, weights[r]);
      }
      return;
    }
#endif
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
      acc[r * acc_stride] = fma(as_vector(weights[r]), as_vector(first), acc[r * acc_stride]);
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

// What is fetched while a block is read: `lines` lines from row(n, g) on with key n of group g.
struct Ahead {
  const char* rows;
  int64_t seq, head;  // bytes
  int lines;

  const char* row(int64_t n, int64_t g) const { return rows + n * seq + g * head; }
};

// To the second cache only: the first would be full of fetches under way, and the memory wait for it.
SHAREDPROJ_INLINE void fetch(const char* address) { __builtin_prefetch(address, 0, 2); }
SHAREDPROJ_INLINE void fetch(const char* address, int lines) {
  fetch(address);
  for (int line = 1; line < lines; ++line) fetch(address + 64 * line);
}

// A block of `count` keys of `groups` groups. Fetches are dropped where too many are under way: with each
// line that is read, the ones `again` bytes behind it, and `other` if that is not 0, are asked for once more.
template <class Input>
struct RowBlock {
  const Input* rows;
  int64_t seq, head;
  int groups, count;
  int64_t again, other;

  // Whether all heads of all keys lie at one stride.
  bool one_run() const { return groups == 1 || seq == groups * head; }
};

// Keeps pointers as running ones: the compiler would compute all of a tile's beforehand and spill them.
#define SHAREDPROJ_STEP(a, b, c) asm("" : "+r"(a), "+r"(b), "+r"(c))

// Calls read(k, mask) for each chunk of a row, from element k on; 0 chunks: as many as e needs.
template <class Input, int chunks, class Read>
SHAREDPROJ_INLINE void in_chunks(int e, Read read) {
  using Reader = RowReader<Input>;
  const auto mask = Reader::mask(e % Reader::chunk == 0 ? Reader::chunk : e % Reader::chunk),
             full = Reader::mask(Reader::chunk);
#pragma GCC unroll 4
  for (int k = 0; k < (chunks - 1) * Reader::chunk; k += Reader::chunk) read(k, full);
  int k = (chunks - 1) * Reader::chunk;
  if constexpr (chunks == 0)
    for (k = 0; k + Reader::chunk < e; k += Reader::chunk) read(k, full);
  read(k, mask);
}

// Scores of kWidth / rows successive keys of `stride`: lane n * rows + r holds query row r of the n-th.
template <class Input, int rows, int chunks>
SHAREDPROJ_INLINE Vector score_tile(const Input* query, int64_t query_stride, int64_t group_stride,
                                    const Input* keys, int64_t stride, int e, int64_t again, int64_t other,
                                    const char* ahead, int64_t ahead_stride, int lines) {
  using Reader = RowReader<Input>;
  constexpr int together = kWidth / rows;
  Vector acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
#pragma GCC unroll 16
  for (int n = 0; n < together; ++n) {
    const auto read = [&](int k, auto mask) SHAREDPROJ_INLINED {
      const Units units = Reader::read(keys + k, mask);
      fetch(reinterpret_cast<const char*>(keys + k) + again);
      if (other != 0) fetch(reinterpret_cast<const char*>(keys + k) + other);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
        acc[n * rows + r] =
            dot<Reader::pairs>(acc[n * rows + r], units, Reader::read(query + r * query_stride + k, mask));
    };
    fetch(ahead, lines);
    in_chunks<Input, chunks>(e, read);
    keys += stride;
    query += group_stride;
    ahead += ahead_stride;
    SHAREDPROJ_STEP(keys, query, ahead);
  }
  return sums(acc);
}

// The same with the same query rows for all keys, each read once per chunk.
template <class Input, int rows, int chunks>
SHAREDPROJ_INLINE Vector score_group_tile(const Input* query, int64_t query_stride, const Input* keys,
                                          int64_t stride, int e, int64_t again, int64_t other,
                                          const char* ahead, int64_t ahead_stride, int lines) {
  using Reader = RowReader<Input>;
  constexpr int together = kWidth / rows;
  Vector acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  for (int n = 0; n < together; ++n) fetch(ahead + n * ahead_stride, lines);
  const auto read = [&](int k, auto mask) SHAREDPROJ_INLINED {
    Units units[together];
#pragma GCC unroll 16
    for (int n = 0; n < together; ++n) {
      units[n] = Reader::read(keys + n * stride + k, mask);
      fetch(reinterpret_cast<const char*>(keys + n * stride + k) + again);
      if (other != 0) fetch(reinterpret_cast<const char*>(keys + n * stride + k) + other);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Units q = Reader::read(query + r * query_stride + k, mask);
#pragma GCC unroll 16
      for (int n = 0; n < together; ++n)
        acc[n * rows + r] = dot<Reader::pairs>(acc[n * rows + r], units[n], q);
    }
  };
  in_chunks<Input, chunks>(e, read);
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

// From this many query rows of a group on, reading them costs more than the keys' order: those are read group
// by group, since all but the first read of a line is from a cache.
constexpr int kGroupRows = 4;

// scores[(n * groups + g) * all_rows + r] = query[g][r] . keys[n][g] for `rows` of a group's query rows. The
// keys of fewer rows are read once, in the order in which they lie in memory, line by line: read in any other
// order, the memory delivers a third less.
template <class Input, int rows, int chunks>
inline void score_rows(float* scores, const Input* queries, int64_t query_stride, int all_rows,
                       const RowBlock<Input>& keys, int e, const Ahead& ahead) {
  constexpr int together = kWidth / rows;
  if (rows >= kGroupRows && keys.groups > 1 && keys.count >= together) {
    for (int g = 0; g < keys.groups; ++g) {
      const Input* first = keys.rows + g * keys.head;
      for (int next = 0; next < keys.count; next += together) {
        const int n = next + together <= keys.count ? next : keys.count - together;
        const Vector tile = score_group_tile<Input, rows, chunks>(
            queries + g * all_rows * query_stride, query_stride, first + n * keys.seq, keys.seq, e,
            keys.again, keys.other, ahead.row(n, g), ahead.seq, ahead.lines);
        float flat[kWidth];
        store(flat, tile);
        for (int m = 0; m < together; ++m)
          std::memcpy(scores + (static_cast<int64_t>(n + m) * keys.groups + g) * all_rows, flat + m * rows,
                      sizeof(float) * rows);
      }
    }
    return;
  }
  const bool one_run = keys.one_run();
  const int64_t stride = keys.groups == 1 ? keys.seq : keys.head, group_stride = all_rows * query_stride,
                ahead_stride = keys.groups == 1 ? ahead.seq : ahead.head;
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
      const Vector tile = score_tile<Input, rows, chunks>(
          queries + n % keys.groups * group_stride, query_stride, group_stride, first + n * stride, stride, e,
          keys.again, keys.other, ahead.row(key, 0) + n * ahead_stride, ahead_stride, ahead.lines);
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

// Scores [count, rows] -> weights [count / keys of a unit, lanes], and the factors for the earlier sums. Keys
// from a row's limit on are not seen.
template <class Input>
inline void softmax_rows(uint32_t* weights, const float* scores, int rows, int count, int64_t first,
                         bool masked, float scale_log2, const RowStates& states) {
  constexpr int keys = RowReader<Input>::keys;
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
    for (int n = 0; n < count; n += keys) {
      const Vector weight = exp2(sub(logit(n), base));
      total = add(total, weight);
#if defined(__AVX512BF16__)
      if constexpr (keys == 2) {
        const Vector next = n + 1 < count ? exp2(sub(logit(n + 1), base)) : zero();
        total = add(total, next);
        store_units(weights + n / 2 * lanes + m, pair(weight, next));
      }
#endif
      if constexpr (keys == 1) store(reinterpret_cast<float*>(weights) + n * lanes + m, weight);
    }
    store(states.maximum + m, top);
    store(states.sum + m, fma(load(states.sum + m), rescale, total));
    store(states.rescale + m, rescale);
  }
}

// out[r] = rescale[r] * out[r] + sum over n of weights[n][r] values[n], on `chunks` chunks from element k on.
template <class Input, int rows, int chunks>
SHAREDPROJ_INLINE void weigh_tile(float* out, int64_t out_stride, const float* rescale,
                                  const uint32_t* weights, int lanes, const Input* values, int64_t stride,
                                  int count, int k, int e, const char* ahead, int64_t ahead_stride,
                                  int lines) {
  using Reader = RowReader<Input>;
  constexpr int vectors = Reader::vectors;
  Vector acc[rows][chunks * vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < chunks * vectors; ++j)
      acc[r][j] = mul(load(out + r * out_stride + k + j * kWidth), broadcast(rescale[r]));
  const auto mask = Reader::mask(e - k - (chunks - 1) * Reader::chunk), full = Reader::mask(Reader::chunk);
  const Input* row = values + k;
  const auto unit = [&](auto whole) SHAREDPROJ_INLINED {
    for (int n = 0; n < (whole.value ? Reader::keys : 1); ++n) {
      fetch(ahead, lines);
      ahead += ahead_stride;
    }
    Units weight[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) weight[r] = broadcast_unit(reinterpret_cast<const char*>(weights + r));
#pragma GCC unroll 8
    for (int j = 0; j < chunks; ++j)
      Reader::template weigh<rows, whole.value>(acc[0] + j * vectors, chunks * vectors, weight,
                                                row + j * Reader::chunk, stride,
                                                j + 1 < chunks ? full : mask);
    row += Reader::keys * stride;
    weights += lanes;
  };
  for (int n = Reader::keys; n <= count; n += Reader::keys) unit(Constant<true>{});
  if (count % Reader::keys != 0) unit(Constant<false>{});
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < chunks * vectors; ++j) store(out + r * out_stride + k + j * kWidth, acc[r][j]);
}

// One group's values for `rows` of its query rows. With each key, `lines` lines at `ahead` are fetched,
// `ahead_stride` bytes further each time.
template <class Input, int rows>
inline void weigh_rows(float* out, int64_t out_stride, const float* rescale, const uint32_t* weights,
                       int lanes, const Input* values, int64_t stride, int count, int e, const char* ahead,
                       int64_t ahead_stride, int lines) {
  using Reader = RowReader<Input>;
  constexpr int accumulators = kWidth == 16 ? 16 : 8;
  constexpr int most = accumulators / (rows * Reader::vectors);
  int k = 0;
  while (k < e) {
    const int left = (e - k + Reader::chunk - 1) / Reader::chunk;
    const auto tile = [&](auto chunks) SHAREDPROJ_INLINED {
      weigh_tile<Input, rows, chunks.value>(out, out_stride, rescale, weights, lanes, values, stride, count,
                                            k, e, ahead, ahead_stride, lines);
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
  return k - within + within / 4 % 2 * kWidth + within / 8 * 4 + within % 4;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
