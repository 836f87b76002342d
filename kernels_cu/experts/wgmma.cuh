// SPDX-License-Identifier: Apache-2.0
// The products of the experts with wgmma, on Hopper: what experts_wgmma.cu and experts_wgmma_fp8.cu share.
//
// in       rows, weights of Product's type, with fp32 scales of rows if it is scaled; bias of Element; sorted_token_ids
//          and expert_ids of moe_align_block_size with blocks of kTileRows; weights as a tensor of 5 dimensions, whose
//          boxes are kBoxRows rows of a step: with a gate, (depth, 8 rows, gate or up, eights, experts), else
//          (depth, 8, eights, 1, experts)
// out      output [num_pairs, num_columns], the rows of pairs that are in a block
// grid     clusters of two blocks, as many as run at once; block: kThreads
// shared   kStages * (kTileRows + kWeightRows) * 128 bytes, Shared, scales of kStages if rows have any, 1024 to align them
// limits   num_columns is a multiple of 8, rows of 16 bytes; rows and weights are aligned to 16 bytes
//
// A block makes tiles of kTileRows rows by kWeightRows rows of weights. A cluster takes two tiles at once, a place: where
// an expert has two blocks of pairs left, one tile of columns for both, and each block loads half of its weights for both;
// else two tiles of columns for one block of pairs. Roles of the warps of a block:
//
//   all         which blocks each expert has, and how many places come before it
//   four        per tile, per 128 bytes of depth: weights, by a box, rows, by cp.async; one takes the next tile meanwhile
//   eight       multiply what is there, 16 rows each; bias, router weight, activation; write
//
// Order: over the depth ascending, a product at a time, for each element alone: a row has the same bits in every batch.
#pragma once
#include "experts/experts.cuh"
#include "hopper.cuh"

struct ExpertsWgmmaArgs {
  TensorMap weights;
  const int* sorted_token_ids;  // [blocks][kTileRows] pairs; those from num_pairs on are padding
  const int* expert_ids;        // [num_blocks]; -1 behind the last
  u32* counters;                // [2]; in the first product num_tokens_post_pad and any number, then what it has left
  const char* rows;             // [num_pairs / rows_shared, depth], row_stride bytes apart
  char* output;                 // [num_pairs, num_columns]
  const float* row_scales;      // [num_pairs / rows_shared][steps], of 128 columns each
  const char* weight_scales;    // [num_experts][blocks of rows][groups of columns] of ScaleType
  float* output_scales;         // [num_pairs][groups of 128 columns], of what is written in e4m3
  const char* bias;             // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;    // [num_pairs] or null: multiplies what the activation gets
  i64 row_stride, bias_stride;  // in bytes; in elements, of an expert
  i64 scale_expert_stride, scale_row_stride, scale_group_stride;  // in scales, of weights
  u32 num_pairs, num_experts, num_blocks;
  Divisor rows_shared;  // pairs that have one row: topk in GEMM 1, 1 in GEMM 2
  u32 depth, num_columns;
  u32 activation;      // an Activation
  u32 row_step;        // of the row of the bias for the next column: 2 where gate and up rows alternate
  u32 up_offset;       // from the row of a gate to that of its up
  u32 group_twos;      // blocks of pairs, two by two, that share what is read of the weights
  u32 clears_unknown;  // pairs of experts that are not here get rows of zeros
  u32 is_first;        // of the two products: the kernel before it is align; else it is one that has waited for align
  Divisor scale_rows;  // rows of weights that have one scale
  u32 scale_type;      // a ScaleType
  u32 scales_steps;    // weights have a scale of their own in every step
  float alpha, beta, limit;  // of kSwiglu
};

constexpr u32 kTileRows = 128, kWeightRows = 256, kBoxRows = 128, kStages = 4;
constexpr u32 kMaxLocalExperts = 1024;
constexpr u32 kTileBytes = kTileRows * kRowBytes, kBoxBytes = kBoxRows * kRowBytes;
constexpr u32 kStageBytes = kTileBytes + 2 * kBoxBytes;
// Tiles: one is loaded and multiplied, one is looked up. More would be taken from clusters that end before.
constexpr u32 kRing = 2;
constexpr u32 kThreads = 384, kLoaders = 128, kProductWarps = 8;
constexpr u32 kWriteRows = 16;  // that a warp writes at once, 8 chunks of each

struct Job {
  u32 expert, tile;
  bool is_shared;  // the other block has the same tile of columns
  bool is_end;     // there is no job any more
};

struct Shared {
  uint4 written[kProductWarps][kWriteRows * kChunks];
  Barrier full[kStages], empty[kStages];
  Barrier told[kRing], done[kRing], sent[kRing];  // a job is there; all blocks are done with it; `places` is there
  Job jobs[kRing];
  u32 places[kRing];
  alignas(16) u32 pairs[kRing][kTileRows];
  u32 begins[kMaxLocalExperts], ends[kMaxLocalExperts];  // blocks of an expert
  u32 firsts[kMaxLocalExperts];                          // places that come before those of an expert
  u32 num_places, num_blocks, warp_sums[kWarpSize];
};

// Of a stage, where weights have scales: those of each half of the tile, by eights of its rows that are even, and odd.
struct StageScales {
  float weights[2][2];
};

// How many places an expert has, by its blocks and the tiles of columns. Two blocks take a tile, a single one two tiles.
__device__ __forceinline__ u32 count_places(u32 num_blocks, u32 num_tiles) {
  return num_blocks / 2 * num_tiles + (num_blocks % 2 != 0 ? ceil_div(num_tiles, 2) : 0);
}

// Fills the table of experts; by all threads.
__device__ __forceinline__ void count_tiles(const ExpertsWgmmaArgs& args, Shared& shared, u32 num_tiles) {
#pragma unroll 1
  for (u32 e = threadIdx.x; e < args.num_experts; e += kThreads) shared.begins[e] = shared.ends[e] = 0;
  if (threadIdx.x == 0) shared.num_blocks = 0;
  __syncthreads();
#pragma unroll 1
  for (u32 b = threadIdx.x; b < args.num_blocks; b += kThreads) {
    const u32 expert = (u32)args.expert_ids[b];
    if (expert != 0xffffffffu) atomicAdd(&shared.num_blocks, 1);
    if (expert >= args.num_experts) continue;
    if (b == 0 || (u32)args.expert_ids[b - 1] != expert) shared.begins[expert] = b;
    if (b + 1 == args.num_blocks || (u32)args.expert_ids[b + 1] != expert) shared.ends[expert] = b + 1;
  }
  __syncthreads();
  const u32 each = ceil_div(args.num_experts, kThreads), first = threadIdx.x * each;
  u32 mine = 0;
#pragma unroll 1
  for (u32 e = first; e < first + each && e < args.num_experts; ++e) {
    mine += count_places(shared.ends[e] - shared.begins[e], num_tiles);
  }
  u32 total;
  u32 before = block_exclusive_scan(mine, shared.warp_sums, total);
#pragma unroll 1
  for (u32 e = first; e < first + each && e < args.num_experts; ++e) {
    shared.firsts[e] = before;
    before += count_places(shared.ends[e] - shared.begins[e], num_tiles);
  }
  if (threadIdx.x == 0) shared.num_places = total;
  __syncthreads();
}

// What a block of a cluster does at a place; by a warp.
struct Work {
  Job job;
  u32 block;

  __device__ __forceinline__ Work(const ExpertsWgmmaArgs& args, const Shared& shared, u32 place, u32 num_tiles,
                                  u32 rank) {
    job.expert = find(args, shared, place);
    // Groups of twos of blocks take all tiles of columns, two tiles after another, and a single block goes with the last
    // group: what is read of the weights is then read by all of a group at about the same time.
    const u32 begin = shared.begins[job.expert], num_blocks = shared.ends[job.expert] - begin, twos = num_blocks / 2;
    const u32 rest = place - shared.firsts[job.expert], last = twos == 0 ? 0 : (twos - 1) / args.group_twos;
    const u32 group = min_u32(rest / (args.group_twos * num_tiles), last), first = group * args.group_twos;
    const u32 size = min_u32(args.group_twos, twos - first), in_group = rest - first * num_tiles;
    const u32 each = 2 * size + (group == last ? num_blocks % 2 : 0);
    const u32 tile = in_group / each * 2, r = in_group % each;
    job.is_end = false;
    job.is_shared = r < min_u32(2, num_tiles - tile) * size;
    job.tile = tile + (job.is_shared ? r / size : rank);
    block = begin + (job.is_shared ? 2 * (first + r % size) + rank : 2 * twos);
  }

  // The last expert before which there are at most so many places, which is one that has some.
  __device__ static __forceinline__ u32 find(const ExpertsWgmmaArgs& args, const Shared& shared, u32 place) {
    const auto count = [&](u32 e) {
      return (u32)__popc(__ballot_sync(kFullWarp, e < args.num_experts && shared.firsts[e] <= place));
    };
    const u32 chunk = count(lane_id() * kWarpSize) - 1;
    return chunk * kWarpSize + count(chunk * kWarpSize + lane_id()) - 1;
  }
};

// Where a role is in a ring of stages or tiles.
template <u32 kSize>
struct Turn {
  u32 index = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == kSize) index = 0, parity ^= 1;
  }
};

// By lanes that have seen the others' part of the phase.
__device__ __forceinline__ void arrive_in_both(Barrier& barrier) {
  __syncwarp();
  if (lane_id() < 2) barrier.arrive_in(lane_id());
}

// Looks the place up that was sent, and tells the block; by a warp.
__device__ __forceinline__ void tell(const ExpertsWgmmaArgs& args, Shared& shared, const Turn<kRing>& ring,
                                     u32 num_tiles, u32 rank) {
  shared.sent[ring.index].wait_for_cluster(ring.parity);
  const u32 place = shared.places[ring.index];
  shared.done[ring.index].wait(ring.parity ^ 1);
  Job job = {0, 0, false, true};
  if (place < shared.num_places) {
    const Work work(args, shared, place, num_tiles, rank);
    const u32 first = lane_id() * 4;
    copy_async(shared.pairs[ring.index] + first, args.sorted_token_ids + work.block * kTileRows + first, true);
    job = work.job;
  }
  shared.told[ring.index].arrive_with_copies();
  if (lane_id() == 0) {
    shared.jobs[ring.index] = job;
    shared.told[ring.index].arrive();
  }
}

// Of a step, to a stage that is empty; by a thread.
template <typename Product>
__device__ __forceinline__ void load_weights(const ExpertsWgmmaArgs& args, Shared& shared, char* stages, const Job& job,
                                             u32 rank, u32 stage, u32 step) {
  Barrier& barrier = shared.full[stage];
  barrier.expect_and_arrive(2 * kBoxBytes);
#pragma unroll
  for (u32 box = 0; box < 2; ++box) {
    char* to = stages + stage * kStageBytes + kTileBytes + box * kBoxBytes;
    const u32 eights = (job.tile * 2 + box) * (kBoxRows / 8);
    const u32 at[5] = {step * Product::kStepDepth, 0, Product::kGated ? 0 : eights, Product::kGated ? eights / 2 : 0,
                       job.expert};
    if (!job.is_shared) {
      copy_box(to, args.weights, barrier, at);
    } else if (box == rank) {
      copy_box_to_both(to, args.weights, barrier, at);
    }
  }
}

// The scales of the weights of a step, by four threads.
template <typename Product>
struct ScaleLoader {
  const float* weight;
  bool exists;

  __device__ __forceinline__ ScaleLoader(const ExpertsWgmmaArgs& args, const Job& job) {
    if (!Product::kScaled) return;
    const u32 r = threadIdx.x / 2 * (kWeightRows / 2) + threadIdx.x % 2 * 8,
              first_column = job.tile * Product::kColumns;
    exists = threadIdx.x < 4 && first_column + Product::column(r) < args.num_columns;
    weight = reinterpret_cast<const float*>(args.weight_scales);
    if (!exists) return;
    const u32 block = args.scale_rows.quotient(Product::weight_row(args, first_column, r));
    weight += job.expert * args.scale_expert_stride + block * args.scale_row_stride;
  }

  __device__ __forceinline__ void load(const ExpertsWgmmaArgs& args, StageScales& to, u32 step) const {
    if (!Product::kScaled || threadIdx.x >= 4 || !args.scales_steps) return;
    const float* from = weight + (exists ? step * args.scale_group_stride : 0);
    copy_word_async(to.weights[threadIdx.x / 2] + threadIdx.x % 2, from, exists);
  }
};

// Where a thread's chunk of a row begins: a pointer, or, where registers are few, 1/16 of the offset.
template <bool kIsScaled>
struct RowPlace {
  const char* address;
  __device__ __forceinline__ void set(const ExpertsWgmmaArgs& args, i64 offset) { address = args.rows + offset; }
  __device__ __forceinline__ const char* of_step(const ExpertsWgmmaArgs&, u32 step) const {
    return address + step * kRowBytes;
  }
};
template <>
struct RowPlace<true> {
  u32 chunks;
  __device__ __forceinline__ void set(const ExpertsWgmmaArgs&, i64 offset) { chunks = (u32)(offset / 16); }
  __device__ __forceinline__ const char* of_step(const ExpertsWgmmaArgs& args, u32 step) const {
    return args.rows + step * kRowBytes + (u64)chunks * 16;
  }
};

template <typename Product>
__device__ __forceinline__ void load(const ExpertsWgmmaArgs& args, Shared& shared, char* stages, StageScales* scales,
                                     u32 num_tiles, u32 num_steps, u32 rank) {
  constexpr u32 kRowsAtOnce = kLoaders / kChunks, kMyRows = kTileRows / kRowsAtOnce;
  const u32 my_chunk = threadIdx.x % kChunks, my_row = threadIdx.x / kChunks;
  // Clusters take places in the order in which they get to them, as those that run at once then read the same from L2.
  u32* counter = args.counters + (args.is_first ? 0 : 1);
  const u32 not_counted = gridDim.x / 2 - (args.is_first ? shared.num_blocks * kTileRows : 0);
  // When the first steps are on their way, and early enough for memory not to be left idle between two tiles.
  const u32 last = num_steps - 1, takes_at = min_u32(kStages, last), sends_at = min_u32(kStages + 2, last),
            tells_at = min_u32(kStages + 4, last);
  const bool finds = warp_id() == kLoaders / kWarpSize - 1, takes = threadIdx.x == kLoaders - kWarpSize && rank == 0;
  Turn<kStages> turn;
  Turn<kRing> ring;
  if (finds) tell(args, shared, ring, num_tiles, rank);
  u32 ahead = 0;  // steps whose weights are asked for already
  u32 next = 0;
#pragma unroll 1
  for (bool is_begin = true;; is_begin = false) {
    shared.told[ring.index].wait(ring.parity);
    const Job job = shared.jobs[ring.index];
    if (is_begin) {
      if (threadIdx.x == 0 && !job.is_end) {
#pragma unroll 1
        for (; ahead < kStages && ahead < num_steps; ++ahead) {
          load_weights<Product>(args, shared, stages, job, rank, ahead, ahead);
        }
      }
      if (!args.is_first) wait_for_kernel_before();  // the end of this one is that of the one before, too
    }
    if (job.is_end) break;
    // Padding comes last. It is not loaded: what is there is multiplied, but not written.
    RowPlace<Product::kScaled> rows[kMyRows];
    u32 num_rows = 0;
#pragma unroll
    for (u32 i = 0; i < kMyRows; ++i) {
      const u32 pair = shared.pairs[ring.index][my_row + i * kRowsAtOnce];
      if (pair < args.num_pairs) num_rows = i + 1;
      rows[i].set(args, args.rows_shared.quotient(min_u32(pair, args.num_pairs)) * args.row_stride + my_chunk * 16);
    }
    const ScaleLoader<Product> scale_loader(args, job);
    ring.next();
#pragma unroll 1
    for (u32 step = 0; step < num_steps; ++step, turn.next()) {
      shared.empty[turn.index].wait(turn.parity ^ 1);
      if (threadIdx.x == 0) {
        if (ahead > 0) {
          --ahead;
        } else {
          load_weights<Product>(args, shared, stages, job, rank, turn.index, step);
        }
      }
      char* to = stages + turn.index * kStageBytes + chunk_offset(my_row, my_chunk);
      const bool is_within = step * Product::kStepDepth + my_chunk * Product::kPerChunk < args.depth;
#pragma unroll
      for (u32 i = 0; i < kMyRows; ++i) {
        copy_async_if(i < num_rows, to + i * kRowsAtOnce * kRowBytes, rows[i].of_step(args, step), is_within);
      }
      scale_loader.load(args, scales[turn.index], step);
      shared.full[turn.index].arrive_with_copies();
      if (finds) {
        if (step == takes_at && lane_id() == 0) shared.sent[ring.index].expect_and_arrive(4);
        if (step == takes_at && takes) next = atomicAdd(counter, 1) + not_counted;
        if (step == sends_at && takes) {
          shared.done[ring.index].wait(ring.parity ^ 1);  // then all blocks have seen what was sent there before
#pragma unroll
          for (u32 r = 0; r < 2; ++r) shared.sent[ring.index].send(shared.places + ring.index, r, next);
        }
        __syncwarp();
        if (step == tells_at) tell(args, shared, ring, num_tiles, rank);
      }
    }
  }
}

// 16 rows of the tile by a warp, which has them in the layout of m16n8k16. They go through shared memory, so that lines
// are written whole.
template <typename Tile>
__device__ __forceinline__ void write_rows(const ExpertsWgmmaArgs& args, const u32* pairs, u32 first_column,
                                           uint4* memory, const float (&sums)[32][4]) {
  using Element = typename Tile::Element;
  constexpr u32 kStep = Tile::kGated ? 2 : 1, kWritten = kChunks * 8;  // products for 8 columns; columns at once
  const u32 chunk = lane_id() % kChunks, from_row = lane_id() / kChunks, matrix = lane_id() / 8;
  char* memory_bytes = reinterpret_cast<char*>(memory);
  char* output[kWriteRows / 4];
#pragma unroll
  for (u32 i = 0; i < kWriteRows / 4; ++i) {
    const u32 pair = pairs[from_row + i * 4];
    output[i] = pair < args.num_pairs ? args.output + (i64)pair * args.num_columns * 2 : nullptr;
  }
#pragma unroll
  for (u32 first = 0; first < Tile::kColumns; first += kWritten) {
#pragma unroll
    for (u32 c = 0; c < kChunks; c += 2) {
      u32 words[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) words[i] = Element::pack(sums[(first / 8 + c + i / 2) * kStep] + i % 2 * 2);
      store_matrices(memory_bytes + chunk_offset(matrix % 2 * 8 + lane_id() % 8, c + matrix / 2), words);
    }
    __syncwarp();
    const u32 column = first_column + first + chunk * 8;
#pragma unroll
    for (u32 i = 0; i < kWriteRows / 4; ++i) {
      const uint4 words = *reinterpret_cast<uint4*>(memory_bytes + chunk_offset(from_row + i * 4, chunk));
      if (output[i] != nullptr && column < args.num_columns) *reinterpret_cast<uint4*>(output[i] + column * 2) = words;
    }
    __syncwarp();
  }
}

template <typename Product>
__device__ __forceinline__ void multiply(const ExpertsWgmmaArgs& args, Shared& shared, const char* stages,
                                         const StageScales* scales, u32 num_steps) {
  // The same in all threads of a warp, which lets the compiler keep what follows from it in uniform registers.
  const u32 group_row = __shfl_sync(kFullWarp, (threadIdx.x - kLoaders) / 128, 0) * 64;
  const u32 first_row = group_row + warp_id() % 4 * 16;
  if (Product::kScaled && !args.is_first) wait_for_kernel_before();  // whose scales are loaded here
  Turn<kStages> turn;
#pragma unroll 1
  for (Turn<kRing> ring;; ring.next()) {
    shared.told[ring.index].wait(ring.parity);
    const Job job = shared.jobs[ring.index];
    if (job.is_end) break;
    const u32* pairs = shared.pairs[ring.index];
    const u32 first_column = job.tile * Product::kColumns;
    // Rows that exist come first.
    if (pairs[group_row] < args.num_pairs && first_column < args.num_columns) {
      float weights[2], sums[32][4];
      load_router_weights(args, pairs + first_row, weights);
      Product::sum_up(args, shared, stages, scales, pairs + first_row, group_row, num_steps, turn, sums);
      uint4* memory = shared.written[warp_id() % kProductWarps];
      Product::scale(args, job.expert, first_column, memory, sums);
      finish_sums<Product>(args, weights, job.expert, first_column, 0, sums);
      Product::write(args, pairs + first_row, first_column, memory, sums);
    } else {
#pragma unroll 1
      for (u32 step = 0; step < num_steps; ++step, turn.next()) {
        shared.full[turn.index].wait(turn.parity);
        arrive_in_both(shared.empty[turn.index]);
      }
    }
    arrive_in_both(shared.done[ring.index]);
  }
}

// Rows of pairs of experts that are not here.
__device__ __forceinline__ void clear_unknown(const ExpertsWgmmaArgs& args) {
#pragma unroll 1
  for (u32 b = blockIdx.x; b < args.num_blocks; b += gridDim.x) {
    if ((u32)args.expert_ids[b] < args.num_experts) continue;
#pragma unroll 1
    for (u32 r = 0; r < kTileRows; ++r) {
      const u32 pair = (u32)args.sorted_token_ids[b * kTileRows + r];
      if (pair >= args.num_pairs) break;
      clear_row<kThreads>(args, pair);
    }
  }
}

template <typename Product>
__device__ __forceinline__ void experts_wgmma(const ExpertsWgmmaArgs& args) {
  extern __shared__ uint4 memory[];
  const u32 misaligned = shared_address(memory) % 1024;
  char* stages = reinterpret_cast<char*>(memory) + (misaligned ? 1024 - misaligned : 0);
  Shared& shared = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes);
  StageScales* scales = reinterpret_cast<StageScales*>(&shared + 1);  // if rows have scales
  const u32 rank = blockIdx.x % 2, num_tiles = ceil_div(args.num_columns, Product::kColumns);
  if (threadIdx.x == 0) {
    prefetch_map(args.weights);
#pragma unroll
    for (u32 s = 0; s < kStages; ++s) {
      shared.full[s].open(kLoaders + 1);
      shared.empty[s].open(2 * kProductWarps);
    }
#pragma unroll
    for (u32 t = 0; t < kRing; ++t) {
      shared.told[t].open(kWarpSize + 1);
      shared.done[t].open(2 * kProductWarps);
      shared.sent[t].open(1);
    }
    fence_open_barriers();
    shared.places[0] = blockIdx.x / 2;
    shared.sent[0].arrive();
  }
  if (args.is_first) wait_for_kernel_before();
  let_next_kernel_begin();
  if (args.is_first && blockIdx.x == 0 && threadIdx.x == 0) args.counters[1] = 0;
  count_tiles(args, shared, num_tiles);
  if (Product::kScaled && !args.scales_steps && threadIdx.x < 4 * kStages) {
    scales[threadIdx.x / 4].weights[threadIdx.x / 2 % 2][threadIdx.x % 2] = 1.0f;
  }
  // The barriers of all blocks are open.
  sync_cluster();
  const u32 num_steps = ceil_div(args.depth, Product::kStepDepth);
  if (threadIdx.x >= kLoaders) {
    take_registers<Product::kProductRegisters>();
    multiply<Product>(args, shared, stages, scales, num_steps);
  } else {
    give_back_registers<Product::kLoaderRegisters>();
    load<Product>(args, shared, stages, scales, num_tiles, num_steps, rank);
  }
  if (args.clears_unknown) clear_unknown(args);  // nobody reads these rows before the sum
  // Until then, other blocks may write to the shared memory of this one.
  sync_cluster();
}
