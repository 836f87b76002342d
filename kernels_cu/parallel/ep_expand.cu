// SPDX-License-Identifier: Apache-2.0
// Expert parallelism: the rows that came, once for each of their pairs, where the pairs are to come back from.
//
// in       messages [num_rows] (message.cuh). is_exact: those of each rank in turn, of which counts [num_ranks, 2] has
//          the number of pairs and of rows. Else `capacity` of each rank, with ids of -1 where there is no row
// out      rows [num_pairs] of units_per_row times 16 bytes, scales [num_pairs, scale_words], ids and weights
//          [num_pairs]. Else than is_exact, pairs of a rank begin at a multiple of pair_capacity; of slots without a
//          pair, ids are -1, and nothing else is written                                            (ExpandArgs)
// grid     num_rows * parts blocks of kThreads threads
//
//   1  where the pairs of the row's rank begin: with counts, a sum of those before
//   2  where those of the row go
//   3  the units of the part to all of these; by the first part, the words
//   4  by the first part of the last row of a rank: ids of its slots behind
//
// Every slot is written once, if messages are as ep_pack writes them, where rows with pairs come first; none outside of
// the outputs, whatever they hold.
#include "parallel/message.cuh"

struct ExpandArgs {
  const char* messages;
  const u32* counts;
  char* rows;
  u32* scales;
  int* ids;
  u32* weights;
  u32 num_rows, topk, units_per_row;
  Divisor parts;
  u32 units_per_part, scale_words, pitch, num_ranks, num_pairs, is_exact;
  Divisor capacity;
  u32 pair_capacity;
};

// The first slot of the rank that has sent a row, and the one past its last.
__device__ __forceinline__ uint2 slots_of_sender(const ExpandArgs& args, u32 row) {
  if (!args.is_exact) {
    const u32 begin = args.capacity.quotient(row) * args.pair_capacity;
    return make_uint2(begin, begin + args.pair_capacity);
  }
  __shared__ u32 warp_sums[2][kWarpSize];
  __shared__ u32 rows_before[kMaxRanks], pairs_before[kMaxRanks];
  const u32 mine = threadIdx.x;
  const u32 pairs = mine < args.num_ranks ? args.counts[2 * mine] : 0;
  const u32 rows = mine < args.num_ranks ? args.counts[2 * mine + 1] : 0;
  u32 total;
  pairs_before[mine] = block_exclusive_scan(pairs, warp_sums[0], total);
  rows_before[mine] = block_exclusive_scan(rows, warp_sums[1], total);
  __syncthreads();
  u32 rank = 0;
#pragma unroll 1
  while (rank + 1 < args.num_ranks && rows_before[rank + 1] <= row) ++rank;
  return make_uint2(pairs_before[rank], pairs_before[rank] + args.counts[2 * rank]);
}

// Whether any of topk ids is one.
__device__ __forceinline__ bool has_pair(const u32* ids, u32 topk) {
  u32 k = 0;
#pragma unroll 1
  while (k < topk && (int)ids[k] < 0) ++k;
  return k < topk;
}

extern "C" __global__ void __launch_bounds__(kThreads) ep_expand(const __grid_constant__ ExpandArgs args) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  static_assert(kMaxRanks == kThreads && kMaxTopk <= kThreads, "a thread for each");
  __shared__ int locals[kMaxTopk];
  __shared__ char* targets[kMaxTopk];
  __shared__ u32 slots[kMaxTopk];
  const u32 row = args.parts.quotient(blockIdx.x), part = blockIdx.x - row * args.parts.value;
  if (row >= args.num_rows) return;
  const u32 topk = args.topk, k = threadIdx.x;
  const char* message = args.messages + (u64)row * args.pitch;
  const u32* words = reinterpret_cast<const u32*>(message + (u64)args.units_per_row * sizeof(uint4));
  const uint2 range = slots_of_sender(args, row);
  if (k < topk) locals[k] = (int)words[k];
  __syncthreads();
  u32 num_pairs = 0, slot = 0;
#pragma unroll 1
  for (u32 other = 0; other < topk; ++other) {
    if (other == k) slot = num_pairs;
    num_pairs += locals[other] >= 0;
  }
  // Of a row without pairs, nothing else is read: nobody may have written it.
  const u32 first_slot = range.x + (num_pairs > 0 ? words[2 * topk] : 0);
  if (k < topk) {
    slot += first_slot;
    const bool exists = locals[k] >= 0 && slot >= range.x && slot < min_u32(range.y, args.num_pairs);
    slots[k] = slot;
    targets[k] = exists ? args.rows + (u64)slot * args.units_per_row * sizeof(uint4) : nullptr;
    if (exists && part == 0) args.ids[slot] = locals[k], args.weights[slot] = words[topk + k];
  }
  __syncthreads();
  const u32 begin = part * args.units_per_part;
  const u32 end = num_pairs > 0 ? min_u32(begin + args.units_per_part, args.units_per_row) : begin;
  copy_units(reinterpret_cast<const uint4*>(message), targets, topk, begin, end);
#pragma unroll 1
  for (u32 to = warp_id(); part == 0 && to < topk; to += kThreads / kWarpSize) {
    if (targets[to] == nullptr) continue;
#pragma unroll 1
    for (u32 w = lane_id(); w < args.scale_words; w += kWarpSize)
      args.scales[(u64)slots[to] * args.scale_words + w] = words[2 * topk + 1 + w];
  }
  if (args.is_exact || part > 0) return;

  const u32 position = row - args.capacity.quotient(row) * args.capacity.value;
  const bool is_last = position + 1 == args.capacity.value || !has_pair(words + args.pitch / 4, topk);
  if (!is_last || !(num_pairs > 0 || position == 0)) return;
  const u32 behind = first_slot + num_pairs;
#pragma unroll 1
  for (u32 to = behind + threadIdx.x; to < min_u32(range.y, args.num_pairs); to += kThreads) args.ids[to] = -1;
}
