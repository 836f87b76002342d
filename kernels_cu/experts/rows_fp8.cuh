// SPDX-License-Identifier: Apache-2.0
// Rows of e4m3 with an fp32 scale for 128 columns: what the kernels that multiply them by weights of e4m3 share.
#pragma once
#include "experts/experts.cuh"
#include "experts/formats.cuh"

constexpr u32 kGroupColumns = 128;  // of a row, that have one scale

// Where the scale of row r of a tile's weights is, or the first of its scales; behind the last column, that of row 0.
template <typename Tile, typename Args>
__device__ __forceinline__ i64 weight_scale_at(const Args& args, u32 expert, u32 first_column, u32 r) {
  const u32 row = first_column + Tile::column(r) < args.num_columns ? Tile::weight_row(args, first_column, r) : 0;
  return expert * args.scale_expert_stride + args.scale_rows.quotient(row) * args.scale_row_stride;
}

// Of magnitudes; what is not finite counts as little as in quantize.cu.
__device__ __forceinline__ float larger(float largest, float value) {
  const float magnitude = fabsf(value);
  return magnitude <= kLargestFinite ? fmaxf(largest, magnitude) : largest;
}

// Of four lanes, which have a row in the layout of m16n8k16.
__device__ __forceinline__ float largest_of_quad(float largest) {
  largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
  return fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
}

// Of a group whose largest magnitude is known: that of hidden states, too.
__device__ __forceinline__ float group_scale(float largest) { return to_e4m3_scale(largest, 1e-10f); }
