// Stands in for what kernels_cu uses of CUDA, so that a C++ compiler makes of a kernel what machine.cpp runs.
// Threads are fibers; what has to wait for others goes through the functions declared here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#ifndef __cluster_dims__  // the preprocessed text tells who is launched in clusters
#define __cluster_dims__(...)
#endif
#define __grid_constant__
// A block has a thread of the operating system to itself, whose fibers share what is local to it.
#define __shared__ thread_local
#define __restrict__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {
enum Collective : int {
  kShuffle,
  kShuffleUp,
  kShuffleXor,
  kBallot,
  kMatch,
  kAdd,
  kMax,
  kGather,
  kWarpBarrier,
  kMultiply,
  kCommitProducts,
  kWaitProducts
};

uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();
uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned argument, int line);
void block_barrier(int line);
unsigned atomic_add(unsigned* address, unsigned value);
uint64_t nanoseconds();  // a microsecond more at each call
void cluster_arrive(int line);
void cluster_wait(int line);
void inbox_open(const void* inbox);
void inbox_expect(const void* inbox, unsigned num_bytes);
void inbox_send(const void* inbox, void* mine, unsigned rank, const void* value, unsigned num_bytes);
void inbox_wait(const void* inbox, int line);
// 16 bytes, or 4, when they are waited for.
void copy_async(void* shared, const void* global, bool exists, unsigned num_bytes = 16);
void commit_copies();
void wait_copies(unsigned num_groups);
void load_matrices(unsigned* words, const void* row, int line);
void store_matrices(void* row, const unsigned* words, int line);
// Of 16 bits, or, without `to_float`, of e4m3.
void multiply_add(float* sums, const unsigned* a, unsigned b0, unsigned b1, float (*to_float)(unsigned short), int line);

// Of Hopper, as hopper.cuh has them.
unsigned shared_address(const void* shared);
void barrier_open(void* barrier, unsigned arrivals);
void fence_open_barriers();
void barrier_expect(void* barrier, unsigned num_bytes);
void barrier_arrive(void* barrier);
void barrier_arrive_in(void* barrier, unsigned rank);
void barrier_arrive_with_copies(void* barrier);
void barrier_send(void* barrier, void* mine, unsigned rank, unsigned value);
void barrier_wait(void* barrier, unsigned parity, bool of_cluster, int line);
void copy_box(void* shared, const unsigned long long* map, void* barrier, const unsigned* at, bool to_both);
void begin_products();
// Of what multiply_add takes.
void multiply(unsigned columns, float* sums, unsigned a, unsigned b, unsigned adds, float (*to_float)(unsigned short),
              int line);
void commit_products(int line);
void wait_products(unsigned num_groups, int line);

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(Collective kind, unsigned mask, T value, unsigned argument, int line) {
  return from_bits<T>(collective(kind, mask, to_bits(value), argument, line));
}
}  // namespace emulator

#define threadIdx emulator::thread_index()
#define blockIdx emulator::block_index()
#define blockDim emulator::block_size()
#define gridDim emulator::grid_size()
#define __syncthreads() emulator::block_barrier(__LINE__)
#define __syncwarp() emulator::collective(emulator::kWarpBarrier, 0xffffffffu, 0, 0, __LINE__)
#define __shfl_sync(mask, value, lane) emulator::shuffle(emulator::kShuffle, mask, value, lane, __LINE__)
#define __shfl_up_sync(mask, value, delta) emulator::shuffle(emulator::kShuffleUp, mask, value, delta, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulator::shuffle(emulator::kShuffleXor, mask, value, lanes, __LINE__)
#define __ballot_sync(mask, vote) unsigned(emulator::collective(emulator::kBallot, mask, bool(vote), 0, __LINE__))
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __match_any_sync(mask, value) unsigned(emulator::collective(emulator::kMatch, mask, value, 0, __LINE__))
#define __reduce_add_sync(mask, value) unsigned(emulator::collective(emulator::kAdd, mask, value, 0, __LINE__))
#define __reduce_max_sync(mask, value) unsigned(emulator::collective(emulator::kMax, mask, value, 0, __LINE__))
#define atomicAdd emulator::atomic_add

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __clz(unsigned value) { return value ? __builtin_clz(value) : 32; }
inline int __ffs(unsigned value) { return __builtin_ffs(int(value)); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __uint_as_float(unsigned bits) { return emulator::from_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return unsigned(emulator::to_bits(value)); }
// A GPU knows one NaN, which is positive.
inline float __canonical(float value) { return value == value ? value : __uint_as_float(0x7fffffff); }
inline float __fadd_rn(float a, float b) { return __canonical(a + b); }
inline float __fsub_rn(float a, float b) { return __canonical(a - b); }
inline float __fmul_rn(float a, float b) { return __canonical(a * b); }
inline float __fdiv_rn(float a, float b) { return __canonical(a / b); }
// Of a number and a NaN the number, also where libm tells signaling NaNs from quiet ones.
inline float __larger(float a, float b) { return a != a ? b : b != b ? a : fmaxf(a, b); }
inline float __smaller(float a, float b) { return a != a ? b : b != b ? a : fminf(a, b); }
#define fmaxf __larger
#define fminf __smaller
