// SPDX-License-Identifier: Apache-2.0
// The products of the experts with mma.sync: every device from compute capability 8.0 on.
//
// in       rows, weights, bias, topk_weights of Element or fp32; sorted_token_ids, expert_ids and num_tokens_post_pad
//          of moe_align_block_size with blocks of kRows                                          (ExpertsArgs, mma.cuh)
// out      output [num_pairs, num_columns] of Element, the rows of pairs that are in a block
// grid     blocks * column_tiles; block: kThreads
// shared   kStages * (kRows + kWeightRows) * 128 bytes
// limits   depth is a multiple of 8, rows and weights are aligned to 16 bytes
// targets  sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_120 compute_90
//
// A block makes kRows rows by kColumns columns of the output. With a gate, a column takes two rows of weights: those of
// eight gates and of their eight ups alternate in shared memory, so that a thread has the sums of both.
//
//   1  the pairs of the block; where its expert is not here, zeros
//   2  per kDepth elements: ask for what comes kStages - 1 steps later, wait for this step, multiply
//   3  bias, router weight, activation; write
//
// Order: over the depth ascending, 16 at a time, for each element alone: a row has the same bits in every batch and
// with every size of a tile.
#include "experts/mma.cuh"

// kWarpRows x kWarpColumns warps share the tile.
template <typename Element, bool kGated, u32 kRows, u32 kWeightRows, u32 kWarpRows, u32 kWarpColumns, u32 kNumStages>
struct Tile : TileOf<Element, kGated, kRows, kWeightRows, kWarpRows * kWarpColumns * kWarpSize> {
  static constexpr u32 kStages = kNumStages, kAcross = kWarpColumns;
  static constexpr u32 kM = kRows / kWarpRows / 16, kN = kWeightRows / kWarpColumns / 8;  // products of a warp
  static_assert(kN % 2 == 0, "two at a time are loaded, and with a gate belong together");
};

template <typename Tile>
__device__ __forceinline__ void experts_mma(const ExpertsArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ u32 pairs[Tile::kRows];
  char* stages = reinterpret_cast<char*>(memory);
  const Place place(args, Tile::kColumns);
  wait_for_kernel_before();
  let_next_kernel_begin();
  if (place.block * Tile::kRows >= (u32)*args.num_tokens_post_pad) return;
  const u32 expert = (u32)args.expert_ids[place.block];
  load_pairs<Tile>(args, place.block, pairs);
  if (expert >= args.num_experts) return clear_rows<Tile>(args, pairs, place.first_column);

  const Loader<Tile> loader(args, pairs, expert, place.first_column);
  const u32 num_steps = ceil_div(args.depth, Tile::kStepDepth);
  const auto stage_of = [&](u32 step) { return stages + step % Tile::kStages * Tile::kStageBytes; };
  const u32 warp_row = warp_id() / Tile::kAcross * (Tile::kM * 16);
  const u32 warp_column = warp_id() % Tile::kAcross * (Tile::kN * 8);
  float sums[Tile::kM][Tile::kN][4] = {};
#pragma unroll
  for (u32 step = 0; step + 1 < Tile::kStages; ++step) loader.ask(args, stage_of(step), step, num_steps);
#pragma unroll 1
  for (u32 step = 0; step < num_steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // all have waited for their part of this step, and are done with the one before
    loader.ask(args, stage_of(step + Tile::kStages - 1), step + Tile::kStages - 1, num_steps);
    const char* stage = stage_of(step);
    const char* stage_weights = stage + Tile::kRows * kRowBytes;
#pragma unroll
    for (u32 k = 0; k < kDepth / 16; ++k) {
      u32 a[Tile::kM][4];
#pragma unroll
      for (u32 m = 0; m < Tile::kM; ++m) {
        load_matrices(a[m], stage + chunk_offset(warp_row + m * 16 + lane_id() % 16, k * 2 + lane_id() / 16));
      }
#pragma unroll
      for (u32 n = 0; n < Tile::kN; n += 2) {
        u32 b[4];
        const u32 r = warp_column + n * 8 + lane_id() % 8 + lane_id() / 16 * 8;
        load_matrices(b, stage_weights + chunk_offset(r, k * 2 + lane_id() / 8 % 2));
#pragma unroll
        for (u32 m = 0; m < Tile::kM; ++m) {
          multiply_add<typename Tile::Element>(sums[m][n], a[m], b[0], b[1]);
          multiply_add<typename Tile::Element>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (u32 m = 0; m < Tile::kM; ++m) {
    const u32* my_pairs = pairs + warp_row + m * 16;
    float weights[2];
    load_router_weights(args, my_pairs, weights);
    finish_sums<Tile>(args, weights, expert, place.first_column, warp_column, sums[m]);
    write_rows<Tile>(args, my_pairs, place.first_column, warp_column, sums[m]);
  }
}

#define ENTRY(name, type, Element, kGated, kRows, kWeightRows, kWarpRows, kWarpColumns, kStages)    \
  extern "C" __global__ void __launch_bounds__(kWarpRows * kWarpColumns * 32)                       \
      experts_mma_##name##_##kRows##_##type(const __grid_constant__ ExpertsArgs args) {             \
    experts_mma<Tile<Element, kGated, kRows, kWeightRows, kWarpRows, kWarpColumns, kStages>>(args); \
  }
#define ENTRIES(name, type, Element, kGated)           \
  ENTRY(name, type, Element, kGated, 16, 64, 1, 4, 8)  \
  ENTRY(name, type, Element, kGated, 32, 128, 1, 4, 4) \
  ENTRY(name, type, Element, kGated, 64, 128, 2, 2, 4) \
  ENTRY(name, type, Element, kGated, 128, 128, 2, 2, 3)
ENTRIES(gated, bf16, BF16, true)
ENTRIES(gated, f16, F16, true)
ENTRIES(plain, bf16, BF16, false)
ENTRIES(plain, f16, F16, false)
