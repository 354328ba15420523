// CPU entry points: argument checks, choice of the instruction set, and the threads.
//
// The kernels themselves are in cpu/: vector.h (one vector per instruction set), panels.h (packing and the
// register tile), forward.h, backward.h, rows.h and decode.h.
#include <ATen/Parallel.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "shared_kv_attention.h"

namespace sharedproj::cpu {
namespace {

// The best that this processor has, or at most what SHAREDPROJ_CPU_CAPABILITY names (tests run every path by
// it).
const Kernels* choose() {
  const char* limit = std::getenv("SHAREDPROJ_CPU_CAPABILITY");
  const Kernels* best = baseline::kernels();
  const auto consider = [&](bool supported, const Kernels* candidate) {
    const bool limited = limit != nullptr && std::strcmp(limit, best->capability) == 0;
    if (supported && !limited) best = candidate;
    return supported && !limited;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  consider(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::kernels()) &&
      consider(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
               avx512::kernels()) &&
      consider(__builtin_cpu_supports("avx512bf16"), avx512_bf16::kernels());
#endif
  return best;
}

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

constexpr int64_t kTurns = 16;  // that a thread takes on average, if there are as many tasks

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

// Kept per thread between calls: a fresh allocation of this size would fault in its pages every time.
char* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, rounded)));
    size = memory == nullptr ? 0 : rounded;
  }
  return memory.get();
}

// Tasks differ in length (a causal mask, packed sequences): each thread takes the next `turn` ones when it is
// free.
const char* run(int64_t turn, int64_t count, int64_t scratch_bytes, Task task, void* context) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const auto work = [&] {
    char* scratch = thread_scratch(scratch_bytes + 64);
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t first = next.fetch_add(turn); first < count; first = next.fetch_add(turn))
      for (int64_t index = first; index < count && index < first + turn; ++index)
        task(context, index, scratch);
  };
  const int64_t threads = count < at::get_num_threads() ? count : at::get_num_threads();
  if (threads <= 1 || at::in_parallel_region()) {
    work();
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
  }
  return out_of_memory && next < count ? "out of memory for the kernel's scratch space" : nullptr;
}

const char* run_singly(int64_t count, int64_t scratch_bytes, Task task, void* context) {
  return run(1, count, scratch_bytes, task, context);
}

// For many tasks of one length, each of which fetches what the one behind it reads.
const char* run_in_turns(int64_t count, int64_t scratch_bytes, Task task, void* context) {
  const int64_t turn = count / (kTurns * at::get_num_threads());
  return run(turn < 1 ? 1 : turn, count, scratch_bytes, task, context);
}

const char* check(DType dtype, int32_t heads, int32_t groups, int32_t head_size) {
  if (dtype == DType::kFloat16) return "float16 on a CPU: accepted are float32 and bfloat16";
  if (head_size % 8 != 0 || head_size < 8 || head_size > 256)
    return "head size on a CPU: accepted are multiples of 8 from 8 to 256";
  if (groups < 1 || heads % groups != 0) return "groups: must divide the query heads";
  return nullptr;
}

const char* check(const Problem& problem) {
  if (const char* error = check(problem.dtype, problem.heads, problem.groups, problem.head_size))
    return error;
  if (problem.max_seqlen_q > INT32_MAX || problem.max_seqlen_k > INT32_MAX)
    return "sequence length: accepted are lengths below 2^31";
  return nullptr;
}

}  // namespace

const char* forward(const ForwardParams& params) {
  if (const char* error = check(params.problem)) return error;
  return kernels().forward(params, run_singly);
}

const char* backward(const BackwardParams& params) {
  if (const char* error = check(params.problem)) return error;
  return kernels().backward(params, run_singly);
}

const char* decode(const DecodeParams& params) {
  if (const char* error = check(params.dtype, params.heads, params.groups, params.head_size)) return error;
  return kernels().decode(params, run_in_turns);
}

const char* capability() { return kernels().capability; }

}  // namespace sharedproj::cpu
