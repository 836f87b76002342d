// SPDX-License-Identifier: Apache-2.0
// What ranks send each other, as MessageLayout of cupy_moe/plans/parallel.py has it. A row in a message is
//
//   the row itself, in units of 16 bytes
//   topk words       the local id of each pair of its token; -1: of another rank, or dropped
//   topk words       the weights, fp32
//   1 word           where the first of these pairs comes back, the others following it
//   scale_words      its scales
//
// and begins at a multiple of 16 bytes: they are `pitch` apart.
#pragma once
#include "common.cuh"

constexpr u32 kMaxTopk = 64;
constexpr u32 kMaxRanks = 256;
constexpr u32 kThreads = 256;
constexpr u32 kHeld = 4;  // units that a thread has asked for at once

// Copies the units [begin, end) of a row to all targets but null ones, by all threads of a block.
__device__ __forceinline__ void copy_units(const uint4* row, char* const* targets, u32 num_targets, u32 begin,
                                           u32 end) {
#pragma unroll 1
  for (u32 first = begin + threadIdx.x; first < end; first += kHeld * blockDim.x) {
    uint4 held[kHeld];
#pragma unroll
    for (u32 i = 0; i < kHeld; ++i)
      if (first + i * blockDim.x < end) held[i] = row[first + i * blockDim.x];
#pragma unroll 1
    for (u32 k = 0; k < num_targets; ++k) {
      uint4* target = reinterpret_cast<uint4*>(targets[k]);
      if (target == nullptr) continue;
#pragma unroll
      for (u32 i = 0; i < kHeld; ++i)
        if (first + i * blockDim.x < end) target[first + i * blockDim.x] = held[i];
    }
  }
}
