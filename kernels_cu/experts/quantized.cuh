// SPDX-License-Identifier: Apache-2.0
// The products of the experts with quantised weights, which become 16-bit elements on their way to mma.sync: every device
// from compute capability 8.0 on.
//
// in       with kPairs = 8: topk_ids [num_pairs], expert_map [num_mapped] or null; else sorted_token_ids, expert_ids and
//          num_tokens_post_pad of moe_align_block_size with blocks of kPairs
//          rows, weights, scales, zeros, bias and topk_weights as in ExpertsQuantizedArgs
// out      output [num_pairs, num_columns] of Element, the rows of pairs whose expert is here; in GEMM 2 zeros for others
// grid     any number of blocks; best as many as find room, up to kBlocks on each SM; block: kThreads
// shared   kNumStages * kStageBytes of QuantizedTile
// limits   with kPairs = 8: num_pairs <= kMaxPairs; depth is a multiple of 16 bytes of weights, num_columns of 8; a group
//          of columns with one scale is a multiple of 32; rows and weights are aligned to 16 bytes
//
// As experts_direct.cu: weights are what takes time, so each is read and decoded once for kPairs pairs, and what is asked
// for runs ahead of what is multiplied, from one tile to the next. Decoding takes as many instructions as an SM has while
// weights come, so the loop has little else: rows come into the order that makes decoding cheap by those who copied them,
// and scales and zero points are asked for a group ahead.
//
//   1  groups: up to kPairs pairs of one expert
//   2  a block takes kTileWeights rows of weights of a group at a time; per kWeightBytes of them: wait for this step, put
//      its rows in order, ask for what comes kNumStages - 1 steps later, decode, multiply; after each kUnit columns, or
//      after each group of columns with one scale, if these are no multiple of kUnit, the scale
//   3  bias, router weight, activation; write
//
// Order: over the depth ascending, 16 or 32 at a time, kUnit columns or such a group by themselves, for each element
// alone: a row has the same bits in every batch, and with every kPairs.
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

constexpr u32 kThreads = kMaxPairs;
constexpr u32 kWeightBytes = kRowBytes;  // of a row, of a step
// By the pairs of a block: few, in groups of its own; those of a block of align; kBigPairs. Rows of weights of a tile,
// stages, and blocks that an SM has room and registers for, if it has 227 KB.
constexpr u32 kFewWeights = 64, kManyWeights = 128;
constexpr u32 kStages = 3, kBigStages = 2, kBigPairs = 48;
constexpr u32 kFewBlocks = 6, kManyBlocks = 3, kBigBlocks = 2;
constexpr u32 kUnit = 128;  // of the depth, whose products are added up by themselves

template <typename ElementType, bool kHasGate, typename FormatType, u32 kNumPairs>
struct QuantizedTile
    : TileOf<ElementType, kHasGate, kNumPairs, kNumPairs == kGroupPairs ? kFewWeights : kManyWeights, kThreads> {
  using Format = FormatType;
  static constexpr u32 kPairs = kNumPairs;
  static constexpr u32 kTileWeights = kPairs == kGroupPairs ? kFewWeights : kManyWeights;
  static constexpr u32 kM = kTileWeights / (kThreads / kWarpSize * 16), kN = kPairs / 8;  // products of a warp
  static constexpr bool kFinds = kPairs == kGroupPairs;           // groups by itself, without align
  static constexpr u32 kStep = kWeightBytes * 8 / Format::kBits;  // of the depth
  static constexpr u32 kRowChunks = kStep / 8;                    // of a row, of a step
  static constexpr u32 kStageBytes = kTileWeights * kWeightBytes + kPairs * kStep * 2;
  static constexpr bool kIsBig = kPairs == kBigPairs;
  static constexpr u32 kNumStages = kIsBig ? kBigStages : kStages;
  static constexpr u32 kBlocks = kIsBig               ? kBigBlocks
                                 : !kFinds            ? kManyBlocks
                                 : Format::kBits == 8 ? kFewBlocks
                                                      : kFewBlocks - 1;
  static constexpr u32 kUnitChunks = kUnit * Format::kBits / 128;  // 16 bytes of weights

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
  static constexpr u32 kWeightsAtOnce = kThreads / kChunks, kMyWeights = Tile::kTileWeights / kWeightsAtOnce;
  static constexpr u32 kRowsAtOnce = kThreads / Tile::kRowChunks, kMyRows = Tile::kPairs / kRowsAtOnce;
  static constexpr u32 kRowsOfWarp = kWarpSize / Tile::kRowChunks;  // at once
  static_assert(Tile::kPairs % kRowsAtOnce == 0 && kRowsAtOnce % 4 == 0,
                "row_offset depends on the row's number below 4");
  static_assert(kRowsOfWarp * kMyRows <= kWarpSize, "a lane for each row of a warp");
  const ExpertsQuantizedArgs& args;
  Source<Tile> source;
  u32 num_steps;                // of a tile
  u32 place, end;               // all tiles of all groups, taken by the blocks in turn
  u32 left;                     // steps of this tile
  u32 stage;                    // in bytes
  u32 weight_depth, row_depth;  // values of a row that are left for the chunks of this thread, or fewer than 1
  const char *weights, *rows;   // of the next step; from one row of weights to the next are `weights_apart` bytes
  i64 weights_apart;
  u32 num_weights;  // of kMyWeights; the others are behind the last column
  u32 row;          // one of those that the warp copies, or kNobody

  __device__ __forceinline__ Stream(const ExpertsQuantizedArgs& args, const Source<Tile>& source)
      : args(args),
        source(source),
        num_steps(ceil_div(args.depth, Tile::kStep)),
        place(blockIdx.x),
        end(source.count() * args.tiles.value),
        stage(0),
        weights_apart(Tile::column(kWeightsAtOnce) * args.row_step * args.weight_stride) {
    begin();
  }

  __device__ __forceinline__ u32 group() const { return args.tiles.quotient(place); }
  __device__ __forceinline__ u32 first_column() const { return (place - group() * args.tiles.value) * Tile::kColumns; }

  // Of an expert that is not here, rows of weights are any: what comes of them is not used.
  __device__ __forceinline__ void begin() {
    left = num_steps;
    if (place >= end) return;
    const u32 group = this->group(), first_column = this->first_column(), expert = source.expert(group);
    const u32 weight_chunk = threadIdx.x % kChunks, row_chunk = threadIdx.x % Tile::kRowChunks;
    const u32 first = threadIdx.x / kChunks;
    num_weights = 0;
#pragma unroll
    for (u32 i = 0; i < kMyWeights; ++i)
      num_weights += first_column + Tile::column(first + i * kWeightsAtOnce) < args.num_columns;
    weights = args.weights + (expert < args.num_experts ? expert : 0) * args.expert_stride + weight_chunk * 16 +
              (num_weights > 0 ? Tile::weight_row(args, first_column, first) : 0) * args.weight_stride;
    row = kNobody;
    if (lane_id() < kRowsOfWarp * kMyRows) {
      const u32 r = warp_id() * kRowsOfWarp + lane_id() / kMyRows + lane_id() % kMyRows * kRowsAtOnce;
      const u32 pair = source.pairs(group)[r];
      if (pair < args.num_pairs) row = args.rows_shared.quotient(pair);
    }
    rows = args.rows + row_chunk * 16;
    weight_depth = args.depth - weight_chunk * (128 / Tile::Format::kBits);
    row_depth = args.depth - row_chunk * 8;
  }

  // Where this thread's first chunk of a stage's rows is; the others are kRowsAtOnce lines apart.
  __device__ __forceinline__ static u32 row_place() {
    return Tile::kTileWeights * kWeightBytes +
           Tile::row_offset(threadIdx.x / Tile::kRowChunks, threadIdx.x % Tile::kRowChunks);
  }

  // The next step, of one of them or of both; without a commit_copies, which is due even where there is no step left.
  __device__ __forceinline__ void ask(char* stages, bool for_weights, bool for_rows) {
    if (place < end) {
      if (for_weights) {
        char* to = stages + stage + chunk_offset(threadIdx.x / kChunks, threadIdx.x % kChunks);
        const u32 num_here = (i32)weight_depth > 0 ? num_weights : 0;
        const char* from = weights;
#pragma unroll
        for (u32 i = 0; i < kMyWeights; ++i, from += weights_apart)
          copy_async(to + i * kWeightsAtOnce * kRowBytes, from, i < num_here);
      }
      if (for_rows) {
        char* to = stages + stage + row_place();
#pragma unroll
        for (u32 i = 0; i < kMyRows; ++i) {
          const u32 its_row = __shfl_sync(kFullWarp, row, lane_id() / Tile::kRowChunks * kMyRows + i);
          const bool exists = its_row != kNobody;
          copy_async(to + i * kRowsAtOnce * kRowBytes, rows + (u64)(exists ? its_row : 0) * args.row_stride,
                     exists && (i32)row_depth > 0);
        }
      }
      weights += kWeightBytes;
      rows += Tile::kStep * 2;
      weight_depth -= Tile::kStep;
      row_depth -= Tile::kStep;
      if (--left == 0) {
        place += gridDim.x;
        begin();
      }
    }
    stage += Tile::kStageBytes;
    if (stage == Tile::kNumStages * Tile::kStageBytes) stage = 0;
  }
};

// Brings what this thread has copied of a stage's rows into the order in which weights are decoded.
template <typename Tile>
__device__ __forceinline__ void put_rows_in_order(char* stage) {
  if (!Tile::Format::kHasOrder) return;
  char* place = stage + Stream<Tile>::row_place();
#pragma unroll
  for (u32 i = 0; i < Stream<Tile>::kMyRows; ++i) {
    uint4* row = reinterpret_cast<uint4*>(place + i * Stream<Tile>::kRowsAtOnce * kRowBytes);
    *row = Tile::Format::in_order(*row);
  }
}

// Scales and zero points of the rows of weights that a lane has, from one group of columns to the next. They are asked for
// a group ahead, and nothing is made of them before they are used, which would wait for them.
template <typename Tile>
struct Scales {
  using Element = typename Tile::Element;
  using Format = typename Tile::Format;
  static constexpr u32 kRows = 2 * Tile::kM;
  const ExpertsQuantizedArgs& args;
  const ScaleReader read;
  const i64 group_bytes;            // from a scale to that of the next group
  const char* scale_places[kRows];  // of the group to ask for, of which there are `coming`
  const u8* zero_places[kRows];
  u32 coming, left;  // left: chunks of this group
  u32 scale[kRows], next_scale[kRows], next_zero[kRows];
  u32 zero[kRows];  // as Format wants it

  __device__ __forceinline__ Scales(const ExpertsQuantizedArgs& args, u32 expert, u32 first_column,
                                    u32 first_weight_row)
      : args(args), read(args.scale_type), group_bytes(args.scale_group_stride * read.size), coming(args.num_groups) {
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) {
      const u32 r = first_weight_row + lane_id() / 4 + i * 8;
      const bool exists = expert < args.num_experts && first_column + Tile::column(r) < args.num_columns;
      const u32 row = exists ? Tile::weight_row(args, first_column, r) : 0, of = exists ? expert : 0;
      const i64 at = of * args.scale_expert_stride + args.scale_rows.quotient(row) * args.scale_row_stride;
      scale_places[i] = args.scales + at * read.size;
      zero_places[i] = args.zeros + of * args.zero_expert_stride + row * args.zero_row_stride;
      zero[i] = Format::template zero_word<Element>(8);
      next_zero[i] = has_zeros() ? *zero_places[i] : 8;
      zero_places[i] += args.zero_group_stride;
    }
    ask();
    next();
  }
  __device__ __forceinline__ bool has_zeros() const { return Format::kBits == 4 && args.zeros != nullptr; }

  __device__ __forceinline__ void ask() {
    if (coming == 0) return;
    --coming;
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) {
      next_scale[i] = read.bits(scale_places[i]);
      scale_places[i] += group_bytes;
    }
  }

  __device__ __forceinline__ void next() {
    left = args.group_chunks;
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) scale[i] = next_scale[i];
    if (has_zeros()) next_zeros();
    ask();
  }

  // As most calls have none, not among the products: a jump takes less than instructions that do nothing.
  __device__ __forceinline__ void next_zeros() {
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) zero[i] = Format::template zero_word<Element>(next_zero[i]);
    if (coming == 0) return;
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) {
      next_zero[i] = *zero_places[i];
      zero_places[i] += args.zero_group_stride;
    }
  }

  // Whether the group ends with the next `num_chunks`.
  __device__ __forceinline__ bool ends(u32 num_chunks) {
    left -= num_chunks;
    return left == 0;
  }

  // Sums of products of this group to those of all.
  __device__ __forceinline__ void add(float (&sums)[Tile::kM][Tile::kN][4],
                                      float (&part)[Tile::kM][Tile::kN][4]) const {
#pragma unroll
    for (u32 m = 0; m < Tile::kM; ++m) {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const float factor = read.value(scale[m * 2 + half]);
#pragma unroll
        for (u32 n = 0; n < Tile::kN; ++n) {
#pragma unroll
          for (u32 e = half * 2; e < half * 2 + 2; ++e) {
            sums[m][n][e] = fmaf(part[m][n][e], factor, sums[m][n][e]);
            part[m][n][e] = 0.0f;
          }
        }
      }
    }
  }
};

// Where a lane finds what it needs in a stage: its part of a warp's rows of weights, by two chunks, and its part of a row of
// the pairs' for a chunk of weights.
template <typename Tile>
__device__ __forceinline__ u32 weights_place(u32 chunk) {
  return chunk_offset(warp_id() * (16 * Tile::kM) + lane_id() % 16, chunk + lane_id() / 16);
}
template <typename Tile>
__device__ __forceinline__ u32 rows_place(u32 chunk) {
  const u32 r = lane_id() / 4, quad_lane = lane_id() % 4;
  const u32 offset = Tile::Format::kBits == 8 ? Tile::row_offset(r, chunk * 2 + quad_lane / 2) + quad_lane % 2 * 8
                                              : Tile::row_offset(r, chunk * 4 + quad_lane);
  return Tile::kTileWeights * kWeightBytes + offset;
}

// All of these; those for rows come again, so many lines further on.
template <typename Tile>
struct Places {
  static constexpr u32 kRows = Tile::Format::kBits == 8 ? 4 : 2;
  u32 weights[kChunks / 2], rows[kRows];

  __device__ __forceinline__ Places() {
#pragma unroll
    for (u32 i = 0; i < kChunks / 2; ++i) keep_in_register(weights[i] = weights_place<Tile>(i * 2));
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) keep_in_register(rows[i] = rows_place<Tile>(i));
  }
  __device__ __forceinline__ u32 of_rows(u32 chunk) const {
    return rows[chunk % kRows] + chunk / kRows * (Tile::kPairs * kRowBytes);
  }
};

// Two chunks of the rows of weights of a warp: of rows l / 4 and l / 4 + 8, and of the next chunk.
template <typename Tile>
__device__ __forceinline__ void load_chunks(const char* weights, u32 (&words)[Tile::kM][4]) {
#pragma unroll
  for (u32 m = 0; m < Tile::kM; ++m) load_matrices(words[m], weights + m * 16 * kRowBytes);
}

// Those of the two from `begin` to `end`, by all pairs; in `rows` a lane finds its part of these for each chunk.
template <typename Tile>
__device__ __forceinline__ void multiply_chunks(const u32 (&words)[Tile::kM][4], const char* const (&rows)[2],
                                                const u32 (&zero)[2 * Tile::kM], u32 begin, u32 end,
                                                float (&part)[Tile::kM][Tile::kN][4]) {
  using Element = typename Tile::Element;
  using Format = typename Tile::Format;
#pragma unroll
  for (u32 c = 0; c < 2; ++c) {
    if (c < begin || c >= end) continue;
    u32 first[Tile::kM][Format::kPerWord / 2], second[Tile::kM][Format::kPerWord / 2];
#pragma unroll
    for (u32 m = 0; m < Tile::kM; ++m) {
      Format::template decode<Element>(words[m][c * 2], zero[m * 2], first[m]);
      Format::template decode<Element>(words[m][c * 2 + 1], zero[m * 2 + 1], second[m]);
    }
#pragma unroll
    for (u32 n = 0; n < Tile::kN; ++n) {
      const char* row = rows[c] + n * 8 * kRowBytes;
      if constexpr (Format::kBits == 8) {
        const uint2 b = *reinterpret_cast<const uint2*>(row);
#pragma unroll
        for (u32 m = 0; m < Tile::kM; ++m) {
          const u32 a[4] = {first[m][0], second[m][0], first[m][1], second[m][1]};
          multiply_add<Element>(part[m][n], a, b.x, b.y);
        }
      } else {
        const uint4 b = *reinterpret_cast<const uint4*>(row);
#pragma unroll
        for (u32 m = 0; m < Tile::kM; ++m) {
          const u32 a[4] = {first[m][0], second[m][0], first[m][1], second[m][1]};
          const u32 rest[4] = {first[m][2], second[m][2], first[m][3], second[m][3]};
          multiply_add<Element>(part[m][n], a, b.x, b.y);
          multiply_add<Element>(part[m][n], rest, b.z, b.w);
        }
      }
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void experts_quantized(const ExpertsQuantizedArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ Groups groups;
  using Element = typename Tile::Element;
  using Format = typename Tile::Format;
  if (args.is_first) wait_for_kernel_before();
  let_next_kernel_begin();
  if (Tile::kFinds) find_groups(args, groups);  // of ids that were there before the first product
  char* stages = reinterpret_cast<char*>(memory);
  const Source<Tile> source = {args, groups};
  Stream<Tile> stream(args, source), done = stream;
#pragma unroll 1
  for (u32 i = 0; i + 1 < Tile::kNumStages; ++i) {
    stream.ask(stages, true, args.is_first);
    if (args.is_first) commit_copies();
  }
  if (!args.is_first) {  // weights are there, rows will be
    wait_for_kernel_before();
    Stream<Tile> late = done;
#pragma unroll 1
    for (u32 i = 0; i + 1 < Tile::kNumStages; ++i) {
      late.ask(stages, false, true);
      commit_copies();
    }
    if (Tile::kFinds) clear_unknown(args, groups);
  }
  const u32 my_weights = warp_id() * (16 * Tile::kM);
  const Places<Tile> places;
  const bool has_units = args.group_chunks % Tile::kUnitChunks == 0;
#pragma unroll 1
  for (; done.place < done.end; done.place += gridDim.x) {
    const u32 group = done.group(), first_column = done.first_column(), expert = source.expert(group);
    Scales<Tile> scales(args, expert, first_column, my_weights);
    float sums[Tile::kM][Tile::kN][4] = {}, part[Tile::kM][Tile::kN][4] = {};
#pragma unroll 1
    for (u32 step = 0; step < done.num_steps; ++step) {
      wait_copies<Tile::kNumStages - 2>();
      put_rows_in_order<Tile>(stages + done.stage);
      __syncthreads();  // all have waited for their part of this step, and are done with the one before
      stream.ask(stages, true, true);
      commit_copies();
      const char* stage = stages + done.stage;
      done.stage += Tile::kStageBytes;
      if (done.stage == Tile::kNumStages * Tile::kStageBytes) done.stage = 0;
      u32 words[Tile::kM][4];
      if (has_units) {  // most often, and without branches between products
#pragma unroll
        for (u32 unit = 0; unit < kChunks; unit += Tile::kUnitChunks) {
#pragma unroll
          for (u32 chunk = unit; chunk < unit + Tile::kUnitChunks; chunk += 2) {
            const char* const rows[2] = {stage + places.of_rows(chunk), stage + places.of_rows(chunk + 1)};
            load_chunks<Tile>(stage + places.weights[chunk / 2], words);
            multiply_chunks<Tile>(words, rows, scales.zero, 0, 2, part);
          }
          scales.add(sums, part);
          if (scales.ends(Tile::kUnitChunks)) scales.next();
        }
      } else {
        constexpr u32 kAtOnce = Format::kBits == 4 ? 1 : 2;  // chunks, that have one scale
#pragma unroll 1
        for (u32 chunk = 0; chunk < kChunks; chunk += 2) {
          const char* const rows[2] = {stage + rows_place<Tile>(chunk), stage + rows_place<Tile>(chunk + 1)};
          load_chunks<Tile>(stage + weights_place<Tile>(chunk), words);
#pragma unroll
          for (u32 begin = 0; begin < 2; begin += kAtOnce) {
            multiply_chunks<Tile>(words, rows, scales.zero, begin, begin + kAtOnce, part);
            if (!scales.ends(kAtOnce)) continue;
            scales.add(sums, part);
            scales.next();
          }
        }
      }
    }
    if (!has_units) scales.add(sums, part);  // of a group that the depth ends before
    const bool is_known = Tile::kFinds || expert < args.num_experts;
#pragma unroll 1
    for (u32 n = 0; n < Tile::kN; ++n) {  // the sums move on, so that this is not compiled for each of them
#pragma unroll
      for (u32 m = 0; m < Tile::kM; ++m) {
        float (&sum)[4] = sums[m][0];
        if (!is_known) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        write_swapped<Tile>(args, source.pairs(group) + n * 8, expert, first_column, my_weights + m * 16, sum);
#pragma unroll
        for (u32 i = 0; i + 1 < Tile::kN; ++i) {
#pragma unroll
          for (u32 e = 0; e < 4; ++e) sums[m][i][e] = sums[m][i + 1][e];
        }
      }
    }
  }
  wait_copies<0>();
}

// All kernels of a format: the whole of its unit.
#define QUANTIZED_ENTRY(format, Format, name, type, Element, kGated, kPairs)                                        \
  extern "C" __global__ void __launch_bounds__(kThreads, (QuantizedTile<Element, kGated, Format, kPairs>::kBlocks)) \
      experts_##format##_##name##_##kPairs##_##type(const __grid_constant__ ExpertsQuantizedArgs args) {            \
    experts_quantized<QuantizedTile<Element, kGated, Format, kPairs>>(args);                                        \
  }
#define QUANTIZED_ENTRIES(format, Format)                       \
  QUANTIZED_ENTRY(format, Format, gated, bf16, BF16, true, 8)   \
  QUANTIZED_ENTRY(format, Format, gated, f16, F16, true, 8)     \
  QUANTIZED_ENTRY(format, Format, plain, bf16, BF16, false, 8)  \
  QUANTIZED_ENTRY(format, Format, plain, f16, F16, false, 8)    \
  QUANTIZED_ENTRY(format, Format, gated, bf16, BF16, true, 16)  \
  QUANTIZED_ENTRY(format, Format, gated, f16, F16, true, 16)    \
  QUANTIZED_ENTRY(format, Format, plain, bf16, BF16, false, 16) \
  QUANTIZED_ENTRY(format, Format, plain, f16, F16, false, 16)   \
  QUANTIZED_ENTRY(format, Format, gated, bf16, BF16, true, 48)  \
  QUANTIZED_ENTRY(format, Format, gated, f16, F16, true, 48)    \
  QUANTIZED_ENTRY(format, Format, plain, bf16, BF16, false, 48) \
  QUANTIZED_ENTRY(format, Format, plain, f16, F16, false, 48)
