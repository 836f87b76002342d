// SPDX-License-Identifier: Apache-2.0
// Expert parallelism: each token's row, and what has to be known of it, once to each of its ranks.
//
// in       rows [num_tokens] of units_per_row times 16 bytes, row_stride bytes apart; scales [num_tokens, scale_words]
//          or none; weights [num_tokens, topk]; places [num_tokens, topk] of ep_route; inverse_ids and offsets: its
//          buckets, as moe_sort has sorted them                                                       (PackArgs)
// out      rows of messages (message.cuh). is_exact: of all ranks, without gaps, to `messages`. Else each rank has room
//          for `capacity` of them: in `messages`, one after another, or, with `peers`, at the address of each rank,
//          in the `rank`-th of num_ranks such rooms. There, ids of rows without a token are -1, and nothing else of
//          them is written
//          slots [num_tokens, topk]: where what becomes of a pair comes back, or, without has_pairs, of the row,
//          told to its first pair alone; -1: nowhere
//          *dropped, to which is added how many pairs found no room
// grid     num_tokens * parts blocks, one at least, of kThreads threads
//
//   1  per block: the ranks and local ids of a token's pairs
//   2  where its row goes, for the first pair of each rank, and where its pairs come back; the slots, by the first part
//   3  the units of the part to all of these; by the first part, the words behind them
//   4  ids of rows without a token, by all warps
//
// Order: that of tokens, and of pairs of a token. Every word is written once. Sums of integers have no order.
#include "parallel/message.cuh"

struct PackArgs {
  const char* rows;
  const u32* scales;
  const u32* weights;
  const int* places;
  const u32* inverse_ids;
  const u32* offsets;
  char* messages;
  const i64* peers;
  int* slots;
  u32* dropped;
  i64 row_stride;
  u32 num_tokens, topk, units_per_row;
  Divisor parts;
  u32 units_per_part;
  Divisor most_local;
  u32 scale_words, pitch, num_ranks, rank, has_pairs, is_exact;
  Divisor capacity;
  u32 pair_capacity;  // of slots that a rank has for what comes back, with has_pairs
};

constexpr u32 kNoRank = ~0u;

__device__ __forceinline__ char* room_of(const PackArgs& args, u32 rank) {
  const u64 bytes = (u64)args.capacity.value * args.pitch;
  return args.peers ? reinterpret_cast<char*>(args.peers[rank]) + args.rank * bytes : args.messages + rank * bytes;
}

extern "C" __global__ void __launch_bounds__(kThreads) ep_pack(const __grid_constant__ PackArgs args) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  __shared__ u32 ranks[kMaxTopk];
  __shared__ int locals[kMaxTopk];
  __shared__ u32 positions[kMaxTopk];
  __shared__ char* targets[kMaxTopk];
  const u32 token = args.parts.quotient(blockIdx.x), part = blockIdx.x - token * args.parts.value;
  const u32 k = threadIdx.x, topk = args.topk;
  const u32* row_offsets = args.offsets + (args.has_pairs ? args.num_ranks : 0);

  if (token < args.num_tokens) {
    const u64 first_pair = (u64)token * topk;
    if (k < topk) {
      const int place = args.places[first_pair + k];
      ranks[k] = place < 0 ? kNoRank : args.most_local.quotient((u32)place);
      locals[k] = place < 0 ? -1 : (int)((u32)place - ranks[k] * args.most_local.value);
    }
    __syncthreads();
    const u32 rank = k < topk ? ranks[k] : kNoRank;
    const bool exists = rank != kNoRank;
    bool comes_back = false;
    if (k < topk) targets[k] = nullptr, positions[k] = 0;
    if (exists) {
      u32 first = 0;
#pragma unroll 1
      while (ranks[first] != rank) ++first;
      const u32* inverse = args.inverse_ids + first_pair * (args.has_pairs ? 2 : 1);
      const u32 position = inverse[(args.has_pairs ? topk : 0) + first] - row_offsets[rank];
      const bool fits = args.is_exact || position < args.capacity.value;
      const u32 before = row_offsets[rank] - row_offsets[0];
      if (fits && first == k)
        targets[k] = args.is_exact ? args.messages + (u64)(before + position) * args.pitch
                                   : room_of(args, rank) + (u64)position * args.pitch;
      u32 slot = (args.is_exact ? before : rank * args.capacity.value) + position;
      comes_back = fits;
      if (args.has_pairs) {
        positions[k] = inverse[k] - args.offsets[rank];
        comes_back = fits && (args.is_exact || positions[k] < args.pair_capacity);
        slot = (args.is_exact ? args.offsets[rank] : rank * args.pair_capacity) + positions[k];
      }
      if (part == 0) {
        const bool is_told = comes_back && (args.has_pairs || first == k);
        args.slots[first_pair + k] = is_told ? (int)slot : -1;
        if (!comes_back) atomicAdd(args.dropped, 1u);
      }
    } else if (k < topk && part == 0) {
      args.slots[first_pair + k] = -1;
    }
    if (k < topk && !comes_back) locals[k] = -1;
    __syncthreads();

    const u32 begin = part * args.units_per_part, end = min_u32(begin + args.units_per_part, args.units_per_row);
    copy_units(reinterpret_cast<const uint4*>(args.rows + token * args.row_stride), targets, topk, begin, end);
    const u32 num_words = 2 * topk + 1 + args.scale_words;
#pragma unroll 1
    for (u32 to = warp_id(); part == 0 && to < topk; to += kThreads / kWarpSize) {
      if (targets[to] == nullptr) continue;
      u32* words = reinterpret_cast<u32*>(targets[to] + (u64)args.units_per_row * sizeof(uint4));
#pragma unroll 1
      for (u32 w = lane_id(); w < num_words; w += kWarpSize) {
        u32 word;
        if (w < topk) word = ranks[w] == ranks[to] ? (u32)locals[w] : ~0u;
        else if (w < 2 * topk) word = args.weights[first_pair + w - topk];
        else if (w == 2 * topk) word = positions[to];
        else word = args.scales[(u64)token * args.scale_words + w - (2 * topk + 1)];
        words[w] = word;
      }
    }
  }

  if (args.is_exact) return;
  const u32 num_rows = args.num_ranks * args.capacity.value;
#pragma unroll 1
  for (u32 row = blockIdx.x * (kThreads / kWarpSize) + warp_id(); row < num_rows;
       row += gridDim.x * (kThreads / kWarpSize)) {
    const u32 rank = args.capacity.quotient(row), position = row - rank * args.capacity.value;
    if (position < row_offsets[rank + 1] - row_offsets[rank]) continue;
    char* end = room_of(args, rank) + (u64)position * args.pitch + (u64)args.units_per_row * sizeof(uint4);
#pragma unroll 1
    for (u32 w = lane_id(); w < topk; w += kWarpSize) reinterpret_cast<u32*>(end)[w] = ~0u;
  }
}
