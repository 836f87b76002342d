// SPDX-License-Identifier: Apache-2.0
// The products of the experts with weights of int4: see experts/quantized.cuh.
//
// targets  sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121 compute_90
#include "experts/quantized.cuh"

#define ENTRY(name, type, Element, kGated, kPairs)                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads, kBlocks - 1)                              \
      experts_int4_##name##_##kPairs##_##type(const __grid_constant__ ExpertsQuantizedArgs args) { \
    experts_quantized<QuantizedTile<Element, kGated, Int4, kPairs>>(args);                         \
  }
#define ENTRIES(name, type, Element, kGated) \
  ENTRY(name, type, Element, kGated, 8)      \
  ENTRY(name, type, Element, kGated, 16)
ENTRIES(gated, bf16, BF16, true)
ENTRIES(gated, f16, F16, true)
ENTRIES(plain, bf16, BF16, false)
ENTRIES(plain, f16, F16, false)
