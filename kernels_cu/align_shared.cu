// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in one launch, with the counters in shared memory.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     kCluster * c blocks that together cover num_ids, ids_per_block each; block: a multiple of 32 threads,
//          at least num_rows warps
// shared   (Table::words(num_experts, num_rows) + (kCluster > 1 ? num_experts : 0)) words
//
// Every cluster counts all ids, each of its blocks a kCluster-th of them, so no cluster waits for another and no
// workspace outlives the launch; then each block places its own piece and a share of the padding. Counting
// redundantly is cheap, writing from one SM is not: a few bytes an id against one or two cycles a sector.
//
//   1  load the ids of the first tile; clear the table
//   2  rank the first tile; count the rest of this block's share of the ids, before and after the piece
//   3  per bucket: sum up, across the cluster too; scan the padded sums over the buckets
//   4  place the tile; write padding; go on with further tiles, if the piece has any
//
// Order: inside a bucket by chunk (block of the cluster), piece (cluster), tile, warp and lane, which is
// ascending in i. All of it is fixed by the arguments.
#include "align.cuh"

template <typename Ids, u32 kCluster>
__device__ __forceinline__ void align_shared(const AlignArgs& args) {
  extern __shared__ u32 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  const u32 num_experts = args.num_experts, table_words = Table::words(num_experts, args.num_rows);
  const Table table(memory, num_experts);
  u32* chunk_counts = memory + table_words;  // [E], read by the other blocks of the cluster

  // Block `rank` of every cluster counts the same chunk; each cluster places another piece of it.
  const u32 rank = cluster_rank<kCluster>(), num_clusters = gridDim.x / kCluster;
  const Piece piece(args, rank * num_clusters + blockIdx.x / kCluster);
  const u32 chunk_begin = min_u32(args.num_ids, rank * num_clusters * args.ids_per_block);
  const u32 chunk_end = min_u32(args.num_ids, chunk_begin + num_clusters * args.ids_per_block);
  const u32 tile_end = min_u32(piece.end, piece.begin + piece.ids_per_tile(args));
  const bool ranks = warp_id() < args.num_rows;

  Part part;
  if (ranks) load_part<Ids>(args, piece, piece.begin, part);
  clear(memory, table_words);
  __syncthreads();

  if (ranks) rank_part(args, piece, part, table);
  count_ids<Ids>(args, chunk_begin, piece.begin, table.before);
  count_ids<Ids>(args, tile_end, chunk_end, table.rest);
  __syncthreads();

  if (kCluster > 1) {
#pragma unroll 1
    for (u32 bucket = threadIdx.x; bucket < num_experts; bucket += blockDim.x) {
      table.rest[bucket] += scan_column(args, table, bucket);
      chunk_counts[bucket] = table.before[bucket] + table.rest[bucket];
    }
    cluster_arrive<kCluster>();
    cluster_wait<kCluster>();
  }
  u32 post_pad = 0;
#pragma unroll 1
  for (u32 first = 0; first < num_experts; first += blockDim.x) {
    const u32 bucket = first + threadIdx.x;
    u32 before = 0, count = 0;
    if (bucket < num_experts) {
      before = table.before[bucket];
      if (kCluster == 1) {
        count = before + table.rest[bucket] + scan_column(args, table, bucket);
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
    if (bucket < num_experts) {
      table.before[bucket] = begin + before;
      table.rest[bucket] = begin + count;
    }
  }
  cluster_arrive<kCluster>();  // done with the other blocks' memory
  __syncthreads();

  if (ranks) place_part(args, piece, piece.begin, part, table);
  write_padding(args, table.rest, post_pad);
  place_further_tiles<Ids>(args, piece, table);
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
