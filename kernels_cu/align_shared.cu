// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in one launch, with the counters in shared memory.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     kCluster * c blocks that together cover num_ids, per_block each; block: a multiple of 32 threads,
//          at least num_rows warps
// shared   (num_rows + 3) * num_experts + (staged ? 2 * per_block : 0) words; clusters: 5 / 2 * num_experts more
//
// Every cluster counts all ids, each of its blocks a kCluster-th of them, so no cluster waits for another and no
// workspace outlives the launch; then each block places its own piece and a share of the padding. Counting
// redundantly is cheap, writing from one SM is not: a few bytes an id against one or two cycles a sector.
//
//   1  count this block's share of the ids, in the rows of the table
//   2  per bucket: sum up the rows, and the blocks of the cluster; scan the padded sums over the buckets
//   3  place the ids of the piece; write padding
//
// Order: inside a bucket by chunk (block of the cluster), piece (cluster), warp and lane, which is ascending
// in i. All of it is fixed by the arguments.
#include "align.cuh"

// Sum up the counts of each bucket over the blocks of the cluster: totals[bucket] = {ids in the chunks of the blocks
// before this one, ids in all}. Counts are 16 bits wide, since the way between SMs is narrow, and four lanes share
// the loads of a pair of buckets. Begins with a barrier of the cluster and ends with one of the block.
constexpr u32 kGatherLanes = 4;

template <u32 kCluster>
__device__ __forceinline__ void sum_over_cluster(u32 num_experts, const u32* pairs, uint2* totals) {
  const u32 rank = cluster_rank<kCluster>(), num_pairs = ceil_div(num_experts, 2), part = threadIdx.x % kGatherLanes;
  cluster_arrive<kCluster>();
  cluster_wait<kCluster>();
#pragma unroll 1
  for (u32 first = 0; first < num_pairs; first += blockDim.x / kGatherLanes) {
    const u32 pair = first + threadIdx.x / kGatherLanes;
    u32 sums[4] = {0, 0, 0, 0};  // before and in all, of the even and of the odd bucket
    if (pair < num_pairs) {
#pragma unroll
      for (u32 k = 0; k < kCluster / kGatherLanes; ++k) {
        const u32 other = part + k * kGatherLanes, counts = load_from_cluster(pairs + pair, other);
        const u32 before = other < rank ? counts : 0;
        sums[0] += before & 0xffff, sums[1] += counts & 0xffff;
        sums[2] += before >> 16, sums[3] += counts >> 16;
      }
    }
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      sums[k] += __shfl_xor_sync(kFullWarp, sums[k], 1);
      sums[k] += __shfl_xor_sync(kFullWarp, sums[k], 2);
    }
    const u32 bucket = 2 * pair + part;
    if (part < 2 && bucket < num_experts)
      totals[bucket] = part == 0 ? make_uint2(sums[0], sums[1]) : make_uint2(sums[2], sums[3]);
  }
  cluster_arrive<kCluster>();  // done with the other blocks' memory
  __syncthreads();
}

template <typename Ids, u32 kCluster>
__device__ __forceinline__ void align_shared(const AlignArgs& args) {
  extern __shared__ uint2 memory[];
  __shared__ u32 warp_sums[2][kWarpSize];
  uint2* staged = memory;                                          // [per_block], if staged
  uint2* totals = staged + (args.staged ? args.per_block : 0);     // [E], if kCluster > 1
  u32* table_memory = (u32*)(totals + (kCluster > 1 ? args.num_experts : 0));
  const Table table(table_memory, args);
  u16* chunk_counts = (u16*)(table_memory + table.words());        // [E], if kCluster > 1; others read it

  // Block `rank` of every cluster counts the same chunk; each cluster places another piece of it.
  const u32 rank = cluster_rank<kCluster>(), num_clusters = gridDim.x / kCluster;
  const Piece piece(args, rank * num_clusters + blockIdx.x / kCluster);
  const u32 chunk_begin = min_u32(args.num_ids, rank * num_clusters * args.per_block);
  const u32 chunk_end = min_u32(args.num_ids, chunk_begin + num_clusters * args.per_block);
  const u32 begin = piece.begin_of_warp(args, table), end = piece.end_of_warp(args, begin);
  const typename Ids::Id id = load_or_none<Ids>(args, begin + lane_id(), end);
  count_ids<Ids>(args, chunk_begin, chunk_end, table_memory, table.words(),
                 [&](u32 i) { return piece.row(args, table, i); });

  if (kCluster > 1) {
#pragma unroll 1
    for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x)
      chunk_counts[bucket] = (u16)scan_column(table, bucket);
    sum_over_cluster<kCluster>(args.num_experts, (const u32*)chunk_counts, totals);
  }
  const Match match(args, begin + lane_id(), id);
  const Slots slots = find_slots(args, table, warp_sums, [&](u32 bucket) {
    return kCluster > 1 ? totals[bucket] : make_uint2(0, scan_column(table, bucket));
  });
  write_ids<Ids>(args, table, begin, end, match, staged, slots.num_mine);
  write_padding(args, table.after(), slots.post_pad);
  cluster_wait<kCluster>();  // shared memory has to outlive its readers
}

#define ENTRY(name, Ids)                                            \
  extern "C" __global__ void __launch_bounds__(1024, 1)             \
      align_shared_##name(const __grid_constant__ AlignArgs args) { \
    align_shared<Ids, 1>(args);                                     \
  }
FOR_EACH_READER(ENTRY)

#if __CUDA_ARCH__ >= 900
#define CLUSTER_ENTRY(name, Ids, kCluster)                                              \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(1024, 1) \
      align_shared_cluster##kCluster##_##name(const __grid_constant__ AlignArgs args) { \
    align_shared<Ids, kCluster>(args);                                                  \
  }
#define ENTRY8(name, Ids) CLUSTER_ENTRY(name, Ids, 8)
#define ENTRY16(name, Ids) CLUSTER_ENTRY(name, Ids, 16)
FOR_EACH_READER(ENTRY8)
FOR_EACH_READER(ENTRY16)
#endif
