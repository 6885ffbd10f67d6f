// Emulates what csrc/cuda/sm90/instructions.h adds: the copy engine, its barriers, and products of
// a warpgroup.
//
// All three are asynchronous on a GPU, and here they happen as late as they may: a block is copied
// at a random later time and is NaN until then, and a product is computed when it is waited for,
// from what shared memory and registers then hold. What is written for the engine or for products
// is NaN until it is published. A stage that is given back too early, a register that is changed
// too early, or a barrier that is missing, shows as a wrong result.
#pragma once

#include "emulator.h"

#define __grid_constant__

namespace onepass::cuda::sm90 {

using emulator::block;
using emulator::wait_for_change;

struct TensorMap {
  const uint8_t* data;
  int64_t sizes[4], strides[4];  // head_dim, seq, heads, batch; in elements
  int32_t box_tokens;
};

struct BarrierState {
  uint64_t parity : 1;
  uint64_t arrivals : 15;
  int64_t pending : 16;
  int64_t bytes : 32;
};
using Barrier = uint64_t;
static_assert(sizeof(BarrierState) == sizeof(Barrier));

inline BarrierState& state(Barrier* barrier) { return *reinterpret_cast<BarrierState*>(barrier); }

inline void end_phase_if_complete(Barrier* barrier) {
  BarrierState& of = state(barrier);
  EMULATOR_CHECK(of.pending >= 0);
  if (of.pending == 0 && of.bytes == 0) {
    of.parity ^= 1;
    of.pending = of.arrivals;
  }
}

inline void init_barrier(Barrier* barrier, int arrivals) {
  state(barrier) = {0, static_cast<uint64_t>(arrivals), arrivals, 0};
}
inline void publish_barriers() {}
inline void arrive_and_expect(Barrier* barrier, int bytes) {
  state(barrier).bytes += bytes;
  --state(barrier).pending;
  end_phase_if_complete(barrier);
}
inline void arrive(Barrier* barrier) {
  --state(barrier).pending;
  end_phase_if_complete(barrier);
}
inline void wait(Barrier* barrier, int parity) {
  while (state(barrier).parity == static_cast<uint64_t>(parity)) wait_for_change(*barrier);
}

constexpr int kBytesOfLine = 128;

// The chunk of 16 bytes of a line is permuted by address bits 7 to 9, which are the line modulo 8.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void copy_later(void* to, std::vector<uint8_t> data, Barrier* barrier) {
  uint8_t* target = static_cast<uint8_t*>(to);
  std::memset(target, 0xff, data.size());
  block->later.push_back([target, data = std::move(data), barrier] {
    std::memcpy(target, data.data(), data.size());
    state(barrier).bytes -= static_cast<int64_t>(data.size());
    end_phase_if_complete(barrier);
  });
}

inline void copy_block(void* to, const TensorMap& from, Barrier* barrier, int column, int token,
                       int head, int b) {
  const uint32_t begin = shared_address(to);
  EMULATOR_CHECK(begin % 1024 == 0);
  const int bytes = from.box_tokens * kBytesOfLine;
  std::vector<uint8_t> data(bytes, 0);
  for (int i = 0; i < from.box_tokens; ++i) {
    if (token + i >= from.sizes[1] || token + i < 0) continue;
    for (int j = 0; j < kBytesOfLine / 2; ++j) {
      if (column + j >= from.sizes[0]) continue;
      const int64_t element =
          column + j + (token + i) * from.strides[1] + head * from.strides[2] + b * from.strides[3];
      std::memcpy(&data[swizzled(i * kBytesOfLine + 2 * j)], from.data + 2 * element, 2);
    }
  }
  copy_later(to, std::move(data), barrier);
}

inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  EMULATOR_CHECK(bytes % 16 == 0 && shared_address(to) % 16 == 0);
  EMULATOR_CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0);
  const uint8_t* begin = static_cast<const uint8_t*>(from);
  copy_later(to, {begin, begin + bytes}, barrier);
}

template <typename T>
void write_shared(void* to, const T& value) {
  uint8_t* target = static_cast<uint8_t*>(to);
  EMULATOR_CHECK(shared_address(to) % sizeof(T) == 0);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&value);
  std::memset(target, 0xff, sizeof(T));
  emulator::thread().unpublished.emplace_back(target,
                                              std::vector<uint8_t>(bytes, bytes + sizeof(T)));
}
inline void store_matrices(void* matrix_row, const uint32_t (&r)[4]) {
  EMULATOR_CHECK(shared_address(matrix_row) % 16 == 0);
  const uint64_t in[5] = {reinterpret_cast<uintptr_t>(matrix_row), r[0], r[1], r[2], r[3]};
  const uint64_t* rows = emulator::exchange(in, 5, [](emulator::Exchange& warp) {
    for (int lane = 0; lane < 32; ++lane) {  // of each of its four elements, its matrix row
      for (int matrix = 0; matrix < 4; ++matrix) {
        warp.out[lane][matrix] = warp.in[8 * matrix + lane / 4][0];
      }
    }
  });
  for (int matrix = 0; matrix < 4; ++matrix) {
    write_shared(reinterpret_cast<uint8_t*>(rows[matrix]) + emulator::lane() % 4 * 4, r[matrix]);
  }
}
inline void publish_writes() {
  auto& written = emulator::thread().unpublished;
  for (const auto& [to, bytes] : written) std::memcpy(to, bytes.data(), bytes.size());
  written.clear();
}

inline void add_floats(float* to, const void* from, int bytes) {
  EMULATOR_CHECK(bytes % 16 == 0 && shared_address(from) % 16 == 0);
  EMULATOR_CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0);
  emulator::Thread& self = emulator::thread();
  ++self.unread;
  ++self.unfinished;
  block->later.push_back([to, from, bytes, &self] {
    const float* begin = static_cast<const float*>(from);
    emulator::in_flight.push_back(
        [to, values = std::vector<float>(begin, begin + bytes / sizeof(float)), &self] {
          for (size_t i = 0; i < values.size(); ++i) to[i] += values[i];
          --self.unfinished;
          ++self.additions_advanced;
        });
    --self.unread;
    ++self.additions_advanced;
  });
}
inline void wait_read() {
  emulator::Thread& self = emulator::thread();
  while (self.unread > 0) wait_for_change(self.additions_advanced);
}
inline void wait_added() {
  emulator::Thread& self = emulator::thread();
  while (self.unfinished > 0) wait_for_change(self.additions_advanced);
}
inline void order_additions() {}

inline bool complete(emulator::Meeting& meeting, int threads) {
  if (++meeting.arrived < threads) return false;
  meeting.arrived = 0;
  ++meeting.generation;
  return true;
}
inline void sync_threads(int number, int threads) {
  emulator::Meeting& meeting = block->meetings[number];
  if (!complete(meeting, threads)) wait_for_change(meeting.generation);
}
inline void arrive_threads(int number, int threads) { complete(block->meetings[number], threads); }

template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void take_registers() {}

inline void begin_products() {}
inline void commit_products() {
  emulator::Thread& self = emulator::thread();
  self.product_groups.push_back(std::move(self.open_products));
  self.open_products.clear();
}
template <int kPending>
void wait_products() {
  auto& groups = emulator::thread().product_groups;
  EMULATOR_CHECK(emulator::thread().open_products.empty());
  while (groups.size() > kPending) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
inline void finish_before_wait(float* place, float value) { *place = value; }
template <int kBlocks>
void hold(float (&)[kBlocks][4]) {}

struct Descriptor {
  uint32_t begin, leading_bytes, stride_bytes;

  explicit Descriptor(uint64_t bits)
      : begin((bits & 0x3fff) * 16),
        leading_bytes((bits >> 16 & 0x3fff) * 16),
        stride_bytes((bits >> 32 & 0x3fff) * 16) {
    EMULATOR_CHECK(bits >> 62 == 1 && (bits >> 49 & 7) == 0);  // 128-byte swizzle, no base offset
  }

  template <typename Element>
  float load(uint32_t offset) const {
    uint16_t bits;
    std::memcpy(&bits, shared_memory() + swizzled(begin + offset), 2);
    return emulator::widen<Element>(bits);
  }
  // Element (m, k) of a factor that is contiguous in k (K-major).
  template <typename Element>
  float k_major(int m, int k) const {
    return load<Element>(m / 8 * stride_bytes + m % 8 * 128 + 2 * k);
  }
  // Element (k, column) of a factor that is contiguous in columns (MN-major).
  template <typename Element>
  float mn_major(int k, int column) const {
    return load<Element>(column / 64 * leading_bytes + column % 64 * 2 + k / 8 * stride_bytes +
                         k % 8 * 128);
  }
};

// One warp's 16 of the 64 in M of a warpgroup's product; `left(m, k)` and `right(k, column)` give
// elements.
template <int kBlocks, typename Left, typename Right>
void add_product(float* const (&c)[32], bool accumulate, const Left& left, const Right& right) {
  emulator::counters.products += kBlocks;
  static float a[16][16], b[16][8 * kBlocks];
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 16; ++m) a[m][k] = left(m, k);
    for (int column = 0; column < 8 * kBlocks; ++column) b[k][column] = right(k, column);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < kBlocks; ++n) {
      for (int e = 0; e < 4; ++e) {
        const int m = lane / 4 + e / 2 * 8, column = 8 * n + 2 * (lane % 4) + e % 2;
        float sum = accumulate ? c[lane][4 * n + e] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][column];
        c[lane][4 * n + e] = sum;
      }
    }
  }
}

// A product of two factors in shared memory: `left_of(a, m, k)` and `right_of(b, k, column)` find
// their elements.
template <int kBlocks, typename LeftOf, typename RightOf>
void start_product(float (&c)[kBlocks][4], uint64_t a, uint64_t b, bool accumulate,
                   const LeftOf& left_of, const RightOf& right_of) {
  float* target = &c[0][0];
  emulator::thread().open_products.push_back([=] {
    const uint64_t in[1] = {reinterpret_cast<uintptr_t>(target)};
    const int first_m = emulator::block->current % 128 / 32 * 16;
    emulator::exchange(in, 1, [&](emulator::Exchange& warp) {
      float* targets[32];
      for (int lane = 0; lane < 32; ++lane)
        targets[lane] = reinterpret_cast<float*>(warp.in[lane][0]);
      const Descriptor left(a), right(b);
      add_product<kBlocks>(
          targets, accumulate, [&](int m, int k) { return left_of(left, first_m + m, k); },
          [&](int k, int column) { return right_of(right, k, column); });
    });
  });
}

template <typename Element, int kBlocks>
void multiply_transposed(float (&c)[kBlocks][4], uint64_t a, uint64_t b, bool accumulate) {
  start_product(
      c, a, b, accumulate,
      [](const Descriptor& left, int m, int k) { return left.k_major<Element>(m, k); },
      [](const Descriptor& right, int k, int column) { return right.k_major<Element>(column, k); });
}

template <typename Element, int kBlocks>
void multiply_columns(float (&c)[kBlocks][4], uint64_t a, uint64_t b, bool accumulate) {
  start_product(
      c, a, b, accumulate,
      [](const Descriptor& left, int m, int k) { return left.mn_major<Element>(k, m); },
      [](const Descriptor& right, int k, int column) {
        return right.mn_major<Element>(k, column);
      });
}

template <typename Element, int kBlocks>
void multiply_add(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  float* target = &c[0][0];
  const uint32_t* factor = a;
  emulator::thread().open_products.push_back([=] {
    const uint64_t in[2] = {reinterpret_cast<uintptr_t>(target),
                            reinterpret_cast<uintptr_t>(factor)};
    emulator::exchange(in, 2, [&](emulator::Exchange& warp) {
      float* targets[32];
      for (int lane = 0; lane < 32; ++lane)
        targets[lane] = reinterpret_cast<float*>(warp.in[lane][0]);
      const Descriptor right(b);
      add_product<kBlocks>(
          targets, true,
          [&](int m, int k) {
            const int lane = m % 8 * 4 + k % 8 / 2, word = m / 8 + k / 8 * 2;
            const auto* words = reinterpret_cast<const uint32_t*>(warp.in[lane][1]);
            return emulator::widen<Element>(static_cast<uint16_t>(words[word] >> 16 * (k % 2)));
          },
          [&](int k, int column) { return right.mn_major<Element>(k, column); });
    });
  });
}

}  // namespace onepass::cuda::sm90
