"""What expert parallelism does beside the exchange between ranks, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plans.parallel import MessageLayout


@torch.no_grad()
def route(
    topk_ids: torch.Tensor, replicas: torch.Tensor, most_local: int, num_ranks: int, rank: int, pairs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each pair, and what is sorted by rank: [T, K], and [T, K] or, with `pairs`, [T, 2 * K].

    replicas    [E, 1 + most replicas] int32    how many, and the place of each: rank * most_local + local id

    A token's replica is the (token + rank)-th of those that there are, in turn. Buckets are the ranks of
    pairs, if these are sent back one by one, and behind them those of rows: num_ranks higher, of the first
    pair of a token on a rank alone. -1 stands for what there is not.
    """
    ids = topk_ids.to(torch.int64)
    known = (ids >= 0) & (ids < len(replicas))
    entries = replicas[ids.clamp(0, len(replicas) - 1)].to(torch.int64)
    number = entries[..., 0] * known
    tokens = torch.arange(len(ids), device=ids.device)[:, None] + rank
    which = 1 + tokens % number.clamp(min=1)
    places = torch.where(number > 0, entries.gather(2, which[..., None])[..., 0], -1)
    ranks = torch.where(places >= 0, places // most_local, -1)
    equal = ranks[:, :, None] == ranks[:, None, :]
    is_first = ~equal.tril(-1).any(2) & (ranks >= 0)
    rows = torch.where(is_first, ranks + (num_ranks if pairs else 0), -1)
    buckets = torch.cat([ranks, rows], dim=1) if pairs else rows
    return places.to(torch.int32), buckets.to(torch.int32)


class Packed(NamedTuple):
    messages: torch.Tensor  # [rows, pitch] uint8
    slots: torch.Tensor  # [T, K] int32, where what becomes of a pair will come back; -1: nothing will
    num_dropped: int  # pairs


@torch.no_grad()
def pack(
    layout: MessageLayout,
    hidden_states: torch.Tensor,
    scales: torch.Tensor | None,
    topk_weights: torch.Tensor,
    places: torch.Tensor,
    inverse_ids: torch.Tensor,
    offsets: torch.Tensor,
    most_local: int,
    num_ranks: int,
    num_rows: int,
    capacity: int | None,
    pair_capacity: int,
) -> Packed:
    """The messages for each rank, one after another: rows with what has to be known of them (MessageLayout).

    `inverse_ids` and `offsets` are those of the sorted buckets of `route`. Without a `capacity`, messages and
    slots are without gaps. With one, each rank has so many rows, and `pair_capacity` slots, in which pairs
    come back; what does not fit is dropped. Ids of rows without a token are -1.
    """
    topk, pairs = places.shape[1], inverse_ids.shape[1] == 2 * places.shape[1]
    ranks = torch.where(places >= 0, places // most_local, -1).long()
    exists, of_rank = ranks >= 0, ranks.clamp(min=0)
    first = (ranks[:, :, None] == ranks[:, None, :]).int().argmax(2)  # pair of the token on the same rank
    is_first = exists & (first == torch.arange(topk, device=first.device))
    offsets = offsets.long()
    row_offsets = offsets[num_ranks if pairs else 0 :]

    position = inverse_ids[:, -topk:].gather(1, first) - row_offsets[of_rank]
    region = row_offsets[of_rank] - row_offsets[0] if capacity is None else of_rank * capacity
    fits = exists & (position < (num_rows if capacity is None else capacity))
    target = region + position
    first_pair = torch.zeros_like(ranks)
    if pairs:
        position = first_pair = inverse_ids[:, :topk] - offsets[of_rank]
        region = offsets[of_rank] if capacity is None else of_rank * pair_capacity
        comes_back = fits & (position < pair_capacity) if capacity is not None else fits
        slots = torch.where(comes_back, region + position, -1)
    else:
        comes_back = fits
        slots = torch.where(fits & is_first, target, -1)

    token, k = (fits & is_first).nonzero(as_tuple=True)
    rows = target[token, k]
    messages = torch.zeros((num_rows, layout.pitch), dtype=torch.uint8, device=places.device)
    words = messages[:, layout.row_bytes : layout.scales].view(torch.int32)
    words[:, :topk] = -1
    is_here = comes_back[token] & (ranks[token] == ranks[token, k][:, None])
    words[rows, :topk] = torch.where(is_here, places[token] % most_local, -1)
    words[rows, topk : 2 * topk] = topk_weights[token].view(torch.int32)
    words[rows, layout.first_pair] = first_pair[token, k].to(torch.int32)
    messages[rows, : layout.row_bytes] = hidden_states.contiguous().view(torch.uint8)[token]
    if scales is not None:
        messages[rows, layout.scales : layout.scales + layout.scale_bytes] = scales.view(torch.uint8)[token]
    return Packed(messages, slots.to(torch.int32), int((exists & ~comes_back).sum()))


@torch.no_grad()
def expand(
    layout: MessageLayout,
    messages: torch.Tensor,
    counts: torch.Tensor | None,
    num_pairs: int,
    capacity: int | None,
    pair_capacity: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of the rows that came: bytes of rows, ids, weights and bytes of scales, [num_pairs] of each.

    counts    [num_ranks, 2]    pairs and rows that came from each rank; None with a `capacity`

    Pairs are in the order in which they were told to come back: those of a rank in order. Ids of slots
    without a pair are -1.
    """
    topk = layout.topk
    rows = messages[:, : layout.row_bytes]
    words = messages[:, layout.row_bytes : layout.scales].view(torch.int32)
    scales = messages[:, layout.scales : layout.scales + layout.scale_bytes]
    if counts is not None:
        begins = (counts[:, 0].cumsum(0) - counts[:, 0]).repeat_interleave(counts[:, 1])
    else:
        begins = torch.arange(len(messages), device=messages.device) // (capacity or 1) * pair_capacity
    exists = words[:, :topk] >= 0
    slots = begins[:, None] + words[:, layout.first_pair, None] + exists.cumsum(1) - 1
    row, k = (exists & (slots >= 0) & (slots < num_pairs)).nonzero(as_tuple=True)
    slot = slots[row, k].long()
    new = messages.new_zeros
    out_rows, out_scales = new((num_pairs, layout.row_bytes)), new((num_pairs, layout.scale_bytes))
    ids, weights = (new((num_pairs, 1), dtype=torch.int32) for _ in range(2))
    ids -= 1
    out_rows[slot], out_scales[slot] = rows[row], scales[row]
    ids[slot, 0], weights[slot, 0] = words[row, k], words[row, topk + k]
    return out_rows, ids, weights.view(torch.float32), out_scales
