// What the emulated instructions compute, and what an access to shared memory costs; nothing here knows of
// fibers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "emulation.h"

namespace sharedproj::emulation {

inline void split(uint32_t pair, bool bf16, float& low, float& high) {
  low = bf16 ? bits_to_float(pair << 16) : half_to_float(static_cast<uint16_t>(pair));
  high = bf16 ? bits_to_float(pair & 0xffff0000u) : half_to_float(static_cast<uint16_t>(pair >> 16));
}

// mma_16x8x16; the 32 lanes' MmaArguments.
inline void multiply(void* const* lanes) {
  typedef float Row __attribute__((vector_size(32)));
  float a[16][16];
  alignas(32) float b[16][8], c[16][8];
  for (int i = 0; i < 32; ++i) {
    const auto& arguments = *static_cast<const MmaArguments*>(lanes[i]);
    const int r = i / 4, k = i % 4 * 2;
    split(arguments.a[0], arguments.bf16, a[r][k], a[r][k + 1]);
    split(arguments.a[1], arguments.bf16, a[r + 8][k], a[r + 8][k + 1]);
    split(arguments.a[2], arguments.bf16, a[r][k + 8], a[r][k + 9]);
    split(arguments.a[3], arguments.bf16, a[r + 8][k + 8], a[r + 8][k + 9]);
    split(arguments.b0, arguments.bf16, b[k][r], b[k + 1][r]);
    split(arguments.b1, arguments.bf16, b[k + 8][r], b[k + 9][r]);
    c[r][k] = arguments.c[0];
    c[r][k + 1] = arguments.c[1];
    c[r + 8][k] = arguments.c[2];
    c[r + 8][k + 1] = arguments.c[3];
  }
  for (int m = 0; m < 16; ++m) {
    Row sum = *reinterpret_cast<Row*>(c[m]);
    for (int k = 0; k < 16; ++k) sum += a[m][k] * *reinterpret_cast<Row*>(b[k]);
    *reinterpret_cast<Row*>(c[m]) = sum;
  }
  for (int i = 0; i < 32; ++i) {
    float* out = static_cast<const MmaArguments*>(lanes[i])->c;
    const int r = i / 4, k = i % 4 * 2;
    out[0] = c[r][k];
    out[1] = c[r][k + 1];
    out[2] = c[r + 8][k];
    out[3] = c[r + 8][k + 1];
  }
}

// The 32 lanes' ShuffleArguments.
inline void shuffle(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    auto* arguments = static_cast<ShuffleArguments*>(lanes[i]);
    const int from = i ^ arguments->mask;
    arguments->result = from < 32 ? static_cast<ShuffleArguments*>(lanes[from])->value : arguments->value;
  }
}

// Each phase of an access serves 128 bytes; different words in one bank need further turns. An access of 16
// bytes takes one of 8 groups of banks, a smaller one 1 or 2 of 32.
struct Access {
  uint32_t offset;
  uint16_t bytes;
  uint8_t kind;
  int32_t site;
};

// Extra turns of one access by `lanes` lanes. Each phase serves 128 bytes; different words in one bank need
// further turns. An access of 16 bytes takes one of 8 groups of banks, a smaller one 1 or 2 of 32.
inline int conflicts_of(const Access* row, const bool* present, int lanes) {
  int first = 0;
  while (!present[first]) ++first;
  const int unit = row[first].bytes == 16 ? 16 : 4, banks = 128 / unit;
  const int units = std::max(row[first].bytes / unit, 1);
  const int lanes_per_phase = std::min(32, 128 / std::max<int>(row[first].bytes, 4));
  uint32_t occupants[32][32];
  int extra = 0;
  for (int phase = 0; phase < lanes; phase += lanes_per_phase) {
    int counts[32] = {}, turns = 1;
    for (int i = phase; i < phase + lanes_per_phase; ++i) {
      if (!present[i]) continue;
      for (int u = 0; u < units; ++u) {
        const uint32_t word = row[i].offset / unit + u, bank = word % banks;
        uint32_t* begin = occupants[bank];
        if (std::find(begin, begin + counts[bank], word) != begin + counts[bank]) continue;
        begin[counts[bank]++] = word;
        turns = std::max(turns, counts[bank]);
      }
    }
    extra += turns - 1;
  }
  return extra;
}

}  // namespace sharedproj::emulation
