// The CUDA kernels on the emulator, for ctypes: see emulation.py, which builds this file.
#include "kernels.cu"
#include "plan.cu"
#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "sm90/backward.cuh"
#include "sm90/forward.cuh"

using namespace onepass::cuda;

namespace {

// A tile of queries that a block of keys visits, and which entry, from 1, adds to its dq before.
struct TileOfWalk {
  int32_t tile, before;
};

// Of every block of keys, the tiles of queries that it visits, in this order.
template <int kQueries, int kKeys>
__global__ void walk_kernel(const BackwardParams params, TileOfWalk* walks) {
  KeyBlock& block = *reinterpret_cast<KeyBlock*>(shared_memory());
  if (threadIdx.x == 0) block = take_key_block<kQueries, kKeys>(params);
  sync_block();
  QueryTileWalk<kQueries, kKeys> walk(params, block);
  const DqOrder<kQueries, kKeys> order(params, block);
  TileOfWalk* next = walks + block.entry * ceil_div(params.seq, kQueries);
  for (QueryStep step = walk.next(); step.head >= 0; step = walk.next()) {
    const TileOfWalk visited{step.first / kQueries, order.find_before(step.first)};
    if (threadIdx.x == 0) *next++ = visited;
  }
}

ElementType element(bool is_bf16) { return is_bf16 ? ElementType::bf16 : ElementType::fp16; }

// A warp for each block of the Hopper forward pass: what its producer finds, until there is no tile
// left.
template <int kKeys>
void visits_kernel(const Params params, Visit* visits) {
  constexpr int kQueries = 128;
  const int32_t block = blockIdx.z * gridDim.x + blockIdx.x;
  Visit* of_block = visits + block * (ceil_div(params.seq, kKeys) + 1);
  KeyTileWalk<kQueries, kKeys, sm90::kConsumers> walk(params, blockIdx.z, blockIdx.x * kQueries);
  Visit visit;
  do {
    visit = walk.next();
    if (threadIdx.x == 0) *of_block++ = visit;
  } while (visit.tile >= 0);
}

}  // namespace

extern "C" {

int64_t onepass_size_of_params() { return sizeof(Params); }
int64_t onepass_size_of_backward_params() { return sizeof(BackwardParams); }
int64_t onepass_plan_size(int32_t seq) { return plan_size(seq); }
int64_t onepass_dq_order_size(int32_t batch, int32_t heads, int32_t seq) {
  return dq_order_size(batch, heads, seq);
}

int32_t onepass_parts_of_group(int32_t batch, int32_t heads, int32_t kv_heads, int32_t seq,
                               bool in_order) {
  return parts_of_group(batch, heads, kv_heads, seq, in_order);
}

// The same with as many blocks as the compiled kernels aim at.
int32_t onepass_parts_for_balance(int64_t blocks, int32_t group) {
  return parts_for_balance(blocks, group, kBalancedBlocks);
}
int32_t onepass_parts_in_order(int32_t kv_heads, int32_t group) {
  return parts_for_balance(kv_heads, group, kHeadsInOrder);
}

// For every block of a grid in the order in which they start, its entry and its head.
void onepass_places(int32_t entries, int32_t heads, int32_t* places) {
  for (int32_t y = 0; y < heads; ++y) {
    for (int32_t x = 0; x < entries; ++x) {
      const Place place = place_of(x, y, entries, heads, kBalancedBlocks);
      *places++ = place.entry;
      *places++ = place.head;
    }
  }
}

// For every entry of the order of keys, ceil(seq / queries) tiles of its block's walk.
void onepass_walks(const BackwardParams* params, int queries, int keys, TileOfWalk* walks) {
  const auto kernel = keys == 64      ? walk_kernel<64, 64>
                      : queries == 64 ? walk_kernel<64, 128>
                                      : walk_kernel<128, 128>;
  launch(kernel, Grid{ceil_div(params->seq, keys), 1, 1}, 32, static_cast<int>(sizeof(KeyBlock)),
         nullptr, *params, walks);
}

void onepass_seed(uint64_t seed) { emulator::seed = seed; }

// Matrix loads, those with a bank conflict, and products, since the last call.
void onepass_counters(int64_t* values) {
  values[0] = emulator::counters.matrix_loads;
  values[1] = emulator::counters.bank_conflicts;
  values[2] = emulator::counters.products;
  emulator::counters = {};
}

void onepass_plan(const PlanParams* params, int32_t* counts) {
  launch_plan(*params, counts, nullptr);
}

// For every row and block of 128 queries, ceil(seq / keys) + 1 visits.
void onepass_hopper_visits(const Params* params, int keys, Visit* visits) {
  const auto kernel = keys == 64 ? visits_kernel<64> : visits_kernel<128>;
  const Grid grid{ceil_div(params->seq, 128), 1, params->batch};
  launch(kernel, grid, 32, 0, Stream{}, *params, visits);
}

int onepass_forward(int major, bool is_bf16, int d_qk, int d_v, const Params* params) {
  const auto* kernel = find_forward(major, element(is_bf16), d_qk, d_v);
  if (kernel != nullptr) kernel->launch(*params, nullptr);
  return kernel != nullptr;
}

int onepass_backward(int major, bool is_bf16, int d_qk, int d_v, const BackwardParams* params) {
  const auto* kernel = find_backward(major, element(is_bf16), d_qk, d_v);
  if (kernel != nullptr) kernel->launch(*params, nullptr);
  return kernel != nullptr;
}
}
