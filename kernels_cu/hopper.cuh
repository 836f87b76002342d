// SPDX-License-Identifier: Apache-2.0
// What Hopper has beside: barriers in shared memory that count bytes, copies of boxes of a tensor, wgmma.
#pragma once
#include "convert.cuh"

__device__ __forceinline__ u32 shared_address(const void* shared) {
#if EMULATED
  return emulator::shared_address(shared);
#else
  return (u32)__cvta_generic_to_shared(shared);
#endif
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// A barrier in shared memory, which ends a phase when all have arrived and all bytes that were announced are there.
struct Barrier {
  u64 word;

  __device__ __forceinline__ void open(u32 arrivals) {
#if EMULATED
    emulator::barrier_open(this, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
#endif
  }
  __device__ __forceinline__ void expect(u32 num_bytes) {
#if EMULATED
    emulator::barrier_expect(this, num_bytes);
#else
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(num_bytes)
                 : "memory");
#endif
  }
  __device__ __forceinline__ void expect_and_arrive(u32 num_bytes) {
#if EMULATED
    emulator::barrier_expect(this, num_bytes);
    emulator::barrier_arrive(this);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(num_bytes)
                 : "memory");
#endif
  }
  __device__ __forceinline__ void arrive() {
#if EMULATED
    emulator::barrier_arrive(this);
#else
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#endif
  }
  // Some time later, when the copies that the thread has asked for with cp.async are there.
  __device__ __forceinline__ void arrive_with_copies() {
#if EMULATED
    emulator::barrier_arrive_with_copies(this);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this)) : "memory");
#endif
  }
  // At the same barrier of another block of the cluster.
  __device__ __forceinline__ void arrive_in(u32 rank) {
#if EMULATED
    emulator::barrier_arrive_in(this, rank);
#else
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(this)),
        "r"(rank)
        : "memory");
#endif
  }
  // A word for the block `rank` of the cluster, to where `mine` is in this block; it counts 4 bytes at the same barrier.
  __device__ __forceinline__ void send(u32* mine, u32 rank, u32 value) {
#if EMULATED
    emulator::barrier_send(this, mine, rank, value);
#else
    u32 to, counter;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(mine)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(this)), "r"(rank));
#if __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ == 0  // does not know st.async, and waits
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
    asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], 4;" ::"r"(counter) : "memory");
#else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(value),
                 "r"(counter)
                 : "memory");
#endif
#endif
  }
  // Until the phase of this parity has ended; that before the first has the parity 1.
  __device__ __forceinline__ void wait(u32 parity) {
#if EMULATED
    emulator::barrier_wait(this, parity, false, __LINE__);
#else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait_%=;\n"
        "}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
#endif
  }
  // The same, and what another block of the cluster has sent with it is there.
  __device__ __forceinline__ void wait_for_cluster(u32 parity) {
#if EMULATED
    emulator::barrier_wait(this, parity, true, __LINE__);
#else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait_%=;\n"
        "}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
#endif
  }
};

// After `open`, before any other thread of the cluster uses it.
__device__ __forceinline__ void fence_open_barriers() {
#if EMULATED
  emulator::fence_open_barriers();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By all threads of a cluster; what they have written before is then there for all.
__device__ __forceinline__ void sync_cluster() {
#if EMULATED
  emulator::cluster_arrive(__LINE__);
  emulator::cluster_wait(__LINE__);
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// As copy_async, or nothing at all; a branch would take more than the copy.
__device__ __forceinline__ void copy_async_if(bool condition, void* shared, const void* global, bool exists) {
#if EMULATED
  if (condition) emulator::copy_async(shared, global, exists);
#else
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.u32 condition, %3, 0;\n"
      "@condition cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n"
      "}" ::"r"(shared_address(shared)),
      "l"(global), "r"(exists ? 16 : 0), "r"((u32)condition)
      : "memory");
#endif
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// A tensor in global memory as cuTensorMapEncodeTiled describes it.
struct alignas(64) TensorMap {
  u64 words[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#if !EMULATED
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// A box of a tensor of 5 dimensions, to shared memory; its bytes count at the barrier.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, Barrier& barrier, const u32 (&at)[5]) {
#if EMULATED
  emulator::copy_box(shared, map.words, &barrier, at, false);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
#endif
}

// The same to both blocks of a cluster of two, at the same place and barrier of each.
__device__ __forceinline__ void copy_box_to_both(void* shared, const TensorMap& map, Barrier& barrier,
                                                 const u32 (&at)[5]) {
#if EMULATED
  emulator::copy_box(shared, map.words, &barrier, at, true);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "h"((u16)3)
      : "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes, the reverse of load_matrices.
__device__ __forceinline__ void store_matrices(void* row, const u32 (&words)[4]) {
#if EMULATED
  emulator::store_matrices(row, words, __LINE__);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#endif
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// Registers of a thread, from the pool that the block was launched with; by all threads of a warpgroup.
template <u32 kRegisters>
__device__ __forceinline__ void give_back_registers() {
#if !EMULATED
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <u32 kRegisters>
__device__ __forceinline__ void take_registers() {
#if !EMULATED
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// What cp.async has written is there for wgmma, too.
__device__ __forceinline__ void see_copies() {
#if !EMULATED
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// What registers hold is there for wgmma.
__device__ __forceinline__ void begin_products() {
#if EMULATED
  emulator::begin_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#if EMULATED
  emulator::commit_products(__LINE__);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <u32 kGroups>
__device__ __forceinline__ void wait_products() {
#if EMULATED
  emulator::wait_products(kGroups, __LINE__);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

#define SUMS_4(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 1), SUMS_4(i + 2), SUMS_4(i + 3)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 4), SUMS_16(i + 8), SUMS_16(i + 12)

// Operands are rows of 128 bytes in shared memory, swizzled, at multiples of 1024 bytes; they are given by 1/16 of their
// addresses, which is what descriptors have in their lower words.
constexpr u32 kDescribed = 1u << 16, kDescribedUpper = 1u << 30 | 64;

// sums[64][256] = a[64][16] * b[256][16]^T, added to what they are if `adds`, by a warpgroup; each of its warps has 16
// rows, in the layout of m16n8k16.
template <typename Element>
__device__ __forceinline__ void multiply_256(float (&sums)[32][4], u32 a, u32 b, u32 adds);

#if EMULATED
template <>
inline void multiply_256<BF16>(float (&sums)[32][4], u32 a, u32 b, u32 adds) {
  emulator::multiply(256, sums[0], a, b, adds, BF16::to_float, __LINE__);
}
template <>
inline void multiply_256<F16>(float (&sums)[32][4], u32 a, u32 b, u32 adds) {
  emulator::multiply(256, sums[0], a, b, adds, F16::to_float, __LINE__);
}
#else
#define MULTIPLY_256(Element, type)                                                                          \
  template <>                                                                                                \
  __device__ __forceinline__ void multiply_256<Element>(float (&sums)[32][4], u32 a, u32 b, u32 adds) {      \
    asm volatile(                                                                                            \
        "{\n"                                                                                                \
        ".reg .pred adds;\n"                                                                                 \
        ".reg .b64 a, b;\n"                                                                                  \
        "setp.ne.u32 adds, %130, 0;\n"                                                                       \
        "mov.b64 a, {%128, %131};\n"                                                                         \
        "mov.b64 b, {%129, %131};\n"                                                                         \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                         \
        " {"                                                                                                 \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                   \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                   \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "       \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},\n" \
        "a, b, adds, 1, 1, 0, 0;\n"                                                                          \
        "}"                                                                                                  \
        : SUMS_64(0), SUMS_64(16)                                                                            \
        : "r"(a | kDescribed), "r"(b | kDescribed), "r"(adds), "n"(kDescribedUpper));                        \
  }
MULTIPLY_256(BF16, "bf16")
MULTIPLY_256(F16, "f16")
#endif

// sums[64][128] = a[64][32] * b[128][32]^T of e4m3, in the same way.
__device__ __forceinline__ void multiply_128_e4m3(float (&sums)[16][4], u32 a, u32 b, u32 adds) {
#if EMULATED
  emulator::multiply(128, sums[0], a, b, adds, nullptr, __LINE__);
#else
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      ".reg .b64 a, b;\n"
      "setp.ne.u32 adds, %66, 0;\n"
      "mov.b64 a, {%64, %67};\n"
      "mov.b64 b, {%65, %67};\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"
      " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},\n"
      "a, b, adds, 1, 1;\n"
      "}"
      : SUMS_64(0)
      : "r"(a | kDescribed), "r"(b | kDescribed), "r"(adds), "n"(kDescribedUpper));
#endif
}
