// SPDX-License-Identifier: Apache-2.0
// Formats of quantised weights, and how words of them become 16-bit elements, exactly: a value is (decoded - zero) * scale,
// and scales multiply sums in fp32.
#pragma once
#include "convert.cuh"

enum ScaleType : u32 { kScaleF32, kScaleBF16, kScaleF16 };

// Both without a branch.
struct ScaleReader {
  bool is_word, is_half;
  u32 size, shift;

  __device__ __forceinline__ explicit ScaleReader(u32 scale_type)
      : is_word(scale_type == kScaleF32),
        is_half(scale_type == kScaleF16),
        size(is_word ? 4 : 2),
        shift(scale_type == kScaleBF16 ? 16 : 0) {}

  __device__ __forceinline__ u32 bits(const char* place) const {
#if EMULATED
    return is_word ? *reinterpret_cast<const u32*>(place) : *reinterpret_cast<const u16*>(place);
#else
    u32 result;
    asm volatile(
        "{\n"
        ".reg .pred is_word;\n"
        "setp.ne.u32 is_word, %2, 0;\n"
        "@is_word ld.global.u32 %0, [%1];\n"
        "@!is_word ld.global.u16 %0, [%1];\n"
        "}"
        : "=r"(result)
        : "l"(place), "r"((u32)is_word));
    return result;
#endif
  }
  __device__ __forceinline__ float value(u32 bits) const {
    const float half = F16::to_float((u16)bits), other = __uint_as_float(bits << shift);
    return is_half ? half : other;
  }
};
__device__ __forceinline__ float load_scale(const char* scales, u32 scale_type, i64 index) {
  const ScaleReader read(scale_type);
  return read.value(read.bits(scales + index * read.size));
}

// word & kMask | bits, where compilers would take two instructions for two constants.
template <u32 kMask>
__device__ __forceinline__ u32 keep_and_set(u32 word, u32 bits) {
#if EMULATED
  return (word & kMask) | bits;
#else
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(kMask), "r"(bits));
  return result;
#endif
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

// Elements 0 and 1 of two words each, paired.
__device__ __forceinline__ u32 lower_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 upper_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// The same element twice.
template <typename Element>
__device__ __forceinline__ u32 twice(float value) {
  return Element::from_float(value) * 0x10001u;
}

// A format has kBits, kPerWord values in a word, and `decode`, which gives them as pairs of elements: those for the first
// and second half of the first product, then of the second, if there is one. `zero` is what `zero_word` has made of a
// zero point. The values of a pair are those that lie 16 bits apart, but for Fp8, which has neighbours; `in_order` brings
// eight elements of a row, that are multiplied by eight values, into the same order.

struct Fp8 {  // e4m3; NaN becomes 480
  static constexpr u32 kBits = 8, kPerWord = 4;
  static constexpr bool kHasOrder = false;
  static __device__ __forceinline__ uint4 in_order(uint4 row) { return row; }
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
  static constexpr bool kHasOrder = true;
  static __device__ __forceinline__ uint4 in_order(uint4 row) {
    return make_uint4(lower_halves(row.x, row.y), upper_halves(row.x, row.y), lower_halves(row.z, row.w),
                      upper_halves(row.z, row.w));
  }
  template <typename Element>
  static __device__ __forceinline__ u32 zero_word(u32) {
    return 0;
  }
  // Values 0 and 2, 1 and 3.
  template <typename Element>
  static __device__ __forceinline__ void decode(u32 word, u32, u32 (&pairs)[2]) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 bytes = word >> (8 * i);
      if constexpr (Element::kExponentBits == 8) {
        // 128 + the lower 7 bits, less 128 or, with the sign bit, which is the lowest one of the exponent, 256
        pairs[i] = multiply_add_pair<Element>(keep_and_set<0x00800080u>(bytes, 0x43004300u), twice<Element>(-1.0f),
                                              keep_and_set<0x007f007fu>(bytes, 0x43004300u));
      } else {
        // 1024 + the value + 128
        pairs[i] = multiply_add_pair<Element>(keep_and_set<0x00ff00ffu>(bytes ^ 0x00800080u, 0x64006400u),
                                              twice<Element>(1.0f), twice<Element>(-1152.0f));
      }
    }
  }
};

struct Int4 {
  static constexpr u32 kBits = 4, kPerWord = 8;
  static constexpr bool kHasOrder = true;
  static __device__ __forceinline__ uint4 in_order(uint4 row) {
    return make_uint4(lower_halves(row.x, row.z), upper_halves(row.x, row.z), lower_halves(row.y, row.w),
                      upper_halves(row.y, row.w));
  }
  template <typename Element>
  static constexpr float kOffset = Element::kExponentBits == 8 ? 128.0f : 1024.0f;
  template <typename Element>
  static __device__ __forceinline__ u32 zero_word(u32 zero) {
    return twice<Element>(-kOffset<Element> - (float)zero);
  }
  // Values 0 and 4, 1 and 5, 2 and 6, 3 and 7.
  template <typename Element>
  static __device__ __forceinline__ void decode(u32 word, u32 zero, u32 (&pairs)[4]) {
    constexpr u32 kOffsetBits = Element::kExponentBits == 8 ? 0x43004300u : 0x64006400u;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      pairs[i] = multiply_add_pair<Element>(keep_and_set<0x000f000fu>(word >> (4 * i), kOffsetBits),
                                            twice<Element>(1.0f), zero);
    }
  }
};
