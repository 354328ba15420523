// C ABI of the emulated kernels, loaded by tests/csrc with ctypes. The structs are those of
// shared_kv_attention.h.
#include "../shared_kv_attention.h"
#include "emulation.h"
#include "scheduler.h"

namespace {

template <class Function>
const char* run(uint64_t seed, const Function& function) {
  sharedproj::emulation::begin(seed);
  const char* refused = function();
  return refused != nullptr ? refused : sharedproj::emulation::error_message();
}

}  // namespace

// Each entry point returns null, or why it was refused or what the emulation found.
extern "C" {

const char* emulated_forward(const sharedproj::ForwardParams* params, uint64_t seed) {
  return run(seed, [&] { return sharedproj::cuda::forward(*params, nullptr); });
}

uint64_t emulated_backward_workspace_bytes(const sharedproj::BackwardParams* params) {
  return sharedproj::cuda::backward_workspace_bytes(*params);
}

const char* emulated_backward(const sharedproj::BackwardParams* params, uint64_t seed) {
  return run(seed, [&] { return sharedproj::cuda::backward(*params, nullptr); });
}

int32_t emulated_decode_num_splits(const sharedproj::DecodeParams* params) {
  return sharedproj::cuda::decode_num_splits(*params);
}

uint64_t emulated_decode_workspace_bytes(const sharedproj::DecodeParams* params) {
  return sharedproj::cuda::decode_workspace_bytes(*params);
}

const char* emulated_decode(const sharedproj::DecodeParams* params, uint64_t seed) {
  return run(seed, [&] { return sharedproj::cuda::decode(*params, nullptr); });
}

// kind: 0 ldmatrix, 1 shared_load, 2 shared_store, 3 cp.async.
int64_t emulated_bank_conflicts(int32_t kind) { return sharedproj::emulation::bank_conflicts(kind); }

void emulated_set_multiprocessors(int32_t count) { sharedproj::emulation::multiprocessors = count; }

void emulated_allow_reads(const void* address, uint64_t bytes) {
  sharedproj::emulation::allow_reads(address, bytes);
}

// So that the tests can compare their ctypes structs with the compiler's.
uint64_t emulated_struct_bytes(int32_t which) {
  const uint64_t bytes[] = {sizeof(sharedproj::ForwardParams), sizeof(sharedproj::BackwardParams),
                            sizeof(sharedproj::DecodeParams)};
  return bytes[which];
}
}
