// SPDX-License-Identifier: Apache-2.0
// Clusters of blocks (sm_90 and later): who is in one, its barrier, and an inbox for what others of it send.
// kBlocks = 1 is a plain block, for which these do nothing.
#pragma once
#include "common.cuh"

template <u32 kBlocks>
__device__ __forceinline__ u32 cluster_rank() {
  return kBlocks == 1 ? 0 : blockIdx.x % kBlocks;
}

// The two halves of a barrier. This one tells that the block runs, not what it wrote: a fence takes half a microsecond.
template <u32 kBlocks>
__device__ __forceinline__ void cluster_arrive() {
#if EMULATED
  if (kBlocks > 1) emulator::cluster_arrive(__LINE__);
#elif __CUDA_ARCH__ >= 900
  if (kBlocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

template <u32 kBlocks>
__device__ __forceinline__ void cluster_wait() {
#if EMULATED
  if (kBlocks > 1) emulator::cluster_wait(__LINE__);
#elif __CUDA_ARCH__ >= 900
  if (kBlocks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Counts the bytes that other blocks of the cluster store in this block's shared memory.
struct Inbox {
  u64 barrier;

  // By one thread, which does it before it arrives at the cluster's barrier.
  __device__ __forceinline__ void open() {
#if EMULATED
    emulator::inbox_open(this);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(this)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // How many bytes to wait for. By one thread; some may have arrived already.
  __device__ __forceinline__ void expect(u32 num_bytes) {
#if EMULATED
    emulator::inbox_expect(this, num_bytes);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(this)), "r"(num_bytes)
                 : "memory");
#endif
  }

  // 16 bytes for block `rank`, to where `mine` is in this block; needs no fence, and does not wait for their arrival.
  __device__ __forceinline__ void send(uint4* mine, u32 rank, uint4 value) {
#if EMULATED
    emulator::inbox_send(this, mine, rank, &value, sizeof(value));
#elif __CUDA_ARCH__ >= 900
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
#if EMULATED
    emulator::inbox_wait(this, __LINE__);
#elif __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred arrived;\n"
        "wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 arrived, [%0], 0;\n"
        "@!arrived bra wait;\n"
        "}" ::"r"(address(this))
        : "memory");
#endif
  }

#if __CUDA_ARCH__ >= 900 && !EMULATED
 private:
  __device__ static __forceinline__ u32 address(const void* mine) { return (u32)__cvta_generic_to_shared(mine); }
  __device__ static __forceinline__ u32 address_in(const void* mine, u32 rank) {
    u32 result;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address(mine)), "r"(rank));
    return result;
  }
#endif
};
