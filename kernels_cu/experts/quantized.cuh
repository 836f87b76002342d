// SPDX-License-Identifier: Apache-2.0
// The products of the experts with quantised weights, which become 16-bit elements on their way to mma.sync: every device
// from compute capability 8.0 on.
//
// in       with kPairs = 8: topk_ids [num_pairs], expert_map [num_mapped] or null; else sorted_token_ids, expert_ids and
//          num_tokens_post_pad of moe_align_block_size with blocks of kPairs
//          rows, weights, scales, zeros, bias and topk_weights as in ExpertsQuantizedArgs
// out      output [num_pairs, num_columns] of Element, the rows of pairs whose expert is here; in GEMM 2 zeros for others
// grid     any number of blocks; best two for each SM; block: kThreads
// shared   kStages * kStageBytes of QuantizedTile
// limits   with kPairs = 8: num_pairs <= kMaxPairs; depth is a multiple of 16 bytes of weights, num_columns of 8; a group
//          of columns with one scale is a multiple of 32; rows and weights are aligned to 16 bytes
//
// As experts_direct.cu: weights are what takes time, so each is read and decoded once for kPairs pairs, and what is asked
// for runs ahead of what is multiplied, from one tile to the next.
//
//   1  groups: up to kPairs pairs of one expert
//   2  a block takes kTileWeights rows of weights of a group at a time; per kWeightBytes of them: wait for this step, ask
//      for what comes kStages - 1 steps later, decode, multiply; where a group of columns ends, its scale
//   3  bias, router weight, activation; write
//
// Order: over the depth ascending, 16 or 32 at a time, a group of columns by itself, for each element alone: a row has the
// same bits in every batch, and with every kPairs.
#pragma once
#include "experts/formats.cuh"
#include "experts/swapped.cuh"

struct ExpertsQuantizedArgs {
  const u32* topk_ids;          // [num_pairs] of 1 or 2 words
  const int* expert_map;        // [num_mapped], or null: ids are numbers of experts
  const int* sorted_token_ids;  // [num_tokens_post_pad] pairs; those from num_pairs on are padding
  const int* expert_ids;        // [blocks]
  const int* num_tokens_post_pad;
  const char* rows;                              // [num_pairs / rows_shared, depth], row_stride bytes apart
  const char* weights;                           // [num_experts][rows of an expert][depth]
  const char* scales;                            // [num_experts][blocks of rows][groups of columns] of ScaleType
  const u8* zeros;                               // [num_experts][rows of an expert][groups of columns], or null: 8
  char* output;                                  // [num_pairs, num_columns]
  const char* bias;                              // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;                     // [num_pairs] or null: multiplies what the activation gets
  i64 row_stride, expert_stride, weight_stride;  // in bytes
  i64 scale_expert_stride, scale_row_stride, scale_group_stride;  // in scales
  i64 zero_expert_stride, zero_row_stride, zero_group_stride;
  u32 num_pairs, num_experts, num_mapped, words_per_id;
  Divisor tiles;        // of columns
  Divisor rows_shared;  // pairs that have one row: topk in GEMM 1, 1 in GEMM 2
  Divisor scale_rows;   // rows of weights that have one scale
  u32 group_chunks;     // 16 bytes of columns that have one scale
  u32 num_groups;
  u32 scale_type;  // a ScaleType
  u32 depth, num_columns;
  u32 activation;            // an Activation
  u32 row_step;              // of the row of weights for the next column: 2 where gate and up rows alternate
  u32 up_offset;             // from the row of a gate to that of its up
  u32 is_first;              // of the two products: it reads nothing before the kernel before it has ended
  i64 bias_stride;           // in elements, of an expert
  float alpha, beta, limit;  // of kSwiglu
};

constexpr u32 kThreads = kMaxPairs, kTileWeights = 64;
constexpr u32 kWeightBytes = kRowBytes;  // of a row, of a step
// With groups of its own, and with blocks of align: kBlocks of the former find room on an SM of 227 KB.
constexpr u32 kFewStages = 3, kManyStages = 4, kBlocks = 6;

template <typename ElementType, bool kHasGate, typename FormatType, u32 kNumPairs>
struct QuantizedTile : TileOf<ElementType, kHasGate, kNumPairs, kTileWeights, kThreads> {
  using Format = FormatType;
  static constexpr u32 kPairs = kNumPairs;
  static constexpr bool kFinds = kPairs == kGroupPairs;           // groups by itself, without align
  static constexpr u32 kStep = kWeightBytes * 8 / Format::kBits;  // of the depth
  static constexpr u32 kRowChunks = kStep / 8;                    // of a row, of a step
  static constexpr u32 kStageBytes = kTileWeights * kWeightBytes + kPairs * kStep * 2;
  static constexpr u32 kStages = kFinds ? kFewStages : kManyStages;

  // Where a chunk of a row lies behind the weights of a stage. What a warp reads at once, 32 bytes of 4 rows each or 64 of
  // 2, does not meet in a bank.
  __device__ static __forceinline__ u32 row_offset(u32 r, u32 chunk) {
    const u32 turned = Format::kBits == 8 ? (chunk ^ r % 4 * 2) % 8 : (chunk ^ r % 2 * 4) % 8;
    return (chunk / 8 * kPairs + r) * kRowBytes + turned * 16;
  }
};

// What a group is: found by the block itself, or a block of align.
template <typename Tile>
struct Source {
  const ExpertsQuantizedArgs& args;
  const Groups& groups;

  __device__ __forceinline__ u32 count() const {
    return Tile::kFinds ? groups.count : (u32)*args.num_tokens_post_pad / Tile::kPairs;
  }
  __device__ __forceinline__ u32 expert(u32 group) const {
    return Tile::kFinds ? groups.experts[group] : (u32)args.expert_ids[group];
  }
  __device__ __forceinline__ const u32* pairs(u32 group) const {
    return Tile::kFinds ? groups.pairs[group]
                        : reinterpret_cast<const u32*>(args.sorted_token_ids) + group * Tile::kPairs;
  }
};

// What a block has asked for: steps in order, from one tile to the next. Eight threads copy a step of a row of weights.
template <typename Tile>
struct Stream {
  static constexpr u32 kWeightsAtOnce = kThreads / kChunks, kMyWeights = kTileWeights / kWeightsAtOnce;
  static constexpr u32 kRowsAtOnce = kThreads / Tile::kRowChunks,
                       kMyRows = (Tile::kPairs + kRowsAtOnce - 1) / kRowsAtOnce;
  const ExpertsQuantizedArgs& args;
  Source<Tile> source;
  u32 num_steps;                // of a tile
  u32 place, end;               // all tiles of all groups, taken by the blocks in turn
  u32 left;                     // steps of this tile
  u32 stage;                    // in bytes
  u32 weight_depth, row_depth;  // values of a row that are left for the chunks of this thread, or fewer than 1
  const char *weights[kMyWeights], *rows[kMyRows];
  u32 row_bytes[kMyRows];  // 0: zeros

  __device__ __forceinline__ Stream(const ExpertsQuantizedArgs& args, const Source<Tile>& source)
      : args(args),
        source(source),
        num_steps(ceil_div(args.depth, Tile::kStep)),
        place(blockIdx.x),
        end(source.count() * args.tiles.value),
        stage(0) {
    begin();
  }

  __device__ __forceinline__ u32 group() const { return args.tiles.quotient(place); }
  __device__ __forceinline__ u32 first_column() const { return (place - group() * args.tiles.value) * Tile::kColumns; }

  // Rows of weights behind the last column, and of an expert that is not here, are any rows: what comes of them is not
  // used.
  __device__ __forceinline__ void begin() {
    left = num_steps;
    if (place >= end) return;
    const u32 group = this->group(), first_column = this->first_column(), expert = source.expert(group);
    const u32 weight_chunk = threadIdx.x % kChunks, row_chunk = threadIdx.x % Tile::kRowChunks;
    const char* mine = args.weights + (expert < args.num_experts ? expert : 0) * args.expert_stride + weight_chunk * 16;
#pragma unroll
    for (u32 i = 0; i < kMyWeights; ++i) {
      const u32 r = threadIdx.x / kChunks + i * kWeightsAtOnce;
      const bool exists = first_column + Tile::column(r) < args.num_columns;
      weights[i] = mine + (exists ? Tile::weight_row(args, first_column, r) : 0) * args.weight_stride;
    }
#pragma unroll
    for (u32 i = 0; i < kMyRows; ++i) {
      const u32 r = threadIdx.x / Tile::kRowChunks + i * kRowsAtOnce;
      const u32 pair = r < Tile::kPairs ? source.pairs(group)[r] : kNobody;
      const bool exists = pair < args.num_pairs;
      rows[i] = args.rows + (exists ? args.rows_shared.quotient(pair) : 0) * args.row_stride + row_chunk * 16;
      row_bytes[i] = exists ? 16 : 0;
    }
    weight_depth = args.depth - weight_chunk * (128 / Tile::Format::kBits);
    row_depth = args.depth - row_chunk * 8;
  }

  // The next step, of one of them or of both; without a commit_copies, which is due even where there is no step left.
  __device__ __forceinline__ void ask(char* stages, bool for_weights, bool for_rows) {
    if (place < end) {
      if (for_weights) {
        char* to = stages + stage + chunk_offset(threadIdx.x / kChunks, threadIdx.x % kChunks);
#pragma unroll
        for (u32 i = 0; i < kMyWeights; ++i) {
          copy_async(to + i * kWeightsAtOnce * kRowBytes, weights[i], (i32)weight_depth > 0);
        }
      }
      if (for_rows) {
        char* to = stages + stage + kTileWeights * kWeightBytes;
#pragma unroll
        for (u32 i = 0; i < kMyRows; ++i) {
          const u32 r = threadIdx.x / Tile::kRowChunks + i * kRowsAtOnce;
          if (Tile::kPairs % kRowsAtOnce != 0 && r >= Tile::kPairs) continue;
          copy_async_of((i32)row_depth > 0 ? row_bytes[i] : 0, to + Tile::row_offset(r, threadIdx.x % Tile::kRowChunks),
                        rows[i]);
        }
      }
#pragma unroll
      for (u32 i = 0; i < kMyWeights; ++i) weights[i] += kWeightBytes;
#pragma unroll
      for (u32 i = 0; i < kMyRows; ++i) rows[i] += Tile::kStep * 2;
      weight_depth -= Tile::kStep;
      row_depth -= Tile::kStep;
      if (--left == 0) {
        place += gridDim.x;
        begin();
      }
    }
    stage += Tile::kStageBytes;
    if (stage == Tile::kStages * Tile::kStageBytes) stage = 0;
  }
};

// Scales and zero points of the two rows of weights that a lane has, from one group of columns to the next; they are asked
// for a group ahead.
template <typename Tile>
struct Scales {
  using Element = typename Tile::Element;
  using Format = typename Tile::Format;
  const ExpertsQuantizedArgs& args;
  i64 scale_at[2], zero_at[2];
  u32 group, left;  // chunks of this group
  float scale[2];
  u32 zero[2], next_zero[2];

  __device__ __forceinline__ Scales(const ExpertsQuantizedArgs& args, u32 expert, u32 first_column,
                                    u32 first_weight_row)
      : args(args), group(0), left(args.group_chunks) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 r = first_weight_row + lane_id() / 4 + half * 8;
      const bool exists = expert < args.num_experts && first_column + Tile::column(r) < args.num_columns;
      const u32 row = exists ? Tile::weight_row(args, first_column, r) : 0, of = exists ? expert : 0;
      scale_at[half] = of * args.scale_expert_stride + args.scale_rows.quotient(row) * args.scale_row_stride;
      zero_at[half] = of * args.zero_expert_stride + row * args.zero_row_stride;
      scale[half] = load_scale(args.scales, args.scale_type, scale_at[half]);
      zero[half] = load_zero(half, 0);
      next_zero[half] = load_zero(half, 1);
    }
  }

  __device__ __forceinline__ u32 load_zero(u32 half, u32 of_group) const {
    if (Format::kBits != 4) return 0;
    const u32 zero = args.zeros == nullptr
                         ? 8
                         : args.zeros[zero_at[half] + min_u32(of_group, args.num_groups - 1) * args.zero_group_stride];
    return Format::template zero_word<Element>(zero);
  }

  // The sums of a group of columns to those of all.
  template <u32 kN>
  __device__ __forceinline__ void add(float (&sums)[kN][4], float (&part)[kN][4]) const {
#pragma unroll
    for (u32 n = 0; n < kN; ++n) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        sums[n][e] += part[n][e] * scale[e / 2];
        part[n][e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void next() {
    ++group;
    left = args.group_chunks;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      scale[half] = load_scale(args.scales, args.scale_type,
                               scale_at[half] + min_u32(group, args.num_groups - 1) * args.scale_group_stride);
      zero[half] = next_zero[half];
      next_zero[half] = load_zero(half, group + 1);
    }
  }
};

// Where a lane finds what it needs in a stage: rows of weights, by two chunks, and its part of a row of the pairs' for a
// chunk of weights.
__device__ __forceinline__ u32 weights_offset(u32 first_weight_row, u32 chunk) {
  return chunk_offset(first_weight_row + lane_id() % 16, chunk + lane_id() / 16);
}
template <typename Tile>
__device__ __forceinline__ u32 rows_offset(u32 chunk) {
  const u32 r = lane_id() / 4, quad_lane = lane_id() % 4;
  const u32 offset = Tile::Format::kBits == 8 ? Tile::row_offset(r, chunk * 2 + quad_lane / 2) + quad_lane % 2 * 8
                                              : Tile::row_offset(r, chunk * 4 + quad_lane);
  return kTileWeights * kWeightBytes + offset;
}

// A chunk of two rows of weights in each lane, by all pairs.
template <typename Tile>
__device__ __forceinline__ void multiply_chunk(const char* rows, u32 word, u32 lower_word, const u32 (&zero)[2],
                                               float (&part)[Tile::kPairs / 8][4]) {
  using Element = typename Tile::Element;
  using Format = typename Tile::Format;
  constexpr u32 kDecoded = Format::kPerWord / 2;
  u32 first[kDecoded], second[kDecoded];
  Format::template decode<Element>(word, zero[0], first);
  Format::template decode<Element>(lower_word, zero[1], second);
#pragma unroll
  for (u32 n = 0; n < Tile::kPairs / 8; ++n) {
    const char* row = rows + n * 8 * kRowBytes;
    const u32 a[4] = {first[0], second[0], first[1], second[1]};
    if constexpr (Format::kBits == 8) {
      const uint2 b = *reinterpret_cast<const uint2*>(row);
      multiply_add<Element>(part[n], a, b.x, b.y);
    } else {
      const u32 rest[4] = {first[2], second[2], first[3], second[3]};
      const uint4 b = *reinterpret_cast<const uint4*>(row);
      multiply_add<Element>(part[n], a, __byte_perm(b.x, b.z, 0x5410), __byte_perm(b.x, b.z, 0x7632));
      multiply_add<Element>(part[n], rest, __byte_perm(b.y, b.w, 0x5410), __byte_perm(b.y, b.w, 0x7632));
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void experts_quantized(const ExpertsQuantizedArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ Groups groups;
  using Element = typename Tile::Element;
  using Format = typename Tile::Format;
  constexpr u32 kN = Tile::kPairs / 8;
  if (args.is_first) wait_for_kernel_before();
  let_next_kernel_begin();
  if (Tile::kFinds) find_groups(args, groups);  // of ids that were there before the first product
  char* stages = reinterpret_cast<char*>(memory);
  const Source<Tile> source = {args, groups};
  Stream<Tile> stream(args, source), done = stream;
#pragma unroll 1
  for (u32 i = 0; i + 1 < Tile::kStages; ++i) {
    stream.ask(stages, true, args.is_first);
    if (args.is_first) commit_copies();
  }
  if (!args.is_first) {  // weights are there, rows will be
    wait_for_kernel_before();
    Stream<Tile> late = done;
#pragma unroll 1
    for (u32 i = 0; i + 1 < Tile::kStages; ++i) {
      late.ask(stages, false, true);
      commit_copies();
    }
    if (Tile::kFinds) clear_unknown(args, groups);
  }
  const u32 my_weights = warp_id() * 16;
  // Those of the first half of a stage; its other rows are kRowsOffset lines behind, its other weights have one bit more.
  constexpr u32 kRowsOffset = Tile::kRowChunks / 8 / 2 * Tile::kPairs;
  const u32 weight_offsets[2] = {weights_offset(my_weights, 0), weights_offset(my_weights, 2)};
  u32 row_offsets[kChunks / 2];
#pragma unroll
  for (u32 i = 0; i < kChunks / 2; ++i) row_offsets[i] = rows_offset<Tile>(i);
#pragma unroll 1
  for (; done.place < done.end; done.place += gridDim.x) {
    const u32 group = done.group(), first_column = done.first_column(), expert = source.expert(group);
    Scales<Tile> scales(args, expert, first_column, my_weights);
    float sums[kN][4] = {}, part[kN][4] = {};
    const auto end_group = [&](u32 num_chunks) {
      scales.left -= num_chunks;
      if (scales.left != 0) return;
      scales.add(sums, part);
      scales.next();
    };
#pragma unroll 1
    for (u32 step = 0; step < done.num_steps; ++step) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();  // all have waited for their part of this step, and are done with the one before
      stream.ask(stages, true, true);
      commit_copies();
      const char* stage = stages + done.stage;
      done.stage += Tile::kStageBytes;
      if (done.stage == Tile::kStages * Tile::kStageBytes) done.stage = 0;
      if (args.group_chunks % 4 == 0) {  // most often, and without branches between the products of four chunks
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          u32 words[2][4];  // of the first rows and the others, and of the next chunk
          load_matrices(words[0], stage + (weight_offsets[0] ^ half * 64));
          load_matrices(words[1], stage + (weight_offsets[1] ^ half * 64));
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const char* rows = stage + row_offsets[i] + half * (kRowsOffset * kRowBytes);
            multiply_chunk<Tile>(rows, words[i / 2][i % 2 * 2], words[i / 2][i % 2 * 2 + 1], scales.zero, part);
          }
          end_group(4);
        }
      } else {
#pragma unroll 1
        for (u32 chunk = 0; chunk < kChunks; chunk += 2) {
          u32 words[4];
          load_matrices(words, stage + weights_offset(my_weights, chunk));
          multiply_chunk<Tile>(stage + rows_offset<Tile>(chunk), words[0], words[1], scales.zero, part);
          if (Format::kBits == 4) end_group(1);
          multiply_chunk<Tile>(stage + rows_offset<Tile>(chunk + 1), words[2], words[3], scales.zero, part);
          end_group(Format::kBits == 4 ? 1 : 2);
        }
      }
    }
    scales.add(sums, part);
#pragma unroll
    for (u32 n = 0; n < kN; ++n) {
      if (!Tile::kFinds && expert >= args.num_experts) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
      write_swapped<Tile>(args, source.pairs(group) + n * 8, expert, first_column, my_weights, sums[n]);
    }
  }
  wait_copies<0>();
}

// All kernels of a format: the whole of its unit. Rows of 4-bit weights leave room for a block fewer on an SM.
#define QUANTIZED_ENTRY(format, Format, name, type, Element, kGated, kPairs)                             \
  extern "C" __global__ void __launch_bounds__(kThreads, Format::kBits == 8 ? kBlocks : kBlocks - 1)     \
      experts_##format##_##name##_##kPairs##_##type(const __grid_constant__ ExpertsQuantizedArgs args) { \
    experts_quantized<QuantizedTile<Element, kGated, Format, kPairs>>(args);                             \
  }
#define QUANTIZED_ENTRIES(format, Format)                       \
  QUANTIZED_ENTRY(format, Format, gated, bf16, BF16, true, 8)   \
  QUANTIZED_ENTRY(format, Format, gated, f16, F16, true, 8)     \
  QUANTIZED_ENTRY(format, Format, plain, bf16, BF16, false, 8)  \
  QUANTIZED_ENTRY(format, Format, plain, f16, F16, false, 8)    \
  QUANTIZED_ENTRY(format, Format, gated, bf16, BF16, true, 16)  \
  QUANTIZED_ENTRY(format, Format, gated, f16, F16, true, 16)    \
  QUANTIZED_ENTRY(format, Format, plain, bf16, BF16, false, 16) \
  QUANTIZED_ENTRY(format, Format, plain, f16, F16, false, 16)
