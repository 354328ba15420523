// Host twin of the device primitives: one fiber per CUDA thread; the kernels run under g++ without a GPU.
//
// What it checks: threads of a warp meet in the same collective; every thread reaches a barrier; shared
// memory starts as NaN and each access through a primitive is inside it; two warps never touch a word between
// the same two barriers when one of them writes, nor two lanes between the same two sync_warp; the data of
// cp.async lands only at the wait that covers it (NaN before) and comes from the tensors; bank conflicts.
// Warps, lanes and blocks run in an order that the seed chooses. What it cannot check: the PTX text itself.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace sharedproj::emulation {

enum AccessKind { kLdmatrix = 0, kLoad = 1, kStore = 2, kAsyncCopy = 3, kAccessKinds = 4 };
enum CollectiveKind {
  kCollectiveLdmatrix,
  kCollectiveLdmatrixTrans,
  kCollectiveMma,
  kCollectiveShuffle,
  kCollectiveSync
};

// What the running fiber sees; one OS thread runs all of them.
struct Current {
  int thread, block[3], grid[3];
  uint8_t* shared;
  size_t shared_bytes;
};
extern Current current;

struct MatrixArguments {
  uint32_t* result;
  const void* address;
};

struct MmaArguments {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
  bool bf16;
};

struct ShuffleArguments {
  float value, result;
  int mask;
};

// Returns when all 32 lanes of the warp have arrived and the collective was carried out.
void collective(CollectiveKind kind, void* arguments);
void block_barrier();
// Checks bounds and races, notes the access for the count of bank conflicts; false: outside shared memory.
bool shared_access(const void* address, int bytes, AccessKind kind, int site);
void async_copy(void* smem, const void* global, bool valid, int site);
void async_commit();
void async_wait(int groups_left);
const char* run_grid(const int64_t grid[3], int threads, size_t shared_bytes, void (*kernel)(void*),
                     void* context);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
extern int multiprocessors;

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace sharedproj::emulation

namespace sharedproj::cuda {

struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint8_t* shared_memory() { return emulation::current.shared; }
inline int thread_index() { return emulation::current.thread; }
inline int lane_index() { return emulation::current.thread % 32; }
inline int warp_index() { return emulation::current.thread / 32; }
inline int block_x() { return emulation::current.block[0]; }
inline int block_y() { return emulation::current.block[1]; }
inline int block_z() { return emulation::current.block[2]; }
inline int grid_x() { return emulation::current.grid[0]; }
inline int grid_y() { return emulation::current.grid[1]; }
inline int grid_z() { return emulation::current.grid[2]; }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  emulation::MatrixArguments arguments{r, smem};
  emulation::collective(emulation::kCollectiveLdmatrix, &arguments);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  emulation::MatrixArguments arguments{r, smem};
  emulation::collective(emulation::kCollectiveLdmatrixTrans, &arguments);
}

template <class T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MmaArguments arguments{c, a, b0, b1, std::is_same_v<T, bf16_t>};
  emulation::collective(emulation::kCollectiveMma, &arguments);
}

inline void cp_async_16(void* smem, const void* global, bool valid, uint64_t = 0,
                        int site = __builtin_LINE()) {
  emulation::async_copy(smem, global, valid, site);
}
inline uint64_t evict_first_policy() { return 0; }
inline uint64_t evict_normal_policy() { return 0; }
inline void cp_async_commit() { emulation::async_commit(); }

template <int N>
inline void cp_async_wait() {
  emulation::async_wait(N);
}

inline void sync_block() { emulation::block_barrier(); }
inline void sync_warp() { emulation::collective(emulation::kCollectiveSync, nullptr); }

inline float shuffle_xor(float value, int mask) {
  emulation::ShuffleArguments arguments{value, 0.f, mask};
  emulation::collective(emulation::kCollectiveShuffle, &arguments);
  return arguments.result;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
inline float log2_fast(float x) { return std::log2(x); }

template <class T>
inline float to_float(T x) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    return emulation::bits_to_float(static_cast<uint32_t>(x.bits) << 16);
  } else {
    return emulation::half_to_float(x.bits);
  }
}

template <class T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    return bf16_t{emulation::float_to_bfloat16(x)};
  } else {
    return fp16_t{emulation::float_to_half(x)};
  }
}

template <class T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T>
inline void unpack2(uint32_t bits, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(bits & 0xffffu)});
  high = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

inline void atomic_add(float* address, float value) { *address += value; }

template <class T>
inline T shared_load(const T* smem, int site = __builtin_LINE()) {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof(T));
  if (emulation::shared_access(smem, sizeof(T), emulation::kLoad, site)) value = *smem;
  return value;
}

template <class T>
inline void shared_store(T* smem, T value, int site = __builtin_LINE()) {
  if (emulation::shared_access(smem, sizeof(T), emulation::kStore, site)) *smem = value;
}

struct Grid {
  int64_t x, y, z;
};

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void*,
                   Arguments... arguments) {
  const int64_t extent[3] = {grid.x, grid.y, grid.z};
  auto call = [&] { kernel(arguments...); };
  const auto thread = [](void* context) { (*static_cast<decltype(call)*>(context))(); };
  return emulation::run_grid(extent, threads, shared_bytes, thread, &call);
}

inline const char* memset_async(void* address, int value, size_t bytes, void*) {
  std::memset(address, value, bytes);
  return nullptr;
}

inline int multiprocessor_count() { return emulation::multiprocessors; }

}  // namespace sharedproj::cuda
