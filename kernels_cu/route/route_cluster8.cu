// SPDX-License-Identifier: Apache-2.0
// route for some tokens: the blocks of a cluster share them out, and tell each other their ids.
// targets  sm_90 sm_100 sm_120 compute_90
//
// in       logits, bias, padding_mask, as gate_warp.cu; expert_map [num_experts + num_shared] or unused  (RouteArgs)
// out      topk_weights, topk_ids, as gate_warp.cu; sorted_token_ids [num_slots], expert_ids [num_blocks],
//          num_tokens_post_pad [1], as align_shared.cu, of experts and shared experts
// grid     clusters of kCluster blocks, which together cover num_ids, per_block each; block: as align_shared. Tokens of
//          a block are rows_per_block, whose ids are a multiple of 4; its warps take turns with them
// shared   the table (align.cuh), and kCluster * rows_per_block * (topk + num_shared) words
// limits   those of gate_warp.cu
//
//   1  gate the rows of the block, with the ids to shared memory
//   2  send them to the other blocks of the cluster, and wait for theirs
//   3  place the piece of the block, as align_shared does: it counts all ids, which are all here
//
// Order: that of gate_warp and align_shared, whose code this is.
#include "align/shared.cuh"
#include "route/route.cuh"

constexpr u32 kMaxThreads = 512, kCluster = 8;

template <u32 kShare, Mode kMode>
__device__ __forceinline__ void route_cluster(const RouteArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ Inbox inbox;
  const u32 rank = cluster_rank<kCluster>(), num_threads = blockDim.x;
  const u32 num_results = args.topk + args.num_shared, ids_per_block = args.rows_per_block * num_results;
  if (threadIdx.x == 0) inbox.open();
  cluster_arrive<kCluster>();
  const Placed placed(args, nullptr);
  u32* ids = (u32*)memory + Table((u32*)memory, placed).words();  // [kCluster][ids_per_block]

  const u32 first = rank * args.rows_per_block, end = min_u32(args.num_tokens, first + args.rows_per_block);
  const Gated gated(args, ids, blockIdx.x < kCluster);
#pragma unroll 1
  for (u32 token = first + warp_id(); token < end; token += num_threads / kWarpSize)
    gate_row<kShare, kMode>(gated, token, kWarpSize);
  // What is past the last token's ids travels, too.
  const u32 used = first < end ? (end - first) * num_results : 0;
  u32* mine = ids + rank * ids_per_block;
  fill(mine, used, ids_per_block, ~0u, threadIdx.x, num_threads);
  __syncthreads();
  if (threadIdx.x == 0) inbox.expect((kCluster - 1) * ids_per_block * sizeof(u32));
  cluster_wait<kCluster>();
#pragma unroll 1
  for (u32 k = threadIdx.x; k < (kCluster - 1) * ids_per_block / 4; k += num_threads) {
    const u32 vector = k / (kCluster - 1), other = (rank + 1 + k % (kCluster - 1)) % kCluster;
    uint4* place = reinterpret_cast<uint4*>(mine) + vector;
    inbox.send(place, other, *place);
  }
  inbox.wait();
  align_shared<InShared, 1>(Placed(args, ids));
}

static_assert(kCluster == 8, "which entries say as a number, for the emulator to read");
#define ENTRY(name, kShare, kMode)                                                       \
  extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(kMaxThreads, 1) \
      route_cluster8_##name##_##kShare(const __grid_constant__ RouteArgs args) {         \
    route_cluster<kShare, kMode>(args);                                                  \
  }
FOR_EACH_GATE(ENTRY)
