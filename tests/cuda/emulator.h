// Runs the CUDA kernels on a CPU, instruction by instruction: what csrc/cuda/instructions.h and
// launch.h provide on a GPU, for the tests.
//
// Every CUDA thread is a fiber, and one runs at a time. Where the threads of a warp or a block must
// meet they wait for each other; who goes on next is drawn at random, so that a missing barrier
// shows. So are how many blocks run at a time, and the order in which they start. Memory tells of
// mistakes too: shared memory starts as NaN, and an asynchronous copy makes its destination NaN
// until its group has been waited for. Addresses of matrix rows are checked for alignment and, in
// `Counters`, for bank conflicts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace onepass::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

namespace emulator {

#define EMULATOR_CHECK(condition)                                                    \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: emulator: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                  \
    }                                                                                \
  } while (0)

struct Index {
  int32_t x, y, z;
};
using Grid = Index;

// Totals over all launches.
struct Counters {
  int64_t matrix_loads = 0, bank_conflicts = 0, products = 0;
};
inline Counters counters;
inline uint64_t seed = 0;

// What the 32 threads of a warp give to and get from one instruction that they execute together.
struct Exchange {
  int arrived = 0;
  uint64_t generation = 0;
  uint64_t in[32][10];
  uint64_t out[32][4];
};

struct Copy {
  uint8_t* to;
  uint8_t data[16];
};

struct Thread {
  ucontext_t start;
  jmp_buf paused;  // of a started thread: _longjmp asks the kernel nothing, unlike swapcontext
  std::unique_ptr<uint8_t[]> stack;
  Index index;
  bool started = false, done = false;
  const uint64_t* waits_for = nullptr;  // a generation, to be another one than `seen`
  uint64_t seen = 0;
  std::vector<Copy> open;                            // copies of the group that is not closed yet
  std::vector<std::vector<Copy>> groups;             // closed, not waited for, oldest first
  std::vector<std::function<void()>> open_products;  // the same for products of a warpgroup
  std::vector<std::vector<std::function<void()>>> product_groups;
  std::vector<std::pair<uint8_t*, std::vector<uint8_t>>> unpublished;  // written for the engine
  int unread = 0, unfinished = 0;  // additions that have not read shared memory, or are not done
  uint64_t additions_advanced = 0;
};

// Threads that wait for each other by number.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
};

constexpr size_t kStackBytes = 256 * 1024;

struct Block {
  jmp_buf scheduler;
  std::vector<Thread> threads;
  std::vector<Exchange> warps;
  std::vector<uint8_t> shared;
  int arrived = 0;
  uint64_t generation = 0;
  Index index, grid;
  int current = 0;
  std::function<void()> body;
  std::mt19937_64 random;
  std::vector<std::function<void()>> later;  // what the copy engine has not done yet
  Meeting meetings[16];
  std::vector<unsigned> pace;  // of warps
  unsigned engine_pace;
  int left;  // threads that are not done
};
inline Block* block = nullptr;
inline std::vector<std::function<void()>> in_flight;  // additions on their way to global memory

inline Thread& thread() { return block->threads[block->current]; }
inline Exchange& warp() { return block->warps[block->current / 32]; }
inline int lane() { return block->current % 32; }

// Lets others run until the generation changes.
inline void wait_for_change(const uint64_t& generation) {
  Thread& self = thread();
  self.waits_for = &generation;
  self.seen = generation;
  if (_setjmp(self.paused) == 0) _longjmp(block->scheduler, 1);
}

// Lets others run.
inline void pause() {
  if (_setjmp(thread().paused) == 0) _longjmp(block->scheduler, 1);
}

// Runs a thread until it waits or is done.
inline void resume(Thread& self) {
  if (self.waits_for != nullptr && *self.waits_for == self.seen) return;
  self.waits_for = nullptr;
  if (_setjmp(block->scheduler) != 0) return;
  if (self.started) _longjmp(self.paused, 1);
  self.started = true;
  setcontext(&self.start);
}

inline void run_thread() {
  block->body();
  Thread& self = thread();
  EMULATOR_CHECK(self.open.empty());
  for (const auto& group : self.groups) EMULATOR_CHECK(group.empty());
  EMULATOR_CHECK(self.open_products.empty() && self.product_groups.empty());
  EMULATOR_CHECK(self.unpublished.empty() && self.unread == 0);
  self.done = true;
  _longjmp(block->scheduler, 1);
}

// Gives `in`, waits for the warp, of which the last to come computes all of `out`.
template <typename Compute>
uint64_t* exchange(const uint64_t* in, int count, const Compute& compute) {
  Exchange& shared = warp();
  std::memcpy(shared.in[lane()], in, count * sizeof(uint64_t));
  if (++shared.arrived == 32) {
    compute(shared);
    shared.arrived = 0;
    ++shared.generation;
  } else {
    wait_for_change(shared.generation);
  }
  return shared.out[lane()];
}

inline uint64_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &low, 4);
  return value;
}

template <typename Element>
uint16_t round_to(float value);
template <>
inline uint16_t round_to<Bf16>(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits = static_cast<uint32_t>(bits_of(value));
  bits += 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>(bits >> 16);
}
template <>
inline uint16_t round_to<Fp16>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <typename Element>
float widen(uint16_t bits);
template <>
inline float widen<Bf16>(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}
template <>
inline float widen<Fp16>(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}

// One of some functions, drawn at random, is called and removed.
inline void call_one(std::vector<std::function<void()>>& functions, std::mt19937_64& random) {
  std::swap(functions[random() % functions.size()], functions.back());
  const std::function<void()> chosen = std::move(functions.back());
  functions.pop_back();
  chosen();
}

inline void start_block(Block& started, Index index) {
  started.index = index;
  std::memset(started.shared.data(), 0xff, started.shared.size());
  const int threads = static_cast<int>(started.threads.size());
  for (int t = 0; t < threads; ++t) {
    Thread& self = started.threads[t];
    self.started = self.done = false;
    self.waits_for = nullptr;
    self.groups.clear();
    getcontext(&self.start);
    self.start.uc_stack.ss_sp = self.stack.get();
    self.start.uc_stack.ss_size = kStackBytes;
    self.start.uc_link = nullptr;
    makecontext(&self.start, run_thread, 0);
  }
  // Warps in random order, each for one round of its threads, some far more often than others: what
  // a GPU may do, too.
  const int warps = threads / 32;
  started.pace.resize(warps);
  for (int begin = 0; begin < warps; begin += 4) {  // four warps in step: a warpgroup on Hopper
    const unsigned of_four = started.random() % 2 == 0 ? 1 : 64;
    for (int i = begin; i < std::min(begin + 4, warps); ++i) {
      started.pace[i] = started.random() % 4 == 0 ? 8 : of_four;
    }
  }
  // The copy engine is slow, and for some blocks very slow.
  started.engine_pace = started.random() % 4 == 0 ? 16384 : 512;
  started.left = threads;
}

// Lets the threads of one warp, drawn at random, run until they wait. Returns whether any is done.
inline bool advance(Block& running) {
  block = &running;
  if (!running.later.empty() && running.random() % running.engine_pace == 0) {
    call_one(running.later, running.random);
  }
  if (!in_flight.empty() && running.random() % (4 * running.engine_pace) == 0) {
    call_one(in_flight, running.random);
  }
  const int chosen = static_cast<int>(running.random() % running.pace.size());
  if (running.random() % running.pace[chosen] != 0) return false;
  const int begin = static_cast<int>(running.random() % 32), before = running.left;
  for (int i = 0; i < 32; ++i) {
    running.current = chosen * 32 + (begin + i) % 32;
    if (thread().done) continue;
    resume(thread());
    running.left -= thread().done;
  }
  return running.left < before;
}

inline void check_end(const Block& ended) {
  EMULATOR_CHECK(ended.arrived == 0 && ended.later.empty());
  for (const Meeting& meeting : ended.meetings) EMULATOR_CHECK(meeting.arrived == 0);
  for (const Exchange& shared : ended.warps) EMULATOR_CHECK(shared.arrived == 0);
}

template <typename... Params, typename Stream, typename... Arguments>
void launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, Stream,
            const Arguments&... arguments) {
  EMULATOR_CHECK(threads % 32 == 0 && shared_bytes <= 227 * 1024);
  std::mt19937_64 random(seed);
  std::vector<Index> waiting;
  for (int32_t z = 0; z < grid.z; ++z) {
    for (int32_t y = 0; y < grid.y; ++y) {
      for (int32_t x = 0; x < grid.x; ++x) waiting.push_back({x, y, z});
    }
  }
  std::shuffle(waiting.begin(), waiting.end(), random);
  std::vector<std::unique_ptr<Block>> running, ended;
  const size_t most = 1 + random() % 3;
  for (size_t i = 0; i < std::min(most, waiting.size()); ++i) {
    auto created = std::make_unique<Block>();
    created->grid = grid;
    created->threads.resize(threads);
    for (int t = 0; t < threads; ++t) {
      created->threads[t].stack.reset(new uint8_t[kStackBytes]);
      created->threads[t].index = {t, 0, 0};
    }
    created->warps.resize(threads / 32);
    created->random.seed(random());
    created->shared.resize(shared_bytes + 1024);
    created->body = [&] { kernel(arguments...); };
    start_block(*created, waiting.back());
    waiting.pop_back();
    running.push_back(std::move(created));
  }
  int64_t idle = 0;
  while (!running.empty()) {
    std::unique_ptr<Block>& chosen = running[random() % running.size()];
    if (advance(*chosen)) idle = 0;
    EMULATOR_CHECK(++idle < 15'000'000);  // a deadlock
    if (chosen->left > 0) continue;
    check_end(*chosen);
    if (waiting.empty()) {
      std::swap(chosen, running.back());
      ended.push_back(std::move(running.back()));  // additions in flight know their threads
      running.pop_back();
    } else {
      start_block(*chosen, waiting.back());
      waiting.pop_back();
    }
  }
  while (!in_flight.empty()) call_one(in_flight, random);
}

}  // namespace emulator

#define threadIdx (::onepass::cuda::emulator::thread().index)
#define blockIdx (::onepass::cuda::emulator::block->index)
#define gridDim (::onepass::cuda::emulator::block->grid)

inline uint8_t* shared_memory() {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(emulator::block->shared.data());
  return reinterpret_cast<uint8_t*>((begin + 1023) / 1024 * 1024);
}

inline int32_t recomputed(int32_t value) { return value; }

// Addresses of shared memory start at 0.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_memory());
}

template <typename Element>
uint32_t pack(float low, float high) {
  return emulator::round_to<Element>(low) | static_cast<uint32_t>(emulator::round_to<Element>(high))
                                                << 16;
}
template <typename Element>
float2 unpack(uint32_t pair) {
  return {emulator::widen<Element>(static_cast<uint16_t>(pair)),
          emulator::widen<Element>(static_cast<uint16_t>(pair >> 16))};
}

inline float fast_exp2(float x) { return x < -126 ? 0.0f : std::exp2(x); }
inline float fast_tanh(float x) {
  return 1.0f - 2.0f / (1.0f + fast_exp2(2.8853900817779268f * x));
}
inline int first_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline int leading_zeros(uint32_t bits) { return __builtin_clz(bits); }

inline void sync_block() {
  emulator::Block& running = *emulator::block;
  if (++running.arrived == static_cast<int>(running.threads.size())) {
    running.arrived = 0;
    ++running.generation;
  } else {
    emulator::wait_for_change(running.generation);
  }
}

inline void sync_warp() {
  emulator::exchange(nullptr, 0, [](emulator::Exchange&) {});
}

inline uint32_t ballot(bool predicate) {
  const uint64_t in = predicate;
  return static_cast<uint32_t>(*emulator::exchange(&in, 1, [](emulator::Exchange& warp) {
    uint64_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= warp.in[lane][0] << lane;
    for (auto& out : warp.out) out[0] = bits;
  }));
}

template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint64_t in[2] = {0, static_cast<uint64_t>(lane)};
  std::memcpy(in, &value, 4);
  const uint64_t* out = emulator::exchange(in, 2, [](emulator::Exchange& warp) {
    for (int to = 0; to < 32; ++to) warp.out[to][0] = warp.in[warp.in[to][1] % 32][0];
  });
  std::memcpy(&value, out, 4);
  return value;
}
template <typename T>
T shuffle_xor(T value, int lane_mask) {
  return shuffle(value, emulator::lane() ^ lane_mask);
}

template <typename Element>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t in[10] = {emulator::bits_of(c[0]),
                           emulator::bits_of(c[1]),
                           emulator::bits_of(c[2]),
                           emulator::bits_of(c[3]),
                           a[0],
                           a[1],
                           a[2],
                           a[3],
                           b0,
                           b1};
  const uint64_t* out = emulator::exchange(in, 10, [](emulator::Exchange& warp) {
    ++emulator::counters.products;
    const auto half = [&](int lane, int word, int index) {
      return emulator::widen<Element>(static_cast<uint16_t>(warp.in[lane][word] >> (16 * index)));
    };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) {
        const int m = lane / 4, column = 2 * (lane % 4) + i;
        left[m][column] = half(lane, 4, i);
        left[m + 8][column] = half(lane, 5, i);
        left[m][column + 8] = half(lane, 6, i);
        left[m + 8][column + 8] = half(lane, 7, i);
        right[column][m] = half(lane, 8, i);
        right[column + 8][m] = half(lane, 9, i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int m = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
        float sum = emulator::float_of(warp.in[lane][e]);
        for (int k = 0; k < 16; ++k) sum += left[m][k] * right[k][column];
        warp.out[lane][e] = emulator::bits_of(sum);
      }
    }
  });
  for (int e = 0; e < 4; ++e) c[e] = emulator::float_of(out[e]);
}

namespace emulator {

inline void load_matrices(uint32_t (&r)[4], const void* matrix_row, bool transposed) {
  const uint64_t in = reinterpret_cast<uintptr_t>(matrix_row);
  const uint64_t* out = exchange(&in, 1, [&](Exchange& warp) {
    const uint8_t* begin = shared_memory();
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      uint32_t banks = 0;
      for (int i = 0; i < 8; ++i) {
        const uint8_t* address = reinterpret_cast<const uint8_t*>(warp.in[8 * matrix + i][0]);
        EMULATOR_CHECK(address >= begin &&
                       address + 16 <= block->shared.data() + block->shared.size());
        EMULATOR_CHECK((address - begin) % 16 == 0);
        banks |= 1u << (address - begin) / 16 % 8;
        std::memcpy(values[i], address, 16);
      }
      ++counters.matrix_loads;
      counters.bank_conflicts += banks != 0xff;
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const uint32_t low = transposed ? values[j][i] : values[i][j];
        const uint32_t high = transposed ? values[j + 1][i] : values[i][j + 1];
        warp.out[lane][matrix] = low | high << 16;
      }
    }
  });
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t>(out[i]);
}

}  // namespace emulator

inline void load_matrices(uint32_t (&r)[4], const void* matrix_row) {
  emulator::load_matrices(r, matrix_row, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* matrix_row) {
  emulator::load_matrices(r, matrix_row, true);
}

inline void add_to(float* sum, float value) { *sum += value; }

inline int32_t take_number(int32_t* counter) { return (*counter)++; }
inline void set_after_writes(int32_t* number, int32_t value) { *number = value; }
inline void wait_until(const int32_t* number, int32_t value) {
  while (*number != value) emulator::pause();
}

inline void copy_async(void* to, const void* from, bool valid) {
  emulator::Copy copy{static_cast<uint8_t*>(to), {}};
  EMULATOR_CHECK((copy.to - shared_memory()) % 16 == 0);
  EMULATOR_CHECK(copy.to >= shared_memory() &&
                 copy.to + 16 <= emulator::block->shared.data() + emulator::block->shared.size());
  EMULATOR_CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0);
  if (valid) std::memcpy(copy.data, from, 16);
  std::memset(copy.to, 0xff, 16);
  emulator::thread().open.push_back(copy);
}

inline void commit_copies() {
  emulator::Thread& self = emulator::thread();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int kPending>
void wait_copies() {
  auto& groups = emulator::thread().groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.data, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace onepass::cuda
