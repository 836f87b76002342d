// SPDX-License-Identifier: Apache-2.0
// fp32, fp16 and bf16 in memory <-> float in registers, and float to fp8, without the headers of CUDA.
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

// The conversions of F16 and BF16 for where there is no PTX.
__device__ __forceinline__ float plain_f16_to_float(u16 bits) {
  const u32 magnitude = bits & 0x7fffu, sign = (u32)(bits & 0x8000u) << 16;
  if (magnitude > 0x7c00u) return __uint_as_float(0x7fffffffu);  // NaN
  if (magnitude == 0x7c00u) return __uint_as_float(sign | 0x7f800000u);
  // The exponent is 112 too small; that puts normal and subnormal numbers right, exactly.
  const float scaled = __uint_as_float(magnitude << 13) * __uint_as_float((127 + 112) << 23);
  return __uint_as_float(sign | __float_as_uint(scaled));
}

__device__ __forceinline__ u16 plain_float_to_f16(float value) {
  const u32 word = __float_as_uint(value), magnitude = word & 0x7fffffffu, sign = word >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fffu;          // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                        // subnormal in fp16: adding 0.5 rounds at the right bit
    const u32 rounded = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - __float_as_uint(0.5f);
    return sign | rounded;
  }
  const u32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);  // to nearest, ties to even
  return sign | (rounded - (112u << 23)) >> 13;
}

__device__ __forceinline__ u16 plain_float_to_bf16(float value) {
  const u32 word = __float_as_uint(value);
  return value == value ? (u16)((word + 0x7fffu + (word >> 16 & 1)) >> 16) : (u16)0x7fffu;
}

struct F16 {
  static constexpr u32 kBytes = 2, kPerWord = 2, kExponentBits = 5;
  using Bits = u16;
  static __device__ __forceinline__ float to_float(Bits bits) {
#if EMULATED
    return plain_f16_to_float(bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
  }
  static __device__ __forceinline__ Bits from_float(float value) {
#if EMULATED
    return plain_float_to_f16(value);
#else
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
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
  static constexpr u32 kBytes = 2, kPerWord = 2, kExponentBits = 8;
  using Bits = u16;
  static __device__ __forceinline__ float to_float(Bits bits) { return __uint_as_float((u32)bits << 16); }
  static __device__ __forceinline__ Bits from_float(float value) {
#if __CUDA_ARCH__ >= 800 && !EMULATED
    Bits bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return plain_float_to_bf16(value);
#endif
  }
  static __device__ __forceinline__ void unpack(u32 word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ u32 pack(const float* values) {
#if __CUDA_ARCH__ >= 800 && !EMULATED
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return (u32)from_float(values[0]) | (u32)from_float(values[1]) << 16;
#endif
  }
};

// To nearest, ties to even; what is larger than 448, the largest number of e4m3, becomes 448, and NaN is 0x7f.
__device__ __forceinline__ u8 plain_float_to_e4m3(float value) {
  const u32 word = __float_as_uint(value), magnitude = word & 0x7fffffffu, sign = word >> 24 & 0x80u;
  if (magnitude > 0x7f800000u) return 0x7fu;          // NaN
  if (magnitude >= 0x43e00000u) return sign | 0x7eu;  // 448 and more
  if (magnitude < 0x3c800000u) {                      // subnormal in e4m3: adding 2^14 rounds at the right bit
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) - __float_as_uint(16384.0f));
  }
  const u32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
  return sign | (rounded - (120u << 23)) >> 20;
}

constexpr float kLargestE4m3 = 448.0f, kLargestFinite = 3.40282346638528859812e38f;

// Of values whose largest magnitude is `largest`; a normal number, as its reciprocal is.
__device__ __forceinline__ float to_e4m3_scale(float largest, float least) {
  return __fdiv_rn(fmaxf(largest, least), kLargestE4m3);
}

// Two floats as e4m3, the first one in the lower byte.
__device__ __forceinline__ u32 pack_e4m3(float first, float second) {
#if !EMULATED && \
    (__CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ == 890 && (__CUDACC_VER_MAJOR__ > 12 || __CUDACC_VER_MINOR__ > 0)))
  u16 pair;  // NVRTC 12.0 has this for sm_90 alone
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return (u32)plain_float_to_e4m3(first) | (u32)plain_float_to_e4m3(second) << 8;
#endif
}
