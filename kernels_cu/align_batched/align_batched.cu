// SPDX-License-Identifier: Apache-2.0
// batched_moe_align_block_size: tokens that already lie expert by expert, max_tokens rows each, in blocks.
//
// in       expert_num_tokens [num_batches] int32; outside [0, max_tokens] it counts as the nearer of the two
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// grid     num_batches * parts blocks, at least one; block: any multiple of 32 threads
//
//   1  per block: the slots of all batches before its own, and of all batches
//   2  write a share of its batch, and of what lies past the last batch
//
// Order: by batch, ascending in each. Every output is written once, by one thread.
#include "common.cuh"

struct BatchedArgs {
  const int* expert_num_tokens;
  int* sorted_token_ids;
  int* expert_ids;
  int* num_tokens_post_pad;
  u32 num_batches, max_tokens, num_slots, num_blocks;
  Divisor block_size;
  u32 parts;  // blocks that share a batch
};

__device__ __forceinline__ u32 num_tokens(const BatchedArgs& args, u32 batch) {
  const int count = __ldg(args.expert_num_tokens + batch);
  return count < 0 ? 0 : min_u32(count, args.max_tokens);
}

extern "C" __global__ void __launch_bounds__(1024, 1) align_batched(const __grid_constant__ BatchedArgs args) {
  __shared__ u32 sums[2];
  const u32 batch = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  u32 before = 0, all = 0;
#pragma unroll 4
  for (u32 other = threadIdx.x; other < args.num_batches; other += blockDim.x) {
    const u32 width = args.block_size.round_up(num_tokens(args, other));
    before += other < batch ? width : 0;
    all += width;
  }
#pragma unroll
  for (u32 distance = kWarpSize / 2; distance > 0; distance /= 2) {
    before += __shfl_xor_sync(kFullWarp, before, distance);
    all += __shfl_xor_sync(kFullWarp, all, distance);
  }
  if (lane_id() == 0) {
    atomicAdd(sums, before);
    atomicAdd(sums + 1, all);
  }
  __syncthreads();
  const u32 begin = sums[0], post_pad = sums[1], no_token = args.num_batches * args.max_tokens;

  if (batch < args.num_batches) {
    const u32 count = num_tokens(args, batch), width = args.block_size.round_up(count);
    const u32 first = part * blockDim.x + threadIdx.x, step = args.parts * blockDim.x;
    const u32 first_block = args.block_size.quotient(begin), blocks = args.block_size.quotient(width);
#pragma unroll 1
    for (u32 i = first; i < width; i += step)
      args.sorted_token_ids[begin + i] = (int)(i < count ? batch * args.max_tokens + i : no_token);
#pragma unroll 1
    for (u32 i = first; i < blocks; i += step) args.expert_ids[first_block + i] = (int)batch;
  }
  const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, num_threads = gridDim.x * blockDim.x;
#pragma unroll 1
  for (u32 i = post_pad + thread; i < args.num_slots; i += num_threads) args.sorted_token_ids[i] = (int)no_token;
#pragma unroll 1
  for (u32 i = args.block_size.quotient(post_pad) + thread; i < args.num_blocks; i += num_threads)
    args.expert_ids[i] = -1;
  if (thread == 0) *args.num_tokens_post_pad = (int)post_pad;
}
