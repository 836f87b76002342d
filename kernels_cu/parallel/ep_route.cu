// SPDX-License-Identifier: Apache-2.0
// Expert parallelism: to which rank each pair of a token and an expert goes, and what is sorted by rank; by ep_route_few,
// which takes few pairs, in order at once.
//
//   places[t, k] = replicas[e, 1 + (t + rank) % replicas[e, 0]] for e = topk_ids[t, k]; -1 where there is none
//
// in       topk_ids [num_pairs / topk, topk] of 1 or 2 words of 32 bits; replicas [num_experts, num_columns]: how many
//          an expert has, and the place of each, its rank * most_local + its local id
// out      places [num_pairs]; buckets [num_pairs / topk, topk], or 2 * topk with has_pairs: ranks of pairs, if asked
//          for, then ranks of rows, num_ranks higher if pairs come before. A row is of the first pair of a token on
//          a rank; -1 for others
//          Instead of buckets, by ep_route_few, what moe_sort makes of them with blocks of one: inverse_ids as buckets,
//          the slot of each; offsets [buckets + 1] and counts [buckets], num_ranks or twice as many
// grid     a thread for each pair, in blocks of kThreads; ep_route_few: one block, of 2 * num_ranks threads at least
//
//   1  per pair: look up its place
//   2  look up the places of the token's pairs before it: is it the first on its rank?
//   3  ep_route_few: per rank, ballots of each warp; sums over the warps, then over the buckets
//
// Every element is written once, by the thread of its pair or bucket. Order: pairs ascending.
#include "common.cuh"

struct RouteArgs {
  const u32* topk_ids;
  const int* replicas;
  int* places;
  int* buckets;
  int* inverse_ids;
  u32* offsets;
  u32* counts;
  u32 num_pairs;
  Divisor topk, most_local;
  u32 num_experts, num_columns, words_per_id, num_ranks, rank, has_pairs;
};

constexpr u32 kThreads = 128;
constexpr u32 kFewPairs = 1024, kFewRanks = 32;

__device__ __forceinline__ int place_of(const RouteArgs& args, u32 pair, u32 token) {
  const u32* words = args.topk_ids + (u64)pair * args.words_per_id;
  const u32 id = words[0], upper = words[args.words_per_id - 1];
  if (id >= args.num_experts || (args.words_per_id == 2 && upper != 0)) return -1;
  const int* entry = args.replicas + (u64)id * args.num_columns;
  const u32 number = (u32)entry[0];
  if (number == 0) return -1;
  return entry[1 + (number == 1 ? 0 : (token + args.rank) % number)];
}

__device__ __forceinline__ int rank_of(const RouteArgs& args, int place) {
  return place < 0 ? -1 : (int)args.most_local.quotient((u32)place);
}

extern "C" __global__ void __launch_bounds__(kThreads) ep_route(const __grid_constant__ RouteArgs args) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const u32 pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= args.num_pairs) return;
  const u32 token = args.topk.quotient(pair), topk = args.topk.value, k = pair - token * topk;
  const int place = place_of(args, pair, token), rank = rank_of(args, place);
  bool is_first = rank >= 0;
#pragma unroll 1
  for (u32 other = pair - k; is_first && other < pair; ++other)
    is_first = rank_of(args, place_of(args, other, token)) != rank;
  const int row = is_first ? rank + (args.has_pairs ? (int)args.num_ranks : 0) : -1;
  args.places[pair] = place;
  int* buckets = args.buckets + (u64)token * topk * (args.has_pairs ? 2 : 1) + k;
  if (args.has_pairs) *buckets = rank, buckets += topk;
  *buckets = row;
}

extern "C" __global__ void __launch_bounds__(kFewPairs) ep_route_few(const __grid_constant__ RouteArgs args) {
  __shared__ int ranks[kFewPairs];
  __shared__ u32 counts[2 * kFewRanks][kWarpSize];  // of buckets in warps; then of the warps before
  __shared__ u32 totals[2 * kFewRanks], starts[2 * kFewRanks], warp_sums[kWarpSize];
  wait_for_kernel_before();
  let_next_kernel_begin();
  const u32 pair = threadIdx.x, topk = args.topk.value, token = args.topk.quotient(pair), k = pair - token * topk;
  const u32 num_warps = blockDim.x / kWarpSize, num_buckets = args.num_ranks * (args.has_pairs ? 2 : 1);
  const bool exists = pair < args.num_pairs;
  const int place = exists ? place_of(args, pair, token) : -1, rank = rank_of(args, place);
  ranks[pair] = rank;
  __syncthreads();
  bool is_first = rank >= 0;
#pragma unroll 1
  for (u32 other = pair - k; is_first && other < pair; ++other) is_first = ranks[other] != rank;
  const u32 first_rows = args.has_pairs ? args.num_ranks : 0;  // the bucket of rows to rank 0
  u32 pairs_before = 0, rows_before = 0;                       // of the same bucket, in this warp
#pragma unroll 1
  for (u32 of = 0; of < args.num_ranks; ++of) {
    const bool is_mine = rank == (int)of;
    const u32 pairs = __ballot_sync(kFullWarp, is_mine), rows = __ballot_sync(kFullWarp, is_mine && is_first);
    if (is_mine) {
      pairs_before = (u32)__popc(pairs & lanes_below());
      rows_before = (u32)__popc(rows & lanes_below());
    }
    if (lane_id() == 0) {
      if (args.has_pairs) counts[of][warp_id()] = (u32)__popc(pairs);
      counts[first_rows + of][warp_id()] = (u32)__popc(rows);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (u32 b = warp_id(); b < num_buckets; b += num_warps) {
    const u32 count = lane_id() < num_warps ? counts[b][lane_id()] : 0;
    u32 sum = count;
#pragma unroll
    for (u32 distance = 1; distance < kWarpSize; distance *= 2) {
      const u32 below = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane_id() >= distance) sum += below;
    }
    counts[b][lane_id()] = sum - count;
    if (lane_id() == kWarpSize - 1) totals[b] = sum;
  }
  __syncthreads();
  const u32 bucket = threadIdx.x, total = bucket < num_buckets ? totals[bucket] : 0;
  u32 all;
  const u32 start = block_exclusive_scan(total, warp_sums, all);
  if (bucket < num_buckets) {
    starts[bucket] = args.offsets[bucket] = start;
    args.counts[bucket] = total;
  }
  if (threadIdx.x == 0) args.offsets[num_buckets] = all;
  __syncthreads();
  if (!exists) return;
  args.places[pair] = place;
  int* inverse = args.inverse_ids + (u64)token * topk * (args.has_pairs ? 2 : 1) + k;
  const auto slot = [&](u32 of, u32 before) { return (int)(starts[of] + counts[of][warp_id()] + before); };
  if (args.has_pairs) *inverse = rank < 0 ? -1 : slot((u32)rank, pairs_before), inverse += topk;
  *inverse = is_first ? slot(first_rows + (u32)rank, rows_before) : -1;
}
