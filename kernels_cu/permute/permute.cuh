// SPDX-License-Identifier: Apache-2.0
// What the kernels of moe_permute share: their argument, and how a block reads its units of rows and writes them.
//
// A unit is 16 bytes, or an element where rows are no multiples of these. A block has one part of the rows of some
// tokens: it reads each unit once, and writes it topk times.
#pragma once
#include "common.cuh"

struct PermuteArgs {
  const char* rows;
  char* permuted;
  int* inverse_ids;
  const char* scales;
  char* permuted_scales;
  int* expert_offsets;
  int* sorted_token_ids;
  int* expert_ids;  // this one and the next two are of permute_direct alone
  const void* topk_ids;
  const int* expert_map;
  u32 num_tokens, topk, tokens_per_block, units_per_row;
  Divisor parts, units_per_part;
  i64 token_stride;  // in bytes, as all strides of rows and scales
  u32 row_bytes, unit_bytes;
  u32 num_slots, num_ids, num_experts, words_per_offset;
  u32 has_padding, fills_tail;  // slots without a pair between others; whether those after all others are written
  u32 num_scales, scale_bytes;
  i64 scale_row_stride, scale_stride, permuted_scale_row_stride, permuted_scale_stride;
  u32 num_blocks, map_mode;  // from here on of permute_direct alone, as in AlignArgs
  Divisor block_size;
  u32 per_block;
  Divisor per_row;
  u32 num_rows;
  u32 id_type, num_cols;
  i64 row_stride, col_stride;  // of topk_ids
};

constexpr u32 kHeld = 4;  // units that a thread has asked for at once
constexpr u32 kMaxThreads = 256;

// What is moved at once, of `bytes`.
struct Vector {
  static constexpr u32 kSlotsAtOnce = 8;  // that are asked for together
  uint4 words;
  __device__ __forceinline__ void clear() { words = make_uint4(0, 0, 0, 0); }
  static __device__ __forceinline__ u64 offset(u32 unit, u32) { return (u64)unit * sizeof(uint4); }
  __device__ __forceinline__ void load(const char* address, u32) { words = *reinterpret_cast<const uint4*>(address); }
  __device__ __forceinline__ void store(char* address, u32) const { store_vector(address, words); }
};

struct Element {
  static constexpr u32 kSlotsAtOnce = 2;
  u64 bits;
  __device__ __forceinline__ void clear() { bits = 0; }
  static __device__ __forceinline__ u64 offset(u32 unit, u32 bytes) { return (u64)unit * bytes; }
  __device__ __forceinline__ void load(const char* address, u32 bytes) {
    switch (bytes) {
      case 1: bits = *reinterpret_cast<const u8*>(address); break;
      case 2: bits = *reinterpret_cast<const u16*>(address); break;
      case 4: bits = *reinterpret_cast<const u32*>(address); break;
      default: bits = *reinterpret_cast<const u64*>(address);
    }
  }
  __device__ __forceinline__ void store(char* address, u32 bytes) const {
    switch (bytes) {
      case 1: *reinterpret_cast<u8*>(address) = (u8)bits; break;
      case 2: *reinterpret_cast<u16*>(address) = (u16)bits; break;
      case 4: *reinterpret_cast<u32*>(address) = (u32)bits; break;
      default: *reinterpret_cast<u64*>(address) = bits;
    }
  }
};

// One part of the rows of some tokens.
struct Part {
  u32 group, index;
  u32 first_token, num_tokens;
  u32 first_unit, num_units;  // of each row

  __device__ __forceinline__ Part(const PermuteArgs& args)
      : group(args.parts.quotient(blockIdx.x)),
        index(blockIdx.x - group * args.parts.value),
        first_token(min_u32(args.num_tokens, group * args.tokens_per_block)),
        num_tokens(min_u32(args.num_tokens - first_token, args.tokens_per_block)),
        first_unit(index * args.units_per_part.value),
        num_units(args.units_per_row > first_unit ? args.units_per_row - first_unit : 0) {}
};

// The units of a part, kHeld a thread: request, then write(slot_of), where slot_of(token, k) is the slot of a pair of
// the part, or nothing below num_slots.
template <typename Unit>
struct Units {
  Unit held[kHeld];

  // Calls f(unit, token of the part, unit of the row) for each of the thread's.
  template <typename F>
  __device__ __forceinline__ void for_each(const PermuteArgs& args, const Part& part, F f) {
#pragma unroll
    for (u32 k = 0; k < kHeld; ++k) {
      const u32 u = k * blockDim.x + threadIdx.x, token = args.units_per_part.quotient(u);
      const u32 unit = u - token * args.units_per_part.value;
      if (token < part.num_tokens && unit < part.num_units) f(held[k], token, part.first_unit + unit);
    }
  }

  __device__ __forceinline__ void request(const PermuteArgs& args, const Part& part) {
    const char* rows = args.rows + part.first_token * args.token_stride;
    for_each(args, part, [&](Unit& value, u32 token, u32 unit) {
      value.load(rows + token * args.token_stride + Unit::offset(unit, args.unit_bytes), args.unit_bytes);
    });
  }

  template <typename SlotOf>
  __device__ __forceinline__ void write(const PermuteArgs& args, const Part& part, SlotOf slot_of) {
    for_each(args, part, [&](const Unit& value, u32 token, u32 unit) {
      char* column = args.permuted + Unit::offset(unit, args.unit_bytes);
      for_each_slot(args, token, slot_of,
                    [&](u32 slot) { value.store(column + (u64)slot * args.row_bytes, args.unit_bytes); });
    });
  }

  // Calls f(slot) for each pair of a token that has one. Slots are asked for together, as stores come between.
  template <typename SlotOf, typename F>
  __device__ static __forceinline__ void for_each_slot(const PermuteArgs& args, u32 token, SlotOf slot_of, F f) {
#pragma unroll 1
    for (u32 first = 0; first < args.topk; first += Unit::kSlotsAtOnce) {
      u32 slots[Unit::kSlotsAtOnce];
#pragma unroll
      for (u32 k = 0; k < Unit::kSlotsAtOnce; ++k) slots[k] = first + k < args.topk ? slot_of(token, first + k) : ~0u;
#pragma unroll
      for (u32 k = 0; k < Unit::kSlotsAtOnce; ++k)
        if (slots[k] < args.num_slots) f(slots[k]);
    }
  }
};

__device__ __forceinline__ char* place_of_scale(const PermuteArgs& args, u32 slot, u32 scale) {
  return args.permuted_scales + slot * args.permuted_scale_row_stride + scale * args.permuted_scale_stride;
}

// The scales of the tokens, by the first part.
template <typename SlotOf>
__device__ __forceinline__ void write_scales(const PermuteArgs& args, const Part& part, SlotOf slot_of) {
  if (part.index > 0) return;
#pragma unroll 1
  for (u32 token = warp_id(); token < part.num_tokens; token += blockDim.x / kWarpSize) {
    const char* scales = args.scales + (part.first_token + token) * args.scale_row_stride;
#pragma unroll 1
    for (u32 scale = lane_id(); scale < args.num_scales; scale += kWarpSize) {
      Element value;
      value.load(scales + scale * args.scale_stride, args.scale_bytes);
      Units<Element>::for_each_slot(
          args, token, slot_of, [&](u32 slot) { value.store(place_of_scale(args, slot, scale), args.scale_bytes); });
    }
  }
}

// Zeros in the rows [first, end) that have no pair, by all warps of the grid: those from `used` on, and of those before
// what has_pair does not know.
template <typename Unit, typename HasPair>
__device__ __forceinline__ void clear_rows(const PermuteArgs& args, u32 used, HasPair has_pair) {
  const u32 warps = blockDim.x / kWarpSize, end = args.fills_tail ? args.num_slots : used;
  Unit zeros;
  Element zero;
  zeros.clear(), zero.clear();
#pragma unroll 1
  for (u32 slot = (args.has_padding ? 0 : used) + blockIdx.x * warps + warp_id(); slot < end;
       slot += gridDim.x * warps) {
    if (slot < used && has_pair(slot)) continue;
    char* row = args.permuted + (u64)slot * args.row_bytes;
#pragma unroll 1
    for (u32 unit = lane_id(); unit < args.units_per_row; unit += kWarpSize)
      zeros.store(row + Unit::offset(unit, args.unit_bytes), args.unit_bytes);
#pragma unroll 1
    for (u32 scale = lane_id(); scale < args.num_scales; scale += kWarpSize)
      zero.store(place_of_scale(args, slot, scale), args.scale_bytes);
  }
}
