// SPDX-License-Identifier: Apache-2.0
// moe_sort: moe_align_block_size, and what else its counts tell, in the same launches.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused; topk_weights [num_ids] or null      (SortArgs)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32; and where they
//          are not null
//            inverse_ids [num_ids]           the slot of each id, -1 if it has none
//            expert_offsets [E + 1]          the first slot of each expert, and how many are in use; 1 or 2 words each
//            counts [E]                      ids of each expert
//            sorted_weights [num_slots]      topk_weights in the order of sorted_token_ids; 0 in padding
//            fine_expert_ids [num_fine]      expert_ids for blocks of a size that divides the other
// scratch, grid, block, shared: as the kernels of align_shared.cu and align_global.cu, which these are
//
// Each by-product is written by who finds it out: inverse_ids and sorted_weights with an id, offsets and counts by the
// first block, which knows them as all blocks do, and the rest with the padding.
#include "align/align.cuh"
#include "align/global.cuh"
#include "align/shared.cuh"

struct SortArgs {
  const void* topk_ids;
  int* sorted_token_ids;
  int* expert_ids;
  int* num_tokens_post_pad;
  const int* expert_map;
  u32* scratch;
  int* inverse_ids;
  int* expert_offsets;
  int* counts;
  const float* topk_weights;
  float* sorted_weights;
  int* fine_expert_ids;
  u32 num_ids, num_experts, num_slots, num_blocks;  // as in AlignArgs, up to the strides
  u32 map_mode;
  Divisor block_size;
  u32 per_block;
  Divisor per_row;
  u32 num_rows;
  u32 id_type, num_cols;
  i64 row_stride, col_stride;
  u32 words_per_offset;  // 1 or 2
  Divisor fine_size;     // divides block_size
  u32 num_fine;
};

__device__ __forceinline__ void note_id(const SortArgs& args, u32 i, u32 bucket, u32 slot) {
  if (args.inverse_ids != nullptr) args.inverse_ids[i] = (int)slot;
  if (args.sorted_weights != nullptr) args.sorted_weights[slot] = args.topk_weights[i];
  if (args.fine_expert_ids != nullptr) {
    const u32 block = args.fine_size.quotient(slot);
    if (block * args.fine_size.value == slot) args.fine_expert_ids[block] = expert_of(args, bucket);
  }
}

__device__ __forceinline__ void note_dropped(const SortArgs& args, u32 i) {
  if (args.inverse_ids != nullptr) args.inverse_ids[i] = -1;
}

__device__ __forceinline__ void note_bucket(const SortArgs& args, u32 bucket, u32 begin, u32 count) {
  if (blockIdx.x > 0) return;
  if (args.expert_offsets != nullptr) write_offset(args, bucket, begin);
  if (args.counts != nullptr) args.counts[bucket] = (int)count;
}

__device__ __forceinline__ void note_padding(const SortArgs& args, u32 bucket, u32 begin, u32 end) {
  if (args.sorted_weights != nullptr) fill(args.sorted_weights, begin, end, 0.0f, lane_id(), kWarpSize);
  if (args.fine_expert_ids != nullptr) {
    const u32 first = args.fine_size.quotient(begin + args.fine_size.value - 1), last = args.fine_size.quotient(end);
    fill(args.fine_expert_ids, first, last, expert_of(args, bucket), lane_id(), kWarpSize);
  }
}

__device__ __forceinline__ void note_end(const SortArgs& args, u32 post_pad, u32 thread, u32 num_threads) {
  if (args.sorted_weights != nullptr) fill(args.sorted_weights, post_pad, args.num_slots, 0.0f, thread, num_threads);
  if (args.fine_expert_ids != nullptr)
    fill(args.fine_expert_ids, args.fine_size.quotient(post_pad), args.num_fine, -1, thread, num_threads);
  if (thread > 0) return;
  if (args.num_tokens_post_pad != nullptr) *args.num_tokens_post_pad = (int)post_pad;
  if (args.expert_offsets != nullptr) write_offset(args, args.num_experts, post_pad);
}

#define ENTRY(body, name, ...)                                                                               \
  extern "C" __global__ void __launch_bounds__(1024, 1) sort_##name(const __grid_constant__ SortArgs args) { \
    body<__VA_ARGS__>(args);                                                                                 \
  }
#define ENTRIES(name, Ids)                    \
  ENTRY(align_shared, shared_##name, Ids, 1)  \
  ENTRY(align_count, count_##name, Ids, true) \
  ENTRY(align_scatter, scatter_##name, Ids, true)
FOR_EACH_READER(ENTRIES)
ENTRY(align_count, count_large_any, Any, false)
ENTRY(align_scatter, scatter_large_any, Any, false)

#if __CUDA_ARCH__ >= 900
#define CLUSTER_ENTRY(name, Ids, kCluster)                                               \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(1024, 1) \
      sort_shared_cluster##kCluster##_##name(const __grid_constant__ SortArgs args) {    \
    align_shared<Ids, kCluster>(args);                                                   \
  }
#define ENTRY8(name, Ids) CLUSTER_ENTRY(name, Ids, 8)
#define ENTRY16(name, Ids) CLUSTER_ENTRY(name, Ids, 16)
FOR_EACH_FAST_READER(ENTRY8)
FOR_EACH_FAST_READER(ENTRY16)
#endif
