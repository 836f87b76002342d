// SPDX-License-Identifier: Apache-2.0
// route for the few tokens of a decode step: each block gates them all, and places their ids as align_small does.
//
// in       logits, bias, padding_mask, as gate_warp.cu; expert_map [num_experts + num_shared] or unused  (RouteArgs)
// out      topk_weights, topk_ids, as gate_warp.cu; sorted_token_ids [num_slots], expert_ids [num_blocks],
//          num_tokens_post_pad [1], as align_small.cu, of experts and shared experts
// grid     blocks that together cover num_slots, slots_per_block each; block: as align_small, and a warp for each token
// limits   those of gate_warp.cu, and up to kMaxIds ids
//
//   1  a warp for each token: gate its row, with the ids to shared memory
//   2  place them
//
// Order: that of gate_warp and align_small, whose code this is.
#include "align/small.cuh"
#include "route/route.cuh"

constexpr u32 kMaxThreads = 544;  // four for each of kMaxIds and one more, as align_small has, in whole warps

template <u32 kShare, Mode kMode>
__device__ __forceinline__ void route_small(const RouteArgs& args) {
  __shared__ u32 ids[kMaxIds];
  if (warp_id() < args.num_tokens) gate_row<kShare, kMode>(Gated(args, ids, blockIdx.x == 0), warp_id(), kWarpSize);
  __syncthreads();
  align_small<InShared>(Placed(args, ids));
}

#define ENTRY(name, kShare, kMode)                                            \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)                \
      route_small_##name##_##kShare(const __grid_constant__ RouteArgs args) { \
    route_small<kShare, kMode>(args);                                         \
  }
FOR_EACH_GATE(ENTRY)
