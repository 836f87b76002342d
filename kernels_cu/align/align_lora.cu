// SPDX-License-Identifier: Apache-2.0
// moe_lora_align_block_size: an alignment for each adapter, of the ids of its tokens, all in one launch or two.
//
// in       topk_ids [num_ids], topk of each token; token_lora_mapping [num_ids / topk] int32, the adapter of each token;
//          adapter_enabled [adapters] bool or int32, or null, where all are; expert_map [num_experts] or unused    (LoraArgs)
// out      sorted_token_ids [adapters][num_slots], expert_ids [adapters][num_blocks], num_tokens_post_pad [adapters], all
//          int32. Ids of other adapters' tokens are dropped; those of an adapter that is not enabled are, too
// scratch  scratch_words words for each adapter, as align_global has them
// grid     team blocks for each adapter; these, block and shared: as align_small, align_shared and align_global
//
// The blocks of an adapter are a team, which does what the grid does in those kernels; its ids are read through the map
// of tokens to adapters.
#include "align/align.cuh"
#include "align/global.cuh"
#include "align/shared.cuh"
#include "align/small.cuh"

struct LoraArgs {
  const void* topk_ids;
  int* sorted_token_ids;
  int* expert_ids;
  int* num_tokens_post_pad;
  const int* token_lora_mapping;
  const void* adapter_enabled;
  const int* expert_map;
  u32* scratch;
  u32 num_ids, num_experts, num_slots, num_blocks;  // of one adapter
  u32 map_mode;
  Divisor block_size;
  Divisor team;  // blocks of an adapter
  Divisor topk;
  u32 per_block;  // of align_shared and align_global, as the next two
  Divisor per_row;
  u32 num_rows;
  u32 slots_per_block, lanes_per_id;  // of align_small
  u32 id_type, num_cols;
  i64 row_stride, col_stride;
  u32 scratch_words, flag_bytes;  // of an adapter
};

// What a block knows of its adapter, whose outputs the pointers lead to.
struct OfAdapter : LoraArgs {
  u32 adapter, rank;
  bool is_enabled;

  __device__ __forceinline__ OfAdapter(const LoraArgs& args)
      : LoraArgs(args), adapter(args.team.quotient(blockIdx.x)), rank(blockIdx.x - adapter * args.team.value) {
    sorted_token_ids += (u64)adapter * num_slots;
    expert_ids += (u64)adapter * num_blocks;
    num_tokens_post_pad += adapter;
    scratch += (u64)adapter * scratch_words;
    is_enabled = true;
    if (adapter_enabled == nullptr) return;
    is_enabled = flag_bytes == 1 ? __ldg(static_cast<const u8*>(adapter_enabled) + adapter) != 0
                                 : __ldg(static_cast<const int*>(adapter_enabled) + adapter) != 0;
  }
  __device__ __forceinline__ bool has(u32 token) const {
    return is_enabled && (u32)__ldg(token_lora_mapping + token) == adapter;
  }
};

__device__ __forceinline__ u32 team_rank(const OfAdapter& args) { return args.rank; }
__device__ __forceinline__ u32 team_size(const OfAdapter& args) { return args.team.value; }

// Ids, of which those of other adapters' tokens are none.
template <typename Ids>
struct Mine {
  using Id = typename Ids::Id;
  using Vector = typename Ids::Vector;
  static constexpr u32 kPerLoad = Ids::kPerLoad;

  __device__ static __forceinline__ Id load(const OfAdapter& args, u32 i) {
    const Id id = Ids::load(args, i);
    return args.has(args.topk.quotient(i)) ? id : ~Id(0);
  }
  __device__ static __forceinline__ Vector load_vector(const OfAdapter& args, u32 i) {
    Vector vector = Ids::load_vector(args, i);
#pragma unroll
    for (u32 k = 0; k < kPerLoad; ++k)
      if (!args.has(args.topk.quotient(i + k))) vector.ids[k] = ~Id(0);
    return vector;
  }
};

#define ENTRY(body, name, ...)                                                                               \
  extern "C" __global__ void __launch_bounds__(1024, 1) lora_##name(const __grid_constant__ LoraArgs args) { \
    body<__VA_ARGS__>(OfAdapter(args));                                                                      \
  }
#define ENTRIES(name, Ids)                          \
  ENTRY(align_small, small_##name, Mine<Ids>)       \
  ENTRY(align_shared, shared_##name, Mine<Ids>, 1)  \
  ENTRY(align_count, count_##name, Mine<Ids>, true) \
  ENTRY(align_scatter, scatter_##name, Mine<Ids>, true)
ENTRIES(i32, Contiguous<u32>)
ENTRIES(any, Any)
ENTRY(align_count, count_large_any, Mine<Any>, false)
ENTRY(align_scatter, scatter_large_any, Mine<Any>, false)

#if __CUDA_ARCH__ >= 900
#define CLUSTER_ENTRY(kCluster)                                                          \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(1024, 1) \
      lora_shared_cluster##kCluster##_i32(const __grid_constant__ LoraArgs args) {       \
    align_shared<Mine<Contiguous<u32>>, kCluster>(OfAdapter(args));                      \
  }
CLUSTER_ENTRY(8)
CLUSTER_ENTRY(16)
#endif
