// SPDX-License-Identifier: Apache-2.0
// What the products of the experts share: their argument, activations, and what mma.sync kernels ask of a warp.
//
// GEMM 1 takes rows of hidden states to rows of activations, GEMM 2 these to outputs; both are
//
//   output[pair] = epilogue(rows[pair / rows_shared] * weights[expert]^T)
//
// for blocks of pairs of one expert, in the order of sorted_token_ids. A pair is a token and one of its experts.
#pragma once
#include "convert.cuh"

enum Activation : u32 { kNone, kSilu, kGelu, kGeluTanh, kRelu2, kSwiglu };

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Not inlined: an epilogue has up to 128 of them, and each would bring all activations.
__device__ __noinline__ float activated(u32 activation, float x) {
  switch (activation) {
    case kSilu: return x * sigmoid(x);
    case kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case kGeluTanh: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case kRelu2: return x < 0 ? 0.0f : x * x;  // NaN stays
    default: return x;
  }
}

// With a gate, both of swiglu clamped, the gate only from above.
__device__ __noinline__ float activated_gate(u32 activation, float gate, float up, float alpha, float beta,
                                             float limit) {
  if (activation != kSwiglu) return activated(activation, gate) * up;
  gate = gate > limit ? limit : gate;  // NaN stays, as it would not with fminf
  up = up > limit ? limit : up < -limit ? -limit : up;
  return (up + beta) * gate * sigmoid(alpha * gate);
}

// 1 / (1 + e^-x) within 1e-6, by the special function unit: results are rounded to 8 or 11 bits.
__device__ __forceinline__ float fast_sigmoid(float x) {
#if EMULATED
  return sigmoid(x);
#else
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
#endif
}

template <typename Args>
__device__ __forceinline__ float gated(const Args& args, float gate, float up) {
  return activated_gate(args.activation, gate, up, args.alpha, args.beta, args.limit);
}

// ---- cp.async, ldmatrix, mma ----------------------------------------------------------------------------------------

// 16 bytes to shared memory, some time before wait_copies; zeros where num_bytes is 0.
__device__ __forceinline__ void copy_async_of(u32 num_bytes, void* shared, const void* global) {
#if EMULATED
  emulator::copy_async(shared, global, num_bytes != 0);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(num_bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  copy_async_of(exists ? 16 : 0, shared, global);
}

// 4 bytes, or zeros, in the same way.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, bool exists) {
#if EMULATED
  emulator::copy_async(shared, global, exists, 4);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global),
               "r"(exists ? 4 : 0)
               : "memory");
#endif
}

// What a thread has asked to be copied since the last time is one group.
__device__ __forceinline__ void commit_copies() {
#if EMULATED
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most kGroups groups of the calling thread are on their way.
template <u32 kGroups>
__device__ __forceinline__ void wait_copies() {
#if EMULATED
  emulator::wait_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes; lane l has the address of row l % 8 of matrix l / 8, and gets two elements of row
// l / 4 of each.
__device__ __forceinline__ void load_matrices(u32 (&words)[4], const void* row) {
#if EMULATED
  emulator::load_matrices(words, row, __LINE__);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
#endif
}

// sums[16][8] += a[16][16] * b[8][16]^T, in the layout of m16n8k16.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1);

#if EMULATED
template <>
inline void multiply_add<BF16>(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::multiply_add(sums, a, b0, b1, BF16::to_float, __LINE__);
}
template <>
inline void multiply_add<F16>(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::multiply_add(sums, a, b0, b1, F16::to_float, __LINE__);
}
#else
#define MULTIPLY_ADD(Element, type)                                                                           \
  template <>                                                                                                 \
  __device__ __forceinline__ void multiply_add<Element>(float (&sums)[4], const u32(&a)[4], u32 b0, u32 b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
MULTIPLY_ADD(BF16, "bf16")
MULTIPLY_ADD(F16, "f16")
#endif

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr u32 kDepth = 64, kRowBytes = kDepth * 2, kChunks = kRowBytes / 16;  // of a step along the depth, of 16 bits

// Chunks of 16 bytes are stored so that neither rows nor columns of them meet in a bank; as TMA's swizzle of 128 bytes.
__device__ __forceinline__ u32 chunk_offset(u32 row, u32 chunk) { return row * kRowBytes + ((chunk ^ row % 8) * 16); }

// A tile of the output. With a gate, a column takes two rows of weights: those of eight gates and of their eight ups
// alternate, so that a thread has the sums of both.
template <typename ElementType, bool kHasGate, u32 kTileRows, u32 kTileWeightRows, u32 kNumThreads, u32 kNumBytes = 2>
struct TileOf {
  using Element = ElementType;
  static constexpr bool kGated = kHasGate;
  static constexpr u32 kRows = kTileRows, kWeightRows = kTileWeightRows, kThreads = kNumThreads;
  static constexpr u32 kColumns = kGated ? kWeightRows / 2 : kWeightRows;
  static constexpr u32 kBytes = kNumBytes;  // of what is multiplied
  static constexpr u32 kStepDepth = kRowBytes / kBytes, kPerChunk = 16 / kBytes;
  static constexpr u32 kStageBytes = (kRows + kWeightRows) * kRowBytes;

  // The column of the tile that row r of its weights is for.
  __device__ static __forceinline__ u32 column(u32 r) { return kGated ? r / 16 * 8 + r % 8 : r; }
  // The row of the expert's weights.
  template <typename Args>
  __device__ static __forceinline__ u32 weight_row(const Args& args, u32 first_column, u32 r) {
    const u32 row = (first_column + column(r)) * args.row_step;
    return kGated && r / 8 % 2 != 0 ? row + args.up_offset : row;
  }
};

// The row of one pair, by a block.
template <u32 kThreads, typename Args>
__device__ __forceinline__ void clear_row(const Args& args, u32 pair) {
  uint4* row = reinterpret_cast<uint4*>(args.output + (i64)pair * args.num_columns * 2);
#pragma unroll 1
  for (u32 i = threadIdx.x; i < args.num_columns / 8; i += kThreads) row[i] = make_uint4(0, 0, 0, 0);
}

// Of rows l / 4 and l / 4 + 8 of the tile, in lane l; not looked at where a call has none.
template <typename Args>
__device__ __forceinline__ void load_router_weights(const Args& args, const u32* pairs, float (&weights)[2]) {
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 pair = pairs[half * 8 + lane_id() / 4];
    weights[half] = args.topk_weights != nullptr && pair < args.num_pairs ? args.topk_weights[pair] : 0.0f;
  }
}

// Bias, router weight, activation: for 16 rows of the tile in the layout of m16n8k16, by one warp, of kN products side by
// side, for the rows of weights from first_weight_row on, a multiple of 16. One thing after another, as what a call does
// not have is then jumped over once. With a gate, the results are where the gates were.
template <typename Tile, typename Args, u32 kN>
__device__ __forceinline__ void finish_sums(const Args& args, const float (&weights)[2], u32 expert, u32 first_column,
                                            u32 first_weight_row, float (&sums)[kN][4]) {
  using Element = typename Tile::Element;
  constexpr u32 kStep = Tile::kGated ? 2 : 1;  // products for 8 columns
  if (args.bias != nullptr) {
    const u32 r = first_weight_row + lane_id() % 4 * 2, column = first_column + Tile::column(r);
    const auto* bias = reinterpret_cast<const typename Element::Bits*>(args.bias) + expert * args.bias_stride +
                       Tile::weight_row(args, first_column, r);
#pragma unroll
    for (u32 n = 0; n < kN; ++n) {
      if (column + n / kStep * 8 >= args.num_columns) break;
      const auto* mine = n % kStep == 0 ? bias : bias + args.up_offset;
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        const float value = Element::to_float(mine[e * args.row_step]);
        sums[n][e] += value;
        sums[n][e + 2] += value;
      }
      if (n % kStep == kStep - 1) bias += 8 * args.row_step;
    }
  }
  if (args.topk_weights != nullptr) {
#pragma unroll
    for (u32 n = 0; n < kN; ++n) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) sums[n][e] *= weights[e / 2];
    }
  }
  if (Tile::kGated && args.activation == kSilu) {
#pragma unroll
    for (u32 n = 0; n < kN; n += kStep) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) sums[n][e] = sums[n][e] * fast_sigmoid(sums[n][e]) * sums[n + kStep - 1][e];
    }
  } else if (args.activation != kNone) {
#pragma unroll
    for (u32 n = 0; n < kN; n += kStep) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        sums[n][e] =
            Tile::kGated ? gated(args, sums[n][e], sums[n + kStep - 1][e]) : activated(args.activation, sums[n][e]);
      }
    }
  }
}
