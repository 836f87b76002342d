// SPDX-License-Identifier: Apache-2.0
// The products of the experts with weights of int8: see experts/quantized.cuh.
//
// targets  sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_120 compute_90
#include "experts/quantized.cuh"

QUANTIZED_ENTRIES(int8, Int8)
