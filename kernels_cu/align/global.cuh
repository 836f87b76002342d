// SPDX-License-Identifier: Apache-2.0
// The placement with counts in global memory, in two launches; align_global.cu says how they are launched.
#pragma once
#include "align/align.cuh"

constexpr u32 kColumnParts = 4;  // threads that share the sum of one column of counts

template <typename Ids, bool kSharedTable, typename Args>
__device__ __forceinline__ void align_count(const Args& args) {
  extern __shared__ uint4 memory[];
  const Piece piece(args, team_rank(args));
  const u32 stride = Table(nullptr, args).stride;
  u32* result = args.scratch + (u64)team_rank(args) * stride;
  u32* counts = kSharedTable ? (u32*)memory : result;
  count_ids<Ids, 4>(args, piece.begin, piece.end, counts, stride, [&](u32) { return counts; });
  if (!kSharedTable) return;
#pragma unroll 1
  for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x) result[bucket] = counts[bucket];
}

template <typename Ids, bool kSharedTable, typename Args>
__device__ __forceinline__ void align_scatter(const Args& args) {
  let_next_kernel_begin();
  extern __shared__ uint4 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  const u32 num_experts = args.num_experts, stride = Table(nullptr, args).stride;
  u32* tables = args.scratch + (u64)team_size(args) * stride;
  u32* table_memory = kSharedTable ? (u32*)memory : tables + (u64)team_rank(args) * Table(nullptr, args).words();
  const Table table(table_memory, args);
  u32* stage = (u32*)memory + table.words();  // [per_block], if kSharedTable
  const Piece piece(args, team_rank(args));
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
    for (u32 block = part; block < team_size(args); block += kColumnParts) {
      const u32 count = __ldg(args.scratch + (u64)block * stride + bucket);
      before += block < team_rank(args) ? count : 0;
      after += block > team_rank(args) ? count : 0;
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
