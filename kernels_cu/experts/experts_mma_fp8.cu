// SPDX-License-Identifier: Apache-2.0
// The products of the experts with mma.sync, of e4m3, which rows of activations have become: devices from compute
// capability 8.9 on, but for Hopper, which has wgmma. Tensor cores of 8.9, 12.0 and 12.1 take e4m3; for those of 10.0 and
// 10.3, as for Hopper's, NVRTC makes fp16 of it. There is no PTX, as Hopper would run that.
//
// in       rows and weights of e4m3 and their scales, bias of Element, topk_weights; sorted_token_ids, expert_ids and
//          num_tokens_post_pad of moe_align_block_size with blocks of kTileRows                       (ExpertsArgs, mma.cuh)
// out      of GEMM 1 e4m3, with a scale for 128 columns of a row; of GEMM 2, rows of Element; of pairs that are in a block
// grid     blocks * column_tiles; block: kThreads
// shared   kStages * ((kTileRows + kTileWeights) * 128 + sizeof(StageScales)) bytes
// limits   depth and num_columns are multiples of 16; rows and weights are aligned to 16 bytes; scales of weights are fp32
//          if there are several in a row, which are then of 128 columns each and of a multiple of 128 rows
// targets  sm_89 sm_100 sm_120
//
// A block makes kTileRows rows by kTileWeights rows of weights, each warp all rows by an eighth of those. With a gate, they
// alternate as in experts_mma.cu, so that a tile has 128 columns at least, and whole groups of columns.
//
//   1  the pairs of the block; where its expert is not here, zeros
//   2  per 128 elements of depth: ask for what comes kStages - 1 steps later, wait for this step; for 16 rows after another,
//      as long as there are any: multiply, and add to the sums, times the scales of the step
//   3  scales of rows of weights, where steps have none; bias, router weight, activation
//   4  GEMM 1: the largest of each group of columns, from all warps; scales; codes, through shared memory. GEMM 2: write
//
// Tensor cores may keep fewer bits of a sum than fp32 has: they add up 64 elements, which fp32 adds to what comes before.
//
// Order: over the depth ascending, 32 and then 64 at a time, for each element alone: a row has the same bits in every batch.
#include "experts/mma.cuh"
#include "experts/rows_fp8.cuh"

// sums[16][8] += a[16][32] * b[8][32]^T of e4m3, in the layout of m16n8k32.
__device__ __forceinline__ void multiply_add_e4m3(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 4
  // Which does not know it: two products of fp16, which holds all e4m3.
  const auto decode = [](u32 word, u32(&pairs)[2]) {
    const u32 is_nan = (word & 0x7f7f7f7fu) + 0x01010101u;  // in the highest bit of each byte
    Fp8::decode<F16>(word, 0, pairs);
    pairs[0] |= select_bytes(is_nan, 0x9988);
    pairs[1] |= select_bytes(is_nan, 0xbbaa);
  };
  u32 rows[4][2], columns[2][2];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) decode(a[i], rows[i]);
  decode(b0, columns[0]);
  decode(b1, columns[1]);
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    const u32 half[4] = {rows[i * 2][0], rows[i * 2 + 1][0], rows[i * 2][1], rows[i * 2 + 1][1]};
    multiply_add<F16>(sums, half, columns[i][0], columns[i][1]);
  }
#elif EMULATED
  emulator::multiply_add(sums, a, b0, b1, nullptr, __LINE__);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

constexpr u32 kTileRows = 128, kTileWeights = 256, kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr u32 kStages = 2;  // all that there is room for in 99 KB

template <typename ElementType, bool kHasGate>
struct Tile : TileOf<ElementType, kHasGate, kTileRows, kTileWeights, kThreads, 1> {
  static constexpr u32 kM = kTileRows / 16, kN = kTileWeights / kWarps / 8;  // products of a warp
  static constexpr u32 kGroups = Tile::kColumns / kGroupColumns;
};

static_assert(kTileRows + 4 <= kThreads, "each copies a scale at most");
static_assert(kTileWeights == 2 * kGroupColumns && kWarps % 2 == 0, "weights of a warp are in one of two groups");

// Of a step: those of rows, and those of the weights of each half of the tile, by eights of its rows that are even, and odd.
struct StageScales {
  float rows[kTileRows], weights[2][2];
};

// What one thread copies of these, if anything: a word at each step.
template <typename Tile>
struct ScaleLoader {
  const float* from;  // null: nothing
  i64 stride;
  bool exists;

  __device__ __forceinline__ ScaleLoader(const ExpertsArgs& args, const u32* pairs, u32 expert, u32 first_column,
                                         u32 num_steps) {
    const u32 w = threadIdx.x - kTileRows;  // of the weights'
    if (threadIdx.x < kTileRows) {
      const u32 pair = pairs[threadIdx.x];
      exists = pair < args.num_pairs;
      from = args.row_scales + (exists ? args.rows_shared.quotient(pair) * num_steps : 0);
      stride = 1;
    } else {
      const bool is_one = w < 4 && args.scales_steps;
      const i64 at = weight_scale_at<Tile>(args, expert, first_column, w / 2 * (kTileWeights / 2) + w % 2 * 8);
      exists = true;
      from = is_one ? reinterpret_cast<const float*>(args.weight_scales) + at : nullptr;
      stride = args.scale_group_stride;
    }
  }

  // Before the copies of the step are committed.
  __device__ __forceinline__ void ask(StageScales& to, u32 step, u32 num_steps) const {
    if (step < num_steps && from != nullptr) copy_word_async(to.rows + threadIdx.x, from + step * stride, exists);
  }
};

template <typename Tile>
using Sums = float[Tile::kM][Tile::kN][4];

// A step, by a warp; half of it at a time, as there are no registers for the weights of all of it.
template <typename Tile>
__device__ __forceinline__ void multiply(const char* stage, const StageScales& scales, bool scales_steps, u32 num_rows,
                                         Sums<Tile>& sums) {
  constexpr u32 kSlices = kRowBytes / 32, kAtOnce = kSlices / 2;
  const char* weights = stage + kTileRows * kRowBytes;
  float of_weights[2] = {1.0f, 1.0f};
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    if (scales_steps) of_weights[i] = scales.weights[warp_id() / (kWarps / 2)][i];
  }
#pragma unroll 1
  for (u32 first = 0; first < kSlices; first += kAtOnce) {
    u32 b[kAtOnce][Tile::kN / 2][4];
#pragma unroll
    for (u32 k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (u32 n = 0; n < Tile::kN / 2; ++n) {
        const u32 r = warp_id() * (Tile::kN * 8) + n * 16 + lane_id() % 8 + lane_id() / 16 * 8;
        load_matrices(b[k][n], weights + chunk_offset(r, (first + k) * 2 + lane_id() / 8 % 2));
      }
    }
#pragma unroll
    for (u32 m = 0; m < Tile::kM; ++m) {
      if (m * 16 >= num_rows) break;
      float part[Tile::kN][4] = {};
#pragma unroll
      for (u32 k = 0; k < kAtOnce; ++k) {
        u32 a[4];
        load_matrices(a, stage + chunk_offset(m * 16 + lane_id() % 16, (first + k) * 2 + lane_id() / 16));
#pragma unroll
        for (u32 n = 0; n < Tile::kN; ++n) {
          multiply_add_e4m3(part[n], a, b[k][n / 2][n % 2 * 2], b[k][n / 2][n % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const float of_row = scales.rows[m * 16 + half * 8 + lane_id() / 4];
        const float factors[2] = {of_row * of_weights[0], of_row * of_weights[1]};
#pragma unroll
        for (u32 n = 0; n < Tile::kN; ++n) {
#pragma unroll
          for (u32 e = half * 2; e < half * 2 + 2; ++e) sums[m][n][e] = fmaf(part[n][e], factors[n % 2], sums[m][n][e]);
        }
      }
    }
  }
}

// Where steps have no scales of weights.
template <typename Tile>
__device__ __forceinline__ void scale_columns(const ExpertsArgs& args, u32 expert, u32 first_column,
                                              u32 first_weight_row, Sums<Tile>& sums) {
#pragma unroll
  for (u32 n = 0; n < Tile::kN; ++n) {
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      const u32 r = first_weight_row + n * 8 + lane_id() % 4 * 2 + e;
      const i64 at = weight_scale_at<Tile>(args, expert, first_column, r);
      const float scale = load_scale(args.weight_scales, args.scale_type, at);
#pragma unroll
      for (u32 m = 0; m < Tile::kM; ++m) {
        sums[m][n][e] *= scale;
        sums[m][n][e + 2] *= scale;
      }
    }
  }
}

// What rows of e4m3 need of all warps, where stages were.
template <typename Tile>
struct Written {
  uint4 codes[Tile::kGroups][kTileRows * kChunks];
  float largest[kWarps][kTileRows], factors[Tile::kGroups][kTileRows];
  static_assert(sizeof(codes) + sizeof(largest) + sizeof(factors) <= kStages * Tile::kStageBytes, "where stages were");
};

// Rows of e4m3 and their scales, which are those of quantize.cu.
template <typename Tile>
__device__ __forceinline__ void write_codes(const ExpertsArgs& args, const u32* pairs, u32 num_rows, u32 first_column,
                                            Written<Tile>& written, const Sums<Tile>& sums) {
  constexpr u32 kStep = Tile::kGated ? 2 : 1, kEights = Tile::kN / kStep;  // products for 8 columns; of a warp
  const u32 group = warp_id() / (kWarps / Tile::kGroups), my_column = warp_id() * kEights * 8 % kGroupColumns;
  const u32 my_row = lane_id() / 4;
#pragma unroll
  for (u32 m = 0; m < Tile::kM; ++m) {
    if (m * 16 >= num_rows) break;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      float largest = 0;
#pragma unroll
      for (u32 c = 0; c < kEights; ++c) {
        largest = larger(larger(largest, sums[m][c * kStep][half * 2]), sums[m][c * kStep][half * 2 + 1]);
      }
      largest = largest_of_quad(largest);
      if (lane_id() % 4 == 0) written.largest[warp_id()][m * 16 + half * 8 + my_row] = largest;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (u32 i = threadIdx.x; i < Tile::kGroups * kTileRows; i += kThreads) {
    const u32 row = i % kTileRows, of = i / kTileRows, pair = pairs[row];
    const u32 column = first_column + of * kGroupColumns;
    if (row >= num_rows || column >= args.num_columns) continue;
    float largest = 0;
#pragma unroll
    for (u32 w = 0; w < kWarps / Tile::kGroups; ++w) {
      largest = fmaxf(largest, written.largest[of * (kWarps / Tile::kGroups) + w][row]);
    }
    const float scale = group_scale(largest);
    written.factors[of][row] = inverse(scale);
    if (pair < args.num_pairs) {
      args.output_scales[(i64)pair * ceil_div(args.num_columns, kGroupColumns) + column / kGroupColumns] = scale;
    }
  }
  __syncthreads();
  if (first_column + group * kGroupColumns < args.num_columns) {
    char* codes = reinterpret_cast<char*>(written.codes[group]);
#pragma unroll
    for (u32 m = 0; m < Tile::kM; ++m) {
      if (m * 16 >= num_rows) break;
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const u32 row = m * 16 + half * 8 + my_row;
        const float factor = written.factors[group][row];
#pragma unroll
        for (u32 c = 0; c < kEights; ++c) {
          const float* values = sums[m][c * kStep] + half * 2;
          const u32 column = my_column + c * 8 + lane_id() % 4 * 2;
          *reinterpret_cast<u16*>(codes + chunk_offset(row, column / 16) + column % 16) =
              (u16)pack_e4m3(__fmul_rn(values[0], factor), __fmul_rn(values[1], factor));
        }
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (u32 i = threadIdx.x; i < Tile::kGroups * kTileRows * kChunks; i += kThreads) {
    const u32 chunk = i % kChunks, row = i / kChunks % kTileRows, of = i / kChunks / kTileRows;
    const u32 pair = pairs[row], column = first_column + of * kGroupColumns + chunk * 16;
    if (pair >= args.num_pairs || column >= args.num_columns) continue;
    const char* codes = reinterpret_cast<const char*>(written.codes[of]);
    *reinterpret_cast<uint4*>(args.output + (i64)pair * args.num_columns + column) =
        *reinterpret_cast<const uint4*>(codes + chunk_offset(row, chunk));
  }
}

template <typename Tile, bool kIsFirst>
__device__ __forceinline__ void experts_mma_fp8(const ExpertsArgs& args) {
  extern __shared__ uint4 memory[];
  __shared__ u32 pairs[kTileRows];
  char* stages = reinterpret_cast<char*>(memory);
  StageScales* scales = reinterpret_cast<StageScales*>(stages + kStages * Tile::kStageBytes);
  const Place place(args, Tile::kColumns);
  wait_for_kernel_before();
  let_next_kernel_begin();
  if (place.block * kTileRows >= (u32)*args.num_tokens_post_pad) return;
  const u32 expert = (u32)args.expert_ids[place.block];
  load_pairs<Tile>(args, place.block, pairs);
  if (expert >= args.num_experts) return clear_rows<Tile>(args, pairs, place.first_column);

  const u32 num_steps = ceil_div(args.depth, Tile::kStepDepth);
  const Loader<Tile> loader(args, pairs, expert, place.first_column);
  const ScaleLoader<Tile> scale_loader(args, pairs, expert, place.first_column, num_steps);
  const auto ask = [&](u32 step) {
    scale_loader.ask(scales[step % kStages], step, num_steps);
    loader.ask(args, stages + step % kStages * Tile::kStageBytes, step, num_steps);
  };
  // Of 16 rows, the first one tells whether there are any: padding comes last.
  const bool exist = lane_id() < Tile::kM && pairs[lane_id() % Tile::kM * 16] < args.num_pairs;
  const u32 num_rows = (u32)__popc(__ballot_sync(kFullWarp, exist)) * 16;
  Sums<Tile> sums = {};
#pragma unroll
  for (u32 step = 0; step + 1 < kStages; ++step) ask(step);
#pragma unroll 1
  for (u32 step = 0; step < num_steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // all have waited for their part of this step, and are done with the one before
    ask(step + kStages - 1);
    multiply<Tile>(stages + step % kStages * Tile::kStageBytes, scales[step % kStages], args.scales_steps, num_rows,
                   sums);
  }
  const u32 first_weight_row = warp_id() * (Tile::kN * 8);
  if (!args.scales_steps) scale_columns<Tile>(args, expert, place.first_column, first_weight_row, sums);
#pragma unroll
  for (u32 m = 0; m < Tile::kM; ++m) {
    if (m * 16 >= num_rows) break;
    const u32* my_pairs = pairs + m * 16;
    float weights[2];
    load_router_weights(args, my_pairs, weights);
    finish_sums<Tile>(args, weights, expert, place.first_column, first_weight_row, sums[m]);
    if (!kIsFirst) write_rows<Tile>(args, my_pairs, place.first_column, first_weight_row, sums[m]);
  }
  if (!kIsFirst) return;
  __syncthreads();  // nobody reads stages any more
  write_codes<Tile>(args, pairs, num_rows, place.first_column, *reinterpret_cast<Written<Tile>*>(memory), sums);
}

#define ENTRY(name, type, Element, kGated, kIsFirst)                              \
  extern "C" __global__ void __launch_bounds__(kThreads)                          \
      experts_mma_fp8_##name##_##type(const __grid_constant__ ExpertsArgs args) { \
    experts_mma_fp8<Tile<Element, kGated>, kIsFirst>(args);                       \
  }
#define ENTRIES(type, Element)                   \
  ENTRY(first_gated, type, Element, true, true)  \
  ENTRY(first_plain, type, Element, false, true) \
  ENTRY(second, type, Element, false, false)
ENTRIES(bf16, BF16)
ENTRIES(f16, F16)
