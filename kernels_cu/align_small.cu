// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size for the few ids of a decode step, and any number of experts: one launch, no counters.
//
// in       topk_ids [num_ids], num_ids <= kMaxIds; expert_map [num_experts] or unused    (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     any number of blocks; block: a power of two of threads, > num_ids and >= 32
//
// Comparing all pairs of ids takes less time than clearing and scanning a table of counters. Every block finds
// all positions and writes those in its own slice of the outputs, so the writes are spread over the SMs.
//
//   1  load the ids; fill this block's slices with padding
//   2  per id: how many equal ids there are, and how many of them come earlier
//   3  per id: the slots that the smaller buckets take, counted at the first id of each
//   4  write the ids whose slots are in the slice
//
// Order: ascending in i inside a bucket, by construction.
#include "align.cuh"

constexpr u32 kMaxIds = 128;

// Sum over groups of `lanes` neighbouring lanes, a power of two up to 32.
__device__ __forceinline__ u32 group_sum(u32 value, u32 lanes) {
#pragma unroll 1
  for (u32 distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

template <typename Ids>
__device__ __forceinline__ void align_small(const AlignArgs& args) {
  __shared__ u32 buckets[kMaxIds + 1], widths[kMaxIds];
  const u32 n = args.num_ids, thread = threadIdx.x;
  if (thread <= n) buckets[thread] = thread < n ? Ids::bucket(args, thread) : kDropped;

  const u32 slots_per_block = ceil_div(args.num_slots, gridDim.x), blocks_per_block = ceil_div(args.num_blocks, gridDim.x);
  const u32 slot_begin = min_u32(args.num_slots, blockIdx.x * slots_per_block);
  const u32 slot_end = min_u32(args.num_slots, slot_begin + slots_per_block);
  const u32 block_begin = min_u32(args.num_blocks, blockIdx.x * blocks_per_block);
  const u32 block_end = min_u32(args.num_blocks, block_begin + blocks_per_block);
  fill(args.sorted_token_ids, slot_begin, slot_end, n, thread, blockDim.x);
  fill(args.expert_ids, block_begin, block_end, -1, thread, blockDim.x);
  __syncthreads();

  // `lanes` neighbours share one id; id n stands for the end: all other buckets are smaller than its.
  u32 lanes = kWarpSize;
#pragma unroll 1
  while (lanes * (n + 1) > blockDim.x) lanes /= 2;
  const u32 i = thread / lanes, lane = thread % lanes;
  const u32 bucket = i <= n ? buckets[i] : kDropped;
  u32 equal = 0, rank = 0;
#pragma unroll 4
  for (u32 j = lane; j < n; j += lanes) {
    const bool same = buckets[j] == bucket;
    equal += same;
    rank += same && j < i;
  }
  equal = group_sum(equal, lanes);
  rank = group_sum(rank, lanes);
  if (i < n && lane == 0) widths[i] = rank == 0 && bucket != kDropped ? args.block_size.round_up(equal) : 0;
  __syncthreads();

  u32 begin = 0;
#pragma unroll 4
  for (u32 j = lane; j < n; j += lanes) begin += buckets[j] < bucket ? widths[j] : 0;
  begin = group_sum(begin, lanes);
  if (lane != 0 || i > n) return;
  if (i == n) {
    if (blockIdx.x == 0) *args.num_tokens_post_pad = (int)begin;
    return;
  }
  if (bucket == kDropped) return;
  const u32 slot = begin + rank;
  if (slot_begin <= slot && slot < slot_end) args.sorted_token_ids[slot] = (int)i;
  const u32 block = args.block_size.quotient(slot);
  if (block_begin <= block && block < block_end && block * args.block_size.value == slot)
    args.expert_ids[block] = expert_of(args, bucket);
}

#define ENTRY(name, Ids)                                           \
  extern "C" __global__ void __launch_bounds__(1024, 1)            \
      align_small_##name(const __grid_constant__ AlignArgs args) { \
    align_small<Ids>(args);                                        \
  }
FOR_EACH_READER(ENTRY)
