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

enum Activation : u32 { kNone, kSilu, kGelu, kGeluTanh, kRelu2, kSwigluOai };

// What every block reads comes first, as the first look at a line of 64 bytes of the arguments takes 200 cycles.
struct ExpertsArgs {
  const int* sorted_token_ids;  // [num_tokens_post_pad] pairs; those from num_pairs on are padding
  const int* expert_ids;        // [blocks]
  const int* num_tokens_post_pad;
  const char* rows;                              // [num_pairs / rows_shared, depth], row_stride bytes apart
  const char* weights;                           // [num_experts][rows of an expert][depth]
  char* output;                                  // [num_pairs, num_columns]
  const char* bias;                              // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;                     // [num_pairs] or null: multiplies what the activation gets
  i64 row_stride, expert_stride, weight_stride;  // in bytes
  u32 num_pairs, num_experts;
  Divisor column_tiles;  // tiles of kColumns outputs that cover num_columns
  Divisor rows_shared;   // pairs that have one row: topk in GEMM 1, 1 in GEMM 2
  u32 depth, num_columns;
  u32 activation;      // an Activation
  u32 row_step;        // of the row of weights for the next column: 2 where gate and up rows alternate
  u32 up_offset;       // from the row of a gate to that of its up
  u32 clears_unknown;  // pairs of experts that are not here get rows of zeros
  i64 bias_stride;     // in elements, of an expert
  float alpha, limit;  // of kSwigluOai
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Not inlined: an epilogue has up to 128 of them, and each would bring all activations.
__device__ __noinline__ float activated(u32 activation, float x) {
  switch (activation) {
    case kSilu: return x * sigmoid(x);
    case kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case kGeluTanh: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case kRelu2: return x > 0 ? x * x : 0.0f;
    default: return x;
  }
}

__device__ __noinline__ float swiglu_oai(float gate, float up, float alpha, float limit) {
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return (up + 1.0f) * gate * sigmoid(alpha * gate);
}

__device__ __forceinline__ float gated(const ExpertsArgs& args, float gate, float up) {
  if (args.activation == kSwigluOai) return swiglu_oai(gate, up, args.alpha, args.limit);
  return activated(args.activation, gate) * up;
}

// ---- cp.async, ldmatrix, mma ----------------------------------------------------------------------------------------

// 16 bytes to shared memory, some time before wait_copies; zeros where there is no source.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
#if EMULATED
  emulator::copy_async(shared, global, exists);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(exists ? 16 : 0)
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
