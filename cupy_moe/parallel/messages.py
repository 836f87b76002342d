"""What is sent between ranks, made and read: kernels on a GPU, `cupy_moe.cpu.parallel` on the CPU.

Arguments are those of the CPU specification, but for what `route` returns as one, and are checked by who
calls. What is written is allocated here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..cpu import parallel as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.tensors import cuda_index
from ..operators.sort import moe_sort
from ..plans.base import divisor
from ..plans.parallel import MessageLayout, plan_route, plan_rows, plan_sync

_ROUTE_ARGS = ArgumentStruct(
    "parallel/ep_route.cu:RouteArgs",
    "topk_ids replicas places buckets inverse_ids offsets counts",
    "u32 num_pairs; Divisor topk, most_local; u32 num_experts, num_columns, words_per_id, num_ranks, rank,"
    " has_pairs",
)
_PACK_ARGS = ArgumentStruct(
    "parallel/ep_pack.cu:PackArgs",
    "rows scales weights places inverse_ids offsets messages peers slots dropped",
    "i64 row_stride; u32 num_tokens, topk, units_per_row; Divisor parts; u32 units_per_part; Divisor"
    " most_local; u32 scale_words, pitch, num_ranks, rank, has_pairs, is_exact; Divisor capacity;"
    " u32 pair_capacity",
)
_EXPAND_ARGS = ArgumentStruct(
    "parallel/ep_expand.cu:ExpandArgs",
    "messages counts rows scales ids weights",
    "u32 num_rows, topk, units_per_row; Divisor parts; u32 units_per_part, scale_words, pitch, num_ranks,"
    " num_pairs, is_exact; Divisor capacity; u32 pair_capacity",
)


class Routed(NamedTuple):
    places: torch.Tensor  # [T, K] int32
    inverse_ids: torch.Tensor  # [T, K] or, with pairs, [T, 2 * K] int32: the slot of each of the buckets
    offsets: torch.Tensor  # [buckets + 1] int32
    counts: torch.Tensor  # [buckets] int32


def route(
    topk_ids: torch.Tensor, replicas: torch.Tensor, most_local: int, num_ranks: int, rank: int, pairs: bool
) -> Routed:
    """The place of each pair, and what goes to each rank in order: buckets of `cpu.route`, sorted."""
    (num_tokens, topk), num_buckets = topk_ids.shape, 2 * num_ranks if pairs else num_ranks
    launch, sorts = _prepare_route(
        topk_ids.numel(), topk, topk_ids.dtype.itemsize // 4, tuple(replicas.shape), most_local, num_ranks,
        rank, pairs, topk_ids.device,
    )  # fmt: skip
    if launch is None:
        places, buckets = cpu.route(topk_ids, replicas, most_local, num_ranks, rank, pairs)
    else:
        places = replicas.new_empty((num_tokens, topk))
        given = topk_ids.data_ptr(), replicas.data_ptr(), places.data_ptr()
        columns = replicas.new_empty((num_tokens, 2 * topk if pairs else topk))
        if sorts:
            offsets, counts = replicas.new_empty(num_buckets + 1), replicas.new_empty(num_buckets)
            launch(*given, 0, columns.data_ptr(), offsets.data_ptr(), counts.data_ptr())
            return Routed(places, columns, offsets, counts)
        launch(*given, columns.data_ptr(), 0, 0, 0)
        buckets = columns
    found = moe_sort(buckets, 1, num_buckets, return_inverse=True, return_offsets=True, return_counts=True)
    return Routed(places, found.inverse_ids, found.expert_offsets, found.counts)


@functools.lru_cache(CACHED_CALLS)
def _prepare_route(
    num_pairs: int,
    topk: int,
    words_per_id: int,
    replicas: tuple[int, int],
    most_local: int,
    num_ranks: int,
    rank: int,
    pairs: bool,
    device: torch.device,
) -> tuple[Launch | None, bool]:
    """And whether it sorts, too."""
    index = cuda_index("topk_ids", device)
    if index is None:
        return None, False
    plan = plan_route(num_pairs, num_ranks)
    constants = _ROUTE_ARGS.pack(
        num_pairs=num_pairs,
        topk=divisor(max(1, topk)),
        most_local=divisor(most_local),
        num_experts=replicas[0],
        num_columns=replicas[1],
        words_per_id=words_per_id,
        num_ranks=num_ranks,
        rank=rank,
        has_pairs=pairs,
    )
    return bind(plan, index, _ROUTE_ARGS.num_pointers, constants), plan.entry == "ep_route_few"


def pack(
    layout: MessageLayout,
    hidden_states: torch.Tensor,
    scales: torch.Tensor | None,
    topk_weights: torch.Tensor,
    routed: Routed,
    most_local: int,
    num_ranks: int,
    num_rows: int,
    capacity: int | None,
    pair_capacity: int,
    dropped: torch.Tensor,
    rank: int = 0,
    peers: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Messages [num_rows, pitch] uint8, and the slots [T, K] in which pairs, or rows, come back.

    dropped    [1] int32                  the number of pairs that are dropped is added to it
    rank                                  of whom packs
    peers      [num_ranks] int64, CUDA    where each rank has room for messages, [num_ranks, capacity, pitch]:
                                          then they are written there, to the place of this rank, and not
                                          to a tensor; [0, pitch] is returned for them
    """
    places, inverse_ids, offsets, _ = routed
    device = hidden_states.device
    launch = _prepare_pack(
        layout, tuple(places.shape), hidden_states.stride(0) * hidden_states.element_size(), most_local,
        num_ranks, rank, inverse_ids.shape[1] > places.shape[1], capacity, pair_capacity, device,
    )  # fmt: skip
    if launch is None:
        packed = cpu.pack(
            layout, hidden_states, scales, topk_weights, places, inverse_ids, offsets, most_local, num_ranks,
            num_rows, capacity, pair_capacity,
        )  # fmt: skip
        dropped += packed.num_dropped
        return packed.messages, packed.slots
    messages = torch.empty((num_rows if peers is None else 0, layout.pitch), dtype=torch.uint8, device=device)
    slots = torch.empty(places.shape, dtype=torch.int32, device=device)
    launch(
        hidden_states.data_ptr(), 0 if scales is None else scales.data_ptr(), topk_weights.data_ptr(),
        places.data_ptr(), inverse_ids.data_ptr(), offsets.data_ptr(), messages.data_ptr(),
        0 if peers is None else peers.data_ptr(), slots.data_ptr(), dropped.data_ptr(),
    )  # fmt: skip
    return messages, slots


@functools.lru_cache(CACHED_CALLS)
def _prepare_pack(
    layout: MessageLayout,
    shape: tuple[int, int],
    row_stride: int,
    most_local: int,
    num_ranks: int,
    rank: int,
    pairs: bool,
    capacity: int | None,
    pair_capacity: int,
    device: torch.device,
) -> Launch | None:
    index = cuda_index("hidden_states", device)
    if index is None:
        return None
    plan = plan_rows("ep_pack", shape[0], layout.row_bytes, device_limits(index).num_sms)
    constants = _PACK_ARGS.pack(
        row_stride=row_stride,
        num_tokens=shape[0],
        topk=layout.topk,
        units_per_row=layout.row_bytes // 16,
        parts=divisor(plan.parts),
        units_per_part=plan.units_per_part,
        most_local=divisor(most_local),
        scale_words=layout.scale_bytes // 4,
        pitch=layout.pitch,
        num_ranks=num_ranks,
        rank=rank,
        has_pairs=pairs,
        is_exact=capacity is None,
        capacity=divisor(capacity or 1),
        pair_capacity=pair_capacity,
    )
    return bind(plan.launch, index, _PACK_ARGS.num_pointers, constants)


def expand(
    layout: MessageLayout,
    messages: torch.Tensor,
    counts: torch.Tensor | None,
    num_pairs: int,
    capacity: int | None,
    pair_capacity: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes of rows, ids, weights and bytes of scales of the pairs; `counts`, int32, is None with a
    `capacity`."""
    device = messages.device
    launch = _prepare_expand(
        layout,
        len(messages),
        0 if counts is None else len(counts),
        num_pairs,
        capacity,
        pair_capacity,
        device,
    )
    if launch is None:
        return cpu.expand(layout, messages, counts, num_pairs, capacity, pair_capacity)
    rows = torch.empty((num_pairs, layout.row_bytes), dtype=torch.uint8, device=device)
    scales = torch.empty((num_pairs, layout.scale_bytes), dtype=torch.uint8, device=device)
    weights = torch.empty((num_pairs, 1), dtype=torch.float32, device=device)
    ids = torch.empty((num_pairs, 1), dtype=torch.int32, device=device)
    launch(
        messages.data_ptr(), 0 if counts is None else counts.data_ptr(), rows.data_ptr(), scales.data_ptr(),
        ids.data_ptr(), weights.data_ptr(),
    )  # fmt: skip
    return rows, ids, weights, scales


@functools.lru_cache(CACHED_CALLS)
def _prepare_expand(
    layout: MessageLayout,
    num_rows: int,
    num_ranks: int,
    num_pairs: int,
    capacity: int | None,
    pair_capacity: int,
    device: torch.device,
) -> Launch | None:
    index = cuda_index("messages", device)
    if index is None:
        return None
    plan = plan_rows("ep_expand", num_rows, layout.row_bytes, device_limits(index).num_sms)
    constants = _EXPAND_ARGS.pack(
        num_rows=num_rows,
        topk=layout.topk,
        units_per_row=layout.row_bytes // 16,
        parts=divisor(plan.parts),
        units_per_part=plan.units_per_part,
        scale_words=layout.scale_bytes // 4,
        pitch=layout.pitch,
        num_ranks=num_ranks,
        num_pairs=num_pairs,
        is_exact=capacity is None,
        capacity=divisor(capacity or 1),
        pair_capacity=pair_capacity,
    )
    return bind(plan.launch, index, _EXPAND_ARGS.num_pointers, constants)


# ---- in symmetric memory, on GPUs alone

_PUSH_ARGS = ArgumentStruct(
    "parallel/ep_push.cu:PushArgs",
    "outputs ids peers",
    "u32 num_rows, units_per_row; Divisor parts; u32 units_per_part; Divisor num_ranks;"
    " u32 room, num_ids, rank; i64 id_stride",
)
_SYNC_ARGS = ArgumentStruct(
    "parallel/ep_sync.cu:SyncArgs", "flags peers epoch late", "u32 num_ranks, rank; i64 timeout"
)


def push(outputs: torch.Tensor, ids: torch.Tensor, peers: torch.Tensor, room: int, rank: int) -> None:
    """Rows of experts to the ranks that sent them, `room` of each in turn.

    outputs    [num_ranks * room, H]   contiguous, of rows of multiples of 16 bytes
    ids        [num_ranks * room, k]   int32; rows without an id from 0 on are not sent
    peers      [num_ranks] int64       where each rank has [num_ranks, room, H]; `rank` writes its own part
    """
    num_rows, hidden = outputs.shape
    launch = _prepare_push(
        num_rows, hidden * outputs.element_size(), room, ids.shape[1], ids.stride(0), rank, outputs.device
    )
    launch(outputs.data_ptr(), ids.data_ptr(), peers.data_ptr())


@functools.lru_cache(CACHED_CALLS)
def _prepare_push(
    num_rows: int, row_bytes: int, room: int, num_ids: int, id_stride: int, rank: int, device: torch.device
) -> Launch:
    index = _gpu(device)
    plan = plan_rows("ep_push", num_rows, row_bytes, device_limits(index).num_sms)
    constants = _PUSH_ARGS.pack(
        num_rows=num_rows,
        units_per_row=row_bytes // 16,
        parts=divisor(plan.parts),
        units_per_part=plan.units_per_part,
        num_ranks=divisor(max(1, num_rows // room)),
        room=room,
        num_ids=num_ids,
        rank=rank,
        id_stride=id_stride,
    )
    return bind(plan.launch, index, _PUSH_ARGS.num_pointers, constants)


def sync(
    flags: torch.Tensor, peers: torch.Tensor, epoch: torch.Tensor, late: torch.Tensor, rank: int, timeout: int
) -> None:
    """Tell all ranks that what was launched before is done, and wait for as much of them, on the GPU.

    flags      [num_ranks] int32   this rank's, which others write
    peers      [num_ranks] int64   where each rank has its flags
    epoch      [1] int32           counts calls; as often on each rank
    late       [num_ranks] int32   1 for ranks that did not come within `timeout`, in ns
    """
    launch = _prepare_sync(len(peers), rank, timeout, flags.device)
    launch(flags.data_ptr(), peers.data_ptr(), epoch.data_ptr(), late.data_ptr())


@functools.lru_cache(CACHED_CALLS)
def _prepare_sync(num_ranks: int, rank: int, timeout: int, device: torch.device) -> Launch:
    constants = _SYNC_ARGS.pack(num_ranks=num_ranks, rank=rank, timeout=timeout)
    return bind(plan_sync(), _gpu(device), _SYNC_ARGS.num_pointers, constants)


def _gpu(device: torch.device) -> int:
    index = cuda_index("device", device)
    if index is None:
        raise ValueError("device: expected a GPU, got the CPU, which has no symmetric memory")
    return index
