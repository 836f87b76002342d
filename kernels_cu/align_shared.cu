// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in one launch, with the counters in shared memory.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     kCluster * c blocks that together cover num_ids, per_block each; block: a multiple of 32 threads,
//          at least num_rows warps
// shared   (num_rows + 3 + (kCluster > 1)) * num_experts words
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

template <typename Ids, u32 kCluster>
__device__ __forceinline__ void align_shared(const AlignArgs& args) {
  extern __shared__ u32 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  const Table table(memory, args);
  u32* chunk_counts = memory + table.words();  // [E], read by the other blocks of the cluster

  // Block `rank` of every cluster counts the same chunk; each cluster places another piece of it.
  const u32 rank = cluster_rank<kCluster>(), num_clusters = gridDim.x / kCluster;
  const Piece piece(args, rank * num_clusters + blockIdx.x / kCluster);
  const u32 chunk_begin = min_u32(args.num_ids, rank * num_clusters * args.per_block);
  const u32 chunk_end = min_u32(args.num_ids, chunk_begin + num_clusters * args.per_block);
  count_ids<Ids>(args, chunk_begin, chunk_end, memory, table.words(), [&](u32 i) { return piece.row(args, table, i); });

  if (kCluster > 1) {
#pragma unroll 1
    for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x)
      chunk_counts[bucket] = scan_column(table, bucket);
    cluster_arrive<kCluster>();
    cluster_wait<kCluster>();
  }
  u32 post_pad = 0;
#pragma unroll 1
  for (u32 first = 0; first < args.num_experts; first += blockDim.x) {
    const u32 bucket = first + threadIdx.x;
    u32 before = 0, count = 0;
    if (bucket < args.num_experts) {
      if (kCluster == 1) {
        count = scan_column(table, bucket);
      } else {
#pragma unroll
        for (u32 other = 0; other < kCluster; ++other) {
          const u32 theirs = load_from_cluster(chunk_counts + bucket, other);
          count += theirs;
          before += other < rank ? theirs : 0;
        }
      }
    }
    if (first > 0) __syncthreads();  // warp_sums is still being read
    u32 sum;
    const u32 begin = post_pad + block_exclusive_scan(args.block_size.round_up(count), warp_sums, sum);
    post_pad += sum;
    if (bucket < args.num_experts) {
      table.base[bucket] = begin + before;
      table.after()[bucket] = begin + count;  // the first padding slot
    }
  }
  cluster_arrive<kCluster>();  // done with the other blocks' memory
  __syncthreads();

  place_ids<Ids>(args, table, piece);
  write_padding(args, table.after(), post_pad);
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
