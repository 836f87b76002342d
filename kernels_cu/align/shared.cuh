// SPDX-License-Identifier: Apache-2.0
// The placement with the counters in shared memory, in one launch; align_shared.cu says how it is launched.
#pragma once
#include "align/align.cuh"
#include "cluster.cuh"

// Hand this block's counts, [stride] of 16 bits, to all blocks of the cluster: counts[rank] in each. What travels
// between SMs is 16 bits wide, in 16-byte stores, since the way is narrow. Needs every block of the cluster to be
// running. As each waits for what it gets from all, no block stores to one that has ended.
template <u32 kCluster>
__device__ __forceinline__ void send_counts(Inbox& inbox, const u16* mine, u16* counts, u32 stride) {
  const u32 rank = cluster_rank<kCluster>(), num_vectors = stride / 8;
  const uint4* from = reinterpret_cast<const uint4*>(mine);
  uint4* to = reinterpret_cast<uint4*>(counts + rank * stride);
#pragma unroll 1
  for (u32 other = warp_id(); other < kCluster; other += blockDim.x / kWarpSize)
#pragma unroll 1
    for (u32 k = lane_id(); k < num_vectors; k += kWarpSize) inbox.send(to + k, other, from[k]);
}

template <typename Ids, u32 kCluster, typename Args>
__device__ __forceinline__ void align_shared(const Args& args) {
  let_next_kernel_begin();
  // Blocks of large clusters have the most ids to write.
  constexpr bool kSorted = kCluster == 16;
  extern __shared__ uint4 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  __shared__ Inbox inbox;
  const Table table((u32*)memory, args);
  // Clusters only: the counts of this block's chunk, and those of all blocks, in 16-byte vectors; ids, if kSorted.
  const u32 stride = (args.num_experts + 7) & ~7u;
  u16* chunk_counts = (u16*)((u32*)memory + table.words());  // [stride]
  u16* all_counts = chunk_counts + stride;                   // [kCluster][stride]
  u32* stage = (u32*)(all_counts + kCluster * stride);       // [per_block]

  // Block `rank` of every cluster counts the same chunk; each cluster places another piece of it.
  const u32 rank = cluster_rank<kCluster>(), num_clusters = team_size(args) / kCluster;
  const Piece piece(args, rank * num_clusters + team_rank(args) / kCluster);
  const u32 chunk_begin = min_u32(args.num_ids, rank * num_clusters * args.per_block);
  const u32 chunk_end = min_u32(args.num_ids, chunk_begin + num_clusters * args.per_block);
  const u32 begin = piece.begin_of_warp(args, table), end = piece.end_of_warp(args, begin);
  if (kCluster > 1 && threadIdx.x == 0) inbox.open();
  cluster_arrive<kCluster>();
  const typename Ids::Id id = load_or_none<Ids>(args, begin + lane_id(), end);
  constexpr u32 kMaxLoads = kCluster == 1 ? 2 : 4;  // a cluster has more ids to count
  count_ids<Ids, kMaxLoads>(args, chunk_begin, chunk_end, (u32*)memory, table.words(),
                            [&](u32 i) { return piece.row(args, table, i); });

  if (kCluster > 1) {
#pragma unroll 1
    for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x)
      chunk_counts[bucket] = (u16)scan_column(table, bucket);
    if (threadIdx.x == 0) inbox.expect(kCluster * stride * sizeof(u16));
    __syncthreads();
    cluster_wait<kCluster>();
    send_counts<kCluster>(inbox, chunk_counts, all_counts, stride);
  }
  const Match match(args, begin + lane_id(), id);
  const u32 num_sorted = kSorted ? sort_ids<Ids>(args, table, warp_sums, stage, piece, begin, end, match) : 0;
  if (kCluster > 1) inbox.wait();
  const u32 post_pad = find_slots(args, table, warp_sums, [&](u32 bucket) {
    if (kCluster == 1) return make_uint2(0, scan_column(table, bucket));
    uint2 sums = make_uint2(kSorted ? 0 - table.before()[bucket] : 0, 0);
#pragma unroll
    for (u32 other = 0; other < kCluster; ++other) {
      const u32 count = all_counts[other * stride + bucket];
      sums.x += other < rank ? count : 0;
      sums.y += count;
    }
    return sums;
  });
  if (kSorted) write_sorted(args, table, stage, piece, num_sorted);
  else write_ids<Ids>(args, table, begin, end, match);
  write_padding(args, table.after(), post_pad);
}
