// SPDX-License-Identifier: Apache-2.0
// The products of the experts with wgmma: Hopper.
//
// in       as experts_mma.cu, with blocks of kRows
// out      output [num_pairs, num_columns] of Element, the rows of pairs that are in a block
// grid     groups of group_blocks * column_tiles; block: kThreads, a warpgroup for every 64 rows
// shared   kStages * (kRows + kWeightRows) * 128 bytes, and 1024 to align them
// limits   as experts_mma.cu
// targets  sm_90a
//
//   1  the pairs of the block; where its expert is not here, zeros
//   2  per kDepth elements: wait for what was asked for kStages - 2 steps ago; hand it to the tensor cores, which work
//      on the step before; ask for more, to where the step before that was
//   3  bias, router weight, activation; write
//
// Order: over the depth ascending, 16 at a time, for each element alone: a row has the same bits in every batch.
#include "experts/experts.cuh"

// What ordinary stores and cp.async have written is there for wgmma, too.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Rows of 128 bytes in shared memory, swizzled, at a multiple of 1024 bytes.
__device__ __forceinline__ u64 describe(const char* rows) {
  const u64 address = (u32)__cvta_generic_to_shared(rows);
  return (address & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// sums[64][8 * kN] += a[64][16] * b[8 * kN][16]^T by a warpgroup; each warp has 16 rows, in the layout of m16n8k16.
template <typename Element, u32 kN>
__device__ __forceinline__ void multiply_add(float (&sums)[kN][4], u64 a, u64 b);

#define MULTIPLY_ADD_128(Element, type)                                                                           \
  template <>                                                                                                     \
  __device__ __forceinline__ void multiply_add<Element, 16>(float (&sums)[16][4], u64 a, u64 b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                     \
                 " {"                                                                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "               \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                 \
                 "}, %64, %65, 1, 1, 1, 0, 0;"                                                                    \
                 : "+f"(sums[0][0]), "+f"(sums[0][1]), "+f"(sums[0][2]), "+f"(sums[0][3]), "+f"(sums[1][0]),      \
                   "+f"(sums[1][1]), "+f"(sums[1][2]), "+f"(sums[1][3]), "+f"(sums[2][0]), "+f"(sums[2][1]),      \
                   "+f"(sums[2][2]), "+f"(sums[2][3]), "+f"(sums[3][0]), "+f"(sums[3][1]), "+f"(sums[3][2]),      \
                   "+f"(sums[3][3]), "+f"(sums[4][0]), "+f"(sums[4][1]), "+f"(sums[4][2]), "+f"(sums[4][3]),      \
                   "+f"(sums[5][0]), "+f"(sums[5][1]), "+f"(sums[5][2]), "+f"(sums[5][3]), "+f"(sums[6][0]),      \
                   "+f"(sums[6][1]), "+f"(sums[6][2]), "+f"(sums[6][3]), "+f"(sums[7][0]), "+f"(sums[7][1]),      \
                   "+f"(sums[7][2]), "+f"(sums[7][3]), "+f"(sums[8][0]), "+f"(sums[8][1]), "+f"(sums[8][2]),      \
                   "+f"(sums[8][3]), "+f"(sums[9][0]), "+f"(sums[9][1]), "+f"(sums[9][2]), "+f"(sums[9][3]),      \
                   "+f"(sums[10][0]), "+f"(sums[10][1]), "+f"(sums[10][2]), "+f"(sums[10][3]), "+f"(sums[11][0]), \
                   "+f"(sums[11][1]), "+f"(sums[11][2]), "+f"(sums[11][3]), "+f"(sums[12][0]), "+f"(sums[12][1]), \
                   "+f"(sums[12][2]), "+f"(sums[12][3]), "+f"(sums[13][0]), "+f"(sums[13][1]), "+f"(sums[13][2]), \
                   "+f"(sums[13][3]), "+f"(sums[14][0]), "+f"(sums[14][1]), "+f"(sums[14][2]), "+f"(sums[14][3]), \
                   "+f"(sums[15][0]), "+f"(sums[15][1]), "+f"(sums[15][2]), "+f"(sums[15][3])                     \
                 : "l"(a), "l"(b));                                                                               \
  }
MULTIPLY_ADD_128(BF16, "bf16")
MULTIPLY_ADD_128(F16, "f16")

#define MULTIPLY_ADD_256(Element, type)                                                                           \
  template <>                                                                                                     \
  __device__ __forceinline__ void multiply_add<Element, 32>(float (&sums)[32][4], u64 a, u64 b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                     \
                 " {"                                                                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "               \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "               \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "               \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "               \
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "   \
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
                 "}, %128, %129, 1, 1, 1, 0, 0;"                                                                  \
                 : "+f"(sums[0][0]), "+f"(sums[0][1]), "+f"(sums[0][2]), "+f"(sums[0][3]), "+f"(sums[1][0]),      \
                   "+f"(sums[1][1]), "+f"(sums[1][2]), "+f"(sums[1][3]), "+f"(sums[2][0]), "+f"(sums[2][1]),      \
                   "+f"(sums[2][2]), "+f"(sums[2][3]), "+f"(sums[3][0]), "+f"(sums[3][1]), "+f"(sums[3][2]),      \
                   "+f"(sums[3][3]), "+f"(sums[4][0]), "+f"(sums[4][1]), "+f"(sums[4][2]), "+f"(sums[4][3]),      \
                   "+f"(sums[5][0]), "+f"(sums[5][1]), "+f"(sums[5][2]), "+f"(sums[5][3]), "+f"(sums[6][0]),      \
                   "+f"(sums[6][1]), "+f"(sums[6][2]), "+f"(sums[6][3]), "+f"(sums[7][0]), "+f"(sums[7][1]),      \
                   "+f"(sums[7][2]), "+f"(sums[7][3]), "+f"(sums[8][0]), "+f"(sums[8][1]), "+f"(sums[8][2]),      \
                   "+f"(sums[8][3]), "+f"(sums[9][0]), "+f"(sums[9][1]), "+f"(sums[9][2]), "+f"(sums[9][3]),      \
                   "+f"(sums[10][0]), "+f"(sums[10][1]), "+f"(sums[10][2]), "+f"(sums[10][3]), "+f"(sums[11][0]), \
                   "+f"(sums[11][1]), "+f"(sums[11][2]), "+f"(sums[11][3]), "+f"(sums[12][0]), "+f"(sums[12][1]), \
                   "+f"(sums[12][2]), "+f"(sums[12][3]), "+f"(sums[13][0]), "+f"(sums[13][1]), "+f"(sums[13][2]), \
                   "+f"(sums[13][3]), "+f"(sums[14][0]), "+f"(sums[14][1]), "+f"(sums[14][2]), "+f"(sums[14][3]), \
                   "+f"(sums[15][0]), "+f"(sums[15][1]), "+f"(sums[15][2]), "+f"(sums[15][3]), "+f"(sums[16][0]), \
                   "+f"(sums[16][1]), "+f"(sums[16][2]), "+f"(sums[16][3]), "+f"(sums[17][0]), "+f"(sums[17][1]), \
                   "+f"(sums[17][2]), "+f"(sums[17][3]), "+f"(sums[18][0]), "+f"(sums[18][1]), "+f"(sums[18][2]), \
                   "+f"(sums[18][3]), "+f"(sums[19][0]), "+f"(sums[19][1]), "+f"(sums[19][2]), "+f"(sums[19][3]), \
                   "+f"(sums[20][0]), "+f"(sums[20][1]), "+f"(sums[20][2]), "+f"(sums[20][3]), "+f"(sums[21][0]), \
                   "+f"(sums[21][1]), "+f"(sums[21][2]), "+f"(sums[21][3]), "+f"(sums[22][0]), "+f"(sums[22][1]), \
                   "+f"(sums[22][2]), "+f"(sums[22][3]), "+f"(sums[23][0]), "+f"(sums[23][1]), "+f"(sums[23][2]), \
                   "+f"(sums[23][3]), "+f"(sums[24][0]), "+f"(sums[24][1]), "+f"(sums[24][2]), "+f"(sums[24][3]), \
                   "+f"(sums[25][0]), "+f"(sums[25][1]), "+f"(sums[25][2]), "+f"(sums[25][3]), "+f"(sums[26][0]), \
                   "+f"(sums[26][1]), "+f"(sums[26][2]), "+f"(sums[26][3]), "+f"(sums[27][0]), "+f"(sums[27][1]), \
                   "+f"(sums[27][2]), "+f"(sums[27][3]), "+f"(sums[28][0]), "+f"(sums[28][1]), "+f"(sums[28][2]), \
                   "+f"(sums[28][3]), "+f"(sums[29][0]), "+f"(sums[29][1]), "+f"(sums[29][2]), "+f"(sums[29][3]), \
                   "+f"(sums[30][0]), "+f"(sums[30][1]), "+f"(sums[30][2]), "+f"(sums[30][3]), "+f"(sums[31][0]), \
                   "+f"(sums[31][1]), "+f"(sums[31][2]), "+f"(sums[31][3])                                        \
                 : "l"(a), "l"(b));                                                                               \
  }
MULTIPLY_ADD_256(BF16, "bf16")
MULTIPLY_ADD_256(F16, "f16")

template <typename Element, bool kGated, u32 kRows, u32 kWeightRows, u32 kNumStages>
struct Tile : TileOf<Element, kGated, kRows, kWeightRows, kRows * 2> {
  static constexpr u32 kStages = kNumStages, kN = kWeightRows / 8;
};

template <typename Tile>
__device__ __forceinline__ void experts_wgmma(const ExpertsArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ u32 pairs[Tile::kRows];
  const u32 misaligned = (u32)__cvta_generic_to_shared(memory) % 1024;
  char* stages = reinterpret_cast<char*>(memory) + (misaligned ? 1024 - misaligned : 0);
  const Place place(args, Tile::kColumns);
  if (place.block * Tile::kRows >= (u32)*args.num_tokens_post_pad) return;
  const u32 expert = (u32)args.expert_ids[place.block];
  load_pairs<Tile>(args, place.block, pairs);
  if (expert >= args.num_experts) return clear_rows<Tile>(args, pairs, place.first_column);

  const Loader<Tile> loader(args, pairs, expert, place.first_column);
  const u32 num_steps = ceil_div(args.depth, kDepth), group_row = threadIdx.x / 128 * 64;
  const auto stage_of = [&](u32 step) { return stages + step % Tile::kStages * Tile::kStageBytes; };
  float sums[Tile::kN][4] = {};
#pragma unroll
  for (u32 step = 0; step + 2 < Tile::kStages; ++step) loader.ask(args, stage_of(step), step, num_steps);
#pragma unroll 1
  for (u32 step = 0; step < num_steps; ++step) {
    wait_copies<Tile::kStages - 3>();
    fence_for_wgmma();
    __syncthreads();  // all have waited for their part of this step, and for the products of the step before the last
    const char* stage = stage_of(step);
    const u64 a = describe(stage + group_row * kRowBytes), b = describe(stage + Tile::kRows * kRowBytes);
    begin_products();
#pragma unroll
    for (u32 k = 0; k < kDepth / 16; ++k) multiply_add<typename Tile::Element>(sums, a + k * 2, b + k * 2);
    commit_products();
    loader.ask(args, stage_of(step + Tile::kStages - 2), step + Tile::kStages - 2, num_steps);
    wait_products<1>();
  }
  wait_products<0>();
  const u32 warp_row = warp_id() * 16;  // four of a warpgroup
  write_rows<Tile>(args, pairs, expert, warp_row, place.first_column, 0, sums);
}

#define ENTRY(name, type, Element, kGated, kRows, kWeightRows, kStages)                   \
  extern "C" __global__ void __launch_bounds__(kRows * 2)                                 \
      experts_wgmma_##name##_##kRows##_##type(const __grid_constant__ ExpertsArgs args) { \
    experts_wgmma<Tile<Element, kGated, kRows, kWeightRows, kStages>>(args);              \
  }
#define ENTRIES(name, type, Element, kGated)     \
  ENTRY(name, type, Element, kGated, 64, 128, 4) \
  ENTRY(name, type, Element, kGated, 128, 256, 4)
ENTRIES(gated, bf16, BF16, true)
ENTRIES(gated, f16, F16, true)
ENTRIES(plain, bf16, BF16, false)
ENTRIES(plain, f16, F16, false)
