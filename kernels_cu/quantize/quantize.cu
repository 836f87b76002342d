// SPDX-License-Identifier: Apache-2.0
// quantize: rows of activations to fp8 e4m3, with a scale for each group of columns or for each row.
//
//   scales[r, g] = max(eps, largest |value| of the group) / 448, rounded up to a power of two if asked for
//   codes[r, c]  = e4m3(value[r, c] * (1 / scales[r, c / group_size]))
//
// in       rows of Element, row_stride bytes apart: [T, H], or [T, 2 * H] where a value is silu(row[c]) * row[H + c]
//          (gated); ids [num_rows] or null: row r is of token ids[r] / topk, or zeros if ids[r] is not below num_pairs
// out      codes [num_rows, H] e4m3; scales fp32, at strides of their own
// groups   lanes_per_group neighbouring threads, a power of 2 up to 32, for a group; threads of the grid cover num_units
// rows     a block for each row, which is one group; block: any multiple of 32 threads, up to kMaxRowThreads
//
//   1  each thread loads a chunk of kChunk values; rows of more chunks than a block has threads take further rounds
//   2  the largest of the group's finite magnitudes, by shuffles in a warp and then, of rows, through shared memory
//   3  each thread writes the codes of its chunk, which it still has in registers, and the group's first one the scale;
//      chunks of further rounds are loaded again
//
// NaN and infinities do not count for scales, so these are finite; NaN becomes the code 0x7f, infinity that of 448 or
// -448. Each product, sum and quotient is rounded by itself (no fma), as on the CPU; maxima are the same in any order.
#include "convert.cuh"

// What every thread needs before it loads comes first, as the first look at a line of 64 bytes of the arguments takes
// 200 cycles.
struct QuantizeArgs {
  const char* rows;
  char* codes;
  float* scales;
  const u32* ids;
  i64 row_stride;  // in bytes
  u32 num_units;
  Divisor units_per_row;   // lanes of all groups of a row
  u32 lane_bits;           // log2 of the lanes of a group
  u32 group_size, hidden;  // in the kernels for rows, both are the same
  float eps;
  u32 to_power_of_2;
  i64 scale_row_stride, scale_group_stride;  // in elements
  Divisor topk;
  u32 num_pairs;
};

constexpr u32 kChunk = 16, kMaxGroupThreads = 128, kMaxRowThreads = 1024;
constexpr u32 kNoRow = 0xffffffffu;

// x * sigmoid(x) within 7e-6 of its value from x = -86 on, by sums, products and a quotient that any IEEE arithmetic has.
// e^-x is 2^n * 2^f, the latter by a polynomial, for f in [-0.5, 0.5].
__device__ __forceinline__ float silu(float x) {
  const float power = fminf(fmaxf(__fmul_rn(x, -1.4426950408889634f), -125.0f), 125.0f);
  const float shifted = __fadd_rn(power, 12582912.0f);  // 1.5 * 2^23: n is in the last bits
  const float f = __fsub_rn(power, __fsub_rn(shifted, 12582912.0f));
  float y = __fadd_rn(__fmul_rn(f, 0.00958275f), 0.05590615f);
  y = __fadd_rn(__fmul_rn(f, y), 0.24024099f);
  y = __fadd_rn(__fmul_rn(f, y), 0.69312423f);
  y = __fadd_rn(__fmul_rn(f, y), 1.0f);
  y = __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
  return __fmul_rn(x, inverse(__fadd_rn(1.0f, y)));
}

// `count` elements, 16 of them if they are loaded as vectors; zeros after those.
template <typename Element, bool kVectors>
__device__ __forceinline__ void load(const char* address, u32 count, float (&values)[kChunk]) {
  if (kVectors) {
#pragma unroll
    for (u32 i = 0; i < kChunk * Element::kBytes / 16; ++i) {
      const uint4 words = reinterpret_cast<const uint4*>(address)[i];
      float* begin = values + i * 4 * Element::kPerWord;
      Element::unpack(words.x, begin);
      Element::unpack(words.y, begin + Element::kPerWord);
      Element::unpack(words.z, begin + 2 * Element::kPerWord);
      Element::unpack(words.w, begin + 3 * Element::kPerWord);
    }
  } else {
    const auto* elements = reinterpret_cast<const typename Element::Bits*>(address);
#pragma unroll
    for (u32 i = 0; i < kChunk; ++i) values[i] = i < count ? Element::to_float(elements[i]) : 0.0f;
  }
}

template <typename Element, bool kVectors>
__device__ __forceinline__ void store(char* address, u32 count, const float (&values)[kChunk], float scale) {
  const float factor = inverse(scale);
  u32 words[kChunk / 4];
#pragma unroll
  for (u32 i = 0; i < kChunk / 4; ++i) {
    const float* four = values + 4 * i;
    words[i] = pack_e4m3(__fmul_rn(four[0], factor), __fmul_rn(four[1], factor)) |
               pack_e4m3(__fmul_rn(four[2], factor), __fmul_rn(four[3], factor)) << 16;
  }
  if (kVectors) {
    *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (u32 i = 0; i < kChunk; ++i) {
      if (i < count) address[i] = (char)(words[i / 4] >> 8 * (i % 4));
    }
  }
}

// The values of a row from `column` on, `count` of them.
template <typename Element, bool kVectors, bool kGated>
__device__ __forceinline__ void load_values(const QuantizeArgs& args, u32 row, u32 column, u32 count,
                                            float (&values)[kChunk]) {
  const char* address = args.rows + row * args.row_stride + (i64)column * Element::kBytes;
  load<Element, kVectors>(address, count, values);
  if (kGated) {
    float ups[kChunk];
    load<Element, kVectors>(address + (i64)args.hidden * Element::kBytes, count, ups);
#pragma unroll
    for (u32 i = 0; i < kChunk; ++i) values[i] = __fmul_rn(silu(values[i]), ups[i]);
  }
}

// The row that row r of the result is made of.
__device__ __forceinline__ u32 find_row(const QuantizeArgs& args, u32 r) {
  if (args.ids == nullptr) return r;
  const u32 id = args.ids[r];
  return id < args.num_pairs ? args.topk.quotient(id) : kNoRow;
}

__device__ __forceinline__ float largest_magnitude(const float (&values)[kChunk]) {
  float largest = 0;
#pragma unroll
  for (u32 i = 0; i < kChunk; ++i) largest = fmaxf(largest, fabsf(values[i]));  // which takes the one that is not NaN
  if (largest <= kLargestFinite) return largest;
  largest = 0;
#pragma unroll
  for (u32 i = 0; i < kChunk; ++i) {
    const float magnitude = fabsf(values[i]);
    largest = fmaxf(largest, magnitude <= kLargestFinite ? magnitude : 0.0f);
  }
  return largest;
}

// Over groups of 2^lane_bits neighbouring lanes; all threads of the warp take part.
__device__ __forceinline__ float largest_of_lanes(float value, u32 lane_bits) {
#pragma unroll
  for (u32 bit = 0; bit < 5; ++bit) {
    if (bit < lane_bits) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, 1u << bit));
  }
  return value;
}

__device__ __forceinline__ float to_scale(const QuantizeArgs& args, float largest) {
  const float scale = to_e4m3_scale(largest, args.eps);
  return args.to_power_of_2 ? __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u) : scale;
}

template <typename Element, bool kVectors, bool kGated>
__device__ __forceinline__ void quantize_groups(const QuantizeArgs& args) {
  const u32 unit = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 row = args.units_per_row.quotient(unit), place = unit - row * args.units_per_row.value;
  const u32 group = place >> args.lane_bits, begin = (place - (group << args.lane_bits)) * kChunk;
  const bool exists = unit < args.num_units;
  const u32 count = exists && begin < args.group_size ? min_u32(args.group_size - begin, kChunk) : 0;
  const u32 column = group * args.group_size + begin;

  float values[kChunk] = {};
  if (count > 0) {
    const u32 source = find_row(args, row);
    if (source != kNoRow) load_values<Element, kVectors, kGated>(args, source, column, count, values);
  }
  const float scale = to_scale(args, largest_of_lanes(largest_magnitude(values), args.lane_bits));
  if (count > 0) store<Element, kVectors>(args.codes + (i64)row * args.hidden + column, count, values, scale);
  if (exists && begin == 0) args.scales[row * args.scale_row_stride + group * args.scale_group_stride] = scale;
}

// Over a block; one barrier.
__device__ __forceinline__ float largest_of_block(float value) {
  __shared__ float of_warps[kMaxRowThreads / kWarpSize];
  value = largest_of_lanes(value, 5);
  if (lane_id() == 0) of_warps[warp_id()] = value;
  __syncthreads();
  return largest_of_lanes(lane_id() < blockDim.x / kWarpSize ? of_warps[lane_id()] : 0.0f, 5);
}

template <typename Element, bool kVectors>
__device__ __forceinline__ void quantize_rows(const QuantizeArgs& args) {
  const u32 row = blockIdx.x, source = find_row(args, row);
  const u32 begin = threadIdx.x * kChunk, step = blockDim.x * kChunk;
  const auto count = [&](u32 column) { return min_u32(args.group_size - column, kChunk); };

  float first[kChunk] = {}, largest = 0;
  if (source != kNoRow) {
    if (begin < args.group_size) load_values<Element, kVectors, false>(args, source, begin, count(begin), first);
    largest = largest_magnitude(first);
#pragma unroll 1
    for (u32 column = begin + step; column < args.group_size; column += step) {
      float values[kChunk];
      load_values<Element, kVectors, false>(args, source, column, count(column), values);
      largest = fmaxf(largest, largest_magnitude(values));
    }
  }
  const float scale = to_scale(args, largest_of_block(largest));
  char* codes = args.codes + (i64)row * args.group_size;
  if (begin < args.group_size) store<Element, kVectors>(codes + begin, count(begin), first, scale);
#pragma unroll 1
  for (u32 column = begin + step; column < args.group_size; column += step) {
    float values[kChunk] = {};
    if (source != kNoRow) load_values<Element, kVectors, false>(args, source, column, count(column), values);
    store<Element, kVectors>(codes + column, count(column), values, scale);
  }
  if (threadIdx.x == 0) args.scales[row * args.scale_row_stride] = scale;
}

#define GROUPS(name, Element, kVectors, kGated)                    \
  extern "C" __global__ void __launch_bounds__(kMaxGroupThreads)   \
      quantize_##name(const __grid_constant__ QuantizeArgs args) { \
    quantize_groups<Element, kVectors, kGated>(args);              \
  }
#define ROWS(name, Element, kVectors)                              \
  extern "C" __global__ void __launch_bounds__(kMaxRowThreads)     \
      quantize_##name(const __grid_constant__ QuantizeArgs args) { \
    quantize_rows<Element, kVectors>(args);                        \
  }
// With _any: where strides or alignment rule vectors out.
#define ENTRIES(type, Element)                     \
  GROUPS(groups_##type, Element, true, false)      \
  GROUPS(groups_any_##type, Element, false, false) \
  GROUPS(gated_##type, Element, true, true)        \
  GROUPS(gated_any_##type, Element, false, true)   \
  ROWS(rows_##type, Element, true)                 \
  ROWS(rows_any_##type, Element, false)
ENTRIES(f32, F32)
ENTRIES(f16, F16)
ENTRIES(bf16, BF16)
