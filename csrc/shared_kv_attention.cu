// Entry points of the CUDA kernels: refuse what they cannot do, then dispatch on dtype and head size.
#include "shared_kv_attention.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>

#include "shared_kv_backward.cuh"
#include "shared_kv_decode.cuh"
#include "shared_kv_forward.cuh"

namespace sharedproj::cuda {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 30;  // keeps positions inside a sequence in 32 bits

// Refusals are few and differ little, so that keeping each for ever costs nothing.
const char* refuse(const std::string& message) {
  static std::mutex mutex;
  static std::set<std::string> messages;
  const std::lock_guard<std::mutex> lock(mutex);
  return messages.insert("shared_kv_attention (CUDA): " + message).first->c_str();
}

const char* refuse(const char* name, int64_t value, const char* accepted) {
  return refuse(std::string(name) + " is " + std::to_string(value) + "; accepted: " + accepted);
}

const char* check_sizes(DType dtype, int64_t batch, int64_t heads, int64_t groups, int64_t head_size,
                        float scale) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return refuse("dtype", static_cast<int64_t>(dtype), "1 (bfloat16) or 2 (float16)");
  }
  if (head_size != 64 && head_size != 80 && head_size != 128) {
    return refuse("head_size", head_size, "64, 80 or 128");
  }
  if (batch < 0) return refuse("batch", batch, "0 or more");
  if (groups < 1) return refuse("groups", groups, "1 or more");
  if (heads < groups || heads % groups != 0) return refuse("heads", heads, "a multiple of groups");
  if (!(scale > 0.f) || !std::isfinite(scale)) {
    return refuse("scale is " + std::to_string(scale) + "; accepted: finite and above 0");
  }
  return nullptr;
}

// Rows are read and written 16 bytes at a time.
const char* check_tensor(const char* name, const void* pointer, const Strides& strides, int64_t batch,
                         int64_t rows, int64_t heads) {
  if (batch == 0 || rows == 0) return nullptr;
  const std::string prefix = name;
  if (pointer == nullptr) return refuse(prefix + " is null; accepted: a pointer to device memory");
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
    return refuse((prefix + " address modulo 16").c_str(), reinterpret_cast<uintptr_t>(pointer) % 16, "0");
  }
  const struct {
    const char* what;
    int64_t stride, extent;
  } dimensions[] = {{" batch stride", strides.batch, batch},
                    {" seq stride", strides.seq, rows},
                    {" head stride", strides.head, heads}};
  for (const auto& dimension : dimensions) {
    if (dimension.extent > 1 && dimension.stride % 8 != 0) {
      return refuse((prefix + dimension.what).c_str(), dimension.stride, "a multiple of 8 elements");
    }
  }
  return nullptr;
}

const char* check_problem(const Problem& problem) {
  if (const char* refused = check_sizes(problem.dtype, problem.batch, problem.heads, problem.groups,
                                        problem.head_size, problem.scale)) {
    return refused;
  }
  if ((problem.cu_seqlens_q == nullptr) != (problem.cu_seqlens_k == nullptr)) {
    return refuse("only one of cu_seqlens_q and cu_seqlens_k is null; accepted: both or neither");
  }
  if (problem.max_seqlen_q < 0 || problem.max_seqlen_q > kMaxLength) {
    return refuse("max_seqlen_q", problem.max_seqlen_q, "0 to 2^30");
  }
  if (problem.max_seqlen_k < 0 || problem.max_seqlen_k > kMaxLength) {
    return refuse("max_seqlen_k", problem.max_seqlen_k, "0 to 2^30");
  }
  return nullptr;
}

// Calls function(T(), std::integral_constant<int, head size>()) after check_sizes().
template <class Function>
const char* dispatch(DType dtype, int head_size, const Function& function) {
  const auto with_type = [&](auto type) {
    if (head_size == 64) return function(type, std::integral_constant<int, 64>());
    if (head_size == 80) return function(type, std::integral_constant<int, 80>());
    return function(type, std::integral_constant<int, 128>());
  };
  return dtype == DType::kBFloat16 ? with_type(bf16_t()) : with_type(fp16_t());
}

int64_t packed_batch(const Problem& problem) { return problem.cu_seqlens_q != nullptr ? 1 : problem.batch; }

// Packed sequences may be many where each is a single row, so the stride of rows counts then.
int64_t row_extent(const Problem& problem, int64_t longest) {
  return longest == 1 && problem.batch > packed_batch(problem) ? 2 : longest;
}

const char* check_decode(const DecodeParams& params) {
  if (const char* refused = check_sizes(params.dtype, params.batch, params.heads, params.groups,
                                        params.head_size, params.scale)) {
    return refused;
  }
  if (params.seqlen_q < 0 || params.seqlen_q > kMaxLength)
    return refuse("seqlen_q", params.seqlen_q, "0 to 2^30");
  if (params.max_seqlen_k < 0 || params.max_seqlen_k > kMaxLength) {
    return refuse("max_seqlen_k", params.max_seqlen_k, "0 to 2^30");
  }
  if (params.num_splits < 0 || params.num_splits > kMaxSplits) {
    return refuse("num_splits", params.num_splits, "0 (chosen) to 256");
  }
  if (params.value != nullptr) return refuse("value is given; accepted: null, the key is the value");
  if (params.block_table != nullptr) {
    if (params.page_size < 64 || params.page_size % 64 != 0) {
      return refuse("page_size", params.page_size, "a multiple of 64");
    }
    if (params.max_seqlen_k > params.table_stride * params.page_size) {
      return refuse("max_seqlen_k", params.max_seqlen_k, "at most table_stride * page_size");
    }
  }
  if (const char* refused = check_tensor("query", params.query, params.query_strides, params.batch,
                                         params.seqlen_q, params.heads)) {
    return refused;
  }
  const bool paged = params.block_table != nullptr;
  if (const char* refused =
          check_tensor("key", params.key, params.key_strides, paged ? params.num_pages : params.batch,
                       paged ? params.page_size : params.max_seqlen_k, params.groups)) {
    return refused;
  }
  if (params.batch > 0 && params.seqlen_q > 0 && params.lse == nullptr) {
    return refuse("lse is null; accepted: a pointer to device memory");
  }
  return check_tensor("out", params.out, params.out_strides, params.batch, params.seqlen_q, params.heads);
}

const char* check_backward(const BackwardParams& params) {
  const Problem& problem = params.problem;
  if (const char* refused = check_problem(problem)) return refused;
  if (params.value != nullptr) return refuse("value is given; accepted: null, the key is the value");
  if (params.grad_value != nullptr) {
    return refuse("grad_value is given; accepted: null, grad_key is the sum of both gradients");
  }
  const int64_t batch = packed_batch(problem);
  const int64_t query_rows = row_extent(problem, problem.max_seqlen_q);
  const int64_t key_rows = row_extent(problem, problem.max_seqlen_k);
  const struct {
    const char* name;
    const void* pointer;
    const Strides& strides;
    int64_t rows, heads;
  } tensors[] = {
      {"grad_out", params.grad_out, params.grad_out_strides, query_rows, problem.heads},
      {"query", params.query, params.query_strides, query_rows, problem.heads},
      {"key", params.key, params.key_strides, key_rows, problem.groups},
      {"out", params.out, params.out_strides, query_rows, problem.heads},
      {"grad_query", params.grad_query, params.grad_query_strides, query_rows, problem.heads},
      {"grad_key", params.grad_key, params.grad_key_strides, key_rows, problem.groups},
  };
  for (const auto& tensor : tensors) {
    if (const char* refused =
            check_tensor(tensor.name, tensor.pointer, tensor.strides, batch, tensor.rows, tensor.heads)) {
      return refused;
    }
  }
  if (batch > 0 && query_rows > 0 && params.lse == nullptr) {
    return refuse("lse is null; accepted: a pointer to device memory");
  }
  if (plan_backward(params).workspace_bytes() > 0) {
    if (params.workspace == nullptr) {
      return refuse("workspace is null; accepted: backward_workspace_bytes() bytes of device memory");
    }
    if (reinterpret_cast<uintptr_t>(params.workspace) % 256 != 0) {
      return refuse("workspace address modulo 256", reinterpret_cast<uintptr_t>(params.workspace) % 256, "0");
    }
  }
  return nullptr;
}

}  // namespace

const char* forward(const ForwardParams& params, void* stream) {
  const Problem& problem = params.problem;
  if (const char* refused = check_problem(problem)) return refused;
  if (params.value != nullptr) return refuse("value is given; accepted: null, the key is the value");
  const int64_t batch = packed_batch(problem);
  const int64_t query_rows = row_extent(problem, problem.max_seqlen_q);
  const int64_t key_rows = row_extent(problem, problem.max_seqlen_k);
  if (const char* refused =
          check_tensor("query", params.query, params.query_strides, batch, query_rows, problem.heads)) {
    return refused;
  }
  if (const char* refused =
          check_tensor("key", params.key, params.key_strides, batch, key_rows, problem.groups)) {
    return refused;
  }
  if (const char* refused =
          check_tensor("out", params.out, params.out_strides, batch, query_rows, problem.heads)) {
    return refused;
  }
  if (batch > 0 && problem.max_seqlen_q > 0 && params.lse == nullptr) {
    return refuse("lse is null; accepted: a pointer to device memory");
  }
  return dispatch(problem.dtype, problem.head_size, [&](auto type, auto head_size) {
    return launch_forward<decltype(type), decltype(head_size)::value>(params, stream);
  });
}

size_t backward_workspace_bytes(const BackwardParams& params) {
  return check_problem(params.problem) != nullptr ? 0 : plan_backward(params).workspace_bytes();
}

const char* backward(const BackwardParams& params, void* stream) {
  if (const char* refused = check_backward(params)) return refused;
  const Problem& problem = params.problem;
  return dispatch(problem.dtype, problem.head_size, [&](auto type, auto head_size) {
    return launch_backward<decltype(type), decltype(head_size)::value>(params, stream);
  });
}

int32_t decode_num_splits(const DecodeParams& params) {
  return check_decode(params) != nullptr ? 1 : choose_num_splits(params);
}

size_t decode_workspace_bytes(const DecodeParams& params) {
  return check_decode(params) != nullptr ? 0 : decode_workspace(params);
}

const char* decode(const DecodeParams& params, void* stream) {
  if (const char* refused = check_decode(params)) return refused;
  if (decode_workspace(params) > 0 && reinterpret_cast<uintptr_t>(params.workspace) % 256 != 0) {
    return refuse("workspace address modulo 256", reinterpret_cast<uintptr_t>(params.workspace) % 256, "0");
  }
  if (decode_workspace(params) > 0 && params.workspace == nullptr) {
    return refuse("workspace is null; accepted: decode_workspace_bytes() bytes of device memory");
  }
  return dispatch(params.dtype, params.head_size, [&](auto type, auto head_size) {
    return launch_decode<decltype(type), decltype(head_size)::value>(params, stream);
  });
}

}  // namespace sharedproj::cuda
