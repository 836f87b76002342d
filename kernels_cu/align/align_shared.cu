// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in one launch, with the counters in shared memory.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     kCluster * c blocks that together cover num_ids, per_block each; block: a multiple of 32 threads,
//          at least num_rows warps
// shared   the table (align.cuh); in clusters, (kCluster + 1) * 2 bytes more per expert, of which there are num_experts
//          rounded up to 8; in clusters of 16, per_block words more
//
// Every cluster counts all ids, each of its blocks a kCluster-th of them, so no cluster waits for another and no
// workspace outlives the launch; then each block places its own piece and a share of the padding. Counting
// redundantly is cheap, writing from one SM is not: a few bytes an id against one or two cycles a sector.
//
//   1  count this block's share of the ids, in the rows of the table
//   2  per bucket: sum up the rows, and tell the other blocks of the cluster; meanwhile sort the ids of the piece
//   3  per bucket: sum up the blocks; scan the padded sums over the buckets
//   4  write the ids of the piece, and padding
//
// Order: inside a bucket by chunk (block of the cluster), piece (cluster), warp and lane, which is ascending
// in i. All of it is fixed by the arguments.
#include "align/align.cuh"
#include "align/shared.cuh"

#define ENTRY(name, Ids)                                                                                              \
  extern "C" __global__ void __launch_bounds__(1024, 1) align_shared_##name(const __grid_constant__ AlignArgs args) { \
    align_shared<Ids, 1>(args);                                                                                       \
  }
FOR_EACH_READER(ENTRY)

#if __CUDA_ARCH__ >= 900
#define CLUSTER_ENTRY(name, Ids, kCluster)                                               \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(1024, 1) \
      align_shared_cluster##kCluster##_##name(const __grid_constant__ AlignArgs args) {  \
    align_shared<Ids, kCluster>(args);                                                   \
  }
#define ENTRY8(name, Ids) CLUSTER_ENTRY(name, Ids, 8)
#define ENTRY16(name, Ids) CLUSTER_ENTRY(name, Ids, 16)
FOR_EACH_FAST_READER(ENTRY8)
FOR_EACH_FAST_READER(ENTRY16)
#endif
