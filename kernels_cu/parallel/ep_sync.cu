// SPDX-License-Identifier: Apache-2.0
// Expert parallelism in symmetric memory: tells all ranks that what this one has written for them is there, and waits
// until all have said so.
//
// in       peers [num_ranks], the address of each rank's flags, its own among them; flags, its own, [num_ranks]
//          *epoch, how often it has done so; timeout in ns                                          (SyncArgs)
// out      *epoch, one higher; flags[rank] of each rank: the epoch; late [num_ranks], 1 for ranks that did not come in
//          time, which are not waited for again. What these should have written is then anything
// grid     one block of kThreads threads, of which each has a rank
//
//   1  store the epoch in a flag of each rank, released to the system, with all that kernels before have written
//   2  look at the own flag of each rank, acquired from the system, until it has come as far
//
// No rank gets ahead of another by more than one epoch, as it waits for all. Epochs are compared as differences.
#include "parallel/message.cuh"

struct SyncArgs {
  u32* flags;
  const i64* peers;
  u32* epoch;
  u32* late;
  u32 num_ranks, rank;
  i64 timeout;
};

__device__ __forceinline__ void store_release(u32* address, u32 value) {
#if EMULATED
  *address = value;
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

__device__ __forceinline__ u32 load_acquire(const u32* address) {
#if EMULATED
  return *address;
#else
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}

__device__ __forceinline__ i64 nanoseconds() {
#if EMULATED
  return (i64)emulator::nanoseconds();
#else
  i64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads) ep_sync(const __grid_constant__ SyncArgs args) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  static_assert(kMaxRanks <= kThreads, "a thread for each rank");
  const u32 peer = threadIdx.x, epoch = *args.epoch + 1;
  __syncthreads();
  if (peer == 0) *args.epoch = epoch;
  if (peer >= args.num_ranks) return;
  store_release(reinterpret_cast<u32*>(args.peers[peer]) + args.rank, epoch);
  const i64 begin = nanoseconds();
#pragma unroll 1
  while ((int)(load_acquire(args.flags + peer) - epoch) < 0 && args.late[peer] == 0)
    if (nanoseconds() - begin > args.timeout) args.late[peer] = 1;
}
