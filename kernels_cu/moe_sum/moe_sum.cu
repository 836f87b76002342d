// SPDX-License-Identifier: Apache-2.0
// moe_sum: the outputs of the experts that a token went to, added up. moe_unpermute: the same, of rows in any order.
//
//   output[t, h] = factor * sum over k of weights[t, k] * input[t, k, h], plus shared[t, h]
//
// in       input [T, topk, H] of Element, any strides; shared [T, H], weights [T, topk] fp32, ids [T, topk] and
//          expert_map [num_experts]: each may be missing (null)                                      (SumArgs)
//          rows: input [num_experts, H], slot_stride apart, and ids [T, topk] say which row is slot k of token t; where
//          expert_map is not null, it holds how many of the rows are there
// out      output [T, H] of Element
// grid     threads that together cover num_units; block: up to kMaxThreads threads
//
// One thread computes one unit of the output: 16 bytes, or one element where strides or alignment rule that out (any).
// It requests kInFlight slots before it adds the first, so that their latencies overlap; more than topk would only
// take registers. The entries 2, 4 and 8 are for multiples of that many slots, n is for any topk; none of these has
// weights, ids, a shared output or a factor, which ext, any, rows_X and rows_any have. The last ones look up a row before
// they can ask for it, so more threads on an SM are worth more than more loads of each: rows_4 is for multiples of 4
// slots and rows_2 for any topk, rows_8 for few tokens, which do not fill the device.
//
// Slots whose id is negative, past the map, or mapped outside [0, num_experts) are not read; nor are rows that are not.
// Order: k ascending, in fp32; products and sums are rounded one by one (no fma), as on the CPU.
#include "convert.cuh"

// What every kernel reads comes first: the first access to each 64-byte line of the arguments takes 200 cycles.
struct SumArgs {
  const char* input;
  char* output;
  const char* shared;
  const float* weights;
  const u32* ids;
  const u32* expert_map;
  i64 token_stride, slot_stride, output_stride;  // in bytes
  u32 num_units, topk;
  Divisor units_per_token;
  u32 num_threads;   // blockDim.x, which is in another line of constants
  u32 num_experts;   // of the map; 2^31 without one
  u32 words_per_id;  // 1 or 2
  float factor;
  i64 element_stride, shared_stride;  // in bytes
};

constexpr u32 kMaxThreads = 128;
constexpr u32 kRowsBlocks = __CUDA_ARCH__ < 1000 ? 12 : 10;  // of rows_2 on an SM; twelve would spill there

// 16 bytes at a time. Not as what stays the same for all of a kernel's life (.nc), as the kernel before may still write
// when this one begins.
__device__ __forceinline__ uint4 load_vector(const char* address) {
#if EMULATED
  return *reinterpret_cast<const uint4*>(address);
#else
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
#endif
}

// What a thread holds of one slot, and its sum in fp32.
template <typename Element>
struct Vector {
  static constexpr u32 kBytes = 16, kElements = 16 / Element::kBytes;
  uint4 words;
  __device__ __forceinline__ void load(const char* address) { words = load_vector(address); }
  __device__ __forceinline__ void unpack(float* values) const {
    Element::unpack(words.x, values);
    Element::unpack(words.y, values + Element::kPerWord);
    Element::unpack(words.z, values + 2 * Element::kPerWord);
    Element::unpack(words.w, values + 3 * Element::kPerWord);
  }
  static __device__ __forceinline__ void store(char* address, const float* values) {
    uint4 words;
    words.x = Element::pack(values);
    words.y = Element::pack(values + Element::kPerWord);
    words.z = Element::pack(values + 2 * Element::kPerWord);
    words.w = Element::pack(values + 3 * Element::kPerWord);
    store_vector(address, words);
  }
};

template <typename Element>
struct Scalar {
  static constexpr u32 kBytes = Element::kBytes, kElements = 1;
  typename Element::Bits bits;
  __device__ __forceinline__ void load(const char* address) {
    bits = *reinterpret_cast<const typename Element::Bits*>(address);
  }
  __device__ __forceinline__ void unpack(float* values) const { values[0] = Element::to_float(bits); }
  static __device__ __forceinline__ void store(char* address, const float* values) {
    *reinterpret_cast<typename Element::Bits*>(address) = Element::from_float(values[0]);
  }
};

enum Kind : u32 {
  kPlain,     // neither weights nor ids, nor a shared output or a factor
  kExtended,  // perhaps all of these
  kRows,      // the same, and ids say which row of the input a slot is
};

// Which of the slots [first, first + kInFlight) of a token are read, and their ids. Branch-free, so that all loads
// overlap.
template <Kind kKind, u32 kInFlight>
__device__ __forceinline__ void find_reads(const SumArgs& args, u32 token, u32 first, bool (&reads)[kInFlight],
                                           u32 (&ids)[kInFlight]) {
  const u32* of_token = args.ids + (i64)token * args.topk * args.words_per_id;
  u32 num_rows = args.num_experts;
  if (kKind == kRows && args.expert_map != nullptr) num_rows = min_u32(num_rows, *args.expert_map);
#pragma unroll
  for (u32 i = 0; i < kInFlight; ++i) {
    const u32* words = of_token + min_u32(first + i, args.topk - 1) * args.words_per_id;
    const u32 id = words[0], upper = words[args.words_per_id - 1];
    ids[i] = id;
    reads[i] &= id < num_rows && (args.words_per_id == 1 || upper == 0);
    if (kKind != kRows && args.expert_map != nullptr) {
      reads[i] &= args.expert_map[min_u32(id, args.num_experts - 1)] < args.num_experts;
    }
  }
}

// Adds the slots [first, first + kInFlight) of a token: all of them (kExact), or those below topk.
template <typename Unit, Kind kKind, u32 kInFlight, bool kExact>
__device__ __forceinline__ void add_slots(const SumArgs& args, u32 token, u32 first, const char* input,
                                          float (&sum)[Unit::kElements]) {
  constexpr bool kExtends = kKind != kPlain;
  bool reads[kInFlight];
  u32 ids[kInFlight];
#pragma unroll
  for (u32 i = 0; i < kInFlight; ++i) reads[i] = kExact || first + i < args.topk;
  if (kKind == kRows || (kExtends && args.ids != nullptr)) find_reads<kKind>(args, token, first, reads, ids);
  float weights[kInFlight];
#pragma unroll
  for (u32 i = 0; i < kInFlight; ++i) weights[i] = 1;
  if (kExtends && args.weights != nullptr) {
    const float* begin = args.weights + (i64)token * args.topk + first;
#pragma unroll
    for (u32 i = 0; i < kInFlight; ++i) {
      if (kExact || first + i < args.topk) weights[i] = begin[i];
    }
  }
  Unit slots[kInFlight];
#pragma unroll
  for (u32 i = 0; i < kInFlight; ++i) {
    if (reads[i]) slots[i].load(kKind == kRows ? input + ids[i] * args.slot_stride : input);
    if (kKind != kRows) input += args.slot_stride;
  }
#pragma unroll
  for (u32 i = 0; i < kInFlight; ++i) {
    if (!reads[i]) continue;
    float values[Unit::kElements];
    slots[i].unpack(values);
#pragma unroll
    for (u32 e = 0; e < Unit::kElements; ++e) {
      sum[e] = __fadd_rn(sum[e], kExtends ? __fmul_rn(weights[i], values[e]) : values[e]);
    }
  }
}

template <typename Unit, Kind kKind, u32 kInFlight, bool kExact>
__device__ __forceinline__ void moe_sum(const SumArgs& args) {
  constexpr bool kExtends = kKind != kPlain;
  const u32 unit = blockIdx.x * args.num_threads + threadIdx.x;
  if (unit >= args.num_units) return;
  wait_for_kernel_before();
  const u32 token = args.units_per_token.quotient(unit);
  const u32 place = unit - token * args.units_per_token.value;
  const i64 offset = Unit::kElements == 1 ? place * args.element_stride : (i64)place * Unit::kBytes;
  const char* input = args.input + token * args.token_stride + offset;

  Unit shared;
  if (kExtends && args.shared != nullptr) {
    shared.load(args.shared + token * args.shared_stride + (i64)place * Unit::kBytes);
  }
  float sum[Unit::kElements] = {};
#pragma unroll 1
  for (u32 first = 0; first < args.topk; first += kInFlight) {
    add_slots<Unit, kKind, kInFlight, kExact>(args, token, first, input, sum);
    if (kKind != kRows) input += kInFlight * args.slot_stride;
  }
  if (kExtends) {
#pragma unroll
    for (u32 e = 0; e < Unit::kElements; ++e) sum[e] = __fmul_rn(sum[e], args.factor);
    if (args.shared != nullptr) {
      float values[Unit::kElements];
      shared.unpack(values);
#pragma unroll
      for (u32 e = 0; e < Unit::kElements; ++e) sum[e] = __fadd_rn(sum[e], values[e]);
    }
  }
  Unit::store(args.output + token * args.output_stride + (i64)place * Unit::kBytes, sum);
}

#define ENTRY(name, Unit, kKind, kInFlight, kExact, kMinBlocks)         \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, kMinBlocks) \
      moe_sum_##name(const __grid_constant__ SumArgs args) {            \
    moe_sum<Unit, kKind, kInFlight, kExact>(args);                      \
  }
#define ENTRIES(type, Element)                                        \
  ENTRY(2_##type, Vector<Element>, kPlain, 2, true, 8)                \
  ENTRY(4_##type, Vector<Element>, kPlain, 4, true, 8)                \
  ENTRY(8_##type, Vector<Element>, kPlain, 8, true, 8)                \
  ENTRY(n_##type, Vector<Element>, kPlain, 8, false, 8)               \
  ENTRY(ext_##type, Vector<Element>, kExtended, 4, false, 6)          \
  ENTRY(any_##type, Scalar<Element>, kExtended, 4, false, 6)          \
  ENTRY(rows_2_##type, Vector<Element>, kRows, 2, false, kRowsBlocks) \
  ENTRY(rows_4_##type, Vector<Element>, kRows, 4, true, 9)            \
  ENTRY(rows_8_##type, Vector<Element>, kRows, 8, false, 5)           \
  ENTRY(rows_any_##type, Scalar<Element>, kRows, 8, false, 5)
ENTRIES(f32, F32)
ENTRIES(f16, F16)
ENTRIES(bf16, BF16)
