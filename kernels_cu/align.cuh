// SPDX-License-Identifier: Apache-2.0
// What the align kernels share: their argument, how an id becomes a bucket, and the stable placement itself.
//
// Buckets are the experts 0 .. num_experts - 1. sorted_token_ids lists, bucket by bucket, the flat indices i of
// the ids in it, ascending, each bucket padded to a multiple of block_size with num_ids; so does the tail.
// expert_ids names the bucket of each block, -1 past the last. Every output is a function of the counts
// alone, so the kernels agree to the last bit whatever the order in which threads run.
#pragma once
#include "common.cuh"

enum IdType : u32 { kI8, kU8, kI16, kU16, kI32, kI64 };  // u32 ids count as kI32: the same ids are dropped

enum MapMode : u32 {
  kNoMap = 0,
  kMapBlocks = 1,  // count all experts, then write expert_map[expert] into expert_ids
  kMapIds = 2,     // count expert_map[id] instead of id, and drop what is not on this rank
};

// Filled by cupy_moe/align.py, field by field, in this order.
struct AlignArgs {
  const void* topk_ids;
  const int* expert_map;  // [num_experts], read where map_mode is not kNoMap
  int* sorted_token_ids;  // [num_slots]
  int* expert_ids;        // [num_blocks]
  int* num_tokens_post_pad;  // [1]
  u32* scratch;           // align_global only
  i64 row_stride, col_stride;  // of topk_ids [num_ids / num_cols, num_cols], in elements; `Any` alone reads
  u32 num_cols, id_type;       // these four, the other readers know them
  u32 num_ids, num_experts, num_slots, num_blocks;
  u32 map_mode;
  Divisor block_size;
  u32 ids_per_block;  // how many ids one block places
  u32 num_rows;       // how many warps of a block rank ids, each with a row of counters
};

constexpr u32 kDropped = 0xffffffffu;  // the bucket of an id that is not placed

// One unsigned comparison drops negative ids, too: sign extension makes them large.
template <typename Unsigned>
__device__ __forceinline__ u32 to_bucket(const AlignArgs& args, Unsigned id) {
  if (id >= args.num_experts) return kDropped;
  if (args.map_mode != kMapIds) return (u32)id;
  const u32 local = (u32)__ldg(args.expert_map + (u32)id);
  return local < args.num_experts ? local : kDropped;
}

// How the ids are read: as contiguous words, 16 bytes a load where many are read, ...
template <typename Unsigned>
struct Contiguous {
  static constexpr u32 kPerLoad = 16 / sizeof(Unsigned);
  __device__ static __forceinline__ u32 bucket(const AlignArgs& args, u32 i) {
    return to_bucket(args, __ldg(static_cast<const Unsigned*>(args.topk_ids) + i));
  }
};
// ... or one by one, whatever their type and strides are.
struct Any {
  static constexpr u32 kPerLoad = 1;
  __device__ static u32 bucket(const AlignArgs& args, u32 i) {
    const u32 row = i / args.num_cols;
    const i64 offset = row * args.row_stride + (i - row * args.num_cols) * args.col_stride;
    const void* ids = args.topk_ids;
    i64 id = 0;
    switch (args.id_type) {
      case kI8: id = static_cast<const i8*>(ids)[offset]; break;
      case kU8: id = static_cast<const u8*>(ids)[offset]; break;
      case kI16: id = static_cast<const i16*>(ids)[offset]; break;
      case kU16: id = static_cast<const u16*>(ids)[offset]; break;
      case kI32: id = static_cast<const i32*>(ids)[offset]; break;
      case kI64: id = static_cast<const i64*>(ids)[offset]; break;
    }
    return to_bucket(args, (u64)id);
  }
};

// What expert_ids says of a block of this bucket.
__device__ __forceinline__ int expert_of(const AlignArgs& args, u32 bucket) {
  if (args.map_mode != kMapBlocks) return (int)bucket;
  const int local = __ldg(args.expert_map + bucket);
  return (u32)local < args.num_experts ? local : -1;
}

// Place id i at a slot; the first id of a block also names the block's expert.
__device__ __forceinline__ void place(const AlignArgs& args, u32 i, u32 bucket, u32 slot) {
  args.sorted_token_ids[slot] = (int)i;
  const u32 block = args.block_size.quotient(slot);
  if (block * args.block_size.value == slot) args.expert_ids[block] = expert_of(args, bucket);
}

// values[begin, end) = value, by `step` threads of which this is number `first`.
__device__ __forceinline__ void fill(int* values, u32 begin, u32 end, int value, u32 first, u32 step) {
#pragma unroll 1
  for (u32 i = begin + first; i < end; i += step) values[i] = value;
}

// ---------------------------------------------------------------------------------------------------------
// Placement with a table of counters (align_shared.cu, align_global.cu).
//
// The ids are cut into one piece of ids_per_block a block. A block places its piece, for which it needs, per
// bucket, how many ids come before the piece and how many there are in all. Inside the piece, tiles of
// num_rows * ids_per_row ids are ranked by num_rows warps: ids_per_row consecutive ids a warp, which keeps
// the order; a warp counts in its own row, so no atomics decide anything.
// ---------------------------------------------------------------------------------------------------------

constexpr u32 kMaxIdsPerLane = 4;
constexpr u32 kMaxIdsPerRow = kMaxIdsPerLane * kWarpSize;

// One per block, in shared or in global memory; cupy_moe/plan.py computes the same sizes.
struct Table {
  u32* before;  // [E] ids of the bucket before the piece; later the first slot of this block's ids
  u32* rest;    // [E] ids of the bucket from the piece on; later the first padding slot
  u16* rows;    // [num_rows + 1][E] ids of the bucket in a warp's part of the tile, then those before it

  static constexpr u32 kWordsPerExpert = 2;
  __device__ static __forceinline__ u32 words(u32 num_experts, u32 num_rows) {
    return kWordsPerExpert * num_experts + ((num_rows + 1) * num_experts + 1) / 2;
  }
  __device__ __forceinline__ Table(u32* memory, u32 num_experts)
      : before(memory), rest(memory + num_experts), rows((u16*)(memory + kWordsPerExpert * num_experts)) {}
};

// A warp's part of one tile: the ids stay in registers between ranking and placing.
struct Part {
  u32 buckets[kMaxIdsPerLane], ranks[kMaxIdsPerLane];
};

struct Piece {
  u32 begin, end, ids_per_row;

  __device__ __forceinline__ Piece(const AlignArgs& args, u32 index) {
    begin = min_u32(args.num_ids, index * args.ids_per_block);
    end = min_u32(args.num_ids, begin + args.ids_per_block);
    const u32 per_row = ceil_div(args.ids_per_block, args.num_rows);
    ids_per_row = min_u32(kMaxIdsPerRow, ceil_div(per_row, kWarpSize) * kWarpSize);
  }
  __device__ __forceinline__ u32 ids_per_tile(const AlignArgs& args) const { return args.num_rows * ids_per_row; }
};

template <typename Ids>
__device__ __forceinline__ void load_part(const AlignArgs& args, const Piece& piece, u32 tile, Part& part) {
  const u32 begin = tile + warp_id() * piece.ids_per_row + lane_id();
#pragma unroll
  for (u32 k = 0; k < kMaxIdsPerLane; ++k) {
    const u32 i = begin + k * kWarpSize;
    const bool mine = k * kWarpSize < piece.ids_per_row && i < piece.end;
    part.buckets[k] = mine ? Ids::bucket(args, i) : kDropped;
  }
}

__device__ __forceinline__ void rank_part(const AlignArgs& args, const Piece& piece, Part& part, const Table& table) {
  u16* row = table.rows + warp_id() * args.num_experts;
#pragma unroll
  for (u32 k = 0; k < kMaxIdsPerLane; ++k) {
    if (k * kWarpSize >= piece.ids_per_row) break;
    const u32 bucket = part.buckets[k];
    const u32 peers = __match_any_sync(kFullWarp, bucket);
    const u32 below = __popc(peers & lanes_below());
    u32 earlier = 0;
    if (bucket != kDropped) earlier = row[bucket];
    __syncwarp();
    if (bucket != kDropped && below == 0) row[bucket] = (u16)(earlier + __popc(peers));
    __syncwarp();
    part.ranks[k] = earlier + below;
  }
}

__device__ __forceinline__ void place_part(const AlignArgs& args, const Piece& piece, u32 tile, const Part& part,
                                           const Table& table) {
  const u16* row = table.rows + warp_id() * args.num_experts;
  const u32 begin = tile + warp_id() * piece.ids_per_row + lane_id();
#pragma unroll
  for (u32 k = 0; k < kMaxIdsPerLane; ++k) {
    const u32 bucket = part.buckets[k];
    if (k * kWarpSize < piece.ids_per_row && bucket != kDropped)
      place(args, begin + k * kWarpSize, bucket, table.before[bucket] + row[bucket] + part.ranks[k]);
  }
}

// Turn one bucket's column of row counts into counts of the rows before; the last row gets their sum.
__device__ __forceinline__ u32 scan_column(const AlignArgs& args, const Table& table, u32 bucket) {
  u32 sum = 0;
#pragma unroll 4
  for (u32 row = 0; row < args.num_rows; ++row) {
    u16& count = table.rows[row * args.num_experts + bucket];
    const u32 mine = count;
    count = (u16)sum;
    sum += mine;
  }
  table.rows[args.num_rows * args.num_experts + bucket] = (u16)sum;
  return sum;
}

__device__ __forceinline__ void count_one(u32* counts, u32 bucket) {
  if (bucket != kDropped) atomicAdd(counts + bucket, 1);
}

template <typename Ids>
__device__ __forceinline__ void count_one_by_one(const AlignArgs& args, u32 begin, u32 end, u32* counts) {
#pragma unroll 1
  for (u32 i = begin + threadIdx.x; i < end; i += blockDim.x) count_one(counts, Ids::bucket(args, i));
}

__device__ __forceinline__ void count_vector(const AlignArgs& args, const uint4& ids, u32* counts, u32) {
  count_one(counts, to_bucket(args, ids.x));
  count_one(counts, to_bucket(args, ids.y));
  count_one(counts, to_bucket(args, ids.z));
  count_one(counts, to_bucket(args, ids.w));
}
__device__ __forceinline__ void count_vector(const AlignArgs& args, const uint4& ids, u32* counts, u64) {
  count_one(counts, to_bucket(args, (u64)ids.y << 32 | ids.x));
  count_one(counts, to_bucket(args, (u64)ids.w << 32 | ids.z));
}

// counts[bucket] += 1 for the ids [begin, end). The order does not matter, so atomics do no harm; without a
// result, the hardware merges equal addresses of a warp, and a skewed routing costs no more than a uniform one.
template <typename Ids>
__device__ __forceinline__ void count_ids(const AlignArgs& args, u32 begin, u32 end, u32* counts) {
  count_one_by_one<Ids>(args, begin, end, counts);
}
template <typename Ids, typename Unsigned>
__device__ __forceinline__ void count_vectors(const AlignArgs& args, u32 begin, u32 end, u32* counts) {
  constexpr u32 kLoads = 4;
  const Unsigned* ids = static_cast<const Unsigned*>(args.topk_ids);
  if ((u64)(ids + begin) % 16 == 0 && begin < end) {
    const uint4* vectors = reinterpret_cast<const uint4*>(ids + begin);
    const u32 num_vectors = (end - begin) / Ids::kPerLoad, step = blockDim.x;
#pragma unroll 1
    for (u32 v = threadIdx.x; v < num_vectors; v += kLoads * step) {
      uint4 loaded[kLoads];  // all loads leave before the first is waited for
#pragma unroll
      for (u32 k = 0; k < kLoads; ++k)
        if (v + k * step < num_vectors) loaded[k] = __ldg(vectors + v + k * step);
#pragma unroll
      for (u32 k = 0; k < kLoads; ++k)
        if (v + k * step < num_vectors) count_vector(args, loaded[k], counts, Unsigned());
    }
    begin += num_vectors * Ids::kPerLoad;
  }
  count_one_by_one<Ids>(args, begin, end, counts);
}
template <>
__device__ __forceinline__ void count_ids<Contiguous<u32>>(const AlignArgs& args, u32 begin, u32 end, u32* counts) {
  count_vectors<Contiguous<u32>, u32>(args, begin, end, counts);
}
template <>
__device__ __forceinline__ void count_ids<Contiguous<u64>>(const AlignArgs& args, u32 begin, u32 end, u32* counts) {
  count_vectors<Contiguous<u64>, u64>(args, begin, end, counts);
}

// The padding slots, the tail, and what lies past the last block: shared out over all blocks of the grid.
__device__ __forceinline__ void write_padding(const AlignArgs& args, const u32* first_padding, u32 post_pad) {
  const u32 num_warps = blockDim.x / kWarpSize, value = args.num_ids;
#pragma unroll 1
  for (u32 bucket = blockIdx.x + gridDim.x * warp_id(); bucket < args.num_experts; bucket += gridDim.x * num_warps) {
    const u32 begin = first_padding[bucket];
    fill(args.sorted_token_ids, begin, args.block_size.round_up(begin), value, lane_id(), kWarpSize);
  }
  const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, num_threads = gridDim.x * blockDim.x;
  fill(args.sorted_token_ids, post_pad, args.num_slots, value, thread, num_threads);
  fill(args.expert_ids, args.block_size.quotient(post_pad), args.num_blocks, -1, thread, num_threads);
  if (thread == 0) *args.num_tokens_post_pad = (int)post_pad;
}

__device__ __forceinline__ void clear(u32* words, u32 count) {
#pragma unroll 1
  for (u32 i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

// Rank and place what comes after the first tile of a piece.
template <typename Ids>
__device__ __forceinline__ void place_further_tiles(const AlignArgs& args, const Piece& piece, const Table& table) {
  const bool ranks = warp_id() < args.num_rows;
#pragma unroll 1
  for (u32 tile = piece.begin + piece.ids_per_tile(args); tile < piece.end; tile += piece.ids_per_tile(args)) {
    __syncthreads();
#pragma unroll 1
    for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x) {
      table.before[bucket] += table.rows[args.num_rows * args.num_experts + bucket];
#pragma unroll 1
      for (u32 row = 0; row < args.num_rows; ++row) table.rows[row * args.num_experts + bucket] = 0;
    }
    Part part;
    if (ranks) load_part<Ids>(args, piece, tile, part);
    __syncthreads();
    if (ranks) rank_part(args, piece, part, table);
    __syncthreads();
#pragma unroll 1
    for (u32 bucket = threadIdx.x; bucket < args.num_experts; bucket += blockDim.x) scan_column(args, table, bucket);
    __syncthreads();
    if (ranks) place_part(args, piece, tile, part, table);
  }
}

// Three entry points a kernel: i32, i64, and whatever else.
#define FOR_EACH_READER(ENTRY) ENTRY(i32, Contiguous<u32>) ENTRY(i64, Contiguous<u64>) ENTRY(any, Any)
