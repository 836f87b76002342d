// SPDX-License-Identifier: Apache-2.0
// What the align kernels share: their arguments, how an id becomes a bucket, and the stable placement itself.
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

// The argument of align_shared and align_global; align_small has its own, with the same names for what ids and blocks
// are. What every kernel reads comes first: the first access to each 64-byte line of the arguments takes 200 cycles.
struct AlignArgs {
  const void* topk_ids;
  int* sorted_token_ids;     // [num_slots]
  int* expert_ids;           // [num_blocks]
  int* num_tokens_post_pad;  // [1]
  const int* expert_map;     // [num_experts], read where map_mode is not kNoMap
  u32* scratch;              // align_global only
  u32 num_ids, num_experts, num_slots, num_blocks;
  u32 map_mode;
  Divisor block_size;
  u32 per_block;               // ids that one block places, a multiple of 32
  Divisor per_row;             // consecutive ids that one warp places, a multiple of 32
  u32 num_rows;                // warps that place ids
  u32 id_type, num_cols;       // these four are for `Any` alone, the other readers know them:
  i64 row_stride, col_stride;  // of topk_ids [num_ids / num_cols, num_cols], in elements
};

// Below, `Args` is either of the two structs.

// The blocks that make an alignment together: all of the grid, unless there are several alignments.
template <typename Args>
__device__ __forceinline__ u32 team_rank(const Args& args) {
  return blockIdx.x;
}
template <typename Args>
__device__ __forceinline__ u32 team_size(const Args& args) {
  return gridDim.x;
}

// How ids are read, kPerLoad at once. One unsigned comparison drops negative ids, too, if they are extended
// with their sign; an id of all ones is never an expert, and stands for none.
template <typename Unsigned>
struct Contiguous {  // 16-byte loads: topk_ids is aligned to 16 bytes
  using Id = Unsigned;
  static constexpr u32 kPerLoad = 16 / sizeof(Id);
  struct alignas(16) Vector {
    Id ids[kPerLoad];
  };
  template <typename Args>
  __device__ static __forceinline__ Id load(const Args& args, u32 i) {
    return __ldg(static_cast<const Id*>(args.topk_ids) + i);
  }
  template <typename Args>
  __device__ static __forceinline__ Vector load_vector(const Args& args, u32 i) {
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(static_cast<const Id*>(args.topk_ids) + i));
    return reinterpret_cast<const Vector&>(loaded);
  }
};

struct Any {  // one by one, whatever their type and strides are
  using Id = u64;
  static constexpr u32 kPerLoad = 1;
  struct Vector {
    Id ids[1];
  };
  template <typename Args>
  __device__ static Id load(const Args& args, u32 i) {
    const u32 row = i / args.num_cols;
    const i64 offset = row * args.row_stride + (i - row * args.num_cols) * args.col_stride;
    const void* ids = args.topk_ids;
    i64 id = -1;
    switch (args.id_type) {
      case kI8: id = static_cast<const i8*>(ids)[offset]; break;
      case kU8: id = static_cast<const u8*>(ids)[offset]; break;
      case kI16: id = static_cast<const i16*>(ids)[offset]; break;
      case kU16: id = static_cast<const u16*>(ids)[offset]; break;
      case kI32: id = static_cast<const i32*>(ids)[offset]; break;
      case kI64: id = static_cast<const i64*>(ids)[offset]; break;
    }
    return (Id)id;
  }
  template <typename Args>
  __device__ static __forceinline__ Vector load_vector(const Args& args, u32 i) {
    return {{load(args, i)}};
  }
};

// The buckets of kCount ids. One that is not placed is in bucket num_experts, so that counting it takes no branch.
template <u32 kCount>
struct Buckets {
  u32 of[kCount];

  template <typename Args, typename Id>
  __device__ __forceinline__ Buckets(const Args& args, const Id (&ids)[kCount]) {
#pragma unroll
    for (u32 k = 0; k < kCount; ++k) of[k] = ids[k] < args.num_experts ? (u32)ids[k] : args.num_experts;
    if (args.map_mode != kMapIds) return;
#pragma unroll
    for (u32 k = 0; k < kCount; ++k)
      if (of[k] < args.num_experts) of[k] = min_u32((u32)__ldg(args.expert_map + of[k]), args.num_experts);
  }
};

template <typename Args, typename Id>
__device__ __forceinline__ u32 to_bucket(const Args& args, Id id) {
  const Id ids[1] = {id};
  return Buckets<1>(args, ids).of[0];
}

// ---- by-products ----------------------------------------------------------------------------------------------------
//
// What else kernels may want to make of what the placement finds out. These make nothing of it; arguments of other
// kernels have overloads beside them.

// Id i is placed, by one thread of the team.
template <typename Args>
__device__ __forceinline__ void note_id(const Args& args, u32 i, u32 bucket, u32 slot) {}

// Id i is not placed; by the block whose piece it is in.
template <typename Args>
__device__ __forceinline__ void note_dropped(const Args& args, u32 i) {}

// A bucket begins at a slot and has so many ids; by a thread of every block.
template <typename Args>
__device__ __forceinline__ void note_bucket(const Args& args, u32 bucket, u32 begin, u32 count) {}

// The slots [begin, end) of a bucket are padding; by one warp of the team.
template <typename Args>
__device__ __forceinline__ void note_padding(const Args& args, u32 bucket, u32 begin, u32 end) {}

// So many slots are in use; by all `num_threads` of the team.
template <typename Args>
__device__ __forceinline__ void note_end(const Args& args, u32 post_pad, u32 thread, u32 num_threads) {
  if (thread == 0) *args.num_tokens_post_pad = (int)post_pad;
}

// The first slot of a bucket, or past the last bucket the end, in 1 or 2 words.
template <typename Args>
__device__ __forceinline__ void write_offset(const Args& args, u32 bucket, u32 slot) {
  args.expert_offsets[bucket * args.words_per_offset] = (int)slot;
  if (args.words_per_offset == 2) args.expert_offsets[2 * bucket + 1] = 0;
}

// ---- what every kernel writes ---------------------------------------------------------------------------------------

// What expert_ids says of a block of this bucket.
template <typename Args>
__device__ __forceinline__ int expert_of(const Args& args, u32 bucket) {
  if (args.map_mode != kMapBlocks) return (int)bucket;
  const int local = __ldg(args.expert_map + bucket);
  return (u32)local < args.num_experts ? local : -1;
}

// The first id of a block names the block's expert.
template <typename Args>
__device__ __forceinline__ void name_block(const Args& args, u32 bucket, u32 slot) {
  const u32 block = args.block_size.quotient(slot);
  if (block * args.block_size.value == slot) args.expert_ids[block] = expert_of(args, bucket);
}

template <typename Args>
__device__ __forceinline__ void write_id(const Args& args, u32 i, u32 bucket, u32 slot) {
  args.sorted_token_ids[slot] = (int)i;
  name_block(args, bucket, slot);
  note_id(args, i, bucket, slot);
}

// values[begin, end) = value, by `step` threads of which this is number `first`.
template <typename Value>
__device__ __forceinline__ void fill(Value* values, u32 begin, u32 end, Value value, u32 first, u32 step) {
#pragma unroll 1
  for (u32 i = begin + first; i < end; i += step) values[i] = value;
}

// ---------------------------------------------------------------------------------------------------------
// Placement with a table of counters (align_shared.cu, align_global.cu).
//
// A block places a piece of per_block consecutive ids: per_row of them each of num_rows warps. The rows of
// the table count, per bucket, the ids before the piece, those of each warp, and those after the piece. The
// order in which atomics count is of no consequence. Once the columns are summed up, each warp knows where its
// ids of a bucket begin, and walks over them 32 at a time, in order.
// ---------------------------------------------------------------------------------------------------------

struct Table {
  static constexpr u32 kRows = 2;  // of a column are read at once

  u32 stride;  // one bucket more than experts, for what is dropped, in whole vectors
  u32 num_rows;
  u32 height;  // num_rows + 2, rounded up to kRows
  u32* base;   // [stride] first slot of a bucket, for the ids that the table counts
  u32* rows;   // [height][stride]

  template <typename Args>
  __device__ __forceinline__ Table(u32* memory, const Args& args)
      : stride(round_up_4(args.num_experts + 1)),
        num_rows(args.num_rows),
        height((num_rows + 2 + kRows - 1) / kRows * kRows),
        base(memory),
        rows(memory + stride) {}
  __device__ static __forceinline__ u32 round_up_4(u32 value) { return (value + 3) & ~3u; }
  __device__ __forceinline__ u32 words() const { return (height + 1) * stride; }
  __device__ __forceinline__ u32* before() const { return rows; }
  __device__ __forceinline__ u32* of_warp(u32 warp) const { return rows + (warp + 1) * stride; }
  __device__ __forceinline__ u32* after() const { return rows + (num_rows + 1) * stride; }
};

struct Piece {
  u32 begin, end;
  template <typename Args>
  __device__ __forceinline__ Piece(const Args& args, u32 index)
      : begin(min_u32(args.num_ids, index * args.per_block)), end(min_u32(args.num_ids, begin + args.per_block)) {}

  // The ids of the calling warp.
  template <typename Args>
  __device__ __forceinline__ u32 begin_of_warp(const Args& args, const Table& table) const {
    return warp_id() < table.num_rows ? begin + warp_id() * args.per_row.value : end;
  }
  template <typename Args>
  __device__ __forceinline__ u32 end_of_warp(const Args& args, u32 begin_of_warp) const {
    return min_u32(end, begin_of_warp + args.per_row.value);
  }

  // The row that counts id i.
  template <typename Args>
  __device__ __forceinline__ u32* row(const Args& args, const Table& table, u32 i) const {
    if (i < begin) return table.before();
    return i < end ? table.of_warp(args.per_row.quotient(i - begin)) : table.after();
  }
};

// Clear the counters, a multiple of 4 words, then row_of(i)[bucket of id i] += 1 for the ids [begin, end). Ends with
// a barrier. The atomics have no use for their results, so the hardware merges the equal addresses of a warp, and a
// skewed routing costs no more than a uniform one.
template <typename Ids, u32 kMaxLoads, typename Args, typename RowOf>
__device__ __forceinline__ void count_ids(const Args& args, u32 begin, u32 end, u32* counters, u32 num_counters,
                                          RowOf row_of) {
  // In flight at once, the first of them while the counters are cleared.
  constexpr u32 kLoads = Ids::kPerLoad == 1 ? 1 : kMaxLoads;
  typename Ids::Vector vectors[kLoads];
  const u32 vectors_end = end - (end - begin) % Ids::kPerLoad;
  const u32 distance = blockDim.x * Ids::kPerLoad;
  u32 first = begin + threadIdx.x * Ids::kPerLoad;
  const auto load = [&] {
#pragma unroll
    for (u32 k = 0; k < kLoads; ++k)
      if (first + k * distance < vectors_end) vectors[k] = Ids::load_vector(args, first + k * distance);
  };
  load();
#pragma unroll 1
  for (u32 i = 4 * threadIdx.x; i < num_counters; i += 4 * blockDim.x)
    *reinterpret_cast<uint4*>(counters + i) = make_uint4(0, 0, 0, 0);
  __syncthreads();
#pragma unroll 1
  while (first < vectors_end) {
#pragma unroll
    for (u32 k = 0; k < kLoads; ++k) {
      const u32 i = first + k * distance;
      if (i >= vectors_end) break;
      u32* row = row_of(i);
      const Buckets<Ids::kPerLoad> buckets(args, vectors[k].ids);
#pragma unroll
      for (u32 j = 0; j < Ids::kPerLoad; ++j) atomicAdd(row + buckets.of[j], 1);
    }
    first += kLoads * distance;
    load();
  }
  const u32 i = vectors_end + threadIdx.x;
  if (i < end) atomicAdd(row_of(i) + to_bucket(args, Ids::load(args, i)), 1);
  __syncthreads();
}

// Turn a column of counts into counts of the rows before; returns the sum.
__device__ __forceinline__ u32 scan_column(const Table& table, u32 bucket) {
  u32* column = table.rows + bucket;
  u32 sum = 0;
#pragma unroll 1
  for (u32 row = 0; row < table.height; row += Table::kRows) {
    u32 counts[Table::kRows];
#pragma unroll
    for (u32 k = 0; k < Table::kRows; ++k) counts[k] = column[k * table.stride];
#pragma unroll
    for (u32 k = 0; k < Table::kRows; ++k) {
      *column = sum;
      column += table.stride;
      sum += counts[k];
    }
  }
  return sum;
}

// Of the lanes, keep those that have the calling lane's bit k of value. Four instructions; the compiler makes eight.
__device__ __forceinline__ void plain_keep_equal_bit(u32& lanes, u32 value, u32 k) {
  const u32 same = __ballot_sync(kFullWarp, value >> k & 1);
  lanes &= value >> k & 1 ? same : ~same;
}
__device__ __forceinline__ void keep_equal_bit(u32& lanes, u32 value, u32 k) {
#if EMULATED
  plain_keep_equal_bit(lanes, value, k);
#else
  asm volatile(
      "{\n"
      ".reg .pred is_set;\n"
      ".reg .u32 bit, same;\n"
      "and.b32 bit, %1, %2;\n"
      "setp.ne.u32 is_set, bit, 0;\n"
      "vote.sync.ballot.b32 same, is_set, 0xffffffff;\n"
      "@!is_set not.b32 same, same;\n"
      "and.b32 %0, %0, same;\n"
      "}"
      : "+r"(lanes)
      : "r"(value), "r"(1u << k));
#endif
}

// The lanes whose ids are in the same bucket; none for a lane whose id is dropped. Ballots on the bits of the
// bucket take the same time for every routing; __match_any_sync takes time for each distinct value.
template <typename Args>
__device__ __forceinline__ u32 same_bucket(const Args& args, u32 bucket) {
  const bool dropped = bucket == args.num_experts;
  u32 lanes = __ballot_sync(kFullWarp, !dropped);
  constexpr u32 kBits = 4;  // bits above those of num_experts - 1 are 0 in all lanes
#pragma unroll 1
  for (u32 bits = args.num_experts - 1; bits != 0; bits >>= kBits, bucket >>= kBits) {
#pragma unroll
    for (u32 k = 0; k < kBits; ++k) keep_equal_bit(lanes, bucket, k);
  }
  return dropped ? 0 : lanes;
}

// 32 ids of the calling warp, one a lane.
struct Match {
  u32 i, bucket, peers;  // peers: the lanes with ids of the same bucket; 0: dropped

  template <typename Args, typename Id>
  __device__ __forceinline__ Match(const Args& args, u32 i, Id id)
      : i(i), bucket(to_bucket(args, id)), peers(same_bucket(args, bucket)) {}
};

template <typename Ids, typename Args>
__device__ __forceinline__ typename Ids::Id load_or_none(const Args& args, u32 i, u32 end) {
  return i < end ? Ids::load(args, i) : ~typename Ids::Id(0);
}

// From counts to slots: sums_of(bucket) = {x, ids in all}. Afterwards base[bucket] is the first slot of the bucket plus
// x, and after() its first padding slot. Returns the number of slots in use. Ends with a barrier.
template <typename Args, typename SumsOf>
__device__ __forceinline__ u32 find_slots(const Args& args, const Table& table, u32* warp_sums, SumsOf sums_of) {
  u32 post_pad = 0;
#pragma unroll 1
  for (u32 first = 0; first < args.num_experts; first += blockDim.x) {
    const u32 bucket = first + threadIdx.x;
    const bool exists = bucket < args.num_experts;
    const uint2 sums = exists ? sums_of(bucket) : make_uint2(0, 0);
    if (first > 0) __syncthreads();  // warp_sums is still being read
    u32 total;
    const u32 begin = post_pad + block_exclusive_scan(args.block_size.round_up(sums.y), warp_sums, total);
    if (exists) {
      table.base[bucket] = begin + sums.x;
      table.after()[bucket] = begin + sums.y;
      note_bucket(args, bucket, begin, sums.y);
    }
    post_pad += total;
  }
  __syncthreads();
  return post_pad;
}

// Walk over the ids [begin, end) of each warp, of which `match` has the first 32, in order: place(i, bucket, n), where
// n is how many ids of the bucket the column counts before i.
template <typename Ids, typename Args, typename Place>
__device__ __forceinline__ void place_ids(const Args& args, const Table& table, u32 begin, u32 end, Match match,
                                          Place place) {
  u32* row = table.of_warp(warp_id());
#pragma unroll 1
  while (begin < end) {
    begin += kWarpSize;
    const u32 next = begin + lane_id();
    const typename Ids::Id next_id = load_or_none<Ids>(args, next, end);
    const u32 rank = __popc(match.peers & lanes_below());
    u32 earlier = 0;
    if (match.peers) {
      earlier = row[match.bucket];
      place(match.i, match.bucket, earlier + rank);
    } else if (match.i < end) {
      note_dropped(args, match.i);
    }
    if (begin >= end) break;
    __syncwarp();
    if (match.peers && rank == 0) row[match.bucket] = earlier + __popc(match.peers);
    match = Match(args, next, next_id);
    __syncwarp();
  }
}

// Write the ids to their slots, base[] + n.
template <typename Ids, typename Args>
__device__ __forceinline__ void write_ids(const Args& args, const Table& table, u32 begin, u32 end, Match match) {
  place_ids<Ids>(args, table, begin, end, match,
                 [&](u32 i, u32 bucket, u32 n) { write_id(args, i, bucket, table.base[bucket] + n); });
}

// The same in two steps, for a block with many ids: scattered writes cost a sector each, so they are sorted by bucket
// in shared memory first. It needs only the block's own counts, and takes place while those of others are on the way.
//
// Fill stage[before()[bucket] + n] with (index in the piece, bucket), 16 bits each; returns the number of ids. The
// slots are known after a barrier, and then base[] is to take n + before()[] to the slot.
template <typename Ids, typename Args>
__device__ __forceinline__ u32 sort_ids(const Args& args, const Table& table, u32* warp_sums, u32* stage,
                                        const Piece& piece, u32 begin, u32 end, Match match) {
  u32 num_sorted = 0;
#pragma unroll 1
  for (u32 first = 0; first < args.num_experts; first += blockDim.x) {
    const u32 bucket = first + threadIdx.x;
    const bool exists = bucket < args.num_experts;
    const u32 before = exists ? table.of_warp(0)[bucket] : 0;
    const u32 mine = exists ? table.after()[bucket] - before : 0;
    if (first > 0) __syncthreads();
    u32 total;
    const u32 start = num_sorted + block_exclusive_scan(mine, warp_sums, total);
    if (exists) table.before()[bucket] = start - before;
    num_sorted += total;
  }
  __syncthreads();
  place_ids<Ids>(args, table, begin, end, match, [&](u32 i, u32 bucket, u32 n) {
    stage[table.before()[bucket] + n] = (i - piece.begin) << 16 | bucket;
  });
  return num_sorted;
}

template <typename Args>
__device__ __forceinline__ void write_sorted(const Args& args, const Table& table, const u32* stage, const Piece& piece,
                                             u32 num_sorted) {
#pragma unroll 2
  for (u32 k = threadIdx.x; k < num_sorted; k += blockDim.x) {
    const u32 entry = stage[k], bucket = entry & 0xffff, slot = table.base[bucket] + k;
    write_id(args, piece.begin + (entry >> 16), bucket, slot);
  }
}

// The padding slots, the tail, and what lies past the last block: shared out over all blocks of the team.
template <typename Args>
__device__ __forceinline__ void write_padding(const Args& args, const u32* first_padding, u32 post_pad) {
  const u32 num_warps = blockDim.x / kWarpSize, value = args.num_ids;
  const u32 rank = team_rank(args), size = team_size(args);
  // The last warps first, as they may have no ids to place.
#pragma unroll 1
  for (u32 bucket = rank + size * (num_warps - 1 - warp_id()); bucket < args.num_experts; bucket += size * num_warps) {
    const u32 begin = first_padding[bucket], end = args.block_size.round_up(begin);
    fill(args.sorted_token_ids, begin, end, (int)value, lane_id(), kWarpSize);
    note_padding(args, bucket, begin, end);
  }
  const u32 thread = rank * blockDim.x + threadIdx.x, num_threads = size * blockDim.x;
  fill(args.sorted_token_ids, post_pad, args.num_slots, (int)value, thread, num_threads);
  fill(args.expert_ids, args.block_size.quotient(post_pad), args.num_blocks, -1, thread, num_threads);
  note_end(args, post_pad, thread, num_threads);
}

// Entry points: for contiguous i32 and i64 ids aligned to 16 bytes; and, in kernels that have to take any, for all
// others.
#define FOR_EACH_FAST_READER(ENTRY) ENTRY(i32, Contiguous<u32>) ENTRY(i64, Contiguous<u64>)
#define FOR_EACH_READER(ENTRY) FOR_EACH_FAST_READER(ENTRY) ENTRY(any, Any)
