// SPDX-License-Identifier: Apache-2.0
// What the kernels with mma.sync for pairs that align has sorted share, of 16 bits and of fp8: their argument, which tile a
// block has, how it is loaded, and rows of 16 bits.
#pragma once
#include "experts/experts.cuh"

// What every block reads comes first, as the first look at a line of 64 bytes of the arguments takes 200 cycles.
struct ExpertsArgs {
  const int* sorted_token_ids;  // [num_tokens_post_pad] pairs; those from num_pairs on are padding
  const int* expert_ids;        // [blocks]
  const int* num_tokens_post_pad;
  const char* rows;           // [num_pairs / rows_shared, depth], row_stride bytes apart
  const char* weights;        // [num_experts][rows of an expert][depth]
  char* output;               // [num_pairs, num_columns]
  const float* row_scales;    // [num_pairs / rows_shared][steps], of 128 columns each; these and the next two of fp8
  const char* weight_scales;  // [num_experts][blocks of rows][groups of columns] of ScaleType
  float* output_scales;       // [num_pairs][groups of 128 columns], of what is written in e4m3
  const char* bias;           // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;  // [num_pairs] or null: multiplies what the activation gets
  i64 row_stride, expert_stride, weight_stride;                   // in bytes
  i64 scale_expert_stride, scale_row_stride, scale_group_stride;  // in scales, of weights
  u32 num_pairs, num_experts;
  Divisor group_tiles;  // tiles of group_blocks blocks of pairs, which together read the weights of a tile
  Divisor rows_shared;  // pairs that have one row: topk in GEMM 1, 1 in GEMM 2
  u32 depth, num_columns;
  u32 activation;      // an Activation
  u32 row_step;        // of the row of weights for the next column: 2 where gate and up rows alternate
  u32 up_offset;       // from the row of a gate to that of its up
  u32 clears_unknown;  // pairs of experts that are not here get rows of zeros
  u32 group_blocks;
  Divisor scale_rows;        // rows of weights that have one scale
  u32 scale_type;            // a ScaleType
  u32 scales_steps;          // weights have a scale of their own in every step
  i64 bias_stride;           // in elements, of an expert
  float alpha, beta, limit;  // of kSwiglu
};

// Which tile a block of the grid has. Groups of blocks of pairs take all columns, a tile of these after another.
struct Place {
  u32 block, first_column;
  __device__ __forceinline__ Place(const ExpertsArgs& args, u32 columns) {
    const u32 group = args.group_tiles.quotient(blockIdx.x), rest = blockIdx.x - group * args.group_tiles.value;
    const u32 tile = rest / args.group_blocks;
    block = group * args.group_blocks + rest - tile * args.group_blocks;
    first_column = tile * columns;
  }
};

template <typename Tile>
__device__ __forceinline__ void load_pairs(const ExpertsArgs& args, u32 block, u32* pairs) {
#pragma unroll 1
  for (u32 r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    pairs[r] = (u32)args.sorted_token_ids[block * Tile::kRows + r];
  }
  __syncthreads();
}

// For pairs of an expert that is not here.
template <typename Tile>
__device__ __forceinline__ void clear_rows(const ExpertsArgs& args, const u32* pairs, u32 first_column) {
  if (!args.clears_unknown) return;
#pragma unroll 1
  for (u32 i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += Tile::kThreads) {
    const u32 pair = pairs[i / Tile::kColumns], column = first_column + i % Tile::kColumns;
    if (pair < args.num_pairs && column < args.num_columns) {
      reinterpret_cast<u16*>(args.output)[(i64)pair * args.num_columns + column] = 0;
    }
  }
}

// What a thread copies at each step: chunks of the same rows.
template <typename Tile>
struct Loader {
  static constexpr u32 kRowsAtOnce = Tile::kThreads / kChunks;
  static constexpr u32 kMyRows = (Tile::kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr u32 kMyWeights = Tile::kWeightRows / kRowsAtOnce;
  const char *rows[kMyRows], *weights[kMyWeights];  // null: zeros
  u32 my_row, my_chunk;

  __device__ __forceinline__ Loader(const ExpertsArgs& args, const u32* pairs, u32 expert, u32 first_column)
      : my_row(threadIdx.x / kChunks), my_chunk(threadIdx.x % kChunks) {
#pragma unroll
    for (u32 i = 0; i < kMyRows; ++i) {
      const u32 r = my_row + i * kRowsAtOnce;
      const u32 pair = r < Tile::kRows ? pairs[r] : args.num_pairs;
      rows[i] = pair < args.num_pairs ? args.rows + args.rows_shared.quotient(pair) * args.row_stride : nullptr;
    }
    const char* mine = args.weights + expert * args.expert_stride;
#pragma unroll
    for (u32 i = 0; i < kMyWeights; ++i) {
      const u32 r = my_row + i * kRowsAtOnce;
      const bool exists = first_column + Tile::column(r) < args.num_columns;
      weights[i] = exists ? mine + Tile::weight_row(args, first_column, r) * args.weight_stride : nullptr;
    }
  }

  // Asks for a step, if there is one; a group of copies even if not, so that the number of groups tells the step.
  __device__ __forceinline__ void ask(const ExpertsArgs& args, char* stage, u32 step, u32 num_steps) const {
    if (step < num_steps) {
      const u32 element = step * Tile::kStepDepth + my_chunk * Tile::kPerChunk;
      const bool is_within = element < args.depth;
#pragma unroll
      for (u32 i = 0; i < kMyRows; ++i) {
        const u32 r = my_row + i * kRowsAtOnce;
        if (Tile::kRows % kRowsAtOnce != 0 && r >= Tile::kRows) continue;
        const bool exists = is_within && rows[i] != nullptr;
        copy_async(stage + chunk_offset(r, my_chunk), exists ? rows[i] + element * Tile::kBytes : args.rows, exists);
      }
      stage += Tile::kRows * kRowBytes;
#pragma unroll
      for (u32 i = 0; i < kMyWeights; ++i) {
        const u32 r = my_row + i * kRowsAtOnce;
        const bool exists = is_within && weights[i] != nullptr;
        copy_async(stage + chunk_offset(r, my_chunk), exists ? weights[i] + element * Tile::kBytes : args.weights,
                   exists);
      }
    }
    commit_copies();
  }
};

// What the lanes l, l + 1, l + 2, l + 3 of a quad have as words 0 to 3 of lane l + i is word i of each of them after.
__device__ __forceinline__ void transpose_in_quads(u32 (&words)[4]) {
  const auto exchange = [](u32& mine, u32& other, bool is_upper, u32 distance) {
    const u32 taken = __shfl_xor_sync(kFullWarp, is_upper ? mine : other, distance);
    (is_upper ? mine : other) = taken;
  };
  const bool is_odd = lane_id() % 2 != 0, is_upper = lane_id() / 2 % 2 != 0;
  exchange(words[0], words[1], is_odd, 1);
  exchange(words[2], words[3], is_odd, 1);
  exchange(words[0], words[2], is_upper, 2);
  exchange(words[1], words[3], is_upper, 2);
}

// 16 rows of the tile by a warp, which has them in the layout of m16n8k16.
template <typename Tile>
__device__ __forceinline__ void write_rows(const ExpertsArgs& args, const u32* pairs, u32 first_column,
                                           u32 first_weight_row, const float (&sums)[Tile::kN][4]) {
  using Element = typename Tile::Element;
  constexpr u32 kStep = Tile::kGated ? 2 : 1, kWords = Tile::kN / kStep;  // products for a word; words of a row
  constexpr u32 kAtOnce = kWords % 4 == 0 ? 4 : 1;
  const u32 quad_lane = lane_id() % 4;
  const auto column_of = [&](u32 n) { return first_column + Tile::column(first_weight_row + n * 8); };
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 pair = pairs[half * 8 + lane_id() / 4];
    const bool exists = pair < args.num_pairs;
    char* output = args.output + (exists ? (i64)pair * args.num_columns * 2 : 0);
#pragma unroll
    for (u32 first = 0; first < kWords; first += kAtOnce) {
      u32 words[kAtOnce];
#pragma unroll
      for (u32 w = 0; w < kAtOnce; ++w) words[w] = Element::pack(sums[(first + w) * kStep] + half * 2);
      if constexpr (kAtOnce == 4) {
        transpose_in_quads(words);
        const u32 column = column_of((first + quad_lane) * kStep);
        if (exists && column < args.num_columns) {
          *reinterpret_cast<uint4*>(output + column * 2) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      } else {
        const u32 column = column_of(first * kStep) + quad_lane * 2;
        if (exists && column < args.num_columns) *reinterpret_cast<u32*>(output + column * 2) = words[0];
      }
    }
  }
}
