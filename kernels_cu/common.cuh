// SPDX-License-Identifier: Apache-2.0
// Device helpers that every kernel may use. No other header: NVRTC then needs nothing but itself.
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using i16 = short;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "the data model of CUDA");

constexpr u32 kWarpSize = 32;
constexpr u32 kFullWarp = 0xffffffffu;

__device__ __forceinline__ u32 ceil_div(u32 value, u32 divisor) { return (value + divisor - 1) / divisor; }
__device__ __forceinline__ u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
__device__ __forceinline__ u32 lane_id() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x / kWarpSize; }

__device__ __forceinline__ u32 lanes_below() {
  u32 mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// Division of any value below 2^31 by a divisor known at launch: a multiplication and a shift.
// The host computes magic = floor(2^(31 + shift) / divisor) + 1 with shift = ceil(log2(divisor)).
struct Divisor {
  u32 value, magic, shift;
  __device__ __forceinline__ u32 quotient(u32 x) const { return __umulhi(x << 1, magic) >> shift; }
  __device__ __forceinline__ u32 round_up(u32 x) const { return quotient(x + value - 1) * value; }
};

__device__ __forceinline__ u32 warp_sum(u32 value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, value);
#else
#pragma unroll
  for (u32 distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
#endif
}

template <u32 kValues>
struct Sums {
  u32 of[kValues];
};

// Exclusive prefix sums over the threads of a block, of kValues values at once, and their sums over all threads. One
// barrier; before calling it again with the same warp_sums, the block has to pass another one.
template <u32 kValues>
__device__ __forceinline__ Sums<kValues> block_exclusive_scan(Sums<kValues> value, u32 (*warp_sums)[kWarpSize],
                                                              Sums<kValues>& total) {
  const u32 lane = lane_id(), warp = warp_id(), num_warps = blockDim.x / kWarpSize;
  Sums<kValues> scanned = value;
#pragma unroll
  for (u32 distance = 1; distance < kWarpSize; distance *= 2) {
#pragma unroll
    for (u32 k = 0; k < kValues; ++k) {
      const u32 below = __shfl_up_sync(kFullWarp, scanned.of[k], distance);
      if (lane >= distance) scanned.of[k] += below;
    }
  }
#pragma unroll
  for (u32 k = 0; k < kValues; ++k)
    if (lane == kWarpSize - 1) warp_sums[k][warp] = scanned.of[k];
  __syncthreads();
  // Every warp adds up the sums of the warps for itself: cheaper than one warp doing it between two barriers.
#pragma unroll
  for (u32 k = 0; k < kValues; ++k) {
    const u32 sum = lane < num_warps ? warp_sums[k][lane] : 0;
    total.of[k] = warp_sum(sum);
    scanned.of[k] += warp_sum(lane < warp ? sum : 0) - value.of[k];
  }
  return scanned;
}

// Clusters of blocks (sm_90 and later). kBlocks = 1 is a plain block, for which these do nothing.
template <u32 kBlocks>
__device__ __forceinline__ u32 cluster_rank() {
  return kBlocks == 1 ? 0 : blockIdx.x % kBlocks;
}

template <u32 kBlocks>
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  if (kBlocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Without a fence, which takes half a microsecond: tells that this block runs, not what it wrote.
template <u32 kBlocks>
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  if (kBlocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

template <u32 kBlocks>
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  if (kBlocks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Store 16 bytes in the shared memory of block `rank` of the cluster, at the place where `mine` is in this block's.
__device__ __forceinline__ void store_to_cluster(uint4* mine, u32 rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((u32)__cvta_generic_to_shared(mine)), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#endif
}
