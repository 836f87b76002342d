// SPDX-License-Identifier: Apache-2.0
// Gating with a warp or a part of one for each row, which stays in registers; gate_warp.cu says how it works.
#pragma once
#include "gate/gate.cuh"

// Orders keys descending: Batcher's odd-even merge sort. A template for each step, as compilers take long to see
// that a nest of loops does nothing else.
template <u32 kSize, u32 kDistance, u32 kCount>
__device__ __forceinline__ void sort_step(u32 (&keys)[kCount]) {
#pragma unroll
  for (u32 pair = 0; pair < kCount / 2; ++pair) {
    const u32 i = kDistance % kSize + pair / kDistance * (2 * kDistance) + pair % kDistance;
    if (i + kDistance < kCount && i / (2 * kSize) == (i + kDistance) / (2 * kSize)) {
      const u32 a = keys[i], b = keys[i + kDistance];
      keys[i] = max_u32(a, b);
      keys[i + kDistance] = min_u32(a, b);
    }
  }
  if constexpr (kDistance > 1) {
    sort_step<kSize, kDistance / 2>(keys);
  } else if constexpr (2 * kSize < kCount) {
    sort_step<2 * kSize, 2 * kSize>(keys);
  }
}

// The elements at `share` as they are in memory, 16-bit ones widened; those from `count` on are not read.
template <typename Bits, u32 kShare>
__device__ __forceinline__ void load_share(const char* share, u32 count, bool vectors, u32 (&bits)[kShare]) {
  constexpr u32 kShareBytes = kShare * sizeof(Bits), kWords = kShareBytes < 16 ? kShareBytes / 4 : 4;
  constexpr u32 kPerWord = 4 / sizeof(Bits);
  if (vectors) {
#pragma unroll
    for (u32 first = 0; first < kShare; first += kWords * kPerWord) {
      u32 words[4] = {};
      const char* address = share + first * sizeof(Bits);
      if (first < count) {
        if (kWords == 4) {
          const uint4 vector = *reinterpret_cast<const uint4*>(address);
          words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
        } else if (kWords == 2) {
          const uint2 vector = *reinterpret_cast<const uint2*>(address);
          words[0] = vector.x, words[1] = vector.y;
        } else {
          words[0] = *reinterpret_cast<const u32*>(address);
        }
      }
#pragma unroll
      for (u32 i = 0; i < kWords * kPerWord; ++i) {
        bits[first + i] = kPerWord == 1 ? words[i] : words[i / 2] >> (i % 2 * 16) & 0xffff;
      }
    }
  } else {
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) {
      bits[j] = 0;
      if (j < count) bits[j] = reinterpret_cast<const Bits*>(share)[j];
    }
  }
}

// The ranks of the groups by score, ties to the lower group, are compared with topk_group.
template <typename Args>
__device__ __forceinline__ bool is_in_chosen_group(const Args& args, u32 group, u32 lanes, u32 best, u32 second) {
#pragma unroll 1
  for (u32 distance = lanes / 2; distance > 0; distance /= 2) {
    const u32 their_best = __shfl_xor_sync(kFullWarp, best, distance);
    const u32 their_second = __shfl_xor_sync(kFullWarp, second, distance);
    second = max_u32(min_u32(best, their_best), max_u32(second, their_second));
    best = max_u32(best, their_best);
  }
  u32 score = best;
  if (args.bias != nullptr && second != kNone) score = to_choice(from_key(best) + from_key(second));
  // The lanes of a group share out the comparisons with the others.
  u32 rank = 0;
#pragma unroll 1
  for (u32 first = 0; first < args.num_groups; first += lanes) {
    const u32 other = first + (lane_id() & (lanes - 1));
    const u32 theirs = __shfl_sync(kFullWarp, score, other * lanes);
    rank += other < args.num_groups && (theirs > score || (theirs == score && other < group));
  }
#pragma unroll 1
  for (u32 distance = lanes / 2; distance > 0; distance /= 2) rank += __shfl_xor_sync(kFullWarp, rank, distance);
  return rank < args.topk_group;
}

enum Mode {
  kPlain,    // no bias, no groups; a row has a warp
  kFull,     // a bias or groups or both; a row has a warp
  kSeveral,  // a bias perhaps, no groups; a row has lanes_per_row lanes of a warp
  kAny,      // as kFull, and what others have no code for: softplus_sqrt, shared experts
};

constexpr u32 kSeveralMaxLanes = 8;  // of a row, in kSeveral

// Over the lanes of a row, in all of them.
template <Mode kMode>
__device__ __forceinline__ u32 row_max(u32 value, u32 lanes_per_row) {
  if (kMode != kSeveral) return warp_max(value);
#pragma unroll
  for (u32 distance = kSeveralMaxLanes / 2; distance > 0; distance /= 2) {
    const u32 theirs = __shfl_xor_sync(kFullWarp, value, distance);
    if (distance < lanes_per_row) value = max_u32(value, theirs);
  }
  return value;
}

template <Mode kMode>
__device__ __forceinline__ float row_sum(float value, u32 lanes_per_row) {
  if (kMode != kSeveral) return warp_sum(value);
#pragma unroll
  for (u32 distance = kSeveralMaxLanes / 2; distance > 0; distance /= 2) {
    const float theirs = __shfl_xor_sync(kFullWarp, value, distance);
    if (distance < lanes_per_row) value += theirs;
  }
  return value;
}

// The row of a token. kShare: the most experts that a lane holds.
template <u32 kShare, Mode kMode, typename Args>
__device__ __forceinline__ void gate_row(const Args& args, u32 token, u32 lanes_per_row) {
  constexpr bool kGrouped = kMode == kFull || kMode == kAny;
  const u32 lane = lane_id() & (lanes_per_row - 1);
  const u32 row_lanes =
      kMode == kSeveral ? (kFullWarp >> (kWarpSize - lanes_per_row)) << (lane_id() - lane) : kFullWarp;
  const u32 earlier_lanes = lanes_below() & row_lanes;
  const char* row = args.logits + token * args.row_stride;
  const bool with_bias = kMode != kPlain && args.bias != nullptr;

  // The experts [begin, begin + count) are this lane's.
  u32 lanes = kWarpSize, group = 0, begin = lane * kShare, end = args.num_experts, per_lane = kShare;
  if (kGrouped && args.num_groups > 1) {
    const u32 lanes_shift = __clz(args.num_groups - 1) - __clz(kWarpSize - 1);
    lanes = 1u << lanes_shift;
    group = lane >> lanes_shift;
    per_lane = (args.group_size + lanes - 1) >> lanes_shift;
    end = min_u32(end, (group + 1) * args.group_size);
    begin = group * args.group_size + (lane & (lanes - 1)) * per_lane;
  }
  const u32 count = begin < end ? min_u32(per_lane, end - begin) : 0;

  u32 bits[kShare];
  if (args.element == kF32) {
    load_share<u32>(row + begin * 4, count, args.vectors, bits);
  } else {
    load_share<u16>(row + begin * 2, count, args.vectors, bits);
  }
  const bool padded = args.padding_mask != nullptr && args.padding_mask[token] != 0;
  float bias[kShare];  // -Inf past the last expert
  if (with_bias) {
    u32 bias_bits[kShare];
    const bool vectors = args.vectors && reinterpret_cast<u64>(args.bias) % 16 == 0;
    load_share<u32>(reinterpret_cast<const char*>(args.bias + begin), count, vectors, bias_bits);
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) bias[j] = j < count ? __uint_as_float(bias_bits[j]) : kMinusInf;
  }
  float logits[kShare];  // likewise
#pragma unroll
  for (u32 j = 0; j < kShare; ++j) {
    logits[j] = __uint_as_float(bits[j]);
    if (args.element == kF16) logits[j] = F16::to_float((u16)bits[j]);
    if (args.element == kBF16) logits[j] = BF16::to_float((u16)bits[j]);
  }
  if (kShare * lanes_per_row != args.num_experts) {
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) logits[j] = j < count ? logits[j] : kMinusInf;
  }

  float greatest = 0, scale = 1;
  bool no_scores = false;  // softmax of a row that is not finite: all count as 0
  const auto sum_up = [&] {
    float sum = 0;
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) sum += exp_of_summand(logits[j] - greatest);
    scale = reciprocal(row_sum<kMode>(sum, lanes_per_row));
  };
  u32 keys[kShare];
#pragma unroll
  for (u32 j = 0; j < kShare; ++j) keys[j] = to_key(logits[j]);
  if (with_bias) {
    if (args.scoring == kSoftmax) {
      u32 best = keys[0];
#pragma unroll
      for (u32 j = 1; j < kShare; ++j) best = max_u32(best, keys[j]);
      greatest = from_key(row_max<kMode>(best, lanes_per_row));
      no_scores = !is_finite(greatest);
      sum_up();
    }
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) {
      float score = logits[j];
      if (args.scoring != kAsIs) {
        const float power = exp_of_summand(args.scoring == kSigmoid ? -logits[j] : logits[j] - greatest);
        score = args.scoring == kSigmoid ? reciprocal(1.0f + power) : power * scale;
        if (kMode == kAny && args.scoring == kSoftplusSqrt) score = softplus_sqrt(logits[j]);
      }
      keys[j] = to_choice((is_finite(score) && !no_scores ? score : 0.0f) + bias[j]);
    }
  } else if (args.scoring != kSoftmax) {
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) keys[j] = keys[j] > kInfKey ? kMinusInfKey : keys[j];
  }
  // Without groups what is past the last expert never wins: it is the last of the least.
  if (kGrouped) {
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) keys[j] = j < count ? keys[j] : kNone;
  }

  u32 sorted[kShare];
#pragma unroll
  for (u32 j = 0; j < kShare; ++j) sorted[j] = keys[j];
  sort_step<1, 1>(sorted);
  u32 best = row_max<kMode>(sorted[0], lanes_per_row);
  if (!with_bias && args.scoring == kSoftmax) {
    greatest = from_key(best);
    no_scores = !is_finite(greatest);
    if (no_scores) {
      best = kZeroKey;
#pragma unroll
      for (u32 j = 0; j < kShare; ++j) {
        keys[j] = keys[j] == kNone ? kNone : kZeroKey;
        sorted[j] = sorted[j] == kNone ? kNone : kZeroKey;
      }
    }
    if (!args.renormalize) sum_up();
  }
  if (kGrouped && args.num_groups > 1) {
    const bool chosen = is_in_chosen_group(args, group, lanes, sorted[0], sorted[1]);
#pragma unroll
    for (u32 j = 0; j < kShare; ++j) sorted[j] = chosen ? sorted[j] : kNone;
    best = row_max<kMode>(sorted[0], lanes_per_row);
  }

  u32 winner = kNone, holders = 1;
#pragma unroll 1
  for (u32 k = 0;;) {
    const bool holds = sorted[0] == best;
    const u32 all_holders = __ballot_sync(kFullWarp, holds);
    if (lane == k) winner = best, holders = all_holders;
    if (++k == args.topk) break;
    if (holds && (all_holders & earlier_lanes) == 0) {
#pragma unroll
      for (u32 j = 0; j + 1 < kShare; ++j) sorted[j] = sorted[j + 1];
      sorted[kShare - 1] = kNone;
    }
    best = row_max<kMode>(sorted[0], lanes_per_row);
  }

  // Equal winners of one lane are neighbours; the n-th of them is the n-th such key of that lane.
  const u32 owner = __ffs(holders & row_lanes) - 1;
  u32 matches = 0;
#pragma unroll
  for (u32 j = 0; j < kShare; ++j) {
    matches |= (u32)(__shfl_sync(kFullWarp, keys[j], owner) == winner) << j;
  }
  bool same = lane < args.topk;
#pragma unroll 1
  for (u32 distance = 1; distance < args.topk; ++distance) {
    const u32 their_winner = __shfl_up_sync(kFullWarp, winner, distance);
    const u32 their_owner = __shfl_up_sync(kFullWarp, owner, distance);
    same = same && lane >= distance && their_winner == winner && their_owner == owner;
    if (same) matches &= matches - 1;
    if (!__any_sync(kFullWarp, same)) break;
  }
  const u32 id = __shfl_sync(kFullWarp, begin, owner) + __ffs(matches) - 1;

  float logit = from_key(winner);
  if (with_bias && lane < args.topk) logit = load_logit(args, row, id);
  float weight = score_of<kMode == kAny>(args, logit, greatest, scale);
  if (no_scores || lane >= args.topk) weight = 0;
  if (args.renormalize) weight = renormalized(weight, row_sum<kMode>(weight, lanes_per_row));
  const u32 num_results = kMode == kAny ? args.topk + args.num_shared : args.topk;
  if (kMode == kAny && lane >= args.topk) {
    if (lane < num_results) write_shared(args, token, lane - args.topk, padded);
  } else if (lane < args.topk) {
    write_result(args, token * (i64)num_results + lane, padded ? 0.0f : weight * args.factor, padded ? ~0u : id);
  }
}
