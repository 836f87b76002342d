# ruff: noqa: E501 (a table)
"""Deliberate faults in kernels, constants, plans and argument structs, and whether the suite notices them.

    scripts/mutants                 all of them, two at a time; prints a table, exits with 1 if one is missed
    scripts/mutants barrier 17      those whose number or description says so

Each is put into a copy of the checkout, where the tests that need no GPU run until the first fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Those first that are likely to notice; all run.
FIRST = (
    "emulator",
    "experts",
    "structs",
    "plans",
    "align",
    "align_batched",
    "gate",
    "route",
    "moe_sum",
    "quantize",
    "quantized_experts",
    "sort",
    "permute",
    "align_lora",
    "parallel",
    "launch",
    "tensor_map",
    "arguments",
)


class Mutant(NamedTuple):
    what: str
    file: str
    before: str
    after: str
    missed: str = ""  # why it is not noticed


ALIGN, SHARED, SMALL = (
    "kernels_cu/align/align.cuh",
    "kernels_cu/align/shared.cuh",
    "kernels_cu/align/small.cuh",
)
ROUTE, PACK, EXPAND, PUSH, SYNC = (
    f"kernels_cu/parallel/ep_{name}.cu" for name in ("route", "pack", "expand", "push", "sync")
)
GLOBAL, BATCHED = "kernels_cu/align/global.cuh", "kernels_cu/align_batched/align_batched.cu"
GATE, WARP, WIDE = "kernels_cu/gate/gate.cuh", "kernels_cu/gate/warp.cuh", "kernels_cu/gate/gate_wide.cu"
SUM, COMMON, CONVERT = "kernels_cu/moe_sum/moe_sum.cu", "kernels_cu/common.cuh", "kernels_cu/convert.cuh"
EXPERTS, MMA = "kernels_cu/experts/experts.cuh", "kernels_cu/experts/experts_mma.cu"
MMA_BOTH, MMA_FP8 = "kernels_cu/experts/mma.cuh", "kernels_cu/experts/experts_mma_fp8.cu"
ROWS_FP8 = "kernels_cu/experts/rows_fp8.cuh"
DIRECT, WGMMA = "kernels_cu/experts/experts_direct.cu", "kernels_cu/experts/wgmma.cuh"
WGMMA_16, WGMMA_FP8 = "kernels_cu/experts/experts_wgmma.cu", "kernels_cu/experts/experts_wgmma_fp8.cu"
SWAPPED = "kernels_cu/experts/swapped.cuh"
QUANTIZED, FORMATS = "kernels_cu/experts/quantized.cuh", "kernels_cu/experts/formats.cuh"
HOPPER = "kernels_cu/hopper.cuh"
QUANTIZE, PLAN_QUANTIZE = "kernels_cu/quantize/quantize.cu", "cupy_moe/plans/quantize.py"
PLAN, PLAN_GATE, PLAN_SUM = "cupy_moe/plans/align.py", "cupy_moe/plans/gate.py", "cupy_moe/plans/moe_sum.py"
PLAN_EXPERTS = "cupy_moe/plans/experts.py"
LAUNCH, MAP = "cupy_moe/cuda/launch.py", "cupy_moe/cuda/tensor_map.py"
OPERATOR = "cupy_moe/operators/align.py"
LORA = "kernels_cu/align/align_lora.cu"
SORT, PLAN_PERMUTE = "kernels_cu/align/align_sort.cu", "cupy_moe/plans/permute.py"
HASH, CLUSTER8 = "kernels_cu/gate/gate_hash.cu", "kernels_cu/route/route_cluster8.cu"
PERMUTE, PERMUTE_DIRECT = "kernels_cu/permute/permute.cuh", "kernels_cu/permute/permute_direct.cu"

MUTANTS = [
    # comparisons
    Mutant("ids past the last expert are the first expert's", ALIGN, "? (u32)ids[k] : args.num_experts;", "? (u32)ids[k] : 0;"),
    Mutant("map entries are not bounded", ALIGN, "min_u32((u32)__ldg(args.expert_map + of[k]), args.num_experts)", "(u32)__ldg(args.expert_map + of[k])"),
    Mutant("a mapped block names any expert", ALIGN, "(u32)local < args.num_experts ? local : -1", "local"),
    Mutant("the last id of a piece is left out", ALIGN, "return i < end ? Ids::load", "return i + 1 < end ? Ids::load"),
    Mutant("rows after the piece count as the piece's", ALIGN, "return i < end ? table.of_warp", "return i <= end ? table.of_warp"),
    Mutant("equal ids: the later one comes first", SMALL, "other.x == bucket ? (first < i ?", "other.x == bucket ? (first > i ?"),
    Mutant("smaller or equal buckets count as smaller", SMALL, "other.y < bucket ? width.y", "other.y <= bucket ? width.y"),
    Mutant("a slot at the end of the slice is written twice", SMALL, "slot < slot_end", "slot <= slot_end", "two blocks write the same to that slot"),
    Mutant("ties go to the later group", WARP, "theirs == score && other < group", "theirs == score && other > group"),
    Mutant("ties go to the later group, wide", WIDE, "group_keys[other] == score && other < group", "group_keys[other] == score && other > group"),
    Mutant("ties go to the later expert, wide", WIDE, "key == last.key && place > last.place", "key == last.key && place < last.place"),
    Mutant("as many groups as asked for and one more", WARP, "return rank < args.topk_group", "return rank <= args.topk_group"),
    Mutant("adapters have one place for their slots", LORA, "    sorted_token_ids += (u64)adapter * num_slots;\n", ""),
    Mutant("adapters share their workspace", LORA, "    scratch += (u64)adapter * scratch_words;\n", ""),
    Mutant("ids of all tokens, one by one", LORA, "return args.has(args.topk.quotient(i)) ? id : ~Id(0);", "return id;"),
    Mutant("ids of the first token of a load", LORA, "args.has(args.topk.quotient(i + k))", "args.has(args.topk.quotient(i))"),
    Mutant("every adapter is enabled", LORA, "return is_enabled && ", "return "),
    Mutant("flags of one byte are read as words", LORA, "is_enabled = flag_bytes == 1", "is_enabled = flag_bytes == 2"),
    Mutant("the first adapter is everyone's", LORA, "u32 team_rank(const OfAdapter& args) { return args.rank; }", "u32 team_rank(const OfAdapter& args) { return blockIdx.x; }"),
    Mutant("a unit of each part is left out", PERMUTE, "unit < part.num_units)", "unit + 1 < part.num_units)"),
    Mutant("rows of tokens past the last are copied", PERMUTE, "token < part.num_tokens && unit", "unit"),
    Mutant("the last slot is not copied to", PERMUTE, "if (slots[k] < args.num_slots) f(slots[k]);", "if (slots[k] + 1 < args.num_slots) f(slots[k]);"),
    Mutant("pairs beyond those that are asked for at once", PERMUTE, "first < args.topk; first += Unit::kSlotsAtOnce)", "first < min_u32(args.topk, Unit::kSlotsAtOnce); first += Unit::kSlotsAtOnce)"),
    Mutant("scales of the first columns only", PERMUTE, "scale < args.num_scales; scale += kWarpSize) {\n      Element value;", "scale < min_u32(args.num_scales, kWarpSize); scale += kWarpSize) {\n      Element value;"),
    Mutant("padding between experts is not cleared", PERMUTE, "(args.has_padding ? 0 : used)", "used"),
    Mutant("the tail is cleared, whatever was asked for", PERMUTE, "args.fills_tail ? args.num_slots : used", "args.num_slots"),
    Mutant("scales of rows without a pair are not cleared", PERMUTE, "      zero.store(place_of_scale(args, slot, scale), args.scale_bytes);", "      {}"),
    Mutant("dropped pairs go to the first slot", PERMUTE_DIRECT, "slots[k] = ~0u;", "slots[k] = 0;"),
    Mutant("slots of the block are read before they are there", PERMUTE_DIRECT, "  write_padding(args, table.after(), used);\n  __syncthreads();", "  write_padding(args, table.after(), used);"),
    Mutant("rows are moved before they are sorted", "kernels_cu/permute/permute_rows.cu", "  wait_for_kernel_before();\n", ""),
    Mutant("the upper word of an offset is not written", ALIGN, "  if (args.words_per_offset == 2) args.expert_offsets[2 * bucket + 1] = 0;\n", ""),
    Mutant("dropped ids have no inverse", SORT, "  if (args.inverse_ids != nullptr) args.inverse_ids[i] = -1;\n", ""),
    Mutant("weights of padding stay as they were", SORT, "fill(args.sorted_weights, begin, end, 0.0f, lane_id(), kWarpSize);", "{}"),
    Mutant("small blocks of padding have no expert", SORT, "fill(args.fine_expert_ids, first, last, expert_of(args, bucket), lane_id(), kWarpSize);", "{}"),
    Mutant("the first small block of padding is the bucket's last", SORT, "args.fine_size.quotient(begin + args.fine_size.value - 1)", "args.fine_size.quotient(begin)", "both say the same of it"),
    Mutant("blocks of ids that are loaded together", PLAN_PERMUTE, "_cut(sizes, limits, together // gcd(together, sizes.topk))", "_cut(sizes, limits, 1)"),
    Mutant("too few units of a row", PLAN_PERMUTE, "units_per_part = ceil_div(units_per_row, parts)", "units_per_part = units_per_row // parts"),
    Mutant("no room for the slots of a block", PLAN_PERMUTE, "table_bytes(sizes.num_experts, rows) + 4 * pairs", "table_bytes(sizes.num_experts, rows)"),
    Mutant("a row for each slot of its token", SUM, "kKind == kRows ? input + ids[i] * args.slot_stride : input", "kKind == kRows ? input + i * args.slot_stride : input"),
    Mutant("a slot of any id is read", SUM, "reads[i] &= id < num_rows &&", "reads[i] &= id <= num_rows &&"),
    Mutant("rows past those in use are read", SUM, "num_rows = min_u32(num_rows, *args.expert_map);", "{}"),
    Mutant("the upper word of ids is not looked at", SUM, "(args.words_per_id == 1 || upper == 0)", "true"),
    Mutant("one unit too many", SUM, "if (unit >= args.num_units) return;", "if (unit > args.num_units) return;"),
    Mutant("negative counts are not 0", BATCHED, "return count < 0 ? 0 : min_u32(count, args.max_tokens);", "return min_u32(count, args.max_tokens);"),
    Mutant("counts are not bounded", BATCHED, "min_u32(count, args.max_tokens)", "count"),
    # barriers
    Mutant("no barrier after the buckets are there", SMALL, "  __syncthreads();\n\n  // `lanes` neighbours", "\n  // `lanes` neighbours"),
    Mutant("no barrier before counting", ALIGN, "= make_uint4(0, 0, 0, 0);\n  __syncthreads();", "= make_uint4(0, 0, 0, 0);"),
    Mutant("no barrier after counting", ALIGN, "to_bucket(args, Ids::load(args, i)), 1);\n  __syncthreads();", "to_bucket(args, Ids::load(args, i)), 1);"),
    Mutant("no barrier between rounds of a scan", ALIGN, "if (first > 0) __syncthreads();  // warp_sums is still being read", ""),
    Mutant("no barrier after the slots are found", ALIGN, "    post_pad += total;\n  }\n  __syncthreads();", "    post_pad += total;\n  }"),
    Mutant("no barrier of the warp before a row is advanced", ALIGN, "    if (begin >= end) break;\n    __syncwarp();", "    if (begin >= end) break;"),
    Mutant("no barrier of the warp after a row is advanced", ALIGN, "match = Match(args, next, next_id);\n    __syncwarp();", "match = Match(args, next, next_id);"),
    Mutant("no barrier in a scan", COMMON, "warp_sums[warp] = scanned;\n  __syncthreads();", "warp_sums[warp] = scanned;"),
    Mutant("nobody waits for the counts of others", SHARED, "  if (kCluster > 1) inbox.wait();\n", ""),
    Mutant("nobody waits for the cluster to run", SHARED, "    cluster_wait<kCluster>();\n", ""),
    Mutant("the inbox expects too little", SHARED, "inbox.expect(kCluster * stride * sizeof(u16))", "inbox.expect((kCluster - 1) * stride * sizeof(u16))"),
    Mutant("no barrier between offers", WIDE, "if (lane_id() == 0) offers[warp_id()] = offer;\n    __syncthreads();", "if (lane_id() == 0) offers[warp_id()] = offer;"),
    Mutant("no barrier after the keys", WIDE, "no_scores ? 0.0f : logit);\n  }\n  __syncthreads();", "no_scores ? 0.0f : logit);\n  }"),
    Mutant("offers of one round only", WIDE, "u32* offers = partial[k % 2];", "u32* offers = partial[0];"),
    Mutant("no barrier before the sums are read", BATCHED, "atomicAdd(sums + 1, all);\n  }\n  __syncthreads();", "atomicAdd(sums + 1, all);\n  }"),
    Mutant("sums are added to before they are cleared", BATCHED, "if (threadIdx.x < 2) sums[threadIdx.x] = 0;\n  __syncthreads();", "if (threadIdx.x < 2) sums[threadIdx.x] = 0;"),
    # off by one, wrong operation
    Mutant("the quotient of a divisor is shifted by one less", COMMON, "__umulhi(x << 1, magic) >> shift", "__umulhi(x << 1, magic) >> (shift - 1)"),
    Mutant("rounding up one too far", COMMON, "return quotient(x + value - 1) * value;", "return quotient(x + value) * value;"),
    Mutant("an inclusive scan", COMMON, "return scanned - value + warp_sum", "return scanned + warp_sum"),
    Mutant("the tail is not filled", ALIGN, "  fill(args.sorted_token_ids, post_pad, args.num_slots, (int)value, thread, num_threads);\n", ""),
    Mutant("the padding of the first bucket of a warp only", ALIGN, "bucket < args.num_experts; bucket += size * num_warps)", "bucket < min_u32(args.num_experts, size * num_warps); bucket += size * num_warps)"),
    Mutant("the counts of later blocks are left out", GLOBAL, "after += block > team_rank(args) ? count : 0;", "after += block > team_rank(args) + 1 ? count : 0;"),
    Mutant("bits of the bucket: one too few", ALIGN, "bits != 0; bits >>= kBits", "bits > 1; bits >>= kBits"),
    Mutant("weights of the slot before", SUM, "args.weights + (i64)token * args.topk + first;", "args.weights + (i64)token * args.topk;"),
    Mutant("fused products", SUM, "__fadd_rn(sum[e], kExtends ? __fmul_rn(weights[i], values[e]) : values[e])", "fmaf(weights[i], values[e], sum[e])"),
    Mutant("the factor after the shared output", SUM, "sum[e] = __fadd_rn(sum[e], values[e]);\n", "sum[e] = __fmul_rn(__fadd_rn(sum[e], values[e]), args.factor);\n"),
    Mutant("a sum that only the last lane has", GATE, "    value += __shfl_xor_sync(kFullWarp, value, distance);", "    value += __shfl_up_sync(kFullWarp, value, distance);"),
    Mutant("a key of NaN selects", GATE, "return key > kInfKey ? kMinusInfKey : key;", "return key;"),
    Mutant("padding rows have ids", WARP, "padded ? ~0u : id", "id"),
    Mutant("fp16 is rounded down", CONVERT, "magnitude + 0xfffu + (magnitude >> 13 & 1)", "magnitude"),
    # constants and formulas
    Mutant("align_small takes more ids than it has room for", PLAN, 'SMALL_FAST_IDS, SMALL_MAX_IDS = 64, Constant(128,', 'SMALL_FAST_IDS, SMALL_MAX_IDS = 64, Constant(192,'),
    Mutant("a table of one row less", PLAN, "round_up(num_rows + 2, 2) + 1", "round_up(num_rows + 1, 2) + 1"),
    Mutant("a table that is too narrow", PLAN, "return round_up(num_experts + 1, 4)", "return round_up(num_experts, 4)"),
    Mutant("no room for the counts of one block", PLAN, "(cluster + 1) * 2 * round_up(num_experts, 8)", "cluster * 2 * round_up(num_experts, 8)"),
    Mutant("too few scratch words", PLAN, 'pieces.arguments, grid * stride)', 'pieces.arguments, (grid - 1) * stride)'),
    Mutant("pieces that do not cover the ids", PLAN, "round_up(ceil_div(num_ids, grid), WARP)", "round_up(num_ids // grid, WARP)"),
    Mutant("too few threads for the last id", PLAN, "round_up((sizes.num_ids + 1) * lanes, WARP)", "round_up(sizes.num_ids * lanes, WARP)"),
    Mutant("too little shared memory for many experts", PLAN_GATE, "4 * (num_experts + num_groups + 2 * topk)", "4 * (num_experts + num_groups + topk)"),
    Mutant("lanes with one expert too few", PLAN_GATE, "share for share in GATE_SHARES[kernel] if num_experts // num_groups <= share * lanes", "share for share in GATE_SHARES[kernel] if num_experts // num_groups <= share * lanes + 1"),
    Mutant("a block too few", PLAN_SUM, "ceil_div(num_units, threads), threads", "num_units // threads, threads"),
    # structs and enums
    Mutant("two fields of a struct change places", ALIGN, "u32 num_ids, num_experts, num_slots, num_blocks;\n  u32 map_mode;", "u32 num_experts, num_ids, num_slots, num_blocks;\n  u32 map_mode;"),
    Mutant("a field has another type", GATE, "float factor, softcap;", "u32 factor; float softcap;"),
    Mutant("an enumerator is put before another", GATE, "enum Scoring : u32 { kSoftmax, kSigmoid, ", "enum Scoring : u32 { kSigmoid, kSoftmax, "),
    Mutant("the map's modes change places", OPERATOR, "NO_MAP, MAP_BLOCKS, MAP_IDS = range(3)", "NO_MAP, MAP_IDS, MAP_BLOCKS = range(3)"),
    Mutant("pointers change places", OPERATOR, "            for launch in launches:\n                launch(ids, a, b, c)\n    except", "            for launch in launches:\n                launch(ids, b, a, c)\n    except"),
    Mutant("the words of an id are its bytes", "cupy_moe/operators/moe_sum.py", "words_per_id=id_bytes // 4,", "words_per_id=id_bytes // 8 or 1,"),
    # quantising
    Mutant("ties of e4m3 go up", CONVERT, "magnitude + 0x7ffffu + (magnitude >> 20 & 1)", "magnitude + 0x80000u"),
    Mutant("e4m3 has no subnormal numbers", CONVERT, "if (magnitude < 0x3c800000u) {", "if (magnitude < 0x3c800000u) return sign;\n  if (magnitude < 0x3c800000u) {"),
    Mutant("NaN becomes 448", CONVERT, "if (magnitude > 0x7f800000u) return 0x7fu;          // NaN\n", ""),
    Mutant("two codes change places", CONVERT, "(u32)plain_float_to_e4m3(first) | (u32)plain_float_to_e4m3(second) << 8", "(u32)plain_float_to_e4m3(second) | (u32)plain_float_to_e4m3(first) << 8"),
    Mutant("infinity counts for the scale", QUANTIZE, "if (largest <= kLargestFinite) return largest;", "return largest;"),
    Mutant("the largest of half a group", QUANTIZE, "if (bit < lane_bits) value", "if (bit + 1 < lane_bits) value"),
    Mutant("a scale that is a power of two gets another one", QUANTIZE, "+ 0x7fffffu) & 0x7f800000u", "+ 0x800000u) & 0x7f800000u"),
    Mutant("the first padding id is a pair", QUANTIZE, "return id < args.num_pairs ?", "return id <= args.num_pairs ?"),
    Mutant("quotients are rounded twice", "kernels_cu/convert.cuh", "return __fdiv_rn(fmaxf(largest, least), kLargestE4m3);", "return __fmul_rn(fmaxf(largest, least), 1 / kLargestE4m3);"),
    Mutant("one unit too many is quantised", QUANTIZE, "const bool exists = unit < args.num_units;", "const bool exists = unit <= args.num_units;"),
    Mutant("no barrier before the largest of all warps", QUANTIZE, "of_warps[warp_id()] = value;\n  __syncthreads();", "of_warps[warp_id()] = value;"),
    Mutant("further rounds do not count for the scale", QUANTIZE, "      largest = fmaxf(largest, largest_magnitude(values));\n", ""),
    Mutant("the up of the next chunk", QUANTIZE, "address + (i64)args.hidden * Element::kBytes, count, ups", "address + ((i64)args.hidden - 1) * Element::kBytes, count, ups"),
    Mutant("a fused step of the polynomial", QUANTIZE, "y = __fadd_rn(__fmul_rn(f, y), 0.24024099f);", "y = fmaf(f, y, 0.24024099f);"),
    Mutant("a lane too few for a group that is no power of 2", PLAN_QUANTIZE, "max(0, chunks - 1).bit_length()", "chunks.bit_length() - 1 if chunks else 0"),
    Mutant("a block too few for the units", PLAN_QUANTIZE, "ceil_div(num_units, threads), threads", "num_units // threads or 1, threads"),
    # the experts
    Mutant("copies are taken for done a step early", MMA, "wait_copies<Tile::kStages - 2>();", "wait_copies<Tile::kStages - 1>();"),
    Mutant("no barrier between steps", MMA, "    __syncthreads();  // all have waited", "    // all have waited"),
    Mutant("weights are read as if not swizzled", MMA, "stage_weights + chunk_offset(r, k * 2 + lane_id() / 8 % 2)", "stage_weights + r * kRowBytes + (k * 2 + lane_id() / 8 % 2) * 16"),
    Mutant("gate and up change places", EXPERTS, "kGated && r / 8 % 2 != 0 ? row + args.up_offset", "kGated && r / 8 % 2 == 0 ? row + args.up_offset"),
    Mutant("the router weight of another pair", EXPERTS, "const u32 pair = pairs[half * 8 + lane_id() / 4];\n    weights[half]", "const u32 pair = pairs[lane_id() / 4];\n    weights[half]"),
    Mutant("the router weight of what is padding", EXPERTS, "args.topk_weights != nullptr && pair < args.num_pairs ?", "args.topk_weights != nullptr ?"),
    Mutant("half of a row is cleared", EXPERTS, "i < args.num_columns / 8; i += kThreads", "i < args.num_columns / 16; i += kThreads"),
    Mutant("columns past the last are written", MMA_BOTH, "if (exists && column < args.num_columns) {", "if (exists) {"),
    Mutant("columns past the last are written, two at a time", MMA_BOTH, "if (exists && column < args.num_columns) *", "if (exists) *"),
    Mutant("rows of unknown experts are left as they are", MMA_BOTH, "if (!args.clears_unknown) return;", "return;"),
    Mutant("one block more", MMA, "place.block * Tile::kRows >= (u32)*args.num_tokens_post_pad", "place.block * Tile::kRows > (u32)*args.num_tokens_post_pad", "that block has no expert, and its pairs are padding"),
    Mutant("blocks of experts that a map invents have no place", PLAN_EXPERTS, "blocks = min(num_pairs, all_experts) + max(0, num_pairs - all_experts)", "blocks = min(num_pairs, num_experts) + max(0, num_pairs - num_experts)"),
    Mutant("the bias of the column beside", EXPERTS, "mine[e * args.row_step]", "mine[0]"),
    Mutant("padding is written to row 0", MMA_BOTH, "if (exists && column < args.num_columns) {", "if (column < args.num_columns) {"),
    Mutant("padding is written to row 0, two columns at a time", MMA_BOTH, "if (exists && column < args.num_columns) *", "if (column < args.num_columns) *"),
    Mutant("quads transpose one pair of words by the other bit", MMA_BOTH, "exchange(words[1], words[3], is_upper, 2);", "exchange(words[1], words[3], is_odd, 2);"),
    Mutant("quads transpose within neighbours only", MMA_BOTH, "  exchange(words[0], words[2], is_upper, 2);\n  exchange(words[1], words[3], is_upper, 2);\n", ""),
    Mutant("a lane writes the words of its neighbour", MMA_BOTH, "column_of((first + quad_lane) * kStep)", "column_of((first + (quad_lane ^ 1)) * kStep)"),
    Mutant("the lower rows are written for the upper ones", MMA_BOTH, "Element::pack(sums[(first + w) * kStep] + half * 2)", "Element::pack(sums[(first + w) * kStep])"),
    Mutant("a gate that is NaN is no more than the limit", EXPERTS, "gate = gate > limit ? limit : gate;", "gate = fminf(gate, limit);"),
    Mutant("an up that is NaN is no more than the limit", EXPERTS, "up = up > limit ? limit : up < -limit ? -limit : up;", "up = fminf(fmaxf(up, -limit), limit);"),
    Mutant("the square of NaN is 0", EXPERTS, "return x < 0 ? 0.0f : x * x;", "return x > 0 ? x * x : 0.0f;"),
    # direct
    Mutant("pairs beyond the eighth of an expert have no group", SWAPPED, "rank % kGroupPairs == 0;", "rank == 0;"),
    Mutant("a second group has the pairs of the first", SWAPPED, "if (rank % kGroupPairs == 0) leader = other;", "if (rank == 0) leader = other;"),
    Mutant("groups of a warp are put over those of the first", SWAPPED, "if (warp < warp_id()) index +=", "if (warp > 0 && warp < warp_id()) index +="),
    Mutant("no barrier before ranks are counted", SWAPPED, "[pair % kGroupPairs] = kNobody;\n  __syncthreads();", "[pair % kGroupPairs] = kNobody;"),
    Mutant("no barrier before pairs join their groups", SWAPPED, "groups.count = index + leads;\n  __syncthreads();", "groups.count = index + leads;"),
    Mutant("no barrier before groups are numbered", SWAPPED, "groups.leaders[warp_id()] = __popc(leaders);\n  __syncthreads();", "groups.leaders[warp_id()] = __popc(leaders);"),
    Mutant("what a group has no pair for is left as it is", SWAPPED, "for (u32 i = 0; i < kGroupPairs; ++i)\n    groups.pairs", "for (u32 i = 1; i < kGroupPairs; ++i)\n    groups.pairs"),
    Mutant("the upper word of an id is not looked at, direct", SWAPPED, "words[args.words_per_id - 1] != 0 && args.words_per_id == 2", "false", "the sum leaves such slots out"),
    Mutant("an expert that a map invents is taken", SWAPPED, "return expert < args.num_experts ? expert : kNobody;", "return expert;"),
    Mutant("chunks past the depth are read", DIRECT, "const bool is_within = step * kDepth + my_chunk * 8 < args.depth;", "const bool is_within = true;"),
    Mutant("rows of weights past the last are read", DIRECT, "const bool exists = first_column() + Tile::column(r) < args.num_columns;", "const bool exists = true;"),
    Mutant("copies are taken for done a step early, direct", DIRECT, "wait_copies<kStages - 2>();", "wait_copies<kStages - 1>();"),
    Mutant("no barrier between steps, direct", DIRECT, "      __syncthreads();  // all have waited", "      // all have waited"),
    Mutant("steps without copies are not counted as groups", DIRECT, "      stream.ask(true, true);\n      commit_copies();", "      if (stream.place < stream.end) {\n        stream.ask(true, true);\n        commit_copies();\n      }"),
    Mutant("the rows of GEMM 2 are not asked for", DIRECT, "late.ask(false, true);", "late.ask(false, false);"),
    Mutant("the rows of GEMM 2 are asked for in other stages", DIRECT, "Stream<Tile> late = done;", "Stream<Tile> late = stream;"),
    Mutant("blocks take every tile", DIRECT, "        place += gridDim.x;\n        begin();", "        place += 1;\n        begin();"),
    Mutant("rows of unknown experts are left as they are, direct", DIRECT, "    clear_unknown(args, groups);\n", ""),
    Mutant("the bias of the upper rows for the lower ones", SWAPPED, "bias[Tile::weight_row(args, first_column, r + half * 8)]", "bias[Tile::weight_row(args, first_column, r)]"),
    Mutant("the bias of another expert", SWAPPED, "expert * args.bias_stride;", "0 * args.bias_stride;"),
    Mutant("the router weight for half of the rows", SWAPPED, "      sums[i + 2] *= weight;\n", ""),
    Mutant("odd lanes write a column to the right", SWAPPED, "Tile::column(r + half * 8) - is_odd;", "Tile::column(r + half * 8);"),
    Mutant("odd lanes write their columns the other way round", SWAPPED, "{is_odd ? taken : first, is_odd ? second : taken}", "{is_odd ? second : first, taken}"),
    Mutant("lanes get what they have themselves", SWAPPED, "__shfl_xor_sync(kFullWarp, is_odd ? first : second, 4)", "__shfl_xor_sync(kFullWarp, is_odd ? second : first, 4)"),
    # wgmma: stages
    Mutant("stages are taken for empty before they are", WGMMA, "      shared.empty[turn.index].wait(turn.parity ^ 1);\n", ""),
    Mutant("the parity of empty stages is that of full ones", WGMMA, "shared.empty[turn.index].wait(turn.parity ^ 1);", "shared.empty[turn.index].wait(turn.parity);"),
    Mutant("the parity of turns does not change", WGMMA, "if (++index == kSize) index = 0, parity ^= 1;", "if (++index == kSize) index = 0;"),
    Mutant("stages are multiplied before they are full", WGMMA_16, "      shared.full[turn.index].wait(turn.parity);\n      const char* stage =", "      const char* stage ="),
    Mutant("stages are released before products have read them", WGMMA_16, "if (step > 0) arrive_in_both(shared.empty[stage_before]);\n      stage_before = turn.index;\n    }\n    wait_products<0>();\n    arrive_in_both(shared.empty[stage_before]);", "arrive_in_both(shared.empty[turn.index]);\n    }\n    wait_products<0>();"),
    Mutant("two groups of products may be on their way", WGMMA_16, "wait_products<1>();", "wait_products<2>();"),
    Mutant("sums are written before the last products are there", WGMMA_16, "    wait_products<0>();\n", ""),
    Mutant("the last stage of a tile is not released", WGMMA_16, "    wait_products<0>();\n    arrive_in_both(shared.empty[stage_before]);", "    wait_products<0>();"),
    Mutant("the first stage of a tile is released twice", WGMMA_16, "if (step > 0) arrive_in_both(shared.empty[stage_before]);", "arrive_in_both(shared.empty[stage_before]);"),
    Mutant("the own block alone is told what is done", WGMMA, "barrier.arrive_in(lane_id());", "barrier.arrive();"),
    Mutant("stages are released by the warps of one block", WGMMA, "shared.empty[s].open(2 * kProductWarps);", "shared.empty[s].open(kProductWarps);"),
    Mutant("stages are full without one of the copies", WGMMA, "shared.full[s].open(kLoaders + 1);", "shared.full[s].open(kLoaders);"),
    Mutant("warpgroups without rows release nothing", WGMMA, "        arrive_in_both(shared.empty[turn.index]);\n      }\n    }", "      }\n    }"),
    Mutant("warpgroups without rows release what is not there yet", WGMMA, "        shared.full[turn.index].wait(turn.parity);\n        arrive_in_both", "        arrive_in_both"),
    Mutant("lanes are not together where two of them arrive", WGMMA, "  __syncwarp();\n  if (lane_id() < 2) barrier", "  if (lane_id() < 2) barrier"),
    Mutant("the upper half is skipped where it has rows", WGMMA, "if (pairs[group_row] < args.num_pairs &&", "if (pairs[64 - group_row] < args.num_pairs &&"),
    Mutant("tiles past the last column are multiplied", WGMMA, "< args.num_pairs && first_column < args.num_columns) {", "< args.num_pairs) {", "no column of them is written"),
    Mutant("copies do not arrive", WGMMA, "      shared.full[turn.index].arrive_with_copies();\n", "      shared.full[turn.index].arrive();\n"),
    Mutant("barriers are open in the own block alone", WGMMA, "  // The barriers of all blocks are open.\n  sync_cluster();", ""),
    Mutant("blocks end while others write to them", WGMMA, "  // Until then, other blocks may write to the shared memory of this one.\n  sync_cluster();", ""),
    Mutant("barriers are opened without a fence", WGMMA, "    fence_open_barriers();\n", ""),
    Mutant("products are begun without a fence", WGMMA_16, "      begin_products();\n", ""),
    Mutant("stages lie as the driver gives them", WGMMA, "(misaligned ? 1024 - misaligned : 0)", "0"),
    # wgmma: what is loaded and multiplied
    Mutant("a box begins a row of weights further", WGMMA, "(job.tile * 2 + box) * (kBoxRows / 8);", "(job.tile * 2 + box) * (kBoxRows / 8) + 1;"),
    Mutant("both boxes are the first", WGMMA, "(job.tile * 2 + box) * (kBoxRows / 8);", "job.tile * 2 * (kBoxRows / 8);"),
    Mutant("gates are as far apart as gates and ups", WGMMA, "Product::kGated ? eights / 2 : 0,", "Product::kGated ? eights : 0,"),
    Mutant("the weights of expert 0", WGMMA, "                       job.expert};", "                       0};"),
    Mutant("each block sends the other half", WGMMA, "copy_box_to_both(to, args.weights", "copy_box_to_both(to + (box == 0 ? kBoxBytes : -kBoxBytes), args.weights"),
    Mutant("both blocks send the first half", WGMMA, "} else if (box == rank) {", "} else if (box == 0) {"),
    Mutant("halves are sent where nothing is shared", WGMMA, "if (!job.is_shared) {", "if (false) {"),
    Mutant("half of the bytes are expected", WGMMA, "barrier.expect_and_arrive(2 * kBoxBytes);", "barrier.expect_and_arrive(kBoxBytes);"),
    Mutant("bytes are expected of one box more", WGMMA, "barrier.expect_and_arrive(2 * kBoxBytes);", "barrier.expect_and_arrive(3 * kBoxBytes);"),
    Mutant("what is loaded ahead is loaded again", WGMMA, "          --ahead;\n", "          --ahead;\n          load_weights<Product>(args, shared, stages, job, rank, turn.index, step);\n"),
    Mutant("more steps are loaded ahead than there are", WGMMA, "ahead < kStages && ahead < num_steps;", "ahead < kStages;"),
    Mutant("weights are loaded for no tile", WGMMA, "if (threadIdx.x == 0 && !job.is_end) {", "if (threadIdx.x == 0) {"),
    Mutant("the first products are added to what registers held", WGMMA_16, "(sums, a, b, step);", "(sums, a, b, 1);"),
    Mutant("the same 16 elements of rows four times", WGMMA_16, "(sums, a + k * 2, b + k * 2, 1);", "(sums, a, b + k * 2, 1);"),
    Mutant("rows are stored as if not swizzled", WGMMA, "turn.index * kStageBytes + chunk_offset(my_row, my_chunk);", "turn.index * kStageBytes + my_row * kRowBytes + my_chunk * 16;"),
    Mutant("elements of rows past the depth are read", WGMMA, "const bool is_within = step * Product::kStepDepth + my_chunk * Product::kPerChunk < args.depth;", "const bool is_within = true;"),
    Mutant("every step has the first elements of rows", WGMMA, "rows[i].of_step(args, step), is_within", "rows[i].of_step(args, 0), is_within"),
    Mutant("each pair has a row of its own", WGMMA, "args.rows_shared.quotient(min_u32(pair, args.num_pairs))", "min_u32(pair, args.num_pairs)"),
    Mutant("the last rows of a thread are not loaded", WGMMA, "if (pair < args.num_pairs) num_rows = i + 1;", "if (pair < args.num_pairs) num_rows = i;"),
    Mutant("rows of padding are loaded", WGMMA, "copy_async_if(i < num_rows,", "copy_async_if(true,"),
    # wgmma: jobs
    Mutant("a ring of one", WGMMA, "constexpr u32 kRing = 2;", "constexpr u32 kRing = 1;"),
    Mutant("the loader stays where it is in the ring", WGMMA, "    ring.next();\n", ""),
    Mutant("products stay where they are in the ring", WGMMA, "for (Turn<kRing> ring;; ring.next()) {", "for (Turn<kRing> ring;;) {"),
    Mutant("a job is loaded before it is told", WGMMA, "    shared.told[ring.index].wait(ring.parity);\n    const Job job = shared.jobs[ring.index];\n    if (is_begin)", "    const Job job = shared.jobs[ring.index];\n    if (is_begin)"),
    Mutant("a job is multiplied before it is told", WGMMA, "    shared.told[ring.index].wait(ring.parity);\n    const Job job = shared.jobs[ring.index];\n    if (job.is_end)", "    const Job job = shared.jobs[ring.index];\n    if (job.is_end)"),
    Mutant("a job is told before it is there", WGMMA, "    shared.jobs[ring.index] = job;\n    shared.told[ring.index].arrive();\n", "    shared.told[ring.index].arrive();\n    shared.jobs[ring.index] = job;\n"),
    Mutant("a job is told by the lanes that copy pairs alone", WGMMA, "shared.told[t].open(kWarpSize + 1);", "shared.told[t].open(kWarpSize);"),
    Mutant("a job is told before its pairs are there", WGMMA, "shared.told[ring.index].arrive_with_copies();", "shared.told[ring.index].arrive();"),
    Mutant("every lane copies the first pairs", WGMMA, "args.sorted_token_ids + work.block * kTileRows + first, true", "args.sorted_token_ids + work.block * kTileRows, true"),
    Mutant("a job is put over one that is not done", WGMMA, "  shared.done[ring.index].wait(ring.parity ^ 1);\n  Job job", "  Job job", "its place is sent only then"),
    Mutant("a place is sent before the one there was has been seen", WGMMA, "          shared.done[ring.index].wait(ring.parity ^ 1);  // then", "          // then"),
    Mutant("a job is done for the warps of one block", WGMMA, "shared.done[t].open(2 * kProductWarps);", "shared.done[t].open(kProductWarps);"),
    Mutant("nobody says that a job is done", WGMMA, "    arrive_in_both(shared.done[ring.index]);\n", ""),
    Mutant("a job is done before its rows are written", WGMMA, "      Product::write(args, pairs + first_row, first_column, memory, sums);\n", "      arrive_in_both(shared.done[ring.index]);\n      Product::write(args, pairs + first_row, first_column, memory, sums);\n      continue;\n"),
    Mutant("a place is looked up before it is sent", WGMMA, "tells_at = min_u32(kStages + 4, last);", "tells_at = min_u32(kStages + 1, last);"),
    Mutant("a place is sent twice", WGMMA, "threadIdx.x == kLoaders - kWarpSize && rank == 0;", "threadIdx.x == kLoaders - kWarpSize;"),
    Mutant("the other block gets no place", WGMMA, "for (u32 r = 0; r < 2; ++r) shared.sent", "for (u32 r = 0; r < 1; ++r) shared.sent"),
    Mutant("a place is not waited for as what another block has sent", WGMMA, "shared.sent[ring.index].wait_for_cluster(ring.parity);", "shared.sent[ring.index].wait(ring.parity);"),
    Mutant("a place is not waited for", WGMMA, "  shared.sent[ring.index].wait_for_cluster(ring.parity);\n", ""),
    Mutant("the bytes of a place are not announced", WGMMA, "shared.sent[ring.index].expect_and_arrive(4);", "shared.sent[ring.index].arrive();"),
    Mutant("the first place is not said to be there", WGMMA, "    shared.sent[0].arrive();\n", ""),
    Mutant("blocks of a cluster begin with places of their own", WGMMA, "shared.places[0] = blockIdx.x / 2;", "shared.places[0] = blockIdx.x;"),
    Mutant("the counter begins elsewhere", WGMMA, "const u32 not_counted = gridDim.x / 2 -", "const u32 not_counted = gridDim.x / 2 + 1 -"),
    Mutant("clusters begin with the same places as others", WGMMA, "const u32 not_counted = gridDim.x / 2 -", "const u32 not_counted = 0 -", "they write the same"),
    Mutant("blocks behind the last are counted", WGMMA, "if (expert != 0xffffffffu) atomicAdd(", "atomicAdd("),
    Mutant("the counter of the second product is not cleared", WGMMA, "args.counters[1] = 0;", "args.counters[1] = 1;"),
    Mutant("the second product goes on with the counter of the first", WGMMA, "args.counters + (args.is_first ? 0 : 1);", "args.counters;"),
    # wgmma: places
    Mutant("the first place of an expert is the last of the one before", WGMMA, "shared.firsts[e] <= place", "shared.firsts[e] < place"),
    Mutant("experts are looked for among the first of a warp", WGMMA, "count(chunk * kWarpSize + lane_id()) - 1;", "count(lane_id()) - 1;"),
    Mutant("experts are looked for behind the last", WGMMA, "e < args.num_experts && shared.firsts[e] <= place", "shared.firsts[e] <= place"),
    Mutant("groups take no account of the last one's size", WGMMA, "size = min_u32(args.group_twos, twos - first)", "size = args.group_twos"),
    Mutant("a single block has a group of its own", WGMMA, "group = min_u32(rest / (args.group_twos * num_tiles), last)", "group = rest / (args.group_twos * num_tiles)"),
    Mutant("a single block goes with every group", WGMMA, "(group == last ? num_blocks % 2 : 0)", "num_blocks % 2"),
    Mutant("a single block goes with no group", WGMMA, "(group == last ? num_blocks % 2 : 0)", "0"),
    Mutant("the last tile is shared as if there were two", WGMMA, "r < min_u32(2, num_tiles - tile) * size", "r < 2 * size"),
    Mutant("a single block counts as shared", WGMMA, "r < min_u32(2, num_tiles - tile) * size", "r <= min_u32(2, num_tiles - tile) * size"),
    Mutant("tiles one after another, as if a place had one", WGMMA, "in_group / each * 2,", "in_group / each,"),
    Mutant("both tiles of columns are the first", WGMMA, "(job.is_shared ? r / size : rank)", "(job.is_shared ? 0 : rank)"),
    Mutant("both blocks take the same tile of a single block", WGMMA, "(job.is_shared ? r / size : rank)", "(job.is_shared ? r / size : 0)"),
    Mutant("both blocks take the same pairs of two", WGMMA, "2 * (first + r % size) + rank : 2 * twos", "2 * (first + r % size) : 2 * twos"),
    Mutant("a single block is the first", WGMMA, "+ rank : 2 * twos);", "+ rank : 0);"),
    Mutant("an expert with an odd number of tiles has a place less", WGMMA, "ceil_div(num_tiles, 2) : 0", "num_tiles / 2 : 0"),
    Mutant("the table of experts is read while it is made", WGMMA, "  if (threadIdx.x == 0) shared.num_places = total;\n  __syncthreads();", "  if (threadIdx.x == 0) shared.num_places = total;"),
    Mutant("the ends of experts are read while they are found", WGMMA, "shared.ends[expert] = b + 1;\n  }\n  __syncthreads();", "shared.ends[expert] = b + 1;\n  }"),
    Mutant("blocks are found before there are none", WGMMA, "if (threadIdx.x == 0) shared.num_blocks = 0;\n  __syncthreads();", "if (threadIdx.x == 0) shared.num_blocks = 0;"),
    Mutant("the end of an expert is not found", WGMMA, "shared.ends[expert] = b + 1;", "shared.ends[expert] = b;"),
    # wgmma: what is written
    Mutant("rows of a warp are those of another one", WGMMA, "load_router_weights(args, pairs + first_row, weights);", "load_router_weights(args, pairs + group_row, weights);"),
    Mutant("the bias of the first expert", WGMMA, "finish_sums<Product>(args, weights, job.expert,", "finish_sums<Product>(args, weights, 0,"),
    Mutant("rows are written to those of their neighbours", WGMMA, "const u32 pair = pairs[from_row + i * 4];", "const u32 pair = pairs[from_row + i];"),
    Mutant("padding is written", WGMMA, "output[i] = pair < args.num_pairs ?", "output[i] = true ?"),
    Mutant("columns past the last are written, wgmma", WGMMA, "if (output[i] != nullptr && column < args.num_columns)", "if (output[i] != nullptr)"),
    Mutant("the first columns of a tile are written again", WGMMA, "const u32 column = first_column + first + chunk * 8;", "const u32 column = first_column + chunk * 8;"),
    Mutant("sums are stored as if not swizzled", WGMMA, "chunk_offset(matrix % 2 * 8 + lane_id() % 8, c + matrix / 2)", "(matrix % 2 * 8 + lane_id() % 8) * kRowBytes + (c + matrix / 2) * 16"),
    Mutant("matrices are stored the other way round", WGMMA, "chunk_offset(matrix % 2 * 8 + lane_id() % 8, c + matrix / 2)", "chunk_offset(matrix / 2 * 8 + lane_id() % 8, c + matrix % 2)"),
    Mutant("sums of the upper rows go to the columns beside", WGMMA, "(first / 8 + c + i / 2) * kStep] + i % 2 * 2)", "(first / 8 + c + i % 2) * kStep] + i / 2 * 2)"),
    Mutant("ups are written as columns", WGMMA, "sums[(first / 8 + c + i / 2) * kStep]", "sums[first / 8 + c + i / 2]"),
    Mutant("sums are read back before all lanes have stored them", WGMMA, "    __syncwarp();\n    const u32 column", "    const u32 column"),
    Mutant("sums are stored over those that are still read", WGMMA, "+ column * 2) = words;\n    }\n    __syncwarp();\n", "+ column * 2) = words;\n    }\n"),
    Mutant("two warps write through the same memory", WGMMA, "shared.written[warp_id() % kProductWarps]", "shared.written[warp_id() % 4]"),
    # quantised weights
    Mutant("rows for quantised weights stay in their order", QUANTIZED, "      put_rows_in_order<Tile>(stages + done.stage);\n", ""),
    Mutant("no barrier after quantised weights have come", QUANTIZED, "      __syncthreads();  // all have waited for their part of this step, and are done with the one before\n", ""),
    Mutant("quantised weights are read while they are on their way", QUANTIZED, "wait_copies<Tile::kNumStages - 2>();", "wait_copies<Tile::kNumStages - 1>();"),
    Mutant("all groups of quantised weights have the first scale", QUANTIZED, "      scale_places[i] += group_bytes;\n", ""),
    Mutant("all groups of quantised weights have the first zero point", QUANTIZED, "    if (has_zeros()) next_zeros();\n", ""),
    Mutant("a group of quantised weights does not end", QUANTIZED, "    return left == 0;", "    return left == ~0u;"),
    Mutant("sums of a unit of quantised weights count twice", QUANTIZED, "            part[m][n][e] = 0.0f;\n", ""),
    Mutant("all pairs of quantised weights get the first sums", QUANTIZED, "sums[m][i][e] = sums[m][i + 1][e];", "sums[m][i][e] = sums[m][i][e];"),
    Mutant("another lane's row for quantised weights", QUANTIZED, "lane_id() / Tile::kRowChunks * kMyRows + i", "lane_id() / Tile::kRowChunks + i"),
    Mutant("rows for quantised weights go on behind their end", QUANTIZED, "exists && (i32)row_depth > 0", "exists"),
    Mutant("quantised weights behind the last column are read", QUANTIZED, "from, i < num_here)", "from, true)"),
    Mutant("rows of quantised weights are too close", QUANTIZED, "Tile::column(kWeightsAtOnce) * args.row_step", "Tile::column(kWeightsAtOnce)"),
    Mutant("halves of a row for quantised int4 change places", FORMATS, "make_uint4(lower_halves(row.x, row.z), upper_halves(row.x, row.z)", "make_uint4(upper_halves(row.x, row.z), lower_halves(row.x, row.z)"),
    Mutant("the sign of quantised int8 in fp16", FORMATS, "(bytes ^ 0x00800080u", "(bytes"),
    Mutant("the upper half of quantised int4 is as the lower", FORMATS, "keep_and_set<0x000f000fu>", "keep_and_set<0x00070007u>"),
    Mutant("fp32 scales of quantised weights are bf16", FORMATS, "shift(scale_type == kScaleBF16 ? 16 : 0)", "shift(16)"),
    Mutant("fp16 scales of quantised weights are bf16", FORMATS, "return is_half ? half : other;", "return other;"),
    Mutant("too many pairs for blocks of 16 of quantised weights", "cupy_moe/plans/experts.py", "num_pairs > QUANTIZED_MEAN_PAIRS * all_experts", "num_pairs > QUANTIZED_MEAN_PAIRS * all_experts + 1"),
    # wgmma of fp8
    Mutant("halves are both the first", WGMMA_FP8, "const u32 from = b + half * (kBoxBytes / 16);", "const u32 from = b;"),
    Mutant("the same 32 elements of rows four times", WGMMA_FP8, "multiply_128_e4m3(part, a + k * 2, from + k * 2, 1);", "multiply_128_e4m3(part, a, from + k * 2, 1);"),
    Mutant("the first products of a step are added to those before", WGMMA_FP8, "multiply_128_e4m3(part, a, from, 0);", "multiply_128_e4m3(part, a, from, 1);"),
    Mutant("what is multiplied is added up before it is there", WGMMA_FP8, "        wait_products<0>();\n", ""),
    Mutant("a stage is released after its first half", WGMMA_FP8, "if (half == 1) arrive_in_both(", "if (half == 0) arrive_in_both("),
    Mutant("the scale of the row before", WGMMA_FP8, "later[half] = args.row_scales[at[half]];", "later[half] = args.row_scales[at[half] ^ 1];"),
    Mutant("all steps have the scales of the first", WGMMA_FP8, "later[half] = args.row_scales[++at[half]];", "later[half] = args.row_scales[at[half]];"),
    Mutant("a step has the scales of the next", WGMMA_FP8, "        now[half] = later[half];\n        if (has_later) later[half] = args.row_scales[++at[half]];", "        if (has_later) later[half] = args.row_scales[++at[half]];\n        now[half] = later[half];"),
    Mutant("scales are read behind the last", WGMMA_FP8, "row_scales.next(args, step + 2 < num_steps)", "row_scales.next(args, true)", "the workspace goes on behind them: only initcheck sees it"),
    Mutant("each pair has scales of its own", WGMMA_FP8, "args.rows_shared.quotient(pair < args.num_pairs ? pair : first) * num_steps", "(pair < args.num_pairs ? pair : first) * num_steps"),
    Mutant("gates have the scales of ups", WGMMA_FP8, "factors[e / 2][n % 2]", "factors[e / 2][1 - n % 2]"),
    Mutant("upper rows have the scales of lower ones", WGMMA_FP8, "factors[e / 2][n % 2]", "factors[1 - e / 2][n % 2]"),
    Mutant("weights have the scales of the first half", WGMMA_FP8, "of.weights[half][i % 2]", "of.weights[0][i % 2]"),
    Mutant("weights have the scales of the first expert", WGMMA, "weight += job.expert * args.scale_expert_stride", "weight += 0 * args.scale_expert_stride"),
    Mutant("weights have the scales of the first step", WGMMA, "weight + (exists ? step * args.scale_group_stride : 0)", "weight"),
    Mutant("weights have the scales of the first block of rows", WGMMA, "+ block * args.scale_row_stride;", "+ 0 * block * args.scale_row_stride;"),
    Mutant("scales of one half of a tile are loaded", WGMMA, "threadIdx.x / 2 * (kWeightRows / 2) + threadIdx.x % 2 * 8", "threadIdx.x % 2 * 8"),
    Mutant("scales of weights without steps are not ones", WGMMA, "threadIdx.x % 2] = 1.0f;", "threadIdx.x % 2] = 2.0f;"),
    Mutant("channels have no scales", WGMMA_FP8, "sums[n][e] *= scales[", "sums[n][e] *= 1 + 0 * scales["),
    Mutant("channels have the scales of every eighth", WGMMA_FP8, "scales[n * 8 + lane_id() % 4 * 2 + e % 2]", "scales[n * 8]"),
    Mutant("channels have the scales of the first expert", ROWS_FP8, "return expert * args.scale_expert_stride", "return 0 * args.scale_expert_stride"),
    Mutant("a group's largest is that of one lane", ROWS_FP8, "return fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));", "return largest;"),
    Mutant("infinite activations make scales", ROWS_FP8, "return magnitude <= kLargestFinite ? fmaxf(largest, magnitude) : largest;", "return fmaxf(largest, magnitude);"),
    Mutant("both halves of rows have one scale's place", WGMMA_FP8, "const u32 row = my_row + half * 8, pair = pairs[row];", "const u32 row = my_row + half * 8, pair = pairs[my_row];"),
    Mutant("scales of activations lie a group further", WGMMA_FP8, "num_groups + column / kGroupColumns] = scale;", "num_groups + first / kGroupColumns] = scale;"),
    Mutant("codes are stored as if not swizzled", WGMMA_FP8, "memory_bytes + chunk_offset(row, c / 2) + c % 2 * 8", "memory_bytes + row * kRowBytes + c / 2 * 16 + c % 2 * 8"),
    Mutant("columns past the last are written, fp8", WGMMA_FP8, "if (pair < args.num_pairs && column + chunk * 16 < args.num_columns) {", "if (pair < args.num_pairs) {"),
    Mutant("codes of one group are over those of another", WGMMA_FP8, "args.num_columns + column + chunk * 16) = words;", "args.num_columns + first_column + chunk * 16) = words;"),
    Mutant("rows of unknown experts are left as they are, wgmma", WGMMA, "  if (args.clears_unknown) clear_unknown(args);", ""),
    Mutant("blocks of unknown experts are left out", WGMMA, "b < args.num_blocks; b += gridDim.x) {", "b < args.num_blocks; b += 2 * gridDim.x) {"),
    Mutant("padding of unknown experts is cleared", WGMMA, "      if (pair >= args.num_pairs) break;\n      clear_row", "      clear_row"),
    Mutant("all but the first rows of unknown experts are left as they are", WGMMA, "for (u32 r = 0; r < kTileRows; ++r) {\n      const u32 pair = (u32)args", "for (u32 r = 0; r < 64; ++r) {\n      const u32 pair = (u32)args"),
    Mutant("boxes have gates and ups the other way round", "cupy_moe/operators/_experts_launches.py", "(depth, 8, 2, columns // 8, experts), strides,", "(depth, 8, 2, columns // 8, experts), (strides[0], strides[2], strides[1], strides[3]),"),
    # mma.sync of fp8
    Mutant("the first half of a step twice", MMA_FP8, "weights + chunk_offset(r, (first + k) * 2 +", "weights + chunk_offset(r, k * 2 +"),
    Mutant("upper rows have the scales of lower ones, mma_fp8", MMA_FP8, "scales.rows[m * 16 + half * 8 + lane_id() / 4]", "scales.rows[m * 16 + lane_id() / 4]"),
    Mutant("gates have the scales of ups, mma_fp8", MMA_FP8, "factors[n % 2], sums", "factors[1 - n % 2], sums"),
    Mutant("weights have the scales of the first half, mma_fp8", MMA_FP8, "scales.weights[warp_id() / (kWarps / 2)][i]", "scales.weights[0][i]"),
    Mutant("all steps have the scales of the first, mma_fp8", MMA_FP8, "from + step * stride, exists", "from, exists"),
    Mutant("each pair has scales of its own, mma_fp8", MMA_FP8, "args.rows_shared.quotient(pair) * num_steps", "pair * num_steps"),
    Mutant("scales come with the copies of the step after", MMA_FP8, "    scale_loader.ask(scales[step % kStages], step, num_steps);\n    loader.ask(args, stages + step % kStages * Tile::kStageBytes, step, num_steps);\n", "    loader.ask(args, stages + step % kStages * Tile::kStageBytes, step, num_steps);\n    scale_loader.ask(scales[step % kStages], step, num_steps);\n"),
    Mutant("the last sixteen rows are not multiplied", MMA_FP8, "__popc(__ballot_sync(kFullWarp, exist)) * 16;", "__popc(__ballot_sync(kFullWarp, exist)) * 16 - 16;"),
    Mutant("no barrier between steps, mma_fp8", MMA_FP8, "    __syncthreads();  // all have waited", "    // all have waited"),
    Mutant("codes are stored where others still multiply", MMA_FP8, "  __syncthreads();  // nobody reads stages any more\n", ""),
    Mutant("factors are read before they are there", MMA_FP8, "  __syncthreads();\n  if (first_column + group", "  if (first_column + group"),
    Mutant("codes are read before they are there", MMA_FP8, "  __syncthreads();\n#pragma unroll 1\n  for (u32 i = threadIdx.x; i < Tile::kGroups * kTileRows * kChunks", "#pragma unroll 1\n  for (u32 i = threadIdx.x; i < Tile::kGroups * kTileRows * kChunks"),
    Mutant("all groups have the scale of the first", MMA_FP8, "written.largest[of * (kWarps / Tile::kGroups) + w][row]", "written.largest[w][row]"),
    Mutant("codes of the second group are over those of the first", MMA_FP8, "first_column + of * kGroupColumns + chunk * 16;", "first_column + chunk * 16;"),
    Mutant("columns past the last are written, mma_fp8", MMA_FP8, "if (pair >= args.num_pairs || column >= args.num_columns) continue;", "if (pair >= args.num_pairs) continue;"),
    Mutant("NaN is 480 where NVRTC has no products of e4m3", MMA_FP8, "    pairs[1] |= select_bytes(is_nan, 0xbbaa);\n", ""),
    Mutant("the second sixteen elements twice where NVRTC has no products of e4m3", MMA_FP8, "columns[i][0], columns[i][1]);", "columns[1][0], columns[1][1]);"),
    Mutant("pairs of other ranks make rows fp8", PLAN_EXPERTS, "MMA_FP8_MEAN_ROWS * all_experts", "MMA_FP8_MEAN_ROWS * num_experts"),
    Mutant("mma_fp8 has no room for scales", PLAN_EXPERTS, "ROW_BYTES + tile.scale_bytes)", "ROW_BYTES)"),
    # launches
    Mutant("a kernel does not wait for the one before", SUM, "  wait_for_kernel_before();\n", ""),
    Mutant("the next kernel may begin before this one has waited", DIRECT, "  if (args.is_first) wait_for_kernel_before();\n  let_next_kernel_begin();", "  let_next_kernel_begin();\n  if (args.is_first) wait_for_kernel_before();"),
    Mutant("wgmma's struct has no room for what follows pairs", PLAN_EXPERTS, "WGMMA_RING * (WGMMA_ROWS + 4)", "WGMMA_RING * WGMMA_ROWS"),
    Mutant("wgmma's struct has no room for barriers", PLAN_EXPERTS, "2 * WGMMA_STAGES + 3 * WGMMA_RING", "2 * WGMMA_STAGES"),
    Mutant("wgmma's struct has a field more", WGMMA, "  u32 begins[kMaxLocalExperts], ends[kMaxLocalExperts];", "  u32 begins[kMaxLocalExperts], ends[kMaxLocalExperts], more[kMaxLocalExperts];"),
    Mutant("groups take more than is left for them", SWAPPED, "  u32 pairs[kMaxPairs][kGroupPairs];", "  u32 pairs[kMaxPairs][kGroupPairs + 3];"),
    Mutant("a launch attribute where another belongs", LAUNCH, '"@I4xi60x", 6, 1', '"@I4xi60x", 5, 1'),
    Mutant("overlapping on devices that do not know it", LAUNCH, "if overlaps and modules.can_overlap(device, unit):", "if overlaps:"),
    Mutant("overlapping where graphs cannot capture it", "cupy_moe/cuda/modules.py", ">= _OVERLAP_IN_GRAPHS", ">= 0"),
    Mutant("overlapping where an image does not wait", "cupy_moe/cuda/modules.py", " or number(_load(device, unit)[1].sidecar.target) < 90", ""),
    Mutant("sums are read through the read-only cache", SUM, "ld.global.v4.u32", "ld.global.nc.v4.u32"),
    Mutant("a refused launch is not noticed", LAUNCH, "    if status:\n        from", "    if status < 0:\n        from"),
    Mutant("strides of a tensor map are those of the box", MAP, "(ctypes.c_uint64 * (rank - 1))(*strides)", "(ctypes.c_uint64 * (rank - 1))(*box[1:])"),
    Mutant("another swizzle than kernels read", MAP, "_ZEROS_OUTSIDE = 0, 3,", "_ZEROS_OUTSIDE = 0, 2,"),
    # without consequence
    Mutant("a row goes to each pair's rank", ROUTE, "is_first = rank_of(args, place_of(args, other, token)) != rank;", "is_first = true;"),
    Mutant("few pairs: those of warps before do not count", ROUTE, "counts[b][lane_id()] = sum - count;", "counts[b][lane_id()] = 0;"),
    Mutant("few pairs: a bucket begins where it ends", ROUTE, "args.offsets[bucket] = start;", "args.offsets[bucket] = start + total;"),
    Mutant("few pairs: rows are sorted among pairs", ROUTE, "const u32 first_rows = args.has_pairs ? args.num_ranks : 0;", "const u32 first_rows = 0;"),
    Mutant("few pairs: each pair is a row", ROUTE, "is_first = ranks[other] != rank;", "is_first = true;"),
    Mutant("few pairs: the last offset is left out", ROUTE, "if (threadIdx.x == 0) args.offsets[num_buckets] = all;", ""),
    Mutant("rows go back in the order of others", PUSH, "const u32 row = peer * args.room + position;", "const u32 row = index;"),
    Mutant("pairs beyond the room come back", PACK, "positions[k] < args.pair_capacity", "positions[k] <= args.pair_capacity"),
    Mutant("rows beyond the capacity are sent", PACK, "position < args.capacity.value;", "position <= args.capacity.value;"),
    Mutant("rows without a token keep their ids", PACK, "if (args.is_exact) return;", "return;"),
    Mutant("pairs of a row in the same slot", EXPAND, "if (other == k) slot = num_pairs;", ""),
    Mutant("rows without a pair are read", EXPAND, "num_pairs > 0 ? min_u32(begin + args.units_per_part, args.units_per_row) : begin", "min_u32(begin + args.units_per_part, args.units_per_row)", "nothing is done with them: only initcheck sees it"),
    Mutant("slots without a pair keep their ids", EXPAND, "if (args.is_exact || part > 0) return;", "return;"),
    Mutant("rows go back to the first rank", PUSH, "args.peers[peer]", "args.peers[0]"),
    Mutant("a flag for oneself", SYNC, "args.peers[peer]) + args.rank", "args.peers[args.rank]) + peer"),
    Mutant("waits for the epoch before", SYNC, "- epoch) < 0", "- epoch) < -1"),
    Mutant("ids equal to num_experts keep their value", ALIGN, "ids[k] < args.num_experts ?", "ids[k] <= args.num_experts ?", "it is that of the bucket of those that are dropped"),
    Mutant("more threads that share a column", GLOBAL, "kColumnParts = 4;", "kColumnParts = 8;", "the same results, at another speed"),
    # gating by a table, shared experts, route
    Mutant("an input id past the table is looked up", HASH, "input >= args.num_rows ||", "input > args.num_rows ||"),
    Mutant("an expert of a table that is none is weighed", HASH, "if (expert >= args.num_experts) continue;", "if (expert > args.num_experts) continue;"),
    Mutant("only the first half of a long row of a table", HASH, "constexpr u32 kMaxThreads = 128, kHeld = 2;", "constexpr u32 kMaxThreads = 128, kHeld = 1;"),
    Mutant("a logarithm with a term less", GATE, "fmaf(square, 1.0f / 13, 1.0f / 11)", "fmaf(square, 0.0f, 1.0f / 11)", "half a unit in the last place"),
    Mutant("a logarithm of another series", GATE, "fmaf(series, square, 1.0f / 5)", "fmaf(series, square, 1.0f / 4)"),
    Mutant("a score that is infinite counts", GATE, "score >= kLeastNormal && is_finite(score)", "score >= kLeastNormal"),
    Mutant("shared experts are scaled", GATE, "padded ? 0.0f : args.shared_weight,", "padded ? 0.0f : args.shared_weight * args.factor,"),
    Mutant("shared experts begin where the others end, less one", GATE, "args.num_experts + k)", "args.num_experts - 1 + k)"),
    Mutant("one shared expert alone", WARP, "if (lane < num_results) write_shared", "if (lane == args.topk) write_shared"),
    Mutant("padding rows keep shared experts", GATE, "padded ? ~0u : args.num_experts", "args.num_experts"),
    Mutant("ids are placed before all are there", "kernels_cu/route/route_small.cu", "kWarpSize);\n  __syncthreads();\n", "kWarpSize);\n"),
    Mutant("no cluster writes what gating finds", CLUSTER8, "blockIdx.x < kCluster);", "false);"),
    Mutant("every cluster writes what gating finds", CLUSTER8, "blockIdx.x < kCluster);", "true);", "the same to the same places"),
    Mutant("what no token has is sent as it was", CLUSTER8, "fill(mine, used, ids_per_block", "fill(mine, ids_per_block, ids_per_block"),
    Mutant("ids are sent before all are there", CLUSTER8, "~0u, threadIdx.x, num_threads);\n  __syncthreads();\n", "~0u, threadIdx.x, num_threads);\n"),
    Mutant("ids are sent to a block that does not run yet", CLUSTER8, "  cluster_wait<kCluster>();\n", ""),
    Mutant("the inbox for ids expects too little", CLUSTER8, "inbox.expect((kCluster - 1) * ids_per_block * sizeof(u32))", "inbox.expect((kCluster - 2) * ids_per_block * sizeof(u32))"),
    Mutant("nobody waits for the ids of others", CLUSTER8, "  inbox.wait();\n", ""),
    Mutant("the last tokens of a cluster are not gated", "cupy_moe/plans/route.py", "round_up(ceil_div(sizes.num_tokens, ROUTE_CLUSTER), step)", "round_up(sizes.num_tokens // ROUTE_CLUSTER, step)"),
    Mutant("ids of a block are no whole vectors", "cupy_moe/plans/route.py", "step = 4 // gcd(4, sizes.ids_per_token)", "step = 1"),
    Mutant("shared experts are no experts of an alignment", "kernels_cu/route/route.cuh", "num_experts(args.num_experts + args.num_shared)", "num_experts(args.num_experts)"),
    Mutant("one load in flight", SHARED, "kMaxLoads = kCluster == 1 ? 2 : 4;", "kMaxLoads = 1;", "the same results, at another speed"),
]  # fmt: skip


def _is_first(test: str, file: str) -> bool:
    """Whether a test is that of a file's own stem."""
    fp8 = ("fp8", "int8", "int4", "quantized", "formats")
    return test == "quantized_experts" if any(name in file for name in fp8) else f"/{test}" in file


def examine(number: int) -> tuple[str, float]:
    """The first test that fails, "" if none does; and how long it took, in seconds."""
    mutant = MUTANTS[number]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cupy_moe-mutant-") as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__", ".*", "results")
        for name in ("cupy_moe", "kernels_cu", "scripts", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        (copy / "cache").mkdir()
        path = copy / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.before) < 1:
            raise SystemExit(f"{number} ({mutant.what}): {mutant.file} has no {mutant.before!r}")
        path.write_text(text.replace(mutant.before, mutant.after, 1), encoding="utf-8")
        # What is compiled already; links, as each copy removes what its sources no longer make.
        if (kept := ROOT / ".pytest_cache").exists():
            shutil.copytree(kept, copy / ".pytest_cache", copy_function=os.link)
        # That of its own stem first of all.
        names = sorted(FIRST, key=lambda name: not _is_first(name, mutant.file))
        tests = [f"tests/test_{name}.py" for name in names]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            *tests,
        ]
        environment = os.environ | {"PYTHONPATH": str(copy), "CUDA_VISIBLE_DEVICES": "", "CI": "1"}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode and not failed:
        failed = [(run.stdout + run.stderr).strip().splitlines()[-1]]
    return (failed[0].split(" - ")[0] if failed else ""), time.monotonic() - start


def main(words: list[str]) -> int:
    chosen = [
        number
        for number, mutant in enumerate(MUTANTS)
        if not words
        or any(word == str(number) or (not word.isdigit() and word in mutant.what) for word in words)
    ]
    missed = caught = 0
    with ThreadPoolExecutor(2) as pool:
        for number, (failed, seconds) in zip(chosen, pool.map(examine, chosen), strict=True):
            mutant = MUTANTS[number]
            known = f"not noticed: {mutant.missed}" if mutant.missed else "MISSED"
            if not failed and not mutant.missed:
                missed += 1
            caught += bool(failed)
            print(f"{number:3}  {mutant.what:50}  {seconds:4.0f} s  {failed or known}", flush=True)
    equal = sum(bool(MUTANTS[number].missed) for number in chosen)
    print(f"{caught} of {len(chosen) - equal} noticed; {equal} more change nothing but speed")
    return int(missed > 0.05 * len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
