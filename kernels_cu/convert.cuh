// SPDX-License-Identifier: Apache-2.0
// fp32, fp16 and bf16 in memory <-> float in registers, without the headers of CUDA.
#pragma once
#include "common.cuh"

// A type of element: kBytes, and the conversion of as many elements as one 32-bit word of memory holds.
// Conversions to 16 bits round to nearest, ties to even.
struct F32 {
  static constexpr u32 kBytes = 4, kPerWord = 1;
  using Bits = u32;
  static __device__ __forceinline__ float to_float(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits from_float(float value) { return __float_as_uint(value); }
  static __device__ __forceinline__ void unpack(u32 word, float* values) { values[0] = __uint_as_float(word); }
  static __device__ __forceinline__ u32 pack(const float* values) { return __float_as_uint(values[0]); }
};

struct F16 {
  static constexpr u32 kBytes = 2, kPerWord = 2;
  using Bits = u16;
  static __device__ __forceinline__ float to_float(Bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  static __device__ __forceinline__ Bits from_float(float value) {
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
  static __device__ __forceinline__ void unpack(u32 word, float* values) {
    values[0] = to_float((Bits)word);
    values[1] = to_float((Bits)(word >> 16));
  }
  static __device__ __forceinline__ u32 pack(const float* values) {
    return (u32)from_float(values[0]) | (u32)from_float(values[1]) << 16;
  }
};

struct BF16 {
  static constexpr u32 kBytes = 2, kPerWord = 2;
  using Bits = u16;
  static __device__ __forceinline__ float to_float(Bits bits) { return __uint_as_float((u32)bits << 16); }
  static __device__ __forceinline__ Bits from_float(float value) {
    Bits bits;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const u32 word = __float_as_uint(value);
    bits = value == value ? (Bits)((word + 0x7fffu + (word >> 16 & 1)) >> 16) : (Bits)0x7fffu;
#endif
    return bits;
  }
  static __device__ __forceinline__ void unpack(u32 word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ u32 pack(const float* values) {
#if __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return (u32)from_float(values[0]) | (u32)from_float(values[1]) << 16;
#endif
  }
};
