// The kernels for one instruction set: setup.py compiles this file once for each, with SHAREDPROJ_ISA its
// name.
#include "backward.h"
#include "decode.h"
#include "forward.h"

#define SHAREDPROJ_STRING_OF(name) #name
#define SHAREDPROJ_STRING(name) SHAREDPROJ_STRING_OF(name)

namespace sharedproj::cpu::SHAREDPROJ_ISA {

static const char* forward(const ForwardParams& params, Runner run) {
  return params.problem.dtype == DType::kFloat32 ? forward_typed<float>(params, run)
                                                 : forward_typed<bf16_t>(params, run);
}

static const char* backward(const BackwardParams& params, Runner run) {
  return params.problem.dtype == DType::kFloat32 ? backward_typed<float>(params, run)
                                                 : backward_typed<bf16_t>(params, run);
}

static const char* decode(const DecodeParams& params, Runner run) {
  return params.dtype == DType::kFloat32 ? decode_typed<float>(params, run)
                                         : decode_typed<bf16_t>(params, run);
}

const Kernels* kernels() {
  static const Kernels table = {SHAREDPROJ_STRING(SHAREDPROJ_ISA), forward, backward, decode};
  return &table;
}

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
