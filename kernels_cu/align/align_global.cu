// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size in two launches, with the counts of each piece in global memory: for many ids where there are no
// clusters, and for more experts than shared memory has room for.
//
// in       topk_ids [num_ids], expert_map [num_experts] or unused                        (AlignArgs, align.cuh)
// out      sorted_token_ids [num_slots], expert_ids [num_blocks], num_tokens_post_pad [1], all int32
// scratch  counts [grid][stride] words, stride = E + 1 rounded up to 4; after them, for the _large entries, a table
//          per block. Need not be cleared.
// grid     as many blocks as pieces of per_block ids; block: a multiple of 32 threads, at least num_rows warps
// shared   align_count: stride words; align_scatter: the table (align.cuh), and per_block words more; _large: none
//
// align_count
//   1  counts[block][e] = ids of expert e in the block's piece
// align_scatter
//   1  count the ids of the piece, in the rows of the table
//   2  per expert: sum up the rows, and the counts of the other blocks; sort the ids of the piece (_large does not)
//   3  scan the padded sums over the experts
//   4  write the ids of the piece, and padding
//
// Order: inside a bucket by piece, warp and lane, which is ascending in i. Atomics only add up counts.
#include "align/align.cuh"
#include "align/global.cuh"

#define ENTRY(kernel, name, Ids, kSharedTable)                                                                    \
  extern "C" __global__ void __launch_bounds__(1024, 1) kernel##_##name(const __grid_constant__ AlignArgs args) { \
    kernel<Ids, kSharedTable>(args);                                                                              \
  }
#define ENTRIES(name, Ids)            \
  ENTRY(align_count, name, Ids, true) \
  ENTRY(align_scatter, name, Ids, true)
FOR_EACH_READER(ENTRIES)
ENTRY(align_count, large_any, Any, false)
ENTRY(align_scatter, large_any, Any, false)
