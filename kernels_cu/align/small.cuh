// SPDX-License-Identifier: Apache-2.0
// The placement of few ids without counters, in one launch; align_small.cu says how it is launched.
#pragma once
#include "align/align.cuh"

constexpr u32 kMaxIds = 128;

// Sum over groups of `lanes` neighbouring lanes, a power of two up to 32.
__device__ __forceinline__ u32 group_sum(u32 value, u32 lanes) {
#pragma unroll 1
  for (u32 distance = 1; distance < lanes; distance *= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

template <typename Ids, typename Args>
__device__ __forceinline__ void align_small(const Args& args) {
  let_next_kernel_begin();
  __shared__ uint4 buckets4[kMaxIds / 4], widths4[kMaxIds / 4];
  u32 *buckets = &buckets4[0].x, *widths = &widths4[0].x;
  const u32 n = args.num_ids, thread = threadIdx.x, lanes = args.lanes_per_id;

  // The last four is filled up with ids that count as dropped: equal to none that is placed, smaller than none.
  const u32 num_fours = ceil_div(n, 4);
  typename Ids::Id id = ~typename Ids::Id(0);
  if (thread < n) id = Ids::load(args, thread);
  const u32 slot_begin = team_rank(args) * args.slots_per_block;
  const u32 slot_end = min_u32(args.num_slots, slot_begin + args.slots_per_block);
  const u32 block_begin = args.block_size.quotient(slot_begin);
  const u32 block_end = min_u32(args.num_blocks, args.block_size.quotient(slot_begin + args.slots_per_block));
  fill(args.sorted_token_ids, slot_begin, slot_end, (int)n, thread, blockDim.x);
  fill(args.expert_ids, block_begin, block_end, -1, thread, blockDim.x);
  if (thread < 4 * num_fours) {
    buckets[thread] = to_bucket(args, id);
    widths[thread] = 0;
  }
  __syncthreads();

  // `lanes` neighbours share an id. Id n stands for the end: all buckets are below its own, num_experts.
  const u32 i = thread >> (31 - __clz(lanes)), lane = thread & (lanes - 1);
  const u32 bucket = i < n ? buckets[i] : args.num_experts;
  u32 counts = 0;  // earlier equal ids in the high half, all equal ids in the low half
#pragma unroll 2
  for (u32 four = lane; four < num_fours; four += lanes) {
    const uint4 other = buckets4[four];
    const u32 first = 4 * four;
    counts += other.x == bucket ? (first < i ? 0x10001 : 1) : 0;
    counts += other.y == bucket ? (first + 1 < i ? 0x10001 : 1) : 0;
    counts += other.z == bucket ? (first + 2 < i ? 0x10001 : 1) : 0;
    counts += other.w == bucket ? (first + 3 < i ? 0x10001 : 1) : 0;
  }
  counts = group_sum(counts, lanes);
  const u32 rank = counts >> 16;
  if (lane == 0 && rank == 0 && bucket < args.num_experts) widths[i] = args.block_size.round_up(counts & 0xffff);
  __syncthreads();

  u32 begin = 0;
#pragma unroll 2
  for (u32 four = lane; four < num_fours; four += lanes) {
    const uint4 other = buckets4[four], width = widths4[four];
    begin += other.x < bucket ? width.x : 0;
    begin += other.y < bucket ? width.y : 0;
    begin += other.z < bucket ? width.z : 0;
    begin += other.w < bucket ? width.w : 0;
  }
  const u32 slot = group_sum(begin, lanes) + rank;
  if (lane != 0) return;
  if (bucket < args.num_experts && slot_begin <= slot && slot < slot_end) {
    args.sorted_token_ids[slot] = (int)i;
    name_block(args, bucket, slot);
  }
  if (i == n && team_rank(args) == 0) *args.num_tokens_post_pad = (int)(slot - rank);
}
