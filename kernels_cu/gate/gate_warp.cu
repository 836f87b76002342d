// SPDX-License-Identifier: Apache-2.0
// The gating functions with a warp or a part of one for each row, which stays in registers.
//
// in       logits, bias, padding_mask                                                      (GateArgs, gate.cuh)
// out      topk_weights [num_tokens, topk + num_shared] fp32, topk_ids, so many of 32 or 64 bits
// grid     lanes_per_row * num_tokens threads or more; block: a multiple of 32 threads, up to kMaxThreads
// limits   topk + num_shared <= lanes_per_row; no softcap; up to 32 groups, with a warp a row; experts that fit the lanes (below)
//
// Each lane of a row holds up to kShare neighbouring experts. Groups have an equal power of two of lanes each, as
// many as there are, and their experts are dealt evenly to these. So lower lanes hold lower ids, and the first lane
// wins a tie.
//
//   1  load; turn what selects into keys (gate.cuh): the logits themselves, as softmax and sigmoid keep their
//      order, or the scores plus the bias; keep them twice, in order of ids and sorted
//   2  groups: rank them by their best key (with a bias: by the sum of their best two), drop all but topk_group
//   3  topk times: the greatest head of the lanes' sorted keys wins and is popped; lane k remembers the k-th
//   4  lane k finds the id of the k-th winner by its key among those of the lane that it came from
//   5  scores of the winners only, renormalised, scaled, written
//
// Order: descending in what selects, then ascending in ids. Sums are taken in a fixed order.
#include "gate/gate.cuh"
#include "gate/warp.cuh"

constexpr u32 kMaxThreads = 128;

template <u32 kShare, Mode kMode>
__device__ __forceinline__ void gate_warp(const GateArgs& args) {
  // Rows past the last one are the last one once more, and write what is there already: no warp diverges.
  const u32 thread = blockIdx.x * args.num_threads + threadIdx.x;
  const u32 token = min_u32(args.num_tokens - 1, kMode == kSeveral ? thread >> args.row_shift : thread / kWarpSize);
  gate_row<kShare, kMode>(args, token, kMode == kSeveral ? args.lanes_per_row : kWarpSize);
}

#define ENTRY(name, kShare, kMode, kMinBlocks)                          \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, kMinBlocks) \
      gate_##name##_##kShare(const __grid_constant__ GateArgs args) {   \
    gate_warp<kShare, kMode>(args);                                     \
  }
ENTRY(several, 4, kSeveral, 8)
ENTRY(several, 8, kSeveral, 8)
ENTRY(plain, 4, kPlain, 8)
ENTRY(plain, 8, kPlain, 8)
ENTRY(plain, 16, kPlain, 8)
ENTRY(full, 8, kFull, 8)
ENTRY(full, 16, kFull, 6)
ENTRY(any, 8, kAny, 6)
ENTRY(any, 16, kAny, 4)
