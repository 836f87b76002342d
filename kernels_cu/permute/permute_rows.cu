// SPDX-License-Identifier: Apache-2.0
// moe_permute, of pairs that have been sorted: each row to the slots of its pairs.
//
//   permuted[inverse_ids[token, k]] = rows[token], and so for the scales of the row; rows without a pair are zeros
//
// in       rows [num_tokens] of units_per_row units, token_stride apart; scales [num_tokens, num_scales] of scale_bytes
//          each, or none; inverse_ids [num_tokens, topk], sorted_token_ids [num_slots] and the last one of
//          expert_offsets [num_experts + 1], as sort_* has just written them                      (PermuteArgs)
// out      permuted [num_slots], rows without gaps; permuted_scales, at strides; with fills_tail = 0, those from the slots
//          in use on are left as they are
// grid     at least parts * ceil(num_tokens / tokens_per_block) blocks; block: a multiple of 32 threads, so many that
//          kHeld units of each are the block's: tokens_per_block * units_per_part
//
//   1  ask for the units, which the launch that sorts has waited for
//   2  wait for it, and write the units to their slots
//   3  zeros where a slot has no pair, by all warps
//
// Each unit of a row is written once, by one block, or as zeros by one warp.
#include "permute/permute.cuh"

template <typename Unit>
__device__ __forceinline__ void permute_rows(const PermuteArgs& args) {
  const Part part(args);
  Units<Unit> units;
  units.request(args, part);
  wait_for_kernel_before();
  const u32* slots = reinterpret_cast<const u32*>(args.inverse_ids) + (u64)part.first_token * args.topk;
  const auto slot_of = [&](u32 token, u32 k) { return slots[token * args.topk + k]; };
  units.write(args, part, slot_of);
  write_scales(args, part, slot_of);
  const u32 used = min_u32(args.num_slots, args.expert_offsets[args.num_experts * args.words_per_offset]);
  clear_rows<Unit>(args, used, [&](u32 slot) { return (u32)args.sorted_token_ids[slot] < args.num_ids; });
}

#define ENTRY(name, Unit)                                        \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 4)   \
      permute_##name(const __grid_constant__ PermuteArgs args) { \
    permute_rows<Unit>(args);                                    \
  }
ENTRY(rows, Vector)
ENTRY(rows_any, Element)
