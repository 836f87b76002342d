// SPDX-License-Identifier: Apache-2.0
// The products of the experts for a handful of pairs, straight from the ids, with mma.sync: every device from compute
// capability 8.0 on.
//
// in       topk_ids [num_pairs], expert_map [num_mapped] or null, rows, weights, bias and topk_weights as in
//          ExpertsDirectArgs
// out      output [num_pairs, num_columns] of Element, the rows of pairs whose expert is here; in GEMM 2 zeros for others
// grid     any number of blocks; best as many as there are SMs; block: kThreads
// shared   kStages * kStageBytes
// limits   num_pairs <= kMaxPairs; depth and num_columns are multiples of 8, rows and weights are aligned to 16 bytes
// targets  sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_120 compute_90
//
// Memory is the limit: every byte of the weights of the experts hit is read once, as long as no expert has more than
// kGroupPairs pairs, and what is asked for runs ahead of what is multiplied, from one tile to the next. Weights are the
// operand of 16 rows, and pairs that of 8 columns.
//
//   1  groups: up to kGroupPairs pairs of one expert
//   2  a block takes kTileWeights rows of weights of a group at a time; per kDepth elements: wait for this step, ask for
//      what comes kStages - 1 steps later, multiply
//   3  bias, router weight, activation; write
//
// Order: over the depth ascending, 16 at a time, for each element alone: a row has the bits that experts_mma.cu gives it,
// in every batch.
#include "experts/swapped.cuh"

struct ExpertsDirectArgs {
  const u32* topk_ids;                           // [num_pairs] of 1 or 2 words
  const char* rows;                              // [num_pairs / rows_shared, depth], row_stride bytes apart
  const char* weights;                           // [num_experts][rows of an expert][depth]
  char* output;                                  // [num_pairs, num_columns]
  const int* expert_map;                         // [num_mapped], or null: ids are numbers of experts
  const char* bias;                              // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;                     // [num_pairs] or null: multiplies what the activation gets
  i64 row_stride, expert_stride, weight_stride;  // in bytes
  u32 num_pairs, num_experts, num_mapped, words_per_id;
  Divisor rows_shared;  // pairs that have one row: topk in GEMM 1, 1 in GEMM 2
  u32 depth, num_columns;
  u32 activation;            // an Activation
  u32 row_step;              // of the row of weights for the next column: 2 where gate and up rows alternate
  u32 up_offset;             // from the row of a gate to that of its up
  u32 is_first;              // of the two products: it reads nothing before the kernel before it has ended
  i64 bias_stride;           // in elements, of an expert
  float alpha, beta, limit;  // of kSwiglu
};

constexpr u32 kThreads = kMaxPairs, kStages = 10, kTileWeights = 64;
constexpr u32 kStageBytes = (kTileWeights + kGroupPairs) * kRowBytes;

// What a block has asked for: steps in order, from one tile to the next. Eight threads copy a step of a row.
template <typename Tile>
struct Stream {
  static constexpr u32 kRowsAtOnce = kThreads / kChunks, kMyWeights = kTileWeights / kRowsAtOnce;
  const ExpertsDirectArgs& args;
  const Groups& groups;
  u32 num_tiles, num_steps;               // of a group, of a tile
  u32 place, end, step;                   // all tiles of all groups, taken by the blocks in turn
  const char *weights[kMyWeights], *row;  // null: zeros
  char* stages;
  u32 stage;

  __device__ __forceinline__ Stream(const ExpertsDirectArgs& args, const Groups& groups, char* stages)
      : args(args),
        groups(groups),
        num_tiles(ceil_div(args.num_columns, Tile::kColumns)),
        num_steps(ceil_div(args.depth, kDepth)),
        place(blockIdx.x),
        end(groups.count * num_tiles),
        stages(stages),
        stage(0) {
    begin();
  }

  __device__ __forceinline__ u32 group() const { return place / num_tiles; }
  __device__ __forceinline__ u32 first_column() const { return place % num_tiles * Tile::kColumns; }

  __device__ __forceinline__ void begin() {
    step = 0;
    if (place >= end) return;
    const u32 my_row = threadIdx.x / kChunks, offset = threadIdx.x % kChunks * 16;
    const char* expert = args.weights + groups.experts[group()] * args.expert_stride + offset;
#pragma unroll
    for (u32 i = 0; i < kMyWeights; ++i) {
      const u32 r = my_row + i * kRowsAtOnce;
      const bool exists = first_column() + Tile::column(r) < args.num_columns;
      weights[i] = exists ? expert + Tile::weight_row(args, first_column(), r) * args.weight_stride : nullptr;
    }
    const u32 pair = my_row < kGroupPairs ? groups.pairs[group()][my_row] : kNobody;
    row = pair == kNobody ? nullptr : args.rows + args.rows_shared.quotient(pair) * args.row_stride + offset;
  }

  // The next step, of one of them or of both; without a commit_copies, which is due even where there is no step left.
  __device__ __forceinline__ void ask(bool for_weights, bool for_rows) {
    if (place < end) {
      const u32 my_row = threadIdx.x / kChunks, my_chunk = threadIdx.x % kChunks, at = step * kRowBytes;
      const bool is_within = step * kDepth + my_chunk * 8 < args.depth;
      char* to = stages + stage * kStageBytes + chunk_offset(my_row, my_chunk);
      const auto copy = [&](u32 r, const char* from) {
        const bool exists = is_within && from != nullptr;
        copy_async(to + r * kRowBytes, exists ? from + at : args.weights, exists);
      };
#pragma unroll
      for (u32 i = 0; i < kMyWeights; ++i) {
        if (for_weights) copy(i * kRowsAtOnce, weights[i]);
      }
      if (for_rows && my_row < kGroupPairs) copy(kTileWeights, row);
      if (++step == num_steps) {
        place += gridDim.x;
        begin();
      }
    }
    if (++stage == kStages) stage = 0;
  }
};

template <typename Tile>
__device__ __forceinline__ void experts_direct(const ExpertsDirectArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ Groups groups;
  using Element = typename Tile::Element;
  if (args.is_first) wait_for_kernel_before();
  let_next_kernel_begin();
  find_groups(args, groups);  // of ids that were there before the first product
  char* stages = reinterpret_cast<char*>(memory);
  Stream<Tile> stream(args, groups, stages), done = stream;
#pragma unroll 1
  for (u32 i = 0; i + 1 < kStages; ++i) {
    stream.ask(true, args.is_first);
    if (args.is_first) commit_copies();
  }
  if (!args.is_first) {  // weights are there, rows will be
    wait_for_kernel_before();
    Stream<Tile> late = done;
#pragma unroll 1
    for (u32 i = 0; i + 1 < kStages; ++i) {
      late.ask(false, true);
      commit_copies();
    }
    clear_unknown(args, groups);
  }
  const u32 my_weights = warp_id() * 16;
#pragma unroll 1
  for (; done.place < done.end; done.place += gridDim.x) {
    float sums[4] = {};
#pragma unroll 1
    for (u32 step = 0; step < done.num_steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // all have waited for their part of this step, and are done with the one before
      stream.ask(true, true);
      commit_copies();
      const char* stage = stages + done.stage * kStageBytes;
      if (++done.stage == kStages) done.stage = 0;
#pragma unroll
      for (u32 k = 0; k < kChunks; k += 4) {
        u32 pairs[4];
        load_matrices(pairs, stage + chunk_offset(kTileWeights + lane_id() % 8, k + lane_id() / 8));
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          u32 weights[4];
          load_matrices(weights, stage + chunk_offset(my_weights + lane_id() % 16, k + half * 2 + lane_id() / 16));
          multiply_add<Element>(sums, weights, pairs[half * 2], pairs[half * 2 + 1]);
        }
      }
    }

    const u32 group = done.group();
    write_swapped<Tile>(args, groups.pairs[group], groups.experts[group], done.first_column(), my_weights, sums);
  }
  wait_copies<0>();
}

#define ENTRY(name, type, Element, kGated)                                              \
  extern "C" __global__ void __launch_bounds__(kThreads)                                \
      experts_direct_##name##_##type(const __grid_constant__ ExpertsDirectArgs args) {  \
    experts_direct<TileOf<Element, kGated, kGroupPairs, kTileWeights, kThreads>>(args); \
  }
ENTRY(gated, bf16, BF16, true)
ENTRY(gated, f16, F16, true)
ENTRY(plain, bf16, BF16, false)
ENTRY(plain, f16, F16, false)
