// SPDX-License-Identifier: Apache-2.0
// Expert parallelism in symmetric memory: what experts made of rows, to the ranks that sent these.
//
// in       outputs [num_rows] of units_per_row times 16 bytes: `room` of each rank in turn; ids [num_rows, num_ids],
//          id_stride apart, all negative where a row was not sent by anybody; peers [num_ranks]    (PushArgs)
// out      at the address of each rank, in the `rank`-th of num_ranks places for `room` rows: its rows, but for those
//          that nobody sent, which are left as they are
// grid     num_rows * parts blocks of kThreads threads, of which neighbours write to different ranks
//
//   1  is it a row at all?
//   2  the units of the part, to the rank that sent it
//
// Every unit is written once. ep_sync tells the others.
#include "parallel/message.cuh"

struct PushArgs {
  const char* outputs;
  const int* ids;
  const i64* peers;
  u32 num_rows, units_per_row;
  Divisor parts;
  u32 units_per_part;
  Divisor num_ranks;
  u32 room, num_ids, rank;
  i64 id_stride;
};

extern "C" __global__ void __launch_bounds__(kThreads) ep_push(const __grid_constant__ PushArgs args) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const u32 index = args.parts.quotient(blockIdx.x), part = blockIdx.x - index * args.parts.value;
  if (index >= args.num_rows) return;
  const u32 position = args.num_ranks.quotient(index), peer = index - position * args.num_ranks.value;
  const u32 row = peer * args.room + position;
  const int* ids = args.ids + row * args.id_stride;
  u32 k = 0;
#pragma unroll 1
  while (k < args.num_ids && ids[k] < 0) ++k;
  if (k == args.num_ids) return;
  const u64 row_bytes = (u64)args.units_per_row * sizeof(uint4);
  char* target = reinterpret_cast<char*>(args.peers[peer]) + ((u64)args.rank * args.room + position) * row_bytes;
  const u32 begin = part * args.units_per_part, end = min_u32(begin + args.units_per_part, args.units_per_row);
  copy_units(reinterpret_cast<const uint4*>(args.outputs + row * row_bytes), &target, 1, begin, end);
}
