// SPDX-License-Identifier: Apache-2.0
// route in one launch: gating and the alignment of its ids, which do not leave the SM in between. What its units share.
//
// Gating again in each block, or in each cluster, costs less than telling all others, as one SM takes a cycle or two for
// each sector that an alignment writes. Weights and ids are written by the first of them.
#pragma once
#include "align/align.cuh"
#include "gate/warp.cuh"

struct RouteArgs {
  const char* logits;
  const float* bias;
  const u8* padding_mask;
  float* topk_weights;
  void* topk_ids;
  int* sorted_token_ids;
  int* expert_ids;
  int* num_tokens_post_pad;
  const int* expert_map;
  i64 row_stride;
  u32 num_tokens, num_experts, topk;  // from here on as in GateArgs
  u32 num_groups, topk_group, group_size;
  u32 element, id_words, vectors, scoring, renormalize;
  float factor;
  u32 num_shared;
  float shared_weight;
  u32 num_ids, num_slots, num_blocks;  // from here on as in AlignArgs and SmallArgs
  u32 map_mode;
  Divisor block_size;
  u32 slots_per_block, lanes_per_id;
  u32 per_block;
  Divisor per_row;
  u32 num_rows;
  u32 rows_per_block;  // tokens that a block of a cluster gates
};

// For gating: ids go to shared memory, too.
struct Gated : RouteArgs {
  u32* ids;
  bool writes;
  __device__ __forceinline__ Gated(const RouteArgs& args, u32* ids, bool writes)
      : RouteArgs(args), ids(ids), writes(writes) {}
};

__device__ __forceinline__ void write_result(const Gated& args, i64 place, float weight, u32 id) {
  args.ids[place] = id;
  if (args.writes) write_result(static_cast<const RouteArgs&>(args), place, weight, id);
}

// For the alignment: the ids are those, and shared experts are experts.
struct Placed : RouteArgs {
  const u32* ids;
  u32 num_experts;
  __device__ __forceinline__ Placed(const RouteArgs& args, const u32* ids)
      : RouteArgs(args), ids(ids), num_experts(args.num_experts + args.num_shared) {}
};

struct InShared {
  using Id = u32;
  static constexpr u32 kPerLoad = 4;
  struct alignas(16) Vector {
    Id ids[kPerLoad];
  };
  __device__ static __forceinline__ Id load(const Placed& args, u32 i) { return args.ids[i]; }
  __device__ static __forceinline__ Vector load_vector(const Placed& args, u32 i) {
    return *reinterpret_cast<const Vector*>(args.ids + i);
  }
};

// The bodies of gating that entries are made of: these do all that the others of gate_warp.cu do, and to the same bits.
#define FOR_EACH_GATE(ENTRY) ENTRY(plain, 4, kPlain) ENTRY(plain, 8, kPlain) ENTRY(any, 8, kAny) ENTRY(any, 16, kAny)
