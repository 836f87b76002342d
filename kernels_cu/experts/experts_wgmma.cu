// SPDX-License-Identifier: Apache-2.0
// The products of the experts with wgmma: Hopper.
//
// in       rows, weights, bias, topk_weights of Element or fp32; sorted_token_ids and expert_ids of
//          moe_align_block_size with blocks of kTileRows; weights as a tensor of 5 dimensions, whose boxes are kBoxRows
//          rows of a step: with a gate, (depth, 8 rows, gate or up, eights, experts), else (depth, 8, eights, 1, experts)
// out      output [num_pairs, num_columns] of Element, the rows of pairs that are in a block
// grid     clusters of two blocks, as many as run at once; block: kThreads
// shared   kStages * (kTileRows + kWeightRows) * 128 bytes, and sizeof(Shared), and 1024 to align them
// limits   depth and num_columns are multiples of 8, rows and weights are aligned to 16 bytes
// targets  sm_90a
//
// A block makes tiles of kTileRows rows by kWeightRows rows of weights. A cluster takes two tiles at once: where an
// expert has two blocks of pairs left, one tile of columns for both, and each block loads half of its weights for both;
// else two tiles of columns for one block of pairs. A warpgroup loads, and two multiply, 64 rows each.
//
//   1  all: which blocks each expert has, and how many tiles come before it
//   2  the loader, per tile: its pairs; per kDepth elements: weights by a box, rows by cp.async
//   3  the others, per tile: multiply what is there; bias, router weight, activation; write
//
// Order: over the depth ascending, 16 at a time, for each element alone: a row has the same bits in every batch.
#include "experts/experts.cuh"
#include "hopper.cuh"

struct ExpertsWgmmaArgs {
  TensorMap weights;
  const int* sorted_token_ids;  // [blocks][kTileRows] pairs; those from num_pairs on are padding
  const int* expert_ids;        // [num_blocks]; -1 behind the last
  u32* counters;                // [2]; in the first product num_tokens_post_pad and any number, then what it has left
  const char* rows;             // [num_pairs / rows_shared, depth], row_stride bytes apart
  char* output;                 // [num_pairs, num_columns]
  const char* bias;             // [num_experts][rows of an expert] of Element, or null
  const float* topk_weights;    // [num_pairs] or null: multiplies what the activation gets
  i64 row_stride, bias_stride;  // in bytes; in elements, of an expert
  u32 num_pairs, num_experts, num_blocks;
  Divisor rows_shared;  // pairs that have one row: topk in GEMM 1, 1 in GEMM 2
  u32 depth, num_columns;
  u32 activation;      // an Activation
  u32 row_step;        // of the row of the bias for the next column: 2 where gate and up rows alternate
  u32 up_offset;       // from the row of a gate to that of its up
  u32 group_pairs;     // blocks of pairs, two by two, that share what is read of the weights
  u32 clears_unknown;  // pairs of experts that are not here get rows of zeros
  u32 is_first;        // of the two products: the kernel before it is align; else it is one that has waited for align
  float alpha, beta, limit;  // of kSwiglu
};

constexpr u32 kTileRows = 128, kWeightRows = 256, kBoxRows = 128, kStages = 4, kThreads = 384, kLoaders = 128;
constexpr u32 kMaxLocalExperts = 1024;
constexpr u32 kTileBytes = kTileRows * kRowBytes, kBoxBytes = kBoxRows * kRowBytes;
constexpr u32 kStageBytes = kTileBytes + 2 * kBoxBytes;
constexpr u32 kRing = 8;  // tiles that are loaded or multiplied at once, and more: a stage is of one tile

struct Shared {
  Barrier full[kStages], empty[kStages];
  u32 pairs[kRing][kTileRows];
  u32 experts[kRing], first_columns[kRing];
  u32 begins[kMaxLocalExperts], ends[kMaxLocalExperts];  // blocks of an expert
  u32 places[kMaxLocalExperts];                          // pairs of tiles that come before those of an expert
  u32 num_places, num_blocks, warp_sums[kWarpSize];
  Barrier placed[kRing];  // where there are what follows
  u32 taken[kRing];       // places of the tiles in the ring; from num_places on: the end
};

template <typename ElementType, bool kHasGate>
struct WgmmaTile : TileOf<ElementType, kHasGate, kTileRows, kWeightRows, kThreads> {};

// How many pairs of tiles an expert has, by its blocks and the tiles of columns.
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
    shared.places[e] = before;
    before += count_places(shared.ends[e] - shared.begins[e], num_tiles);
  }
  if (threadIdx.x == 0) shared.num_places = total;
  __syncthreads();
}

// What one block of a cluster does at a place.
struct Work {
  u32 expert, block, tile;
  bool is_shared;  // the other block has the same tile of columns

  __device__ __forceinline__ Work(const ExpertsWgmmaArgs& args, const Shared& shared, u32 place, u32 num_tiles,
                                  u32 rank) {
    u32 low = 0, high = args.num_experts;  // the last expert with places[expert] <= place that has some
    while (high - low > 1) {
      const u32 middle = (low + high) / 2;
      (shared.places[middle] <= place ? low : high) = middle;
    }
    expert = low;
    // Groups of pairs of blocks take all tiles of columns, two tiles after another, and the last group's single block
    // with them: what is read of the weights is then read by all of a group at about the same time.
    const u32 begin = shared.begins[low], num_blocks = shared.ends[low] - begin, twos = num_blocks / 2;
    const u32 rest = place - shared.places[low],
              group = min_u32(rest / (args.group_pairs * num_tiles), last_group(args, twos));
    const u32 first = group * args.group_pairs, size = min_u32(args.group_pairs, twos - first);
    const u32 in_group = rest - first * num_tiles;
    const u32 has_single = group == last_group(args, twos) ? num_blocks % 2 : 0;
    const u32 two_tiles = in_group / (2 * size + has_single), r = in_group % (2 * size + has_single);
    const u32 tiles = min_u32(2, num_tiles - 2 * two_tiles);  // of this two
    is_shared = r < tiles * size;
    if (is_shared) {
      tile = 2 * two_tiles + r / size;
      block = begin + 2 * (first + r % size) + rank;
    } else {
      block = begin + 2 * twos;
      tile = 2 * two_tiles + rank;
    }
  }

  __device__ static __forceinline__ u32 last_group(const ExpertsWgmmaArgs& args, u32 twos) {
    return twos == 0 ? 0 : (twos - 1) / args.group_pairs;
  }
};

// Where a role is in the ring of stages.
struct Turn {
  u32 stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Where it is in the ring of tiles.
struct RingTurn {
  u32 index = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == kRing) index = 0, parity ^= 1;
  }
  __device__ __forceinline__ u32 place(Shared& shared) const {
    shared.placed[index].wait_for_cluster(parity);
    return shared.taken[index];
  }
};

template <bool kGated>
__device__ __forceinline__ void load_weights(const ExpertsWgmmaArgs& args, Shared& shared, char* stages,
                                             const Work& work, u32 rank, u32 stage, u32 step) {
  char* to = stages + stage * kStageBytes + kTileBytes;
  Barrier& barrier = shared.full[stage];
  barrier.expect(2 * kBoxBytes);
#pragma unroll
  for (u32 box = 0; box < 2; ++box) {
    const u32 eights = (work.tile * 2 + box) * (kBoxRows / 8);
    const u32 at[5] = {step * kDepth, 0, kGated ? 0 : eights, kGated ? eights / 2 : 0, work.expert};
    if (!work.is_shared) {
      copy_box(to + box * kBoxBytes, args.weights, barrier, at);
    } else if (box == rank) {
      copy_box_to_both(to + box * kBoxBytes, args.weights, barrier, at);
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void load(const ExpertsWgmmaArgs& args, Shared& shared, char* stages, u32 num_tiles,
                                     u32 num_steps, u32 rank) {
  constexpr u32 kRowsAtOnce = kLoaders / kChunks, kMyRows = kTileRows / kRowsAtOnce;
  const u32 my_chunk = threadIdx.x % kChunks, my_row = threadIdx.x / kChunks;
  const u32 num_places = shared.num_places, num_clusters = gridDim.x / 2;
  Turn turn;
  RingTurn ring;
  u32 place = ring.place(shared);
  if (place >= num_places) {
    if (!args.is_first) wait_for_kernel_before();  // the end of this one is that of the one before, too
    return;
  }
  Work work(args, shared, place, num_tiles, rank);
  u32 pairs[kMyRows];
  const auto load_pairs = [&] {
#pragma unroll
    for (u32 i = 0; i < kMyRows; ++i) {
      pairs[i] = (u32)args.sorted_token_ids[work.block * kTileRows + my_row + i * kRowsAtOnce];
    }
  };
  load_pairs();
  u32 loaded = 0;  // steps whose weights are asked for already
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (; loaded < kStages && loaded < num_steps; ++loaded) {
      load_weights<Tile::kGated>(args, shared, stages, work, rank, loaded, loaded);
    }
  }
  if (!args.is_first) wait_for_kernel_before();
  // Clusters take places in the order in which they get to them, as those that run at once then read the same from L2.
  u32* counter = args.counters + (args.is_first ? 0 : 1);
  const u32 counted = args.is_first ? shared.num_blocks * kTileRows : 0;
  const bool takes = threadIdx.x == 0 && rank == 0;
  // Early enough in a tile, the next is told and looked up, so that memory is not left idle between the two.
  const u32 tells_at = min_u32(2, num_steps - 1), looks_at = min_u32(6, num_steps - 1);
#pragma unroll 1
  while (place < num_places) {
    u32 next = 0;
    if (takes) next = atomicAdd(counter, 1) - counted + num_clusters;
    // Padding comes last. It is not loaded: what is there is multiplied, but not written.
    const char* rows[kMyRows];
    u32 num_rows = 0;
#pragma unroll
    for (u32 i = 0; i < kMyRows; ++i) {
      const u32 pair = pairs[i];
      if (my_chunk == 0) shared.pairs[ring.index][my_row + i * kRowsAtOnce] = pair;
      if (pair < args.num_pairs) num_rows = i + 1;
      rows[i] = args.rows + args.rows_shared.quotient(min_u32(pair, args.num_pairs)) * args.row_stride + my_chunk * 16;
    }
    if (threadIdx.x == 0) {
      shared.experts[ring.index] = work.expert;
      shared.first_columns[ring.index] = work.tile * Tile::kColumns;
    }
    sync_some<1, kLoaders>();  // thread 0 arrives for all of them
    ring.next();
    if (threadIdx.x == 0) shared.placed[ring.index].expect_and_arrive(4);
    Work now = work;
#pragma unroll 1
    for (u32 step = 0; step < num_steps; ++step, turn.next()) {
      shared.empty[turn.stage].wait(turn.parity ^ 1);
      if (threadIdx.x == 0) {
        if (loaded > 0) {
          --loaded;
        } else {
          load_weights<Tile::kGated>(args, shared, stages, now, rank, turn.stage, step);
        }
        shared.full[turn.stage].arrive();
      }
      char* to = stages + turn.stage * kStageBytes + chunk_offset(my_row, my_chunk);
      const bool is_within = step * kDepth + my_chunk * 8 < args.depth;
#pragma unroll
      for (u32 i = 0; i < kMyRows; ++i) {
        copy_async_if(i < num_rows, to + i * kRowsAtOnce * kRowBytes, rows[i] + step * kRowBytes, is_within);
      }
      shared.full[turn.stage].arrive_with_copies();
      if (takes && step == tells_at) {
        shared.placed[ring.index].send(shared.taken + ring.index, 0, next);
        shared.placed[ring.index].send(shared.taken + ring.index, 1, next);
      }
      if (step == looks_at) {
        place = ring.place(shared);
        if (place < num_places) {
          work = Work(args, shared, place, num_tiles, rank);
          load_pairs();
        }
      }
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void multiply(const ExpertsWgmmaArgs& args, Shared& shared, const char* stages,
                                         u32 num_steps) {
  // The same in all threads of a warp, which lets the compiler keep what follows from it in uniform registers.
  const u32 group_row = __shfl_sync(kFullWarp, threadIdx.x / 128 - 1, 0) * 64;
  Turn turn;
  RingTurn ring;
#pragma unroll 1
  for (; ring.place(shared) < shared.num_places; ring.next()) {
    shared.full[turn.stage].wait(turn.parity);
    const u32 first_column = shared.first_columns[ring.index];
    // Rows that exist come first.
    const bool has_rows = shared.pairs[ring.index][group_row] < args.num_pairs && first_column < args.num_columns;
    const auto release = [&](u32 stage) {
      if (lane_id() < 2) shared.empty[stage].arrive_in(lane_id());
    };
    if (has_rows) {
      float sums[32][4];
      u32 stage_before = 0;
#pragma unroll 1
      for (u32 step = 0; step < num_steps; ++step, turn.next()) {
        shared.full[turn.stage].wait(turn.parity);
        const char* stage = stages + turn.stage * kStageBytes;
        const u32 a = shared_address(stage + group_row * kRowBytes) / 16, b = shared_address(stage + kTileBytes) / 16;
        begin_products();
        multiply_256<typename Tile::Element>(sums, a, b, step);
#pragma unroll
        for (u32 k = 1; k < kDepth / 16; ++k) multiply_256<typename Tile::Element>(sums, a + k * 2, b + k * 2, 1);
        commit_products();
        wait_products<1>();
        if (step > 0) release(stage_before);
        stage_before = turn.stage;
      }
      wait_products<0>();
      release(stage_before);
      write_rows<Tile>(args, shared.pairs[ring.index], shared.experts[ring.index], group_row + warp_id() % 4 * 16,
                       first_column, 0, sums);
    } else {
#pragma unroll 1
      for (u32 step = 0; step < num_steps; ++step, turn.next()) {
        shared.full[turn.stage].wait(turn.parity);
        __syncwarp();  // two lanes release, and the others may not have seen the phase end
        release(turn.stage);
      }
    }
  }
}

// Rows of pairs of experts that are not here.
template <typename Tile>
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

template <typename Tile>
__device__ __forceinline__ void experts_wgmma(const ExpertsWgmmaArgs& args) {
  extern __shared__ uint4 memory[];
  const u32 misaligned = shared_address(memory) % 1024;
  char* stages = reinterpret_cast<char*>(memory) + (misaligned ? 1024 - misaligned : 0);
  Shared& shared = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes);
  const u32 rank = blockIdx.x % 2, num_tiles = ceil_div(args.num_columns, Tile::kColumns);
  if (threadIdx.x == 0) {
    prefetch_map(args.weights);
#pragma unroll
    for (u32 s = 0; s < kStages; ++s) {
      shared.full[s].open(kLoaders + 1);
      shared.empty[s].open(2 * 8);  // warps of both blocks that multiply
    }
#pragma unroll 1
    for (u32 t = 0; t < kRing; ++t) shared.placed[t].open(1);
    fence_open_barriers();
    shared.taken[0] = blockIdx.x / 2;
    shared.placed[0].arrive();
  }
  if (args.is_first) wait_for_kernel_before();
  let_next_kernel_begin();
  if (args.is_first && blockIdx.x == 0 && threadIdx.x == 0) args.counters[1] = 0;
  count_tiles(args, shared, num_tiles);
  // The barriers of both blocks are open.
  sync_cluster();
  const u32 num_steps = ceil_div(args.depth, kDepth);
  if (threadIdx.x < kLoaders) {
    give_back_registers<56>();
    load<Tile>(args, shared, stages, num_tiles, num_steps, rank);
  } else {
    take_registers<224>();
    multiply<Tile>(args, shared, stages, num_steps);
  }
  if (args.clears_unknown) clear_unknown<Tile>(args);  // nobody reads these rows before the sum
  // Until then, the other block may write to the shared memory of this one.
  sync_cluster();
}

#define ENTRY(name, type, Element, kGated)                                            \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1) \
      experts_wgmma_##name##_##type(const __grid_constant__ ExpertsWgmmaArgs args) {  \
    experts_wgmma<WgmmaTile<Element, kGated>>(args);                                  \
  }
ENTRY(gated, bf16, BF16, true)
ENTRY(gated, f16, F16, true)
ENTRY(plain, bf16, BF16, false)
ENTRY(plain, f16, F16, false)
