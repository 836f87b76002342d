// SPDX-License-Identifier: Apache-2.0
// The products of the experts with wgmma, of bf16 and fp16: see experts/wgmma.cuh.
//
// targets  sm_90a
#include "experts/wgmma.cuh"

template <typename ElementType, bool kHasGate>
struct Product : TileOf<ElementType, kHasGate, kTileRows, kWeightRows, kThreads> {
  using Base = TileOf<ElementType, kHasGate, kTileRows, kWeightRows, kThreads>;
  static constexpr bool kScaled = false;
  static constexpr u32 kProductRegisters = 208, kLoaderRegisters = 88;

  __device__ static __forceinline__ void sum_up(const ExpertsWgmmaArgs&, Shared& shared, const char* stages,
                                                const StageScales*, const u32*, u32 group_row, u32 num_steps,
                                                Turn<kStages>& turn, float (&sums)[32][4]) {
    u32 stage_before = 0;
#pragma unroll 1
    for (u32 step = 0; step < num_steps; ++step, turn.next()) {
      shared.full[turn.index].wait(turn.parity);
      const char* stage = stages + turn.index * kStageBytes;
      const u32 a = shared_address(stage + group_row * kRowBytes) / 16, b = shared_address(stage + kTileBytes) / 16;
      see_copies();
      begin_products();
      multiply_256<ElementType>(sums, a, b, step);
#pragma unroll
      for (u32 k = 1; k < kDepth / 16; ++k) multiply_256<ElementType>(sums, a + k * 2, b + k * 2, 1);
      commit_products();
      wait_products<1>();
      if (step > 0) arrive_in_both(shared.empty[stage_before]);
      stage_before = turn.index;
    }
    wait_products<0>();
    arrive_in_both(shared.empty[stage_before]);
  }

  __device__ static __forceinline__ void scale(const ExpertsWgmmaArgs&, u32, u32, uint4*, float (&)[32][4]) {}

  __device__ static __forceinline__ void write(const ExpertsWgmmaArgs& args, const u32* pairs, u32 first_column,
                                               uint4* memory, const float (&sums)[32][4]) {
    write_rows<Base>(args, pairs, first_column, memory, sums);
  }
};

#define ENTRY(name, type, Element, kGated)                                            \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1) \
      experts_wgmma_##name##_##type(const __grid_constant__ ExpertsWgmmaArgs args) {  \
    experts_wgmma<Product<Element, kGated>>(args);                                    \
  }
ENTRY(gated, bf16, BF16, true)
ENTRY(gated, f16, F16, true)
ENTRY(plain, bf16, BF16, false)
ENTRY(plain, f16, F16, false)
