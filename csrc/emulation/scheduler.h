// What the C ABI needs of the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sharedproj::emulation {

void begin(uint64_t seed);         // before each call of a kernel entry point: clears errors and counts
const char* error_message();       // null, or what went wrong since begin(); valid until the next call
int64_t bank_conflicts(int kind);  // extra turns of shared memory since begin(), per AccessKind
// cp.async may read this range of global memory from now on; null forgets all ranges, and then any may be
// read.
void allow_reads(const void* address, size_t bytes);

}  // namespace sharedproj::emulation
