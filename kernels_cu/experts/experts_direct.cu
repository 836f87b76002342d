// SPDX-License-Identifier: Apache-2.0
// The products of the experts for a handful of tokens, straight from the ids: two launches make a layer, and every byte of
// the weights of the experts hit is read once.
//
// in       topk_ids [num_pairs], expert_map [num_mapped] or null, rows, weights, bias, topk_weights and shared as in
//          ExpertsDirectArgs
// out      first: output [num_pairs, num_columns], the activations of pairs whose expert is here
//          sum: output [num_tokens, num_columns], each slot rounded to Element, then added up as moe_sum does
// grid     any number of blocks; block: kWarps warps
// shared   kWarps * kStages * kStepBytes; sum: and 2 * num_pairs * segments of the depth * kSumColumns * 4
// limits   num_pairs <= kMaxPairs; depth and num_columns are multiples of 8, rows and weights are aligned to 16 bytes
// targets  sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121 compute_90
//
// Weights are the operand of 16 rows, and up to 8 pairs of an expert that of 8 columns. A warp
// multiplies what it has copied itself, so that no barrier of the block stands between memory and the tensor cores.
//
//   1  groups: up to 8 pairs of one expert
//   2  first: a warp takes 16 rows of weights of a group at a time, with a gate 8 of gates and the 8 ups to them; bias,
//      router weight, activation; write
//      sum: a block takes 16 columns of the output; its warps share groups and segments of the depth
//   3  sum: per output, over slots: segments, bias, router weight; factor and shared output; write
//
// Order: over the depth ascending, 16 at a time, in `sum` by segments of kSegment, which are then added up. So the
// bits of a row depend on neither the other rows nor the number of blocks.
#include "experts/experts.cuh"

struct ExpertsDirectArgs {
  const u32* topk_ids;  // [num_pairs] of 1 or 2 words
  const char* rows;     // [num_pairs / rows_shared, depth], row_stride bytes apart
  const char* weights;  // [num_experts][rows of an expert][depth]
  char* output;
  const int* expert_map;      // [num_mapped], or null: ids are numbers of experts
  const char* bias;           // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;  // [num_pairs] or null: multiplies what the activation gets, or the slot
  const char* shared;         // sum: [num_tokens, num_columns], added, or null
  i64 row_stride, expert_stride, weight_stride;  // in bytes
  u32 num_pairs, num_experts, num_mapped, words_per_id;
  Divisor rows_shared;  // pairs that have one row: topk in the first, 1 in the sum
  u32 depth, num_columns, topk;
  u32 activation;      // an Activation
  u32 row_step;        // of the row of weights for the next column: 2 where gate and up rows alternate
  u32 up_offset;       // from the row of a gate to that of its up
  i64 bias_stride;     // in elements, of an expert
  float alpha, limit;  // of kSwigluOai
  float factor;        // sum: multiplies what the slots add up to
};

constexpr u32 kWarps = 8, kThreads = kWarps * kWarpSize, kStages = 4;
constexpr u32 kStepBytes = 3072;  // kDepth elements of 16 rows of weights and of 8 pairs
constexpr u32 kMaxPairs = 128, kGroupPairs = 8, kSumColumns = 16, kSegment = 1024;
constexpr u32 kNobody = 0xffffffffu;

struct Groups {
  u32 count, leaders[kMaxPairs / kWarpSize];
  u32 expert_of[kMaxPairs];  // of a pair, or kNobody
  u32 experts[kMaxPairs];    // of a group
  u32 pairs[kMaxPairs][kGroupPairs];
};

__device__ __forceinline__ u32 find_expert(const ExpertsDirectArgs& args, u32 pair) {
  const u32* words = args.topk_ids + pair * args.words_per_id;
  u32 expert = words[0];
  if (words[args.words_per_id - 1] != 0 && args.words_per_id == 2) return kNobody;
  if (args.expert_map != nullptr) expert = expert < args.num_mapped ? (u32)args.expert_map[expert] : kNobody;
  return expert < args.num_experts ? expert : kNobody;
}

__device__ __forceinline__ void find_groups(const ExpertsDirectArgs& args, Groups& groups) {
  const u32 pair = threadIdx.x;
  if (pair < kMaxPairs) groups.expert_of[pair] = pair < args.num_pairs ? find_expert(args, pair) : kNobody;
  __syncthreads();
  bool leads = false;
  u32 expert = kNobody, index = 0;
  if (pair < kMaxPairs) {
    expert = groups.expert_of[pair];
    u32 rank = 0;
#pragma unroll 4
    for (u32 other = 0; other < pair; ++other) rank += groups.expert_of[other] == expert;
    leads = expert != kNobody && rank % kGroupPairs == 0;
    const u32 leaders = __ballot_sync(kFullWarp, leads);
    index = __popc(leaders & lanes_below());
    if (lane_id() == 0) groups.leaders[warp_id()] = __popc(leaders);
  }
  __syncthreads();
  if (leads) {
#pragma unroll 1
    for (u32 warp = 0; warp < warp_id(); ++warp) index += groups.leaders[warp];
    groups.experts[index] = expert;
    u32 count = 0;
#pragma unroll 1
    for (u32 other = pair; other < args.num_pairs && count < kGroupPairs; ++other) {
      if (groups.expert_of[other] == expert) groups.pairs[index][count++] = other;
    }
#pragma unroll 1
    for (; count < kGroupPairs; ++count) groups.pairs[index][count] = kNobody;
  }
  if (threadIdx.x == 0) {
    u32 total = 0;
#pragma unroll
    for (u32 warp = 0; warp < kMaxPairs / kWarpSize; ++warp) total += groups.leaders[warp];
    groups.count = total;
  }
  __syncthreads();
}

// A piece of work of a warp: 16 rows of the weights of a group, over some steps of the depth.
struct Piece {
  u32 group, first_column, segment, first_step, num_steps;
};

// All pieces, one after another: of the first product, to all warps of the grid in turn.
struct Spread {
  u32 at, stride, count, tiles, num_steps, columns;
  __device__ __forceinline__ Spread(const ExpertsDirectArgs& args, const Groups& groups, u32 columns)
      : at(warp_id() * gridDim.x + blockIdx.x),
        stride(gridDim.x * kWarps),
        tiles(ceil_div(args.num_columns, columns)),
        num_steps(ceil_div(args.depth, kDepth)),
        columns(columns) {
    count = groups.count * tiles;
  }
  __device__ __forceinline__ bool is_end() const { return at >= count; }
  __device__ __forceinline__ void next() { at += stride; }
  __device__ __forceinline__ Piece piece() const {
    const u32 group = at / tiles;
    return {group, (at - group * tiles) * columns, 0, 0, num_steps};
  }
};

// Of the sum: a block takes columns, its warps groups and segments in turn.
struct InTurns {
  u32 column, index, count, num_columns, num_steps;
  __device__ __forceinline__ InTurns(const ExpertsDirectArgs& args, const Groups& groups, u32 segments)
      : column(blockIdx.x * kSumColumns),
        index(warp_id()),
        count(groups.count * segments),
        num_columns(args.num_columns),
        num_steps(ceil_div(args.depth, kDepth)),
        segments(segments) {}
  u32 segments;
  __device__ __forceinline__ bool is_end() const { return index >= count || column >= num_columns; }
  __device__ __forceinline__ void next() {
    index += kWarps;
    if (index >= count) index = warp_id(), column += gridDim.x * kSumColumns;
  }
  __device__ __forceinline__ Piece piece() const {
    const u32 group = index / segments, segment = index - group * segments, first = segment * (kSegment / kDepth);
    return {group, column, segment, first, min_u32(kSegment / kDepth, num_steps - first)};
  }
};

// What a warp has asked for: kStages steps, in order, across pieces. Eight lanes copy a step of a row.
template <typename Tile, typename Pieces>
struct Stream {
  static constexpr u32 kRowsAtOnce = kWarpSize / kChunks;
  static constexpr u32 kMyWeights = 16 / kRowsAtOnce, kMyRows = kGroupPairs / kRowsAtOnce;
  const ExpertsDirectArgs& args;
  const Groups& groups;
  Pieces pieces;
  const char *weights[kMyWeights], *rows[kMyRows];  // at the piece's first step; null: zeros
  u32 step, num_steps, first_element, slot;
  char* slots;

  __device__ __forceinline__ Stream(const ExpertsDirectArgs& args, const Groups& groups, Pieces pieces, char* slots)
      : args(args), groups(groups), pieces(pieces), slot(0), slots(slots) {
    begin();
  }

  __device__ __forceinline__ void begin() {
    step = num_steps = 0;
    if (pieces.is_end()) return;
    const Piece piece = pieces.piece();
    num_steps = piece.num_steps;
    first_element = piece.first_step * kDepth + lane_id() % kChunks * 8;
    const char* expert = args.weights + groups.experts[piece.group] * args.expert_stride + first_element * 2;
#pragma unroll
    for (u32 i = 0; i < kMyWeights; ++i) {
      const u32 r = i * kRowsAtOnce + lane_id() / kChunks;
      const bool exists = piece.first_column + Tile::column(r) < args.num_columns;
      weights[i] = exists ? expert + Tile::weight_row(args, piece.first_column, r) * args.weight_stride : nullptr;
    }
#pragma unroll
    for (u32 i = 0; i < kMyRows; ++i) {
      const u32 pair = groups.pairs[piece.group][i * kRowsAtOnce + lane_id() / kChunks];
      rows[i] = nullptr;
      if (pair != kNobody) rows[i] = args.rows + args.rows_shared.quotient(pair) * args.row_stride + first_element * 2;
    }
  }

  // The next step, of one of them or of both; without a commit_copies, which is due even where there is no step left.
  __device__ __forceinline__ void ask(bool for_weights, bool for_rows) {
    if (step < num_steps) {
      char* to = slots + slot * kStepBytes;
      const u32 at = step * kRowBytes;
      const bool is_within = first_element + step * kDepth < args.depth;
      const auto copy = [&](u32 r, const char* from) {
        const bool exists = is_within && from != nullptr;
        copy_async(to + chunk_offset(r + lane_id() / kChunks, lane_id() % kChunks), exists ? from + at : args.weights,
                   exists);
      };
#pragma unroll
      for (u32 i = 0; i < kMyWeights; ++i) {
        if (for_weights) copy(i * kRowsAtOnce, weights[i]);
      }
#pragma unroll
      for (u32 i = 0; i < kMyRows; ++i) {
        if (for_rows) copy(16 + i * kRowsAtOnce, rows[i]);
      }
      if (++step == num_steps) {
        pieces.next();
        begin();
      }
    }
    if (++slot == kStages) slot = 0;
  }
};

// The products of a piece: of row lane / 4 of the weights and pairs lane % 4 * 2 and the next, then of row lane / 4 + 8.
template <typename Tile, typename Pieces>
__device__ __forceinline__ void multiply(Stream<Tile, Pieces>& stream, u32 num_steps, u32& slot, float (&sums)[4]) {
#pragma unroll
  for (u32 i = 0; i < 4; ++i) sums[i] = 0;
#pragma unroll 1
  for (u32 step = 0; step < num_steps; ++step) {
    wait_copies<kStages - 1>();
    __syncwarp();  // all lanes have waited for their part
    const char* from = stream.slots + slot * kStepBytes;
#pragma unroll
    for (u32 k = 0; k < kChunks; k += 4) {
      u32 pairs[4];
      load_matrices(pairs, from + chunk_offset(16 + lane_id() % 8, k + lane_id() / 8));
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        u32 weights[4];
        load_matrices(weights, from + chunk_offset(lane_id() % 16, k + half * 2 + lane_id() / 16));
        multiply_add<typename Tile::Element>(sums, weights, pairs[half * 2], pairs[half * 2 + 1]);
      }
    }
    if (++slot == kStages) slot = 0;
    __syncwarp();  // all lanes are done with what is asked for anew
    stream.ask(true, true);
    commit_copies();
  }
}

// 16 rows of weights, by one warp.
template <typename ElementType, bool kGated>
struct DirectTile : TileOf<ElementType, kGated, kGroupPairs, 16, kThreads> {};

template <typename Tile>
__device__ __forceinline__ void experts_direct(const ExpertsDirectArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ Groups groups;
  using Element = typename Tile::Element;
  wait_for_kernel_before();
  let_next_kernel_begin();
  find_groups(args, groups);
  char* slots = reinterpret_cast<char*>(memory) + warp_id() * kStages * kStepBytes;
  Spread pieces(args, groups, Tile::kColumns);
  Stream<Tile, Spread> stream(args, groups, pieces, slots);
#pragma unroll 1
  for (u32 i = 0; i < kStages; ++i) {
    stream.ask(true, true);
    commit_copies();
  }
  u32 slot = 0;
#pragma unroll 1
  for (; !pieces.is_end(); pieces.next()) {
    const Piece piece = pieces.piece();
    float sums[4];
    multiply(stream, piece.num_steps, slot, sums);
    const u32 expert = groups.experts[piece.group], r = lane_id() / 4;
    const typename Element::Bits* bias = reinterpret_cast<const typename Element::Bits*>(args.bias);
    if (bias != nullptr) bias += expert * args.bias_stride;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {  // of the rows
      if (bias != nullptr && piece.first_column + Tile::column(r + half * 8) < args.num_columns) {
        const float value = Element::to_float(bias[Tile::weight_row(args, piece.first_column, r + half * 8)]);
        sums[half * 2] += value;
        sums[half * 2 + 1] += value;
      }
    }
    u32 pairs[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      pairs[i] = groups.pairs[piece.group][lane_id() % 4 * 2 + i];
      if (args.topk_weights != nullptr && pairs[i] != kNobody) {
        const float weight = args.topk_weights[pairs[i]];
        sums[i] *= weight;
        sums[i + 2] *= weight;
      }
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      if (Tile::kGated) {
        sums[i] = args.activation == kSilu ? sums[i] * fast_sigmoid(sums[i]) * sums[i + 2]
                                           : gated(args, sums[i], sums[i + 2]);
      } else {
        sums[i] = activated(args.activation, sums[i]);
        sums[i + 2] = activated(args.activation, sums[i + 2]);
      }
    }
    // Neighbouring rows are neighbouring columns of the output: lanes of even rows take the first pair, the others the
    // second, and write two columns.
    const bool is_odd = r % 2 != 0;
#pragma unroll
    for (u32 half = 0; half < (Tile::kGated ? 1 : 2); ++half) {
      const float first = sums[half * 2], second = sums[half * 2 + 1];
      const float mine = is_odd ? second : first, given = is_odd ? first : second;
      const float taken = __shfl_xor_sync(kFullWarp, given, 4);
      const float values[2] = {is_odd ? taken : mine, is_odd ? mine : taken};
      const u32 pair = is_odd ? pairs[1] : pairs[0], column = piece.first_column + Tile::column(r + half * 8) - is_odd;
      if (pair != kNobody && column < args.num_columns) {
        *reinterpret_cast<u32*>(args.output + ((i64)pair * args.num_columns + column) * 2) = Element::pack(values);
      }
    }
  }
  wait_copies<0>();
}

template <typename Tile>
__device__ __forceinline__ void experts_direct_sum(const ExpertsDirectArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ Groups groups;
  using Element = typename Tile::Element;
  const u32 segments = ceil_div(args.depth, kSegment), num_tokens = args.num_pairs / args.topk;
  char* slots = reinterpret_cast<char*>(memory) + warp_id() * kStages * kStepBytes;
  float* parts = reinterpret_cast<float*>(reinterpret_cast<char*>(memory) + kWarps * kStages * kStepBytes);
  find_groups(args, groups);  // of ids that were there before the first product, as the weights were
  InTurns pieces(args, groups, segments);
  Stream<Tile, InTurns> stream(args, groups, pieces, slots);
  Stream<Tile, InTurns> early = stream;  // weights are there, rows will be
#pragma unroll 1
  for (u32 i = 0; i < kStages; ++i) early.ask(true, false);
  wait_for_kernel_before();
  let_next_kernel_begin();
#pragma unroll 1
  for (u32 i = 0; i < kStages; ++i) {
    stream.ask(false, true);
    commit_copies();
  }
  u32 slot = 0;
  // What a block has of its columns alternates between two places, so that one barrier is enough.
  bool is_second = false;
#pragma unroll 1
  for (u32 column = blockIdx.x * kSumColumns; column < args.num_columns; column += gridDim.x * kSumColumns) {
    float* mine = parts + (is_second ? args.num_pairs * segments * kSumColumns : 0);
    is_second = !is_second;
#pragma unroll 1
    for (; !pieces.is_end() && pieces.column == column; pieces.next()) {
      const Piece piece = pieces.piece();
      float sums[4];
      multiply(stream, piece.num_steps, slot, sums);
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 pair = groups.pairs[piece.group][lane_id() % 4 * 2 + i % 2];
        if (pair != kNobody)
          mine[(pair * segments + piece.segment) * kSumColumns + lane_id() / 4 + i / 2 * 8] = sums[i];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < num_tokens * kSumColumns / 2; i += kThreads) {
      const u32 token = i / (kSumColumns / 2), c = i % (kSumColumns / 2) * 2;
      if (column + c >= args.num_columns) continue;
      float totals[2] = {0, 0};
#pragma unroll 1
      for (u32 pair = token * args.topk; pair < (token + 1) * args.topk; ++pair) {
        const u32 expert = groups.expert_of[pair];
        if (expert == kNobody) continue;
        float values[2] = {0, 0};
#pragma unroll 1
        for (u32 s = 0; s < segments; ++s) {
          values[0] += mine[(pair * segments + s) * kSumColumns + c];
          values[1] += mine[(pair * segments + s) * kSumColumns + c + 1];
        }
        if (args.bias != nullptr) {
          const auto* bias = reinterpret_cast<const typename Element::Bits*>(args.bias) + expert * args.bias_stride;
          values[0] += Element::to_float(bias[column + c]);
          values[1] += Element::to_float(bias[column + c + 1]);
        }
        if (args.topk_weights != nullptr) {
          values[0] *= args.topk_weights[pair];
          values[1] *= args.topk_weights[pair];
        }
        Element::unpack(Element::pack(values), values);
        totals[0] = __fadd_rn(totals[0], values[0]);
        totals[1] = __fadd_rn(totals[1], values[1]);
      }
      totals[0] = __fmul_rn(totals[0], args.factor);
      totals[1] = __fmul_rn(totals[1], args.factor);
      const i64 at = ((i64)token * args.num_columns + column + c) * 2;
      if (args.shared != nullptr) {
        float values[2];
        Element::unpack(*reinterpret_cast<const u32*>(args.shared + at), values);
        totals[0] = __fadd_rn(totals[0], values[0]);
        totals[1] = __fadd_rn(totals[1], values[1]);
      }
      *reinterpret_cast<u32*>(args.output + at) = Element::pack(totals);
    }
  }
  wait_copies<0>();
}

#define ENTRY(name, type, function, Element, kGated)                                   \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                            \
      experts_direct_##name##_##type(const __grid_constant__ ExpertsDirectArgs args) { \
    function<DirectTile<Element, kGated>>(args);                                       \
  }
#define ENTRIES(type, Element)                       \
  ENTRY(gated, type, experts_direct, Element, true)  \
  ENTRY(plain, type, experts_direct, Element, false) \
  ENTRY(sum, type, experts_direct_sum, Element, false)
ENTRIES(bf16, BF16)
ENTRIES(f16, F16)
