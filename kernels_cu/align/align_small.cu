// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size for the few ids of a decode step, and any number of experts: one launch, no counters.
//
// in       topk_ids [num_ids], num_ids <= kMaxIds; expert_map [num_experts] or unused    (SmallArgs)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     blocks that together cover num_slots, slots_per_block each; block: a multiple of 32 threads, at least
//          (num_ids + 1) * lanes_per_id
//
// Comparing all pairs of ids takes less time than clearing and scanning a table of counters. Every block finds
// all positions and writes those in its own slice of the outputs, so the writes are spread over the SMs.
//
//   1  load the ids; fill this block's slices with padding
//   2  per id: how many equal ids there are, and how many of them come earlier
//   3  per id: the slots that the smaller buckets take, counted at the first id of each
//   4  place the ids whose slots are in the slice
//
// Order: ascending in i inside a bucket, by construction.
#include "align/align.cuh"

constexpr u32 kMaxIds = 128;

struct SmallArgs {
  const void* topk_ids;
  int* sorted_token_ids;     // [num_slots]
  int* expert_ids;           // [num_blocks]
  int* num_tokens_post_pad;  // [1]
  const int* expert_map;     // [num_experts], read where map_mode is not kNoMap
  u32 num_ids, num_experts, num_slots, num_blocks;
  u32 map_mode;
  Divisor block_size;
  u32 slots_per_block;    // that one block writes, a multiple of block_size
  u32 lanes_per_id;       // threads that share an id, a power of two up to 32
  u32 id_type, num_cols;  // as in AlignArgs
  i64 row_stride, col_stride;
};

// Sum over groups of `lanes` neighbouring lanes, a power of two up to 32.
__device__ __forceinline__ u32 group_sum(u32 value, u32 lanes) {
#pragma unroll 1
  for (u32 distance = 1; distance < lanes; distance *= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

template <typename Ids>
__device__ __forceinline__ void align_small(const SmallArgs& args) {
  let_next_kernel_begin();
  __shared__ uint4 buckets4[kMaxIds / 4], widths4[kMaxIds / 4];
  u32 *buckets = &buckets4[0].x, *widths = &widths4[0].x;
  const u32 n = args.num_ids, thread = threadIdx.x, lanes = args.lanes_per_id;

  // The last four is filled up with ids that count as dropped: equal to none that is placed, smaller than none.
  const u32 num_fours = ceil_div(n, 4);
  typename Ids::Id id = ~typename Ids::Id(0);
  if (thread < n) id = Ids::load(args, thread);
  const u32 slot_begin = blockIdx.x * args.slots_per_block;
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
  if (i == n && blockIdx.x == 0) *args.num_tokens_post_pad = (int)(slot - rank);
}

#define ENTRY(name, Ids)                                                                                             \
  extern "C" __global__ void __launch_bounds__(1024, 1) align_small_##name(const __grid_constant__ SmallArgs args) { \
    align_small<Ids>(args);                                                                                          \
  }
FOR_EACH_READER(ENTRY)
