// Runs a grid of emulated blocks: fibers, warp collectives, barriers, cp.async, races, bank conflicts.
#include "scheduler.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "emulation.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sharedproj::emulation {

Current current;
int multiprocessors = 4;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // per block on sm_80
constexpr size_t kMaxAccesses = 4096;           // between two collectives, remembered for bank conflicts

#if defined(__x86_64__)
// swapcontext() makes two system calls for the signal mask; this saves what the ABI asks for and no more.
extern "C" void sharedproj_switch(void** save, void* load);
asm(R"(
.text
.type sharedproj_switch, @function
sharedproj_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sharedproj_switch, .-sharedproj_switch
)");

struct Context {
  void* pointer = nullptr;
  void prepare(uint8_t* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // keeps the stack misaligned by 8 at entry, as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer = top;
  }
  inline void switch_to(Context& other) { sharedproj_switch(&pointer, other.pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(uint8_t* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  inline void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

enum class LaneState { kReady, kCollective, kBarrier, kDone };

struct Copy {
  void* smem;
  const void* global;
  bool valid;
};

struct Lane {
  Context context;
  LaneState state;
  std::vector<Copy> copies;        // of all groups that have not landed, oldest first
  std::vector<size_t> group_ends;  // of committed groups, as ends in `copies`
  size_t landed = 0, groups_landed = 0;
  size_t accesses = 0;
};

struct Warp {
  int arrived = 0;
  uint32_t sync = 0;  // different after each sync_warp and barrier, and from other warps'
  CollectiveKind kind;
  std::array<void*, 32> arguments;
  std::vector<std::array<Access, 32>> trace;
  std::array<uint32_t, 32> traced;  // per lane: entries in `trace`
};

// Who touched a 32-bit word of shared memory since which barrier (epoch) and which sync_warp.
struct Word {
  uint32_t write_epoch = 0, read_epoch = 0, write_sync = 0, read_sync = 0;
  uint32_t writer = 0, readers = 0, reader_lanes = 0;  // thread, mask of warps, mask of lanes
};

struct Machine {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<uint8_t> stacks, memory;
  std::vector<Word> words;
  Context scheduler;
  void (*kernel)(void*) = nullptr;
  void* context = nullptr;
  int threads = 0;
  uint32_t epoch = 1, syncs = 0;
  uint64_t random_state = 1;
  int pass_warp = 0, pass_start = 0, pass_step = 1, pass_visited = 32;
  bool abandoned = false;
  int64_t errors = 0;
  std::string first_error;
  std::vector<std::pair<uintptr_t, uintptr_t>> readable;  // global memory that cp.async may read; empty: all
  int64_t conflicts[kAccessKinds] = {};
};

Machine machine;

const std::vector<float> half_values = [] {
  std::vector<float> values(65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    const int exponent = i >> 10 & 31;
    const float fraction = static_cast<float>(i & 1023);
    float x = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024.f, exponent - 25);
    if (exponent == 31) x = (i & 1023) ? NAN : INFINITY;
    values[i] = i >> 15 ? -x : x;
  }
  return values;
}();

uint64_t random_bits() {  // xorshift64*
  uint64_t& x = machine.random_state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return (x * 0x2545f4914f6cdd1dull) >> 16;
}

int random_below(int n) { return static_cast<int>(random_bits() % static_cast<uint64_t>(n)); }

void report(const std::string& what) {
  if (machine.errors++ > 0) return;
  machine.first_error = what + " (block " + std::to_string(current.block[0]) + " " +
                        std::to_string(current.block[1]) + " " + std::to_string(current.block[2]) +
                        ", thread " + std::to_string(current.thread) + ")";
}

inline Lane& lane() { return machine.lanes[current.thread]; }
inline Warp& warp() { return machine.warps[current.thread / 32]; }

// The next ready thread of this pass over a warp, or -1.
inline int next_in_pass() {
  Machine& m = machine;
  while (m.pass_visited < 32 && !m.abandoned) {
    const int t = m.pass_warp * 32 + (m.pass_start + m.pass_visited++ * m.pass_step) % 32;
    if (m.lanes[t].state == LaneState::kReady) return t;
  }
  return -1;
}

// From lane to lane directly: half the switches, and the processor predicts the returns.
inline void yield(LaneState state) {
  Lane& self = lane();
  self.state = state;
  const int next = next_in_pass();
  if (next >= 0) current.thread = next;
  self.context.switch_to(next >= 0 ? machine.lanes[next].context : machine.scheduler);
}

// A fatal error leaves the block's fibers where they are; their stacks are used again.
void abandon(const std::string& what) {
  report(what);
  machine.abandoned = true;
}

void fiber_main() {
  machine.kernel(machine.context);
  Lane& self = lane();
  if (self.landed < self.copies.size()) report("a thread ended with cp.async still under way");
  yield(LaneState::kDone);
  std::abort();
}

// The n-th accesses of all lanes since the last collective happen together if they come from one place in the
// source.
void count_conflicts(Warp& w) {
  const uint32_t count = *std::max_element(w.traced.begin(), w.traced.end());
  for (uint32_t i = 0; i < count; ++i) {
    const auto& row = w.trace[i];
    std::array<bool, 32> present;
    int reference = -1;
    bool uniform = true;
    for (int l = 0; l < 32; ++l) {
      present[l] = w.traced[l] > i;
      if (!present[l]) continue;
      if (reference < 0) reference = l;
      uniform &= row[l].site == row[reference].site && row[l].bytes == row[reference].bytes;
    }
    if (uniform) machine.conflicts[row[reference].kind] += conflicts_of(row.data(), present.data(), 32);
  }
  w.traced.fill(0);
}

// Between warps an access is ordered by a barrier only, between the lanes of a warp also by sync_warp.
// ldmatrix reads for all lanes; it returns to all of them together, so that what they write later cannot
// overtake it.
void mark(size_t offset, int bytes, AccessKind kind) {
  const uint32_t self = current.thread, own_warp = self / 32, lane_bit = 1u << (self % 32);
  const uint32_t sync = warp().sync;
  const bool write = kind == kStore || kind == kAsyncCopy;
  for (size_t index = offset / 4; index <= (offset + bytes - 1) / 4; ++index) {
    Word& w = machine.words[index];
    const bool other_lane = w.writer != self || kind == kLdmatrix;
    bool warps = w.write_epoch == machine.epoch && w.writer / 32 != own_warp;
    bool lanes = w.write_sync == sync && w.writer / 32 == own_warp && other_lane;
    if (write) {
      warps |= w.read_epoch == machine.epoch && (w.readers & ~(1u << own_warp));
      lanes |= w.read_sync == sync && (w.reader_lanes & ~lane_bit);
      w.write_epoch = machine.epoch;
      w.write_sync = sync;
      w.writer = self;
    } else {
      if (w.read_epoch != machine.epoch) w.readers = 0;
      w.read_epoch = machine.epoch;
      w.readers |= 1u << own_warp;
      if (kind == kLoad) {
        if (w.read_sync != sync) w.reader_lanes = 0;
        w.read_sync = sync;
        w.reader_lanes |= lane_bit;
      }
    }
    if (warps || lanes) {
      report(std::string("race between ") + (warps ? "warps" : "lanes") + " on shared memory byte " +
             std::to_string(index * 4));
      return;
    }
  }
}

bool check(const void* address, int bytes, AccessKind kind) {
  const auto* pointer = static_cast<const uint8_t*>(address);
  const int64_t offset = pointer - current.shared;
  if (offset < 0 || offset + bytes > static_cast<int64_t>(current.shared_bytes)) {
    report("shared memory access of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
           " of " + std::to_string(current.shared_bytes));
    return false;
  }
  if (offset & (bytes - 1)) {
    report("misaligned shared memory access at byte " + std::to_string(offset));
    return false;
  }
  mark(static_cast<size_t>(offset), bytes, kind);
  return true;
}

void land(Lane& self, size_t end) {
  for (; self.landed < end; ++self.landed) {
    const Copy& copy = self.copies[self.landed];
    if (!check(copy.smem, 16, kAsyncCopy)) continue;
    if (copy.valid) {
      std::memcpy(copy.smem, copy.global, 16);
    } else {
      std::memset(copy.smem, 0, 16);
    }
  }
}

void do_ldmatrix(Warp& w, bool transposed) {
  std::array<const uint8_t*, 32> rows;
  std::array<uint8_t, 16> poison;
  poison.fill(0xff);
  const int self = current.thread;
  for (int i = 0; i < 32; ++i) {
    const auto* arguments = static_cast<const MatrixArguments*>(w.arguments[i]);
    current.thread = self / 32 * 32 + i;
    rows[i] = check(arguments->address, 16, kLdmatrix) ? static_cast<const uint8_t*>(arguments->address)
                                                       : poison.data();
  }
  current.thread = self;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::array<Access, 8> accesses;
    std::array<bool, 8> present;
    uint16_t values[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint8_t* row = rows[matrix * 8 + r];
      std::memcpy(values[r], row, 16);
      const bool inside = row != poison.data();
      present[r] = inside;
      if (inside) accesses[r] = {static_cast<uint32_t>(row - current.shared), 16, kLdmatrix, 0};
    }
    if (present[0]) machine.conflicts[kLdmatrix] += conflicts_of(accesses.data(), present.data(), 8);
    for (int i = 0; i < 32; ++i) {
      const int r = i / 4, c = i % 4 * 2;
      const uint16_t low = transposed ? values[c][r] : values[r][c];
      const uint16_t high = transposed ? values[c + 1][r] : values[r][c + 1];
      static_cast<const MatrixArguments*>(w.arguments[i])->result[matrix] = low | static_cast<uint32_t>(high)
                                                                                      << 16;
    }
  }
}

// Runs one block; its threads start anew.
void run_block() {
  Machine& m = machine;
  for (int t = 0; t < m.threads; ++t) {
    Lane& l = m.lanes[t];
    // Staggered by an odd number of cache lines: otherwise all stack tops fall into the same cache sets.
    l.context.prepare(m.stacks.data() + t * kStackBytes, kStackBytes - (t * 832) % 65536, fiber_main);
    l.state = LaneState::kReady;
    l.copies.clear();
    l.group_ends.clear();
    l.landed = l.groups_landed = 0;
  }
  const int warp_count = m.threads / 32;
  for (Warp& w : m.warps) {
    w.arrived = 0;
    w.traced.fill(0);
    w.sync = ++m.syncs;
  }
  ++m.epoch;
  std::fill(m.memory.begin(), m.memory.end(), 0xff);

  const auto all_lanes = [&](int w, LaneState state) {
    for (int i = 0; i < 32; ++i) {
      if (m.lanes[w * 32 + i].state != state) return false;
    }
    return true;
  };
  // Every ready lane goes on as far as its next meeting point; false: none was ready.
  const auto pass = [&](int w) {
    m.pass_warp = w;
    m.pass_start = random_below(32);
    m.pass_step = random_below(2) ? 1 : 31;
    m.pass_visited = 0;
    const int first = next_in_pass();
    if (first < 0) return false;
    current.thread = first;
    m.scheduler.switch_to(m.lanes[first].context);
    return true;
  };
  std::vector<int> running;
  while (!m.abandoned) {
    running.resize(warp_count);
    std::iota(running.begin(), running.end(), 0);
    while (!running.empty() && !m.abandoned) {
      const int pick = random_below(static_cast<int>(running.size())), w = running[pick];
      const bool alone = random_below(2);
      bool progress;
      do {
        progress = pass(w);
      } while (alone && progress && !m.abandoned);
      if (!progress) {
        running[pick] = running.back();
        running.pop_back();
      }
    }
    if (m.abandoned) break;
    int at_barrier = 0, done = 0;
    for (int w = 0; w < warp_count; ++w) {
      at_barrier += all_lanes(w, LaneState::kBarrier);
      done += all_lanes(w, LaneState::kDone);
      count_conflicts(m.warps[w]);
    }
    if (done == warp_count) break;
    if (at_barrier != warp_count) {
      abandon("deadlock: " + std::to_string(at_barrier) + " of " + std::to_string(warp_count) +
              " warps wait whole at a barrier, " + std::to_string(done) + " have ended");
      break;
    }
    ++m.epoch;
    for (Warp& w : m.warps) w.sync = ++m.syncs;
    for (int t = 0; t < m.threads; ++t) m.lanes[t].state = LaneState::kReady;
  }
  const auto untouched = [](uint8_t byte) { return byte == 0xff; };
  if (!std::all_of(m.memory.begin(), m.memory.begin() + kGuardBytes, untouched) ||
      !std::all_of(m.memory.end() - kGuardBytes, m.memory.end(), untouched)) {
    report("a plain write beyond shared memory");
  }
}

}  // namespace

void collective(CollectiveKind kind, void* arguments) {
  Warp& w = warp();
  if (w.arrived > 0 && w.kind != kind) {
    abandon("lanes of a warp meet in different collectives");
    yield(LaneState::kDone);
  }
  w.kind = kind;
  w.arguments[current.thread % 32] = arguments;
  if (++w.arrived < 32) {
    yield(LaneState::kCollective);
    return;
  }
  w.arrived = 0;
  switch (kind) {
    case kCollectiveLdmatrix:
    case kCollectiveLdmatrixTrans:
      do_ldmatrix(w, kind == kCollectiveLdmatrixTrans);
      break;
    case kCollectiveMma:
      multiply(w.arguments.data());
      break;
    case kCollectiveShuffle:
      shuffle(w.arguments.data());
      break;
    case kCollectiveSync:
      w.sync = ++machine.syncs;
      break;
  }
  count_conflicts(w);
  const int first = current.thread / 32 * 32;
  for (int i = 0; i < 32; ++i) machine.lanes[first + i].state = LaneState::kReady;
}

void block_barrier() { yield(LaneState::kBarrier); }

bool shared_access(const void* address, int bytes, AccessKind kind, int site) {
  if (!check(address, bytes, kind)) return false;
  Warp& w = warp();
  uint32_t& n = w.traced[current.thread % 32];
  if (n >= kMaxAccesses) return true;
  if (n >= w.trace.size()) w.trace.resize(n + 64);
  const auto offset = static_cast<uint32_t>(static_cast<const uint8_t*>(address) - current.shared);
  w.trace[n++][current.thread % 32] = {offset, static_cast<uint16_t>(bytes), static_cast<uint8_t>(kind),
                                       site};
  return true;
}

bool may_read(uintptr_t address) {
  if (machine.readable.empty()) return true;
  for (const auto& range : machine.readable) {
    if (address >= range.first && address + 16 <= range.second) return true;
  }
  return false;
}

void async_copy(void* smem, const void* global, bool valid, int site) {
  if (!shared_access(smem, 16, kAsyncCopy, site)) return;
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) {
    report("cp.async from a misaligned global address");
    return;
  }
  if (valid && !may_read(reinterpret_cast<uintptr_t>(global))) {
    report("cp.async reads outside the tensors");
    return;
  }
  std::memset(smem, 0xff, 16);
  lane().copies.push_back({smem, global, valid});
}

void async_commit() { lane().group_ends.push_back(lane().copies.size()); }

void async_wait(int groups_left) {
  Lane& self = lane();
  while (self.group_ends.size() - self.groups_landed > static_cast<size_t>(groups_left)) {
    land(self, self.group_ends[self.groups_landed++]);
  }
  if (self.groups_landed == self.group_ends.size() && self.landed == self.copies.size()) {
    self.copies.clear();
    self.group_ends.clear();
    self.landed = self.groups_landed = 0;
  }
}

const char* run_grid(const int64_t grid[3], int threads, size_t shared_bytes, void (*kernel)(void*),
                     void* context) {
  Machine& m = machine;
  if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || m.abandoned) return nullptr;
  if (grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535) return "the launch grid is too large";
  if (shared_bytes > kMaxSharedBytes) return "the launch needs more shared memory than a block of sm_80 has";
  if (threads < 32 || threads > 1024 || threads % 32) return "the launch has a wrong number of threads";
  m.kernel = kernel;
  m.context = context;
  m.threads = threads;
  if (m.lanes.size() < static_cast<size_t>(threads)) m.lanes.resize(threads);
  m.warps.resize(threads / 32);
  if (m.stacks.size() < threads * kStackBytes) m.stacks.resize(threads * kStackBytes);
  const size_t padded = (shared_bytes + 127) / 128 * 128;
  m.memory.resize(padded + 2 * kGuardBytes + 128);
  m.words.assign(padded / 4 + 1, Word{});
  m.epoch = 1;
  const auto base = reinterpret_cast<uintptr_t>(m.memory.data() + kGuardBytes);
  current.shared = reinterpret_cast<uint8_t*>((base + 127) / 128 * 128);
  current.shared_bytes = shared_bytes;
  for (int i = 0; i < 3; ++i) current.grid[i] = static_cast<int>(grid[i]);

  std::vector<int64_t> order(grid[0] * grid[1] * grid[2]);
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(static_cast<int>(i))]);
  for (const int64_t block : order) {
    current.block[0] = static_cast<int>(block % grid[0]);
    current.block[1] = static_cast<int>(block / grid[0] % grid[1]);
    current.block[2] = static_cast<int>(block / grid[0] / grid[1]);
    run_block();
    if (m.abandoned) break;
  }
  return nullptr;
}

float half_to_float(uint16_t bits) { return half_values[bits]; }

uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (x != x) return 0x7fff;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude < 2 ^ exponent
  exponent = std::max(exponent, -13);
  const float scaled = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // ties to even; at most 2048
  if (scaled == 0.f) return sign;
  const float rounded = std::ldexp(scaled, exponent - 11);
  std::frexp(rounded, &exponent);
  if (exponent < -13) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
  return sign | static_cast<uint16_t>((exponent + 14) << 10 |
                                      (static_cast<uint32_t>(std::ldexp(rounded, 11 - exponent)) & 1023));
}

void begin(uint64_t seed) {
  machine.random_state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  for (int i = 0; i < 8; ++i) random_bits();
  machine.abandoned = false;
  machine.errors = 0;
  machine.first_error.clear();
  std::fill(std::begin(machine.conflicts), std::end(machine.conflicts), 0);
}

void allow_reads(const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  if (address == nullptr) {
    machine.readable.clear();
  } else {
    machine.readable.emplace_back(start, start + bytes);
  }
}

int64_t bank_conflicts(int kind) { return machine.conflicts[kind]; }

const char* error_message() {
  static std::string message;
  if (machine.errors == 0) return nullptr;
  message = "emulation: " + machine.first_error;
  if (machine.errors > 1) message += ", and " + std::to_string(machine.errors - 1) + " more";
  return message.c_str();
}

}  // namespace sharedproj::emulation
