// SPDX-License-Identifier: Apache-2.0
// Formats of quantised weights, and how words of them become 16-bit elements, exactly: a value is (decoded - zero) * scale,
// and scales multiply sums in fp32.
#pragma once
#include "convert.cuh"

enum ScaleType : u32 { kScaleF32, kScaleBF16, kScaleF16 };

__device__ __forceinline__ float load_scale(const char* scales, u32 scale_type, i64 index) {
  if (scale_type == kScaleF32) return reinterpret_cast<const float*>(scales)[index];
  const u16 bits = reinterpret_cast<const u16*>(scales)[index];
  return scale_type == kScaleBF16 ? BF16::to_float(bits) : F16::to_float(bits);
}

// a * b + c of two elements each.
template <typename Element>
__device__ __forceinline__ u32 multiply_add_pair(u32 a, u32 b, u32 c);

#if EMULATED
template <typename Element>
inline u32 multiply_add_pair(u32 a, u32 b, u32 c) {
  float x[2], y[2], z[2];
  Element::unpack(a, x), Element::unpack(b, y), Element::unpack(c, z);
  const float results[2] = {x[0] * y[0] + z[0], x[1] * y[1] + z[1]};  // exact wherever it is called
  return Element::pack(results);
}
#else
template <>
__device__ __forceinline__ u32 multiply_add_pair<BF16>(u32 a, u32 b, u32 c) {
  u32 result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
template <>
__device__ __forceinline__ u32 multiply_add_pair<F16>(u32 a, u32 b, u32 c) {
  u32 result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
#endif

// Four bytes of a word; 8 more in a digit of the selector gives eight times the sign of that byte.
__device__ __forceinline__ u32 select_bytes(u32 word, u32 selector) {
#if EMULATED
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 digit = selector >> 4 * i & 15, byte = word >> digit % 4 * 8 & 255;
    result |= (digit < 8 ? byte : byte >> 7 != 0 ? 255u : 0u) << 8 * i;
  }
  return result;
#else
  u32 result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "r"(selector));
  return result;
#endif
}

// The same element twice.
template <typename Element>
__device__ __forceinline__ u32 twice(float value) {
  return Element::from_float(value) * 0x10001u;
}

// A format has kBits, kPerWord values in a word, and `decode`, which gives them as pairs of elements: those for the first
// and second half of the first product, then of the second, if there is one. `zero` is what `zero_word` has made of a
// zero point.

struct Fp8 {  // e4m3; NaN becomes 480
  static constexpr u32 kBits = 8, kPerWord = 4;
  template <typename Element>
  static __device__ __forceinline__ u32 zero_word(u32) {
    return 0;
  }
  template <typename Element>
  static __device__ __forceinline__ void decode(u32 word, u32, u32 (&pairs)[2]) {
    // As an element whose exponent is too small by the difference of the biases, which a product puts right, also for
    // subnormal numbers.
    constexpr bool kIsBF16 = Element::kExponentBits == 8;
    constexpr u32 kShift = kIsBF16 ? 4 : 7, kMask = kIsBF16 ? 0x87f087f0u : 0xbf80bf80u;
    const u32 factor = kIsBF16 ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 spread = select_bytes(word, i == 0 ? 0x9180 : 0xb3a2);  // and the signs, to move to the left
      pairs[i] = multiply_add_pair<Element>(spread << kShift & kMask, factor, 0x80008000u);
    }
  }
};

struct Int8 {  // signed
  static constexpr u32 kBits = 8, kPerWord = 4;
  template <typename Element>
  static __device__ __forceinline__ u32 zero_word(u32) {
    return 0;
  }
  template <typename Element>
  static __device__ __forceinline__ void decode(u32 word, u32, u32 (&pairs)[2]) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 spread = __byte_perm(word, 0, i == 0 ? 0x4140 : 0x4342);
      if constexpr (Element::kExponentBits == 8) {
        // 128 + the lower 7 bits, less 128 or, with the sign bit, which is the lowest one of the exponent, 256
        pairs[i] = multiply_add_pair<Element>((spread & 0x00800080u) | 0x43004300u, twice<Element>(-1.0f),
                                              (spread & 0x007f007fu) | 0x43004300u);
      } else {
        // 1024 + the value + 128
        pairs[i] = multiply_add_pair<Element>(spread ^ 0x64806480u, twice<Element>(1.0f), twice<Element>(-1152.0f));
      }
    }
  }
};

struct Int4 {
  static constexpr u32 kBits = 4, kPerWord = 8;
  template <typename Element>
  static constexpr float kOffset = Element::kExponentBits == 8 ? 128.0f : 1024.0f;
  template <typename Element>
  static __device__ __forceinline__ u32 zero_word(u32 zero) {
    return twice<Element>(-kOffset<Element> - (float)zero);
  }
  // Values 0 and 4, 1 and 5, 2 and 6, 3 and 7.
  template <typename Element>
  static __device__ __forceinline__ void decode(u32 word, u32 zero, u32 (&pairs)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 offset = Element::kExponentBits == 8 ? 0x43004300u : 0x64006400u;
      pairs[i] = multiply_add_pair<Element>((word >> (4 * i) & 0x000f000fu) | offset, twice<Element>(1.0f), zero);
    }
  }
};
