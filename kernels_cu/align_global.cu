// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in two launches, with the counts of each piece in global memory: for GPUs without
// clusters, and for more experts than shared memory has room for.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// scratch  counts [grid][E] words; without shared tables also one Table per block after it. Need not be cleared.
// grid     as many blocks as pieces of ids_per_block ids; block: a multiple of 32 threads, at least num_rows warps
// shared   align_count: E words; align_scatter: Table::words(E, num_rows) words; the _large entries: none
//
// align_count
//   1  counts[block][e] = ids of expert e in the block's piece
// align_scatter
//   1  load and rank the first tile of the piece, as in align_shared.cu
//   2  per expert: sum counts over the blocks before, and over all; scan the padded sums over the experts
//   3  place the tile; write padding; go on with further tiles, if the piece has any
//
// Order: inside a bucket by piece, tile, warp and lane, which is ascending in i. Atomics only add up counts.
#include "align.cuh"

constexpr u32 kColumnParts = 4;  // threads that share the sum of one column of counts

template <typename Ids, bool kSharedTable>
__device__ __forceinline__ void align_count(const AlignArgs& args) {
  extern __shared__ u32 memory[];
  const Piece piece(args, blockIdx.x);
  u32* row = args.scratch + (u64)blockIdx.x * args.num_experts;
  u32* counts = kSharedTable ? memory : row;
  clear(counts, args.num_experts);
  __syncthreads();
  count_ids<Ids>(args, piece.begin, piece.end, counts);
  if (!kSharedTable) return;
  __syncthreads();
#pragma unroll 1
  for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x) row[bucket] = counts[bucket];
}

template <typename Ids, bool kSharedTable>
__device__ __forceinline__ void align_scatter(const AlignArgs& args) {
  extern __shared__ u32 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  const u32 num_experts = args.num_experts, table_words = Table::words(num_experts, args.num_rows);
  u32* tables = args.scratch + (u64)gridDim.x * num_experts;
  u32* table_memory = kSharedTable ? memory : tables + (u64)blockIdx.x * table_words;
  const Table table(table_memory, num_experts);
  const Piece piece(args, blockIdx.x);
  const bool ranks = warp_id() < args.num_rows;

  Part part;
  if (ranks) load_part<Ids>(args, piece, piece.begin, part);
  clear(table_memory, table_words);
  __syncthreads();
  if (ranks) rank_part(args, piece, part, table);
  // Several threads an expert, so that the loads of a column overlap.
#pragma unroll 1
  for (u32 k = threadIdx.x; k < num_experts * kColumnParts; k += blockDim.x) {
    const u32 bucket = k % num_experts, column_part = k / num_experts;
    u32 before = 0, rest = 0;
#pragma unroll 8
    for (u32 block = column_part; block < gridDim.x; block += kColumnParts) {
      const u32 count = __ldg(args.scratch + (u64)block * num_experts + bucket);
      if (block < blockIdx.x) before += count; else rest += count;
    }
    atomicAdd(table.before + bucket, before);
    atomicAdd(table.rest + bucket, rest);
  }
  __syncthreads();

  u32 post_pad = 0;
#pragma unroll 1
  for (u32 first = 0; first < num_experts; first += blockDim.x) {
    const u32 bucket = first + threadIdx.x;
    u32 before = 0, count = 0;
    if (bucket < num_experts) {
      before = table.before[bucket];
      count = before + table.rest[bucket];
      scan_column(args, table, bucket);
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
  __syncthreads();

  if (ranks) place_part(args, piece, piece.begin, part, table);
  write_padding(args, table.rest, post_pad);
  place_further_tiles<Ids>(args, piece, table);
}

#define ENTRY(kernel, name, Ids, kSharedTable)                        \
  extern "C" __global__ void __launch_bounds__(1024, 1)               \
      kernel##_##name(const __grid_constant__ AlignArgs args) {       \
    kernel<Ids, kSharedTable>(args);                                  \
  }
#define ENTRIES(name, Ids)                       \
  ENTRY(align_count, name, Ids, true)            \
  ENTRY(align_scatter, name, Ids, true)          \
  ENTRY(align_count, large_##name, Ids, false)   \
  ENTRY(align_scatter, large_##name, Ids, false)
FOR_EACH_READER(ENTRIES)
