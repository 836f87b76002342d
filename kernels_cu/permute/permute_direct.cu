// SPDX-License-Identifier: Apache-2.0
// moe_permute in one launch, for so few pairs that every block can count them all; without padding, block_size is 1.
//
//   permuted[slot of pair i] = rows[i / topk], and so for the scales of the row; rows without a pair are zeros
//
// in       rows [num_tokens] of units_per_row times 16 bytes, token_stride apart; scales [num_tokens, num_scales] of
//          scale_bytes each, or none; topk_ids [num_tokens, topk], expert_map [num_experts] or unused (PermuteArgs)
// out      as permute_rows, and what that takes: inverse_ids, sorted_token_ids, expert_offsets; and expert_ids [num_slots]
// grid     parts * ceil(num_tokens / tokens_per_block) blocks; block: as permute_rows, at least num_rows warps. Pairs of a
//          block are a multiple of those that are loaded at once, unless one block has all
// shared   the table (align.cuh), and tokens_per_block * topk words
//
//   1  ask for the units
//   2  count all ids; place those of the block's tokens, as align_shared does; write the share of the indices
//   3  write the units to their slots; zeros in the tail, by all warps
//
// Order: as align_shared. Indices of a pair are written by the first part of its row.
#include "align/align.cuh"
#include "permute/permute.cuh"

__device__ __forceinline__ void note_bucket(const PermuteArgs& args, u32 bucket, u32 begin, u32 count) {
  if (blockIdx.x == 0) write_offset(args, bucket, begin);
}

__device__ __forceinline__ void note_end(const PermuteArgs& args, u32 post_pad, u32 thread, u32 num_threads) {
  if (thread == 0) write_offset(args, args.num_experts, post_pad);
}

template <typename Ids>
__device__ __forceinline__ void permute_direct(const PermuteArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ u32 warp_sums[kWarpSize];
  const Part part(args);
  Units<Vector> units;
  units.request(args, part);
  const Table table((u32*)memory, args);
  u32* slots = (u32*)memory + table.words();  // [tokens_per_block][topk]
  const u32 num_pairs = part.num_tokens * args.topk;
#pragma unroll 1
  for (u32 k = threadIdx.x; k < num_pairs; k += blockDim.x) slots[k] = ~0u;
  const Piece piece(args, part.group);
  const u32 begin = piece.begin_of_warp(args, table), end = piece.end_of_warp(args, begin);
  const typename Ids::Id id = load_or_none<Ids>(args, begin + lane_id(), end);
  count_ids<Ids, 2>(args, 0, args.num_ids, (u32*)memory, table.words(),
                    [&](u32 i) { return piece.row(args, table, i); });
  const Match match(args, begin + lane_id(), id);
  const u32 used =
      find_slots(args, table, warp_sums, [&](u32 bucket) { return make_uint2(0, scan_column(table, bucket)); });
  place_ids<Ids>(args, table, begin, end, match, [&](u32 i, u32 bucket, u32 n) {
    const u32 slot = table.base[bucket] + n;
    slots[i - piece.begin] = slot;
    if (part.index == 0) write_id(args, i, bucket, slot);
  });
  write_padding(args, table.after(), used);
  __syncthreads();
  const auto slot_of = [&](u32 token, u32 k) { return slots[token * args.topk + k]; };
  units.write(args, part, slot_of);
  write_scales(args, part, slot_of);
#pragma unroll 1
  for (u32 k = threadIdx.x; part.index == 0 && k < num_pairs; k += blockDim.x)
    args.inverse_ids[piece.begin + k] = (int)slots[k];
  clear_rows<Vector>(args, used, [](u32) { return true; });
}

#define ENTRY(name, Ids)                                                \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 4)          \
      permute_direct_##name(const __grid_constant__ PermuteArgs args) { \
    permute_direct<Ids>(args);                                          \
  }
FOR_EACH_READER(ENTRY)
