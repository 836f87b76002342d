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
#include "align/small.cuh"

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

#define ENTRY(name, Ids)                                                                                             \
  extern "C" __global__ void __launch_bounds__(1024, 1) align_small_##name(const __grid_constant__ SmallArgs args) { \
    align_small<Ids>(args);                                                                                          \
  }
FOR_EACH_READER(ENTRY)
