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

// The exclusive prefix sum over the threads of a block, and the sum over all of them. One barrier; before calling it
// again with the same warp_sums, [kWarpSize], the block has to pass another one.
__device__ __forceinline__ u32 block_exclusive_scan(u32 value, u32* warp_sums, u32& total) {
  const u32 lane = lane_id(), warp = warp_id(), num_warps = blockDim.x / kWarpSize;
  u32 scanned = value;
#pragma unroll
  for (u32 distance = 1; distance < kWarpSize; distance *= 2) {
    const u32 below = __shfl_up_sync(kFullWarp, scanned, distance);
    if (lane >= distance) scanned += below;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = scanned;
  __syncthreads();
  // Every warp adds up the sums of the warps for itself: cheaper than one warp doing it between two barriers.
  const u32 sum = lane < num_warps ? warp_sums[lane] : 0;
  total = warp_sum(sum);
  return scanned - value + warp_sum(lane < warp ? sum : 0);
}

// Clusters of blocks (sm_90 and later). kBlocks = 1 is a plain block, for which these do nothing.
template <u32 kBlocks>
__device__ __forceinline__ u32 cluster_rank() {
  return kBlocks == 1 ? 0 : blockIdx.x % kBlocks;
}

// The two halves of a barrier. This one tells that the block runs, not what it wrote: a fence takes half a microsecond.
template <u32 kBlocks>
__device__ __forceinline__ void cluster_arrive() {
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

// Counts the bytes that other blocks of the cluster store in this block's shared memory.
struct Inbox {
  u64 barrier;

  // By one thread, which does it before it arrives at the cluster's barrier.
  __device__ __forceinline__ void open() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(this)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // How many bytes to wait for. By one thread; some may have arrived already.
  __device__ __forceinline__ void expect(u32 num_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(this)), "r"(num_bytes) : "memory");
#endif
  }

  // 16 bytes for block `rank`, to where `mine` is in this block; needs no fence, and does not wait for their arrival.
  __device__ __forceinline__ void send(uint4* mine, u32 rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
    const u32 to = address_in(mine, rank), counter = address_in(this, rank);
#if __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ == 0  // does not know st.async, and waits
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
    asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], 16;" ::"r"(counter) : "memory");
#else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(counter)
                 : "memory");
#endif
#endif
  }

  __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred arrived;\n"
        "wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 arrived, [%0], 0;\n"
        "@!arrived bra wait;\n"
        "}" ::"r"(address(this))
        : "memory");
#endif
  }

 private:
  __device__ static __forceinline__ u32 address(const void* mine) { return (u32)__cvta_generic_to_shared(mine); }
#if __CUDA_ARCH__ >= 900
  __device__ static __forceinline__ u32 address_in(const void* mine, u32 rank) {
    u32 result;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address(mine)), "r"(rank));
    return result;
  }
#endif
};
