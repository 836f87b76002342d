// SPDX-License-Identifier: Apache-2.0
// The products of the experts with wgmma, of e4m3, which rows of activations have become: see experts/wgmma.cuh.
//
// out      of GEMM 1 e4m3, with a scale for 128 columns of a row; of GEMM 2, Element
// limits   num_columns is a multiple of 16; scales of rows are fp32, and so are those of weights if there are several in
//          a row, which are then of 128 columns each and of a multiple of 128 rows
//
// Products of 128 elements of depth are summed by tensor cores, which keep 14 bits or so, and then multiplied by their
// scales and added up in fp32: half of the tile after the other, as there are no registers for two sums of all of it.
//
// targets  sm_90a
#include "experts/rows_fp8.cuh"
#include "experts/wgmma.cuh"

template <typename ElementType, bool kHasGate>
struct Product : TileOf<ElementType, kHasGate, kTileRows, kWeightRows, kThreads, 1> {
  using Base = TileOf<ElementType, kHasGate, kTileRows, kWeightRows, kThreads, 1>;
  using Base::kGated;
  static constexpr bool kScaled = true;
  static constexpr u32 kProductRegisters = 216, kLoaderRegisters = 72;

  __device__ static __forceinline__ void sum_up(const ExpertsWgmmaArgs& args, Shared& shared, const char* stages,
                                                const StageScales* scales, const u32* pairs, u32 group_row,
                                                u32 num_steps, Turn<kStages>& turn, float (&sums)[32][4]) {
    RowScales row_scales(args, pairs, num_steps);
#pragma unroll
    for (u32 n = 0; n < 32; ++n) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) sums[n][e] = 0;
    }
#pragma unroll 1
    for (u32 step = 0; step < num_steps; ++step, turn.next()) {
      shared.full[turn.index].wait(turn.parity);
      const char* stage = stages + turn.index * kStageBytes;
      const u32 a = shared_address(stage + group_row * kRowBytes) / 16, b = shared_address(stage + kTileBytes) / 16;
      const StageScales& of = scales[turn.index];
      see_copies();
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const u32 from = b + half * (kBoxBytes / 16);
        float part[16][4], factors[2][2];  // of rows, and of the weights of their columns
        begin_products();
        multiply_128_e4m3(part, a, from, 0);
#pragma unroll
        for (u32 k = 1; k < kRowBytes / 32; ++k) multiply_128_e4m3(part, a + k * 2, from + k * 2, 1);
        commit_products();
#pragma unroll
        for (u32 i = 0; i < 4; ++i) factors[i / 2][i % 2] = row_scales.now[i / 2] * of.weights[half][i % 2];
        if (half == 1) row_scales.next(args, step + 2 < num_steps);
        wait_products<0>();
        if (half == 1) arrive_in_both(shared.empty[turn.index]);
#pragma unroll
        for (u32 n = 0; n < 16; ++n) {
#pragma unroll
          for (u32 e = 0; e < 4; ++e) {
            float& sum = sums[half * 16 + n][e];
            sum = fmaf(part[n][e], factors[e / 2][n % 2], sum);
          }
        }
      }
    }
  }

  // Of rows l / 4 and l / 4 + 8 of a warp, in lane l, for this step and, on their way, for the next. They do not go
  // through shared memory: copies of 4 bytes to there take as long as those of 128.
  struct RowScales {
    float now[2], later[2];
    u32 at[2];

    // Rows without a pair take the scales of the first one of their 64, as those of a dropped pair may be missing.
    __device__ __forceinline__ RowScales(const ExpertsWgmmaArgs& args, const u32* pairs, u32 num_steps) {
      const u32 first = pairs[-(int)(warp_id() % 4 * 16)];
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const u32 pair = pairs[half * 8 + lane_id() / 4];
        at[half] = args.rows_shared.quotient(pair < args.num_pairs ? pair : first) * num_steps;
        later[half] = args.row_scales[at[half]];
      }
      next(args, num_steps > 1);
    }
    __device__ __forceinline__ void next(const ExpertsWgmmaArgs& args, bool has_later) {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        now[half] = later[half];
        if (has_later) later[half] = args.row_scales[++at[half]];
      }
    }
  };

  // By the scales of rows of weights, where steps have none; these come through shared memory.
  __device__ static __forceinline__ void scale(const ExpertsWgmmaArgs& args, u32 expert, u32 first_column,
                                               uint4* memory, float (&sums)[32][4]) {
    if (args.scales_steps) return;
    float* scales = reinterpret_cast<float*>(memory);
#pragma unroll 1
    for (u32 r = lane_id(); r < kWeightRows; r += kWarpSize) {
      const i64 at = weight_scale_at<Base>(args, expert, first_column, r);
      scales[r] = load_scale(args.weight_scales, args.scale_type, at);
    }
    __syncwarp();
#pragma unroll
    for (u32 n = 0; n < 32; ++n) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) sums[n][e] *= scales[n * 8 + lane_id() % 4 * 2 + e % 2];
    }
    __syncwarp();
  }
};

// GEMM 1: 16 rows of the tile by a warp, 128 columns at a time, as e4m3 and their scales, which are those of quantize.cu.
template <typename ElementType, bool kHasGate>
struct FirstProduct : Product<ElementType, kHasGate> {
  using Base = Product<ElementType, kHasGate>;

  __device__ static __forceinline__ void write(const ExpertsWgmmaArgs& args, const u32* pairs, u32 first_column,
                                               uint4* memory, const float (&sums)[32][4]) {
    constexpr u32 kStep = Base::kGated ? 2 : 1;  // products for 8 columns
    const u32 num_groups = ceil_div(args.num_columns, kGroupColumns);
    const u32 chunk = lane_id() % kChunks, my_row = lane_id() / 4;
    char* memory_bytes = reinterpret_cast<char*>(memory);
#pragma unroll
    for (u32 first = 0; first < Base::kColumns; first += kGroupColumns) {
      const u32 column = first_column + first;
      if (column >= args.num_columns) break;
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const auto value = [&](u32 c, u32 e) { return sums[(first / 8 + c) * kStep][half * 2 + e]; };
        float largest = 0;
#pragma unroll
        for (u32 c = 0; c < kGroupColumns / 8; ++c) largest = larger(larger(largest, value(c, 0)), value(c, 1));
        const float scale = group_scale(largest_of_quad(largest)), factor = inverse(scale);
        const u32 row = my_row + half * 8, pair = pairs[row];
        if (lane_id() % 4 == 0 && pair < args.num_pairs) {
          args.output_scales[(i64)pair * num_groups + column / kGroupColumns] = scale;
        }
#pragma unroll
        for (u32 c = 0; c < kGroupColumns / 8; ++c) {
          const u32 codes = pack_e4m3(__fmul_rn(value(c, 0), factor), __fmul_rn(value(c, 1), factor));
          char* to = memory_bytes + chunk_offset(row, c / 2) + c % 2 * 8 + lane_id() % 4 * 2;
          *reinterpret_cast<u16*>(to) = (u16)codes;
        }
      }
      __syncwarp();
#pragma unroll
      for (u32 i = 0; i < kWriteRows / 4; ++i) {
        const u32 row = lane_id() / kChunks + i * 4, pair = pairs[row];
        const uint4 words = *reinterpret_cast<uint4*>(memory_bytes + chunk_offset(row, chunk));
        if (pair < args.num_pairs && column + chunk * 16 < args.num_columns) {
          *reinterpret_cast<uint4*>(args.output + (i64)pair * args.num_columns + column + chunk * 16) = words;
        }
      }
      __syncwarp();
    }
  }
};

template <typename ElementType>
struct SecondProduct : Product<ElementType, false> {
  using Base = Product<ElementType, false>;

  __device__ static __forceinline__ void write(const ExpertsWgmmaArgs& args, const u32* pairs, u32 first_column,
                                               uint4* memory, const float (&sums)[32][4]) {
    write_rows<Base>(args, pairs, first_column, memory, sums);
  }
};

#define ENTRY(name, ...)                                                              \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1) \
      experts_wgmma_fp8_##name(const __grid_constant__ ExpertsWgmmaArgs args) {       \
    experts_wgmma<__VA_ARGS__>(args);                                                 \
  }
ENTRY(first_gated_bf16, FirstProduct<BF16, true>)
ENTRY(first_gated_f16, FirstProduct<F16, true>)
ENTRY(first_plain_bf16, FirstProduct<BF16, false>)
ENTRY(first_plain_f16, FirstProduct<F16, false>)
ENTRY(second_bf16, SecondProduct<BF16>)
ENTRY(second_f16, SecondProduct<F16>)
