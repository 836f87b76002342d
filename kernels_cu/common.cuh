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

// Where EMULATED is set, a C++ compiler makes of a kernel what runs on a CPU (tests/emulator). PTX then gives way to
// functions called `plain_`, which do the same in C++; a test on GPUs compares the two.

// Compilers otherwise make a value again each time it is used, where they think that this is cheap.
template <typename T>
__device__ __forceinline__ void keep_in_register(T& value) {
#if !EMULATED
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(value));
  else asm volatile("" : "+r"(value));
#endif
}

__device__ __forceinline__ u32 plain_lanes_below() { return (1u << lane_id()) - 1; }
__device__ __forceinline__ u32 lanes_below() {
#if EMULATED
  return plain_lanes_below();
#else
  u32 mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
#endif
}

// 1 / x rounded to nearest, for x from 2^-126 to 2^125; __frcp_rn does the same once it has looked whether x is there.
__device__ __forceinline__ float plain_inverse(float x) { return __fdiv_rn(1.0f, x); }
__device__ __forceinline__ float inverse(float x) {
#if EMULATED
  return plain_inverse(x);
#else
  float nearly;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(nearly) : "f"(x));
  return fmaf(nearly, -fmaf(x, nearly, -1.0f), nearly);
#endif
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

// 16 bytes, marked as not to be read again (.cs), which leaves more of the L2 to loads.
__device__ __forceinline__ void store_vector(char* address, uint4 v) {
#if EMULATED
  *reinterpret_cast<uint4*>(address) = v;
#else
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// Where a kernel was launched to overlap with the one before it (sm_90 and later): until that one has ended, and what it
// wrote is there. Does nothing otherwise.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900 && !EMULATED
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin where blocks find room, as soon as each block of this one has said so.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900 && !EMULATED
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
