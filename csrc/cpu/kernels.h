// What the dispatcher and the kernels of each instruction set share.
#pragma once

#include <cstdint>

#include "../shared_kv_attention.h"

namespace sharedproj::cpu {

// Runs task(context, i, scratch) for each i in [0, count), started in order, on the caller's threads. Scratch
// is 64-byte aligned memory of a thread's own. Returns null, or what went wrong.
using Task = void (*)(void* context, int64_t index, char* scratch);
using Runner = const char* (*)(int64_t count, int64_t scratch_bytes, Task task, void* context);

struct Kernels {
  const char* capability;
  const char* (*forward)(const ForwardParams&, Runner);
  const char* (*backward)(const BackwardParams&, Runner);
  const char* (*decode)(const DecodeParams&, Runner);
};

// kernels.cpp, compiled once per instruction set; null where it was left out of the build.
namespace baseline {
const Kernels* kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}
namespace avx512_bf16 {
const Kernels* kernels();
}
#endif

}  // namespace sharedproj::cpu
