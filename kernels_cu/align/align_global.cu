// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in two launches, with the counts of each piece in global memory: for many ids where there are no
// clusters, and for more experts than shared memory has room for.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// scratch  counts [grid][stride] words, stride = E + 1 rounded up to 4; after them, for the _large entries, a table
//          per block. Need not be cleared.
// grid     as many blocks as pieces of per_block ids; block: a multiple of 32 threads, at least num_rows warps
// shared   align_count: stride words; align_scatter: the table (align.cuh), and per_block words more; _large: none
//
// align_count
//   1  counts[block][e] = ids of expert e in the block's piece
// align_scatter
//   1  count the ids of the piece, in the rows of the table
//   2  per expert: sum up the rows, and the counts of the other blocks; sort the ids of the piece (_large does not)
//   3  scan the padded sums over the experts
//   4  write the ids of the piece, and padding
//
// Order: inside a bucket by piece, warp and lane, which is ascending in i. Atomics only add up counts.
#include "align/align.cuh"

constexpr u32 kColumnParts = 4;  // threads that share the sum of one column of counts

template <typename Ids, bool kSharedTable>
__device__ __forceinline__ void align_count(const AlignArgs& args) {
  extern __shared__ uint4 memory[];
  const Piece piece(args, blockIdx.x);
  const u32 stride = Table(nullptr, args).stride;
  u32* result = args.scratch + (u64)blockIdx.x * stride;
  u32* counts = kSharedTable ? (u32*)memory : result;
  count_ids<Ids, 4>(args, piece.begin, piece.end, counts, stride, [&](u32) { return counts; });
  if (!kSharedTable) return;
#pragma unroll 1
  for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x) result[bucket] = counts[bucket];
}

template <typename Ids, bool kSharedTable>
__device__ __forceinline__ void align_scatter(const AlignArgs& args) {
  let_next_kernel_begin();
  extern __shared__ uint4 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  const u32 num_experts = args.num_experts, stride = Table(nullptr, args).stride;
  u32* tables = args.scratch + (u64)gridDim.x * stride;
  u32* table_memory = kSharedTable ? (u32*)memory : tables + (u64)blockIdx.x * Table(nullptr, args).words();
  const Table table(table_memory, args);
  u32* stage = (u32*)memory + table.words();  // [per_block], if kSharedTable
  const Piece piece(args, blockIdx.x);
  const u32 begin = piece.begin_of_warp(args, table), end = piece.end_of_warp(args, begin);
  const typename Ids::Id id = load_or_none<Ids>(args, begin + lane_id(), end);
  count_ids<Ids, 4>(args, piece.begin, piece.end, table_memory, table.words(),
                    [&](u32 i) { return piece.row(args, table, i); });

  // Several threads an expert, so that the loads of a column overlap.
#pragma unroll 1
  for (u32 k = threadIdx.x; k < num_experts * kColumnParts; k += blockDim.x) {
    const u32 bucket = k % num_experts, part = k / num_experts;
    u32 before = 0, after = 0;
#pragma unroll 8
    for (u32 block = part; block < gridDim.x; block += kColumnParts) {
      const u32 count = __ldg(args.scratch + (u64)block * stride + bucket);
      before += block < blockIdx.x ? count : 0;
      after += block > blockIdx.x ? count : 0;
    }
    atomicAdd(table.before() + bucket, before);
    atomicAdd(table.after() + bucket, after);
  }
  const Match match(args, begin + lane_id(), id);
  __syncthreads();
  if (!kSharedTable) {
    const u32 post_pad =
        find_slots(args, table, warp_sums, [&](u32 bucket) { return make_uint2(0, scan_column(table, bucket)); });
    write_ids<Ids>(args, table, begin, end, match);
    write_padding(args, table.after(), post_pad);
    return;
  }
#pragma unroll 1
  for (u32 bucket = threadIdx.x; bucket < num_experts; bucket += blockDim.x)
    table.base[bucket] = scan_column(table, bucket);
  const u32 num_sorted = sort_ids<Ids>(args, table, warp_sums, stage, piece, begin, end, match);
  const u32 post_pad = find_slots(
      args, table, warp_sums, [&](u32 bucket) { return make_uint2(0 - table.before()[bucket], table.base[bucket]); });
  write_sorted(args, table, stage, piece, num_sorted);
  write_padding(args, table.after(), post_pad);
}

#define ENTRY(kernel, name, Ids, kSharedTable)                                                                    \
  extern "C" __global__ void __launch_bounds__(1024, 1) kernel##_##name(const __grid_constant__ AlignArgs args) { \
    kernel<Ids, kSharedTable>(args);                                                                              \
  }
#define ENTRIES(name, Ids)            \
  ENTRY(align_count, name, Ids, true) \
  ENTRY(align_scatter, name, Ids, true)
FOR_EACH_READER(ENTRIES)
ENTRY(align_count, large_any, Any, false)
ENTRY(align_scatter, large_any, Any, false)
