// SPDX-License-Identifier: Apache-2.0
// The products of the experts with mma.sync: every device from compute capability 8.0 on.
//
// in       rows, weights, bias, topk_weights of Element or fp32; sorted_token_ids, expert_ids and num_tokens_post_pad
//          of moe_align_block_size with blocks of kRows                                          (ExpertsArgs, experts.cuh)
// out      output [num_pairs, num_columns] of Element, the rows of pairs that are in a block
// grid     blocks * column_tiles; block: kThreads
// shared   kStages * (kRows + kWeightRows) * 128 bytes
// limits   depth is a multiple of 8, rows and weights are aligned to 16 bytes
// targets  sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121 compute_90
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
#include "experts/experts.cuh"

constexpr u32 kDepth = 64, kRowBytes = kDepth * 2, kChunks = kRowBytes / 16;  // of a step

// kWarpRows x kWarpColumns warps share the tile.
template <typename ElementType, bool kHasGate, u32 kTileRows, u32 kTileColumns, u32 kWarpRows, u32 kWarpColumns,
          u32 kNumStages>
struct Tile {
  using Element = ElementType;
  static constexpr bool kGated = kHasGate;
  static constexpr u32 kRows = kTileRows, kWeightRows = kTileColumns, kStages = kNumStages;
  static constexpr u32 kColumns = kGated ? kWeightRows / 2 : kWeightRows;
  static constexpr u32 kThreads = kWarpRows * kWarpColumns * kWarpSize;
  static constexpr u32 kAcross = kWarpColumns;                                            // warps side by side
  static constexpr u32 kM = kRows / kWarpRows / 16, kN = kWeightRows / kWarpColumns / 8;  // products of a warp
  static constexpr u32 kStageBytes = (kRows + kWeightRows) * kRowBytes;
  static_assert(kN % 2 == 0, "two at a time are loaded, and with a gate belong together");
};

// Chunks of 16 bytes are stored so that neither rows nor columns of them meet in a bank.
__device__ __forceinline__ u32 chunk_offset(u32 row, u32 chunk) { return row * kRowBytes + ((chunk ^ row % 8) * 16); }

// The row of weights, of its expert, that is row r of the tile.
template <typename Tile>
__device__ __forceinline__ u32 weight_row(const ExpertsArgs& args, u32 first_column, u32 r) {
  if (!Tile::kGated) return first_column + r;
  const u32 column = first_column + r / 16 * 8 + r % 8;
  return column * args.row_step + (r / 8 % 2 == 0 ? 0 : args.up_offset);
}

template <typename Tile>
__device__ __forceinline__ bool is_weight_row(const ExpertsArgs& args, u32 first_column, u32 r) {
  return first_column + (Tile::kGated ? r / 16 * 8 + r % 8 : r) < args.num_columns;
}

// What a thread copies at each step: chunks of rows, which stay the same rows.
template <u32 kCount>
struct Sources {
  const char* address[kCount];  // null: zeros
};

template <typename Tile>
__device__ __forceinline__ void experts_mma(const ExpertsArgs& args) {
  using Element = typename Tile::Element;
  extern __shared__ uint4 memory[];
  __shared__ u32 pairs[Tile::kRows];
  char* stages = reinterpret_cast<char*>(memory);
  const u32 block = args.column_tiles.quotient(blockIdx.x);
  const u32 first_column = (blockIdx.x - block * args.column_tiles.value) * Tile::kColumns;
  if (block * Tile::kRows >= (u32)*args.num_tokens_post_pad) return;
  const u32 expert = (u32)args.expert_ids[block];

  for (u32 r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    pairs[r] = (u32)args.sorted_token_ids[block * Tile::kRows + r];
  }
  __syncthreads();
  if (expert >= args.num_experts) {
    if (!args.clears_unknown) return;
    for (u32 i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += Tile::kThreads) {
      const u32 pair = pairs[i / Tile::kColumns], column = first_column + i % Tile::kColumns;
      if (pair < args.num_pairs && column < args.num_columns) {
        reinterpret_cast<u16*>(args.output)[(i64)pair * args.num_columns + column] = 0;
      }
    }
    return;
  }

  constexpr u32 kRowsAtOnce = Tile::kThreads / kChunks;
  constexpr u32 kMyRows = (Tile::kRows + kRowsAtOnce - 1) / kRowsAtOnce, kMyWeights = Tile::kWeightRows / kRowsAtOnce;
  const u32 my_row = threadIdx.x / kChunks, my_chunk = threadIdx.x % kChunks;
  Sources<kMyRows> rows;
  Sources<kMyWeights> weights;
#pragma unroll
  for (u32 i = 0; i < kMyRows; ++i) {
    const u32 r = my_row + i * kRowsAtOnce;
    const u32 pair = r < Tile::kRows ? pairs[r] : args.num_pairs;
    rows.address[i] = pair < args.num_pairs ? args.rows + args.rows_shared.quotient(pair) * args.row_stride : nullptr;
  }
  const char* mine = args.weights + expert * args.expert_stride;
#pragma unroll
  for (u32 i = 0; i < kMyWeights; ++i) {
    const u32 r = my_row + i * kRowsAtOnce;
    const bool exists = is_weight_row<Tile>(args, first_column, r);
    weights.address[i] = exists ? mine + weight_row<Tile>(args, first_column, r) * args.weight_stride : nullptr;
  }
  const u32 num_steps = ceil_div(args.depth, kDepth);
  const auto ask = [&](u32 step) {
    if (step < num_steps) {
      char* stage = stages + step % Tile::kStages * Tile::kStageBytes;
      const u32 element = step * kDepth + my_chunk * 8;
      const bool is_within = element < args.depth;
#pragma unroll
      for (u32 i = 0; i < kMyRows; ++i) {
        const u32 r = my_row + i * kRowsAtOnce;
        if (Tile::kRows % kRowsAtOnce != 0 && r >= Tile::kRows) continue;
        const bool exists = is_within && rows.address[i] != nullptr;
        copy_async(stage + chunk_offset(r, my_chunk), exists ? rows.address[i] + element * 2 : args.rows, exists);
      }
      stage += Tile::kRows * kRowBytes;
#pragma unroll
      for (u32 i = 0; i < kMyWeights; ++i) {
        const u32 r = my_row + i * kRowsAtOnce;
        const bool exists = is_within && weights.address[i] != nullptr;
        copy_async(stage + chunk_offset(r, my_chunk), exists ? weights.address[i] + element * 2 : args.weights, exists);
      }
    }
    commit_copies();  // of nothing, too: so the number of groups tells the step
  };

  const u32 warp_row = warp_id() / Tile::kAcross * (Tile::kM * 16);
  const u32 warp_column = warp_id() % Tile::kAcross * (Tile::kN * 8);
  float sums[Tile::kM][Tile::kN][4] = {};
#pragma unroll
  for (u32 step = 0; step + 1 < Tile::kStages; ++step) ask(step);
#pragma unroll 1
  for (u32 step = 0; step < num_steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // all have waited for their part of this step, and are done with the one before
    ask(step + Tile::kStages - 1);
    const char* stage = stages + step % Tile::kStages * Tile::kStageBytes;
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
          multiply_add<Element>(sums[m][n], a[m], b[0], b[1]);
          multiply_add<Element>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  const typename Element::Bits* bias = reinterpret_cast<const typename Element::Bits*>(args.bias);
  if (bias != nullptr) bias += expert * args.bias_stride;
#pragma unroll
  for (u32 m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 pair = pairs[warp_row + m * 16 + half * 8 + lane_id() / 4];
      if (pair >= args.num_pairs) continue;
      const float weight = args.topk_weights != nullptr ? args.topk_weights[pair] : 1.0f;
      u32* output = reinterpret_cast<u32*>(args.output) + (i64)pair * args.num_columns / 2;
#pragma unroll
      for (u32 n = 0; n < Tile::kN; n += Tile::kGated ? 2 : 1) {
        const u32 r = warp_column + n * 8 + lane_id() % 4 * 2;
        const u32 column = first_column + (Tile::kGated ? r / 16 * 8 + r % 8 : r);
        if (column >= args.num_columns) continue;
        float values[2];
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          float value = sums[m][n][half * 2 + e];
          if (bias != nullptr) value += Element::to_float(bias[weight_row<Tile>(args, first_column, r + e)]);
          value *= weight;
          if (Tile::kGated) {
            float up = sums[m][n + 1][half * 2 + e];
            if (bias != nullptr) up += Element::to_float(bias[weight_row<Tile>(args, first_column, r + e + 8)]);
            values[e] = gated(args, value, up * weight);
          } else {
            values[e] = activated(args.activation, value);
          }
        }
        output[column / 2] = Element::pack(values);
      }
    }
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
  ENTRY(name, type, Element, kGated, 128, 128, 2, 4, 3)
ENTRIES(gated, bf16, BF16, true)
ENTRIES(gated, f16, F16, true)
ENTRIES(plain, bf16, BF16, false)
ENTRIES(plain, f16, F16, false)
