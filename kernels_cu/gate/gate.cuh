// SPDX-License-Identifier: Apache-2.0
// What the gating kernels share: their arguments, keys that order scores, scores, and how results are written.
#pragma once
#include "convert.cuh"

struct GateArgs {
  const char* logits;      // [num_tokens, num_experts], rows row_stride bytes apart
  const float* bias;       // [num_experts] or null
  const u8* padding_mask;  // [num_tokens] or null; a padding row where not 0
  float* topk_weights;     // [num_tokens, topk + num_shared]
  void* topk_ids;          // likewise
  i64 row_stride;
  u32 num_tokens, num_experts, topk;
  u32 num_groups, topk_group;  // 1, 1 without groups
  u32 group_size;              // num_experts / num_groups
  u32 element;                 // an ElementType
  u32 id_words;                // of topk_ids: 1 or 2
  u32 vectors;                 // logits may be loaded 16 bytes (or a whole lane's share) at a time
  u32 scoring;                 // a Scoring
  u32 renormalize;
  u32 lanes_per_row, row_shift;  // a power of two, and its logarithm
  u32 num_threads;               // blockDim.x, which is in another line of constants, 200 cycles away
  float factor, softcap;         // softcap 0: none
  u32 num_shared;                // experts after the others, which all tokens go to, with this weight
  float shared_weight;
};

// Below, `Args` is this struct or another with its fields.

enum ElementType : u32 { kF32, kF16, kBF16 };
enum Scoring : u32 { kSoftmax, kSigmoid, kAsIs, kSoftplusSqrt };

// A key is a float as an unsigned integer that sorts the same way; that of +NaN is above all others, 0 is below all.
// -0 counts as +0 and every NaN as +NaN: adding 0 makes them so.
constexpr u32 kNone = 0, kZeroKey = 0x80000000u, kInfKey = 0xff800000u, kMinusInfKey = 0x007fffffu;
#define kMinusInf __uint_as_float(0xff800000u)

__device__ __forceinline__ u32 to_key(float value) {
  const u32 bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return bits ^ ((u32)((i32)bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_key(u32 key) {
  return __uint_as_float(key ^ (~(u32)((i32)key >> 31) | 0x80000000u));
}

// The key of a score that selects: NaN selects nothing.
__device__ __forceinline__ u32 to_choice(float value) {
  const u32 key = to_key(value);
  return key > kInfKey ? kMinusInfKey : key;
}

__device__ __forceinline__ u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

// Maximum over the warp, in all lanes.
__device__ __forceinline__ u32 warp_max(u32 value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullWarp, value);
#else
#pragma unroll
  for (u32 distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = max_u32(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
#endif
}

// Sum over the warp, in all lanes, in a fixed order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (u32 distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

// e^x for a sum that also holds e^0, to 3e-7 of it: rounding x * log2(e) costs a small e^x more of its digits, but a
// small e^x matters less.
__device__ __forceinline__ float exp_of_summand(float x) {
#if EMULATED
  return exp2f(x * 1.4426950408889634f);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#if EMULATED
  return 1.0f / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

__device__ __forceinline__ float square_root(float x) {
#if EMULATED
  return sqrtf(x);
#else
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// sqrt(log(1 + e^x)). The logarithm is 2 atanh(t / (2 + t)) for t = e^-|x|, by its series, as 1 + t would lose digits of
// a small t; far below 0 it is e^x, whose root is within the reach of fp32 for twice as long.
__device__ __forceinline__ float softplus_sqrt(float x) {
  const bool is_low = x < -16;
  const float t = expf(is_low ? 0.5f * x : -fabsf(x)), s = t * reciprocal(2.0f + t), square = s * s;
  float series = fmaf(square, 1.0f / 13, 1.0f / 11);
  series = fmaf(series, square, 1.0f / 9);
  series = fmaf(series, square, 1.0f / 7);
  series = fmaf(series, square, 1.0f / 5);
  series = fmaf(series, square, 1.0f / 3);
  series = fmaf(series * square, 2.0f * s, 2.0f * s);
  return is_low ? t : square_root(fmaxf(x, 0.0f) + series);
}

constexpr float kLeastNormal = 1.175494351e-38f, kMostInvertible = 8.507059173e37f;  // 2^-126, 2^126

// A score; 0 if it is NaN, infinite or less than kLeastNormal.
__device__ __forceinline__ float counted(float score) {
  return score >= kLeastNormal && is_finite(score) ? score : 0.0f;
}

// The score of one expert. For softmax, greatest is the row's greatest logit and scale 1 / sum of e^(logit - greatest).
// A computed score that is NaN or less than kLeastNormal counts as 0. Only kAny knows softplus_sqrt.
template <bool kAny, typename Args>
__device__ __forceinline__ float score_of(const Args& args, float logit, float greatest, float scale) {
  if (kAny && args.scoring == kSoftplusSqrt) return counted(softplus_sqrt(logit));
  if (args.scoring == kAsIs) return is_finite(logit) ? logit : 0.0f;
  float score;
  if (args.scoring == kSigmoid) {
    score = reciprocal(1.0f + expf(-logit));
  } else {
    // Rounding the difference would make nearly all of the error of a small score; d + rest is exact.
    const float d = __fsub_rn(logit, greatest), back = __fsub_rn(logit, d);
    const float rest = __fadd_rn(__fsub_rn(logit, __fadd_rn(d, back)), __fsub_rn(back, greatest));
    const float power = expf(d);
    score = fmaf(power, rest, power) * scale;
  }
  return score >= kLeastNormal ? score : 0.0f;
}

// Weights are divided by their sum only if it and its reciprocal are normal numbers.
__device__ __forceinline__ float renormalized(float weight, float sum) {
  return kLeastNormal <= sum && sum <= kMostInvertible ? weight * reciprocal(sum) : weight;
}

template <typename Args>
__device__ __forceinline__ float load_logit(const Args& args, const char* row, u32 expert) {
  if (args.element == kF32) return reinterpret_cast<const float*>(row)[expert];
  const u16 bits = reinterpret_cast<const u16*>(row)[expert];
  return args.element == kF16 ? F16::to_float(bits) : BF16::to_float(bits);
}

template <typename Args>
__device__ __forceinline__ void write_result(const Args& args, i64 place, float weight, u32 id) {
  args.topk_weights[place] = weight;
  if (args.id_words == 1) {
    static_cast<u32*>(args.topk_ids)[place] = id;
  } else {
    static_cast<i64*>(args.topk_ids)[place] = (i32)id;
  }
}

// The k-th of the shared experts, which come after all others.
template <typename Args>
__device__ __forceinline__ void write_shared(const Args& args, u32 token, u32 k, bool padded) {
  const i64 place = token * (i64)(args.topk + args.num_shared) + args.topk + k;
  write_result(args, place, padded ? 0.0f : args.shared_weight, padded ? ~0u : args.num_experts + k);
}
