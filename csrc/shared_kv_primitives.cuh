// Device primitives of the attention kernels (sm_80 and later): the only file with inline PTX.
// With SHAREDPROJ_EMULATION the same names come from emulation/emulation.h and the kernels run on the host
// under g++.
//
// Fragments of mma_16x8x16, with r = lane / 4 and c = 2 * (lane % 4):
//   A (16 x 16): a[0] = (r, c..c+1)  a[1] = (r + 8, c..)  a[2] = (r, c + 8..)  a[3] = (r + 8, c + 8..)
//   B (16 x 8):  b0 = (c..c+1, r)    b1 = (c + 8.., r)
//   C (16 x 8):  c[0], c[1] = (r, c..c+1)    c[2], c[3] = (r + 8, c..c+1)
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef SHAREDPROJ_EMULATION
#include "emulation/emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace sharedproj::cuda {

using bf16_t = __nv_bfloat16;
using fp16_t = __half;

__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int block_z() { return blockIdx.z; }
__device__ __forceinline__ int grid_x() { return gridDim.x; }
__device__ __forceinline__ int grid_y() { return gridDim.y; }
__device__ __forceinline__ int grid_z() { return gridDim.z; }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8i .. 8i + 7 give the row addresses of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem))
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Copies 16 bytes, or writes zeros without reading `global` where !valid. Both addresses are 16-byte aligned.
__device__ __forceinline__ void cp_async_16(void* smem, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// For data that is read once: the policy keeps it from displacing other lines of the L2 cache.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t evict_normal_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void cp_async_16(void* smem, const void* global, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(smem)),
               "l"(global), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most N of this thread's groups are still under way; other threads' copies need a barrier
// too.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 2 ^ -infinity is 0; results below 2 ^ -126 are flushed to 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16_t>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    return __bfloat162float(x);
  } else {
    return __half2float(x);
  }
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

template <class T>
__device__ __forceinline__ void unpack2(uint32_t bits, float& low, float& high) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    low = __uint_as_float(bits << 16);
    high = __uint_as_float(bits & 0xffff0000u);
  } else {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
  }
}

__device__ __forceinline__ void atomic_add(float* address, float value) { atomicAdd(address, value); }

// Plain accesses to shared memory go through these two, so that the emulation sees them.
template <class T>
__device__ __forceinline__ T shared_load(const T* smem) {
  return *smem;
}

template <class T>
__device__ __forceinline__ void shared_store(T* smem, T value) {
  *smem = value;
}

struct Grid {
  int64_t x, y, z;
};

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null, or why the launch failed.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) return nullptr;
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return "the launch grid is too large";
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return error_text(cudaLaunchKernelEx(&config, kernel, arguments...));
}

inline const char* memset_async(void* address, int value, size_t bytes, void* stream) {
  return error_text(cudaMemsetAsync(address, value, bytes, static_cast<cudaStream_t>(stream)));
}

inline int multiprocessor_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

}  // namespace sharedproj::cuda

#endif  // SHAREDPROJ_EMULATION
