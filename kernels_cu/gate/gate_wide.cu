// SPDX-License-Identifier: Apache-2.0
// The gating functions with one block a row, which lies in shared memory: what the warp
// kernel has no registers or lanes for. Any number of experts that fits, any topk, any groups, softcap.
//
// in       logits, bias, padding_mask                                                      (GateArgs, gate.cuh)
// out      topk_weights [num_tokens, topk + num_shared] fp32, topk_ids, so many of 32 or 64 bits
// grid     num_tokens blocks; block: a multiple of 32 threads, up to kMaxThreads
// shared   (num_experts + num_groups + 2 * topk) words
//
// Thread i has the i-th piece of the experts, and warps have pieces in order, so the first thread wins a tie.
//
//   1  keys of what selects into shared memory, as in gate_warp.cu; softmax takes a maximum and a sum before
//   2  groups: a warp finds the best two of a group; threads rank the groups and drop the keys of the others
//   3  topk times: every thread offers the best key it has; the winner looks for its next one
//   4  the first warp: scores of the winners, renormalised, scaled, written
#include "gate/gate.cuh"

constexpr u32 kMaxThreads = 512, kMaxWarps = kMaxThreads / kWarpSize;

__device__ __noinline__ float capped(float logit, float softcap) {
  return softcap == 0 ? logit : softcap * tanhf(logit / softcap);
}

struct Best {
  u32 key, place;
};

// The greatest key in [begin, end) that comes after `last`: less, or equal and further on.
__device__ __forceinline__ Best next_best(const u32* keys, u32 begin, u32 end, Best last) {
  Best best = {kNone, end};
#pragma unroll 1
  for (u32 place = begin; place < end; ++place) {
    const u32 key = keys[place];
    const bool after = key < last.key || (key == last.key && place > last.place);
    if (after && key > best.key) best = {key, place};
  }
  return best;
}

// Over all threads; `partial` holds a word a warp. Has two barriers.
__device__ __forceinline__ u32 block_max(u32 value, u32* partial) {
  value = warp_max(value);
  __syncthreads();
  if (lane_id() == 0) partial[warp_id()] = value;
  __syncthreads();
  return warp_max(lane_id() < blockDim.x / kWarpSize ? partial[lane_id()] : 0);
}

__device__ __forceinline__ float block_sum(float value, float* partial) {
  value = warp_sum(value);
  __syncthreads();
  if (lane_id() == 0) partial[warp_id()] = value;
  __syncthreads();
  return warp_sum(lane_id() < blockDim.x / kWarpSize ? partial[lane_id()] : 0.0f);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads) gate_wide(const __grid_constant__ GateArgs args) {
  extern __shared__ u32 memory[];
  __shared__ u32 partial[2][kMaxWarps];
  __shared__ float sums[kMaxWarps];
  const u32 thread = threadIdx.x, threads = blockDim.x, num_experts = args.num_experts, token = blockIdx.x;
  u32* keys = memory;
  u32* group_keys = keys + num_experts;
  u32* winners = group_keys + args.num_groups;  // keys, then ids
  const char* row = args.logits + token * args.row_stride;
  const bool padded = args.padding_mask != nullptr && args.padding_mask[token] != 0;

  float greatest = 0, scale = 1;
  bool no_scores = false;
  if (args.scoring == kSoftmax) {
    u32 best = kNone;
#pragma unroll 1
    for (u32 expert = thread; expert < num_experts; expert += threads) {
      best = max_u32(best, to_key(load_logit(args, row, expert)));
    }
    greatest = capped(from_key(block_max(best, partial[0])), args.softcap);
    no_scores = !is_finite(greatest);
    float sum = 0, lost = 0;  // by rounding, and given back: a thread may have a hundred summands
#pragma unroll 1
    for (u32 expert = thread; expert < num_experts; expert += threads) {
      const float power = expf(capped(load_logit(args, row, expert), args.softcap) - greatest);
      const float summand = __fsub_rn(power, lost), next = __fadd_rn(sum, summand);
      lost = __fsub_rn(__fsub_rn(next, sum), summand);
      sum = next;
    }
    scale = reciprocal(block_sum(sum, sums));
  }

  const auto score = [&](u32 expert) {
    const float logit = capped(load_logit(args, row, expert), args.softcap);
    return no_scores ? 0.0f : score_of<true>(args, logit, greatest, scale);
  };
#pragma unroll 1
  for (u32 expert = thread; expert < num_experts; expert += threads) {
    const float logit = load_logit(args, row, expert);
    keys[expert] = to_choice(args.bias != nullptr ? score(expert) + args.bias[expert] : no_scores ? 0.0f : logit);
  }
  __syncthreads();

  if (args.num_groups > 1) {
    const u32 group_size = args.group_size;
#pragma unroll 1
    for (u32 group = warp_id(); group < args.num_groups; group += threads / kWarpSize) {
      u32 best = kNone, second = kNone;
#pragma unroll 1
      for (u32 i = lane_id(); i < group_size; i += kWarpSize) {
        const u32 key = keys[group * group_size + i];
        second = max_u32(second, min_u32(best, key));
        best = max_u32(best, key);
      }
      const u32 first = warp_max(best);
      const u32 owner = __ffs(__ballot_sync(kFullWarp, best == first)) - 1;
      const u32 next = warp_max(lane_id() == owner ? second : best);
      const bool sums_two = args.bias != nullptr && next != kNone;
      if (lane_id() == 0) group_keys[group] = sums_two ? to_choice(from_key(first) + from_key(next)) : first;
    }
    __syncthreads();
#pragma unroll 1
    for (u32 expert = thread; expert < num_experts; expert += threads) {
      const u32 group = expert / group_size, score = group_keys[group];
      u32 rank = 0;
#pragma unroll 1
      for (u32 other = 0; other < args.num_groups; ++other) {
        rank += group_keys[other] > score || (group_keys[other] == score && other < group);
      }
      if (rank >= args.topk_group) keys[expert] = kNone;
    }
    __syncthreads();
  }

  const u32 per_thread = ceil_div(num_experts, threads);
  const u32 begin = min_u32(num_experts, thread * per_thread), end = min_u32(num_experts, begin + per_thread);
  Best mine = next_best(keys, begin, end, {~0u, 0});
#pragma unroll 1
  for (u32 k = 0; k < args.topk; ++k) {
    u32* offers = partial[k % 2];  // of the last round but one, which all have read
    const u32 offer = warp_max(mine.key);
    if (lane_id() == 0) offers[warp_id()] = offer;
    __syncthreads();
    const u32 theirs = lane_id() < threads / kWarpSize ? offers[lane_id()] : kNone;
    const u32 best = warp_max(theirs);
    const u32 owner = __ffs(__ballot_sync(kFullWarp, theirs == best)) - 1;
    if (warp_id() != owner) continue;
    if (lane_id() == __ffs(__ballot_sync(kFullWarp, mine.key == best)) - 1) {
      winners[k] = mine.place;
      mine = next_best(keys, begin, end, mine);
    }
  }
  __syncthreads();

  float* weights = reinterpret_cast<float*>(winners + args.topk);
  if (warp_id() != 0) return;
  float sum = 0;
#pragma unroll 1
  for (u32 k = lane_id(); k < args.topk; k += kWarpSize) sum += weights[k] = score(winners[k]);
  sum = warp_sum(sum);
#pragma unroll 1
  for (u32 k = lane_id(); k < args.topk; k += kWarpSize) {
    const float weight = args.renormalize ? renormalized(weights[k], sum) : weights[k];
    const i64 place = token * (i64)(args.topk + args.num_shared) + k;
    write_result(args, place, padded ? 0.0f : weight * args.factor, padded ? ~0u : winners[k]);
  }
#pragma unroll 1
  for (u32 k = lane_id(); k < args.num_shared; k += kWarpSize) write_shared(args, token, k, padded);
}
