// SPDX-License-Identifier: Apache-2.0
// What kernels share that multiply rows of weights by pairs, and not pairs by rows of weights: a product has 16 rows of
// weights, and 8 pairs as its columns. Where a call has few pairs, each block groups them by itself, straight from the
// ids, which is faster than a launch of align.
#pragma once
#include "experts/experts.cuh"

constexpr u32 kMaxPairs = 128, kGroupPairs = 8;
constexpr u32 kNobody = 0xffffffffu;

struct Groups {
  uint4 expert_of[kMaxPairs / 4];  // of a pair, or kNobody
  u32 leaders[kMaxPairs / kWarpSize];
  u32 index_of[kMaxPairs];  // of the group that a pair begins
  u32 experts[kMaxPairs];   // of a group
  u32 pairs[kMaxPairs][kGroupPairs];
  u32 count;  // not beside what is read when it is written: compilers read four words at once
};

template <typename Args>
__device__ __forceinline__ u32 find_expert(const Args& args, u32 pair) {
  const u32* words = args.topk_ids + pair * args.words_per_id;
  u32 expert = words[0];
  if (words[args.words_per_id - 1] != 0 && args.words_per_id == 2) return kNobody;
  if (args.expert_map != nullptr) expert = expert < args.num_mapped ? (u32)args.expert_map[expert] : kNobody;
  return expert < args.num_experts ? expert : kNobody;
}

// A thread for each of kMaxPairs pairs: how many before it have its expert tells its place in a group, and which of them
// began that.
template <typename Args>
__device__ __forceinline__ void find_groups(const Args& args, Groups& groups) {
  const u32 pair = threadIdx.x, expert = pair < args.num_pairs ? find_expert(args, pair) : kNobody;
  u32* experts = &groups.expert_of[0].x;
  experts[pair] = expert;
#pragma unroll
  for (u32 i = 0; i < kGroupPairs; ++i)
    groups.pairs[i * (kMaxPairs / kGroupPairs) + pair / kGroupPairs][pair % kGroupPairs] = kNobody;
  __syncthreads();
  u32 rank = 0, leader = pair;  // of its group
  const auto count = [&](u32 other, u32 its_expert) {
    if (other >= pair || its_expert != expert) return;
    if (rank % kGroupPairs == 0) leader = other;
    ++rank;
  };
#pragma unroll 2
  for (u32 four = 0; four < ceil_div(args.num_pairs, 4); ++four) {
    const uint4 others = groups.expert_of[four];
    count(four * 4, others.x);
    count(four * 4 + 1, others.y);
    count(four * 4 + 2, others.z);
    count(four * 4 + 3, others.w);
  }
  const bool leads = expert != kNobody && rank % kGroupPairs == 0;
  const u32 leaders = __ballot_sync(kFullWarp, leads);
  if (lane_id() == 0) groups.leaders[warp_id()] = __popc(leaders);
  __syncthreads();
  u32 index = __popc(leaders & lanes_below());
#pragma unroll
  for (u32 warp = 0; warp < kMaxPairs / kWarpSize; ++warp) {
    if (warp < warp_id()) index += groups.leaders[warp];
  }
  if (leads) {
    groups.index_of[pair] = index;
    groups.experts[index] = expert;
  }
  if (threadIdx.x == kMaxPairs - 1) groups.count = index + leads;
  __syncthreads();
  if (leads) leader = pair;
  if (expert != kNobody) groups.pairs[groups.index_of[leader]][rank % kGroupPairs] = pair;
  __syncthreads();
}

// Rows of pairs of experts that are not here.
template <typename Args>
__device__ __forceinline__ void clear_unknown(const Args& args, const Groups& groups) {
#pragma unroll 1
  for (u32 pair = blockIdx.x; pair < args.num_pairs; pair += gridDim.x) {
    if ((&groups.expert_of[0].x)[pair] != kNobody) continue;
    clear_row<kMaxPairs>(args, pair);
  }
}

// Bias, router weight, activation; then written: 16 rows of weights from first_weight_row of the tile on, of 8 pairs, by a
// warp, in the layout of m16n8k16. A pair of kNobody, or of num_pairs and more, is padding.
template <typename Tile, typename Args>
__device__ __forceinline__ void write_swapped(const Args& args, const u32* all_pairs, u32 expert, u32 first_column,
                                              u32 first_weight_row, float (&sums)[4]) {
  using Element = typename Tile::Element;
  // Of rows r and r + 8 of the weights, two pairs each.
  const u32 r = first_weight_row + lane_id() / 4;
  u32 pairs[2];
#pragma unroll
  for (u32 i = 0; i < 2; ++i) pairs[i] = all_pairs[lane_id() % 4 * 2 + i];
  if (args.bias != nullptr && expert < args.num_experts) {
    const auto* bias = reinterpret_cast<const typename Element::Bits*>(args.bias) + expert * args.bias_stride;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      if (first_column + Tile::column(r + half * 8) >= args.num_columns) continue;
      const float value = Element::to_float(bias[Tile::weight_row(args, first_column, r + half * 8)]);
      sums[half * 2] += value;
      sums[half * 2 + 1] += value;
    }
  }
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    if (args.topk_weights != nullptr && pairs[i] < args.num_pairs) {
      const float weight = args.topk_weights[pairs[i]];
      sums[i] *= weight;
      sums[i + 2] *= weight;
    }
    if (Tile::kGated) {
      const bool is_silu = args.activation == kSilu;
      sums[i] = is_silu ? sums[i] * fast_sigmoid(sums[i]) * sums[i + 2] : gated(args, sums[i], sums[i + 2]);
    } else if (args.activation != kNone) {
      sums[i] = activated(args.activation, sums[i]);
      sums[i + 2] = activated(args.activation, sums[i + 2]);
    }
  }
  // Neighbouring rows are neighbouring columns of the output: lanes of even rows take the first pair, the others the
  // second, and write two columns.
  const bool is_odd = r % 2 != 0;
  const u32 pair = is_odd ? pairs[1] : pairs[0];
#pragma unroll
  for (u32 half = 0; half < (Tile::kGated ? 1 : 2); ++half) {
    const float first = sums[half * 2], second = sums[half * 2 + 1];
    const float taken = __shfl_xor_sync(kFullWarp, is_odd ? first : second, 4);
    const float values[2] = {is_odd ? taken : first, is_odd ? second : taken};
    const u32 column = first_column + Tile::column(r + half * 8) - is_odd;
    if (pair < args.num_pairs && column < args.num_columns) {
      *reinterpret_cast<u32*>(args.output + ((i64)pair * args.num_columns + column) * 2) = Element::pack(values);
    }
  }
}
