// SPDX-License-Identifier: Apache-2.0
// Expert parallelism: to which rank each pair of a token and an expert goes, and what is sorted by rank.
//
//   places[t, k] = replicas[e, 1 + (t + rank) % replicas[e, 0]] for e = topk_ids[t, k]; -1 where there is none
//
// in       topk_ids [num_pairs / topk, topk] of 1 or 2 words of 32 bits; replicas [num_experts, num_columns]: how many
//          an expert has, and the place of each, its rank * most_local + its local id
// out      places [num_pairs]; buckets [num_pairs / topk, topk], or 2 * topk with has_pairs: ranks of pairs, if asked
//          for, then ranks of rows, num_ranks higher if pairs come before. A row is of the first pair of a token on
//          a rank; -1 for others
// grid     a thread for each pair, in blocks of kThreads
//
//   1  per pair: look up its place
//   2  look up the places of the token's pairs before it: is it the first on its rank?
//
// Every element is written once, by the thread of its pair.
#include "common.cuh"

struct RouteArgs {
  const u32* topk_ids;
  const int* replicas;
  int* places;
  int* buckets;
  u32 num_pairs;
  Divisor topk, most_local;
  u32 num_experts, num_columns, words_per_id, num_ranks, rank, has_pairs;
};

constexpr u32 kThreads = 128;

__device__ __forceinline__ int place_of(const RouteArgs& args, u32 pair, u32 token) {
  const u32* words = args.topk_ids + (u64)pair * args.words_per_id;
  const u32 id = words[0], upper = words[args.words_per_id - 1];
  if (id >= args.num_experts || (args.words_per_id == 2 && upper != 0)) return -1;
  const int* entry = args.replicas + (u64)id * args.num_columns;
  const u32 number = (u32)__ldg(entry);
  if (number == 0) return -1;
  return __ldg(entry + 1 + (number == 1 ? 0 : (token + args.rank) % number));
}

__device__ __forceinline__ int rank_of(const RouteArgs& args, int place) {
  return place < 0 ? -1 : (int)args.most_local.quotient((u32)place);
}

extern "C" __global__ void __launch_bounds__(kThreads) ep_route(const __grid_constant__ RouteArgs args) {
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
