// SPDX-License-Identifier: Apache-2.0
// topk_softplus_sqrt of tokens whose experts a table tells: DeepSeek-V4's first layers.
//
// in       logits [num_tokens, num_experts]; input_ids [num_tokens]; hash_table [num_rows, topk], the experts of each
//          input id; padding_mask [num_tokens] or null                                                      (HashArgs)
// out      topk_weights [num_tokens, topk + num_shared] fp32, topk_ids, so many of 32 or 64 bits. A token whose input id
//          the table has no row for is padding; an expert that is none has the id -1 and no weight
// grid     lanes_per_row * num_tokens threads or more; block: a multiple of 32 threads, up to kMaxThreads
// limits   topk <= kHeld * lanes_per_row
//
//   1  the input id, then the experts, then their logits: three loads in turn, and all that this takes
//   2  scores, renormalised, scaled, written
//
// Order: that of the table. Sums are taken in a fixed order.
#include "gate/gate.cuh"

struct HashArgs {
  const char* logits;
  const void* input_ids;  // of 1 or 2 words each, as hash_table
  const void* hash_table;
  const u8* padding_mask;
  float* topk_weights;
  void* topk_ids;
  i64 row_stride;
  u32 num_tokens, num_experts, topk, num_rows;
  u32 element, id_words, input_words, table_words;
  u32 renormalize;
  u32 lanes_per_row, row_shift;  // a power of two, and its logarithm
  float factor;
  u32 num_shared;
  float shared_weight;
};

constexpr u32 kMaxThreads = 128, kHeld = 2;

// A number of 1 or 2 words, which is large if it is below 0.
__device__ __forceinline__ u64 load_number(const void* numbers, u64 i, u32 words) {
  return words == 1 ? static_cast<const u32*>(numbers)[i] : static_cast<const u64*>(numbers)[i];
}

extern "C" __global__ void __launch_bounds__(kMaxThreads) gate_hash(const __grid_constant__ HashArgs args) {
  // Rows past the last one are the last one once more, and write what is there already: no warp diverges.
  const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, lane = thread & (args.lanes_per_row - 1);
  const u32 token = min_u32(args.num_tokens - 1, thread >> args.row_shift);
  const u64 input = load_number(args.input_ids, token, args.input_words);
  const bool padded = input >= args.num_rows || (args.padding_mask != nullptr && args.padding_mask[token] != 0);
  const char* row = args.logits + token * args.row_stride;

  u32 ids[kHeld];
  float weights[kHeld], sum = 0;
#pragma unroll
  for (u32 held = 0; held < kHeld; ++held) {
    const u32 k = held * args.lanes_per_row + lane;
    ids[held] = ~0u, weights[held] = 0;
    if (padded || k >= args.topk) continue;
    const u64 expert = load_number(args.hash_table, input * args.topk + k, args.table_words);
    if (expert >= args.num_experts) continue;
    ids[held] = (u32)expert;
    weights[held] = counted(softplus_sqrt(load_logit(args, row, (u32)expert)));
    sum += weights[held];
  }
#pragma unroll 1
  for (u32 distance = args.lanes_per_row / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kFullWarp, sum, distance);

  const i64 first = token * (i64)(args.topk + args.num_shared);
#pragma unroll
  for (u32 held = 0; held < kHeld; ++held) {
    const u32 k = held * args.lanes_per_row + lane;
    const float weight = args.renormalize ? renormalized(weights[held], sum) : weights[held];
    if (k < args.topk) write_result(args, first + k, weight * args.factor, ids[held]);
  }
#pragma unroll 1
  for (u32 k = lane; k < args.num_shared; k += args.lanes_per_row) write_shared(args, token, k, padded);
}
