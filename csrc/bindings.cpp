// The extension's Python side: tensor checks, streams, op registration, and what was built.
//
// Shape legend: b sequences, s query length, t key length, h query heads, g groups (key/value heads), e head
// size. query [b, s, h, e] and key [b, t, g, e], or packed: [total_q, h, e] and [total_k, g, e] with
// cumulative lengths.
#include <torch/library.h>
#include <torch/python.h>
#include <torch/version.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "shared_kv_attention.h"

#ifdef SHAREDPROJ_TORCH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace sharedproj {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      break;
  }
  TORCH_CHECK_VALUE(false, name, " has dtype ", tensor.scalar_type(),
                    "; accepted: float32 (CPU), bfloat16, float16 (CUDA)");
}

// What both devices accept; returns the problem without its pointers.
void check_head_size(const Tensor& query, int64_t e) {
  if (query.is_cuda()) {
    TORCH_CHECK_VALUE(query.scalar_type() != at::kFloat,
                      "query has dtype float32 on CUDA; accepted: bfloat16, float16");
    TORCH_CHECK_VALUE(e == 64 || e == 80 || e == 128, "head size is ", e, " on CUDA; accepted: 64, 80, 128");
  } else {
    TORCH_CHECK_VALUE(query.scalar_type() != at::kHalf,
                      "query has dtype float16 on a CPU; accepted: float32, bfloat16");
    TORCH_CHECK_VALUE(e % 8 == 0 && e >= 8 && e <= 256, "head size is ", e,
                      " on a CPU; accepted: multiples of 8 from 8 to 256");
  }
}

void check_like_query(const Tensor& query, const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == query.device(), name, " is on ", tensor.device(), "; the query is on ",
                    query.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == query.scalar_type(), name, " has dtype ", tensor.scalar_type(),
                    "; the query has ", query.scalar_type());
}

void check_last_dimension(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.stride(-1) == 1 || tensor.size(-1) <= 1, name, " has stride ", tensor.stride(-1),
                    " in its last dimension; accepted: 1 (call .contiguous())");
}

// What forward, backward and decode ask of query, key and value alike; their dimensions are checked before.
void check_operands(const Tensor& query, const Tensor& key, const OptionalTensor& value, double scale) {
  TORCH_CHECK_VALUE(scale > 0 && std::isfinite(scale), "scale is ", scale, "; accepted: finite and above 0");
  check_like_query(query, key, "key");
  check_last_dimension(query, "query");
  check_last_dimension(key, "key");
  const int64_t h = query.size(-2), g = key.size(-2), e = query.size(-1);
  TORCH_CHECK_VALUE(key.size(-1) == e, "key has head size ", key.size(-1), "; the query has ", e);
  TORCH_CHECK_VALUE(g > 0 && h > 0 && h % g == 0, "key has ", g,
                    " groups; accepted: divisors of the query's ", h, " heads");
  check_head_size(query, e);
  if (!value.has_value()) return;
  check_like_query(query, *value, "value");
  TORCH_CHECK_VALUE(value->sizes() == key.sizes(), "value has shape ", value->sizes(), "; the key has ",
                    key.sizes());
  check_last_dimension(*value, "value");
  TORCH_CHECK_VALUE(!query.is_cuda(),
                    "value: the CUDA kernels read one tensor; leave value out, or use SDPA");
}

void check_lengths(const Tensor& lengths, const Tensor& query, int64_t count, const char* name) {
  TORCH_CHECK_VALUE(lengths.device() == query.device(), name, " is on ", lengths.device(),
                    "; the query is on ", query.device());
  TORCH_CHECK_VALUE(lengths.scalar_type() == at::kInt, name, " has dtype ", lengths.scalar_type(),
                    "; accepted: int32");
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.is_contiguous(), name, " has shape ", lengths.sizes(),
                    "; accepted: one contiguous dimension");
  TORCH_CHECK_VALUE(count < 0 || lengths.size(0) == count, name, " has ", lengths.size(0),
                    " entries; expected ", count);
}

// Cumulative lengths that the host can read are checked; those on a GPU would cost a synchronisation.
void check_cumulative(const Tensor& lengths, int64_t total, int64_t longest, const char* name) {
  if (!lengths.is_cpu()) return;
  const int32_t* values = lengths.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(values[0] == 0, name, " begins with ", values[0], "; expected 0");
  for (int64_t i = 1; i < lengths.size(0); ++i) {
    const int64_t length = static_cast<int64_t>(values[i]) - values[i - 1];
    TORCH_CHECK_VALUE(length >= 0 && length <= longest, name, " gives sequence ", i - 1, " the length ",
                      length, "; accepted: 0 to the given maximum ", longest);
  }
  TORCH_CHECK_VALUE(values[lengths.size(0) - 1] == total, name, " ends with ", values[lengths.size(0) - 1],
                    "; the tensor has ", total, " rows");
}

Strides strides_of(const Tensor& tensor) {
  if (tensor.dim() == 3) return {0, tensor.stride(0), tensor.stride(1)};
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The CUDA kernels read 16 bytes at a time: a tensor whose rows don't allow it is copied.
Tensor aligned(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.stride(-1) == 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d)
    fits = fits && (tensor.stride(d) % 8 == 0 || tensor.size(d) <= 1);
  return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

struct Arguments {
  bool causal;
  double scale;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

Problem problem_of(const Tensor& query, const Tensor& key, const OptionalTensor& value,
                   const Arguments& arguments) {
  Problem problem{};
  problem.dtype = dtype_of(query, "query");
  const bool packed = arguments.cu_seqlens_q.has_value();
  TORCH_CHECK_VALUE(packed == arguments.cu_seqlens_k.has_value(),
                    "cu_seqlens_q and cu_seqlens_k: give both (packed sequences) or neither");
  const int64_t dimensions = packed ? 3 : 4;
  const char* shapes = packed ? "[total_q, h, e] and [total_k, g, e]" : "[b, s, h, e] and [b, t, g, e]";
  TORCH_CHECK_VALUE(query.dim() == dimensions, "query has shape ", query.sizes(), "; query and key are ",
                    shapes);
  TORCH_CHECK_VALUE(key.dim() == dimensions, "key has shape ", key.sizes(), "; query and key are ", shapes);
  check_operands(query, key, value, arguments.scale);
  const int64_t h = query.size(-2), g = key.size(-2), e = query.size(-1);
  if (packed) {
    const Tensor &q = *arguments.cu_seqlens_q, &k = *arguments.cu_seqlens_k;
    check_lengths(q, query, -1, "cu_seqlens_q");
    TORCH_CHECK_VALUE(q.size(0) >= 2, "cu_seqlens_q has ", q.size(0),
                      " entries; accepted: batch + 1, batch at least 1");
    check_lengths(k, query, q.size(0), "cu_seqlens_k");
    TORCH_CHECK_VALUE(arguments.max_seqlen_q >= 0 && arguments.max_seqlen_k >= 0, "max_seqlen_q is ",
                      arguments.max_seqlen_q, ", max_seqlen_k is ", arguments.max_seqlen_k,
                      "; accepted: the longest lengths, 0 or more");
    check_cumulative(q, query.size(0), arguments.max_seqlen_q, "cu_seqlens_q");
    check_cumulative(k, key.size(0), arguments.max_seqlen_k, "cu_seqlens_k");
    problem.batch = static_cast<int32_t>(q.size(0) - 1);
    problem.max_seqlen_q = arguments.max_seqlen_q;
    problem.max_seqlen_k = arguments.max_seqlen_k;
    problem.cu_seqlens_q = q.const_data_ptr<int32_t>();
    problem.cu_seqlens_k = k.const_data_ptr<int32_t>();
    problem.total_q = query.size(0);
  } else {
    TORCH_CHECK_VALUE(query.size(0) == key.size(0), "key has batch ", key.size(0), "; the query has ",
                      query.size(0));
    TORCH_CHECK_VALUE(query.size(0) > 0, "query has batch 0; accepted: 1 or more");
    problem.batch = static_cast<int32_t>(query.size(0));
    problem.max_seqlen_q = query.size(1);
    problem.max_seqlen_k = key.size(1);
    problem.total_q = query.size(0) * query.size(1);
  }
  TORCH_CHECK_VALUE(problem.max_seqlen_q <= INT32_MAX && problem.max_seqlen_k <= INT32_MAX,
                    "query has length ", problem.max_seqlen_q, ", key has length ", problem.max_seqlen_k,
                    "; accepted: below 2^31");
  problem.heads = static_cast<int32_t>(h);
  problem.groups = static_cast<int32_t>(g);
  problem.head_size = static_cast<int32_t>(e);
  problem.causal = arguments.causal;
  problem.scale = static_cast<float>(arguments.scale);
  return problem;
}

void check_status(const char* error) { TORCH_CHECK(error == nullptr, "shared_kv_attention: ", error); }

#ifdef SHAREDPROJ_TORCH_CUDA
Tensor workspace(const Tensor& like, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}
#endif

// In the order of the dimensions that `tensor` has, so that a model's [s, b, h, e] stays so. Rows that
// overlap (expanded ones) have no such order that keeps the last dimension contiguous.
Tensor allocate_like(const Tensor& tensor) {
  const Tensor result = at::empty_like(tensor);
  if (result.stride(-1) == 1 || result.size(-1) <= 1) return result;
  return at::empty(tensor.sizes(), tensor.options());
}

Tensor lse_for(const Problem& problem, const Tensor& query) {
  const auto options = query.options().dtype(at::kFloat);
  if (problem.cu_seqlens_q != nullptr) return at::empty({problem.heads, problem.total_q}, options);
  return at::empty({problem.batch, problem.heads, problem.max_seqlen_q}, options);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const OptionalTensor& value,
                                   bool causal, double scale, const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                                   int64_t max_seqlen_k, bool) {
  const Problem problem =
      problem_of(query, key, value, {causal, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k});
  Tensor out = allocate_like(query), lse = lse_for(problem, query);
  if (query.numel() == 0) return {out, lse};
  const Tensor q = aligned(query), k = aligned(key);
  ForwardParams params{};
  params.problem = problem;
  params.query = q.const_data_ptr();
  params.key = k.const_data_ptr();
  params.value = value.has_value() ? value->const_data_ptr() : nullptr;
  params.query_strides = strides_of(q);
  params.key_strides = strides_of(k);
  params.value_strides = value.has_value() ? strides_of(*value) : Strides{};
  Tensor target = aligned(out);
  params.out = target.data_ptr();
  params.out_strides = strides_of(target);
  params.lse = lse.data_ptr<float>();
#ifdef SHAREDPROJ_TORCH_CUDA
  if (query.is_cuda()) {
    const c10::cuda::CUDAGuard guard(query.device());
    check_status(cuda::forward(params, c10::cuda::getCurrentCUDAStream()));
    if (!target.is_same(out)) out.copy_(target);
    return {out, lse};
  }
#endif
  check_status(cpu::forward(params));
  return {out, lse};
}

// The third result is empty where key and value are one tensor: no buffer is made for it.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const OptionalTensor& grad_lse,
                                            const Tensor& query, const Tensor& key,
                                            const OptionalTensor& value, const Tensor& out, const Tensor& lse,
                                            bool causal, double scale, const OptionalTensor& cu_seqlens_q,
                                            const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                                            int64_t max_seqlen_k, bool deterministic) {
  const Problem problem =
      problem_of(query, key, value, {causal, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k});
  check_like_query(query, grad_out, "grad_out");
  check_like_query(query, out, "out");
  TORCH_CHECK_VALUE(grad_out.sizes() == query.sizes(), "grad_out has shape ", grad_out.sizes(),
                    "; the query has ", query.sizes());
  TORCH_CHECK_VALUE(out.sizes() == query.sizes(), "out has shape ", out.sizes(), "; the query has ",
                    query.sizes());
  TORCH_CHECK_VALUE(lse.numel() == problem.heads * problem.total_q && lse.is_contiguous() &&
                        lse.scalar_type() == at::kFloat,
                    "lse has shape ", lse.sizes(), ", dtype ", lse.scalar_type(), "; expected the forward's");
  Tensor grad_query = allocate_like(query), grad_key = allocate_like(key);
  Tensor grad_value = value.has_value() ? allocate_like(*value) : at::empty({0}, key.options());
  if (query.numel() == 0 || key.numel() == 0) {
    return {grad_query.zero_(), grad_key.zero_(), grad_value.zero_()};
  }
  // A gradient often comes expanded from a sum.
  const Tensor g = aligned(grad_out.stride(-1) == 1 ? grad_out : grad_out.contiguous());
  const Tensor q = aligned(query), k = aligned(key),
               o = aligned(out.stride(-1) == 1 ? out : out.contiguous());
  Tensor grad_q = aligned(grad_query), grad_k = aligned(grad_key);
  std::optional<Tensor> lse_gradient;
  if (grad_lse.has_value()) {
    TORCH_CHECK_VALUE(grad_lse->sizes() == lse.sizes() && grad_lse->device() == lse.device(),
                      "grad_lse has shape ", grad_lse->sizes(), " on ", grad_lse->device(), "; the lse has ",
                      lse.sizes(), " on ", lse.device());
    lse_gradient = grad_lse->to(at::kFloat).contiguous();
  }
  BackwardParams params{};
  params.problem = problem;
  params.grad_out = g.const_data_ptr();
  params.grad_lse = lse_gradient.has_value() ? lse_gradient->const_data_ptr<float>() : nullptr;
  params.query = q.const_data_ptr();
  params.key = k.const_data_ptr();
  params.value = value.has_value() ? value->const_data_ptr() : nullptr;
  params.out = o.const_data_ptr();
  params.lse = lse.const_data_ptr<float>();
  params.grad_query = grad_q.data_ptr();
  params.grad_key = grad_k.data_ptr();
  params.grad_value = value.has_value() ? grad_value.data_ptr() : nullptr;
  params.grad_out_strides = strides_of(g);
  params.query_strides = strides_of(q);
  params.key_strides = strides_of(k);
  params.out_strides = strides_of(o);
  params.grad_query_strides = strides_of(grad_q);
  params.grad_key_strides = strides_of(grad_k);
  params.value_strides = value.has_value() ? strides_of(*value) : Strides{};
  params.grad_value_strides = value.has_value() ? strides_of(grad_value) : Strides{};
  params.deterministic = deterministic;
#ifdef SHAREDPROJ_TORCH_CUDA
  if (query.is_cuda()) {
    const c10::cuda::CUDAGuard guard(query.device());
    const Tensor memory = workspace(query, cuda::backward_workspace_bytes(params));
    params.workspace = memory.data_ptr();
    check_status(cuda::backward(params, c10::cuda::getCurrentCUDAStream()));
    if (!grad_q.is_same(grad_query)) grad_query.copy_(grad_q);
    if (!grad_k.is_same(grad_key)) grad_key.copy_(grad_k);
    return {grad_query, grad_key, grad_value};
  }
#endif
  check_status(cpu::backward(params));
  return {grad_query, grad_key, grad_value};
}

void check_pages(const DecodeParams& params) {
  for (int64_t z = 0; z < params.batch; ++z) {
    const int64_t length = params.seqlens_k == nullptr ? params.max_seqlen_k : params.seqlens_k[z];
    TORCH_CHECK_VALUE(length >= 0 && length <= params.max_seqlen_k, "seqlens_k gives sequence ", z,
                      " the length ", length, "; accepted: 0 to the cache's ", params.max_seqlen_k);
    for (int64_t page = 0; params.block_table != nullptr && page * params.page_size < length; ++page) {
      const int32_t entry = params.block_table[z * params.table_stride + page];
      TORCH_CHECK_VALUE(entry >= 0 && entry < params.num_pages, "block_table names page ", entry,
                        " for sequence ", z, "; accepted: 0 to ", params.num_pages - 1);
    }
  }
}

std::tuple<Tensor, Tensor> decode(const Tensor& query, const Tensor& key, const OptionalTensor& value,
                                  double scale, const OptionalTensor& seqlens_k,
                                  const OptionalTensor& block_table, int64_t num_splits) {
  DecodeParams params{};
  params.dtype = dtype_of(query, "query");
  const bool paged = block_table.has_value();
  TORCH_CHECK_VALUE(query.dim() == 4, "query has shape ", query.sizes(), "; accepted: [b, s, h, e]");
  TORCH_CHECK_VALUE(key.dim() == 4, "key has shape ", key.sizes(),
                    "; accepted: ", paged ? "[pages, page_size, g, e]" : "[b, t, g, e]");
  check_operands(query, key, value, scale);
  const int64_t b = query.size(0), s = query.size(1), h = query.size(2), e = query.size(3), g = key.size(2);
  TORCH_CHECK_VALUE(b > 0, "query has batch 0; accepted: 1 or more");
  if (seqlens_k.has_value()) check_lengths(*seqlens_k, query, b, "seqlens_k");
  TORCH_CHECK_VALUE(num_splits >= 0 && num_splits <= 256, "num_splits is ", num_splits,
                    "; accepted: 0 to 256");
  if (paged) {
    const Tensor& table = *block_table;
    TORCH_CHECK_VALUE(table.device() == query.device() && table.scalar_type() == at::kInt, "block_table is ",
                      table.scalar_type(), " on ", table.device(), "; accepted: int32 on ", query.device());
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) == b && (table.stride(1) == 1 || table.size(1) <= 1),
                      "block_table has shape ", table.sizes(),
                      "; accepted: [b, pages of a sequence] with b = ", b);
    TORCH_CHECK_VALUE(key.size(1) > 0 && key.size(1) % 64 == 0, "page size is ", key.size(1),
                      "; accepted: multiples of 64");
    params.block_table = table.const_data_ptr<int32_t>();
    params.table_stride = table.stride(0);
    params.page_size = static_cast<int32_t>(key.size(1));
    params.num_pages = static_cast<int32_t>(key.size(0));
    params.max_seqlen_k = table.size(1) * key.size(1);
  } else {
    TORCH_CHECK_VALUE(key.size(0) == b, "key has batch ", key.size(0), "; the query has ", b);
    params.max_seqlen_k = key.size(1);
  }
  TORCH_CHECK_VALUE(params.max_seqlen_k <= INT32_MAX, "key has length ", params.max_seqlen_k,
                    "; accepted: below 2^31");
  params.batch = static_cast<int32_t>(b);
  params.heads = static_cast<int32_t>(h);
  params.groups = static_cast<int32_t>(g);
  params.head_size = static_cast<int32_t>(e);
  params.seqlen_q = s;
  params.seqlens_k = seqlens_k.has_value() ? seqlens_k->const_data_ptr<int32_t>() : nullptr;
  params.scale = static_cast<float>(scale);
  params.num_splits = static_cast<int32_t>(num_splits);
  Tensor out = allocate_like(query), lse = at::empty({b, h, s}, query.options().dtype(at::kFloat));
  if (query.numel() == 0) return {out, lse};
  const Tensor q = aligned(query);
  Tensor target = aligned(out);
  params.query = q.const_data_ptr();
  params.key = key.const_data_ptr();
  params.value = value.has_value() ? value->const_data_ptr() : nullptr;
  params.out = target.data_ptr();
  params.lse = lse.data_ptr<float>();
  params.query_strides = strides_of(q);
  params.key_strides = strides_of(key);
  params.value_strides = value.has_value() ? strides_of(*value) : Strides{};
  params.out_strides = strides_of(target);
#ifdef SHAREDPROJ_TORCH_CUDA
  if (query.is_cuda()) {
    const c10::cuda::CUDAGuard guard(query.device());
    params.num_splits = cuda::decode_num_splits(params);
    const Tensor memory = workspace(query, cuda::decode_workspace_bytes(params));
    params.workspace = memory.data_ptr();
    check_status(cuda::decode(params, c10::cuda::getCurrentCUDAStream()));
    if (!target.is_same(out)) out.copy_(target);
    return {out, lse};
  }
#endif
  check_pages(params);
  check_status(cpu::decode(params));
  return {out, lse};
}

// Schemas are one place; the same function serves both devices.
TORCH_LIBRARY(megatron_sharedproj, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor? value, bool causal, float scale, Tensor? "
      "cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, bool deterministic=False) -> "
      "(Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor? value, Tensor "
      "out, "
      "Tensor lse, bool causal, float scale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt "
      "max_seqlen_q, "
      "SymInt max_seqlen_k, bool deterministic) -> (Tensor, Tensor, Tensor)");
  library.def(
      "attention_decode(Tensor query, Tensor key, Tensor? value, float scale, Tensor? seqlens_k=None, "
      "Tensor? block_table=None, int num_splits=0) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_sharedproj, CPU, library) {
  library.impl("attention", forward);
  library.impl("attention_backward", backward);
  library.impl("attention_decode", decode);
}

#ifdef SHAREDPROJ_TORCH_CUDA
TORCH_LIBRARY_IMPL(megatron_sharedproj, CUDA, library) {
  library.impl("attention", forward);
  library.impl("attention_backward", backward);
  library.impl("attention_decode", decode);
}
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["mode"] = SHAREDPROJ_MODE;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_capability"] = cpu::capability();
#ifdef SHAREDPROJ_ARCHITECTURES
  info["cuda_architectures"] = SHAREDPROJ_ARCHITECTURES;
#else
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace
}  // namespace sharedproj

PYBIND11_MODULE(_C, module) {
  module.doc() = "Attention over one shared key/value tensor; the ops are in torch.ops.megatron_sharedproj.";
  module.def("build_info", &sharedproj::build_info,
             "How this extension was built, and the CPU path that it takes.");
}
