"""Expert parallelism: the experts of a layer on several GPUs, which exchange rows by torch.distributed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..dispatch.tensors import check_layout, check_tensor, cuda_index, is_plain
from ..errors import PeerError
from ..operators.experts import fused_experts
from ..operators.moe_sum import SUMMED_TYPES, as_factor, place_for_sum
from ..operators.permute import moe_unpermute
from ..plans.parallel import MAX_RANKS, MAX_TOPK, MessageLayout
from ..values import INT32_MAX, as_int, check_choice, check_fp32, check_range, kind_of
from . import messages
from .placement import Placement, place_experts, replica_table
from .placement import replicate_experts as replicate_experts

COMBINE = ("pairs", "partial")
_ID_TYPES = (torch.int32, torch.int64, torch.uint32)


class Handle(NamedTuple):
    """What `combine` has to know of a `dispatch`; not to be looked into."""

    slots: torch.Tensor  # [T, K] int32, of what comes back
    sent: list[int] | None  # rows of what comes back from each rank; None: as many of each
    received: list[int] | None  # rows that each rank gets back
    ids: torch.Tensor | None  # [N, k] int32, of the rows, by which those that nobody has sent are known


class Received(NamedTuple):
    """What `dispatch` returns: for the experts of this rank, as `fused_experts` takes it."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    scales: torch.Tensor | None
    handle: Handle


class ExpertParallel:
    """Brings tokens to the ranks of their experts, and what these make of them back.

    group         ProcessGroup     of up to 256 ranks: NCCL for tensors on GPUs, gloo for those on the CPU
    num_experts   1 to 65 536      of the whole layer
    placement     "linear", "round_robin", lists, a tensor    which rank has which experts, as `place_experts`
                                   takes it; an expert that is on several ranks gets tokens on all in turn
    combine       "pairs"          a row comes back for each pair of a token and an expert; they are added up
                                   where the token is, k ascending, which gives the bits of a single GPU
                  "partial"        a row comes back for each token and rank, the rounded sum of its pairs:
                                   fewer bytes, and the same bits at every call, but not those of one GPU
    capacity      None             exact sizes: the host waits once in each dispatch, for all ranks' counts
                  int              the most tokens that a rank sends another: no wait, so that CUDA graphs
                                   can capture it; what finds no room is dropped, and counted
    pair_capacity int              the most pairs that come back from a rank, with "pairs"; by default all
                                   that `capacity` tokens can have there, which are many, if the experts of
                                   a token are different ones
    device        torch.device     of all tensors; by default the current GPU for NCCL, else the CPU

    All ranks pass the same, and call `dispatch` and `combine` in the same order, also without any token. One
    that does not is a PeerError on the others after the group's timeout; with NCCL, whose exchanges the host
    does not wait for, if TORCH_NCCL_BLOCKING_WAIT=1 is set, and else torch's watchdog ends the process.

    Attributes: `experts`, those of this rank in the order of its weights; `rank` and `num_ranks`; `dropped`
    [1] int32, on the device, how many pairs have found no room since it was last set to 0: reading it
    waits for the GPU, so look when there is time. Without a `capacity` it stays 0.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> parallel = ExpertParallel(dist.group.WORLD, num_experts=2)
    >>> hidden_states, weights = torch.arange(16.0).view(2, 8), torch.tensor([[1.0, 0.5], [2.0, 1.0]])
    >>> received = parallel.dispatch(hidden_states, torch.tensor([[1, 0], [0, -1]]), weights)
    >>> received.topk_ids.tolist(), received.topk_weights.tolist(), received.hidden_states[:, 0].tolist()
    ([[1], [0], [0]], [[1.0], [0.5], [2.0]], [0.0, 0.0, 8.0])
    >>> outputs = received.hidden_states * received.topk_weights  # what experts do
    >>> parallel.combine(outputs, received.handle)[:, 1].tolist()
    [1.5, 18.0]
    >>> dist.destroy_process_group()

    Raises TypeError and ValueError for wrong arguments. Semantics: the dispatch and combine of DeepEP.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        *,
        placement: Any = "linear",
        combine: str = "pairs",
        capacity: int | None = None,
        pair_capacity: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected one that this rank belongs to")
        check_range("group: number of ranks", self.num_ranks, MAX_RANKS)
        check_choice("combine", combine, COMBINE)
        self.num_experts = as_int("num_experts", num_experts)
        self.placement: Placement = place_experts(self.num_experts, self.num_ranks, placement)
        self.experts = self.placement[self.rank]
        self.capacity, self._pair_capacity = capacity, pair_capacity
        for name, value in (("capacity", capacity), ("pair_capacity", pair_capacity)):
            if value is not None:
                check_range(name, as_int(name, value), INT32_MAX // self.num_ranks)
        if capacity is None and pair_capacity is not None:
            raise ValueError("pair_capacity: expected a capacity, too")
        self._pairs = combine == "pairs"
        if device is None:
            on_gpu = "nccl" in dist.get_backend(group)
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        try:
            self.device = torch.device(device)
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"device: expected a torch.device, got {device!r}") from error
        cuda_index("device", self.device)
        table, self._most_local = replica_table(self.placement, self.num_experts)
        self._replicas = torch.tensor(table, dtype=torch.int32, device=self.device)
        self.device = self._replicas.device  # with the number that a GPU has
        self.dropped = torch.zeros(1, dtype=torch.int32, device=self.device)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
    ) -> Received:
        """Send each token's row once to each rank that has experts of it.

        With T tokens of this rank, K experts for each, and hidden size H:

        hidden_states   [T, H]   bf16, fp16, fp8, any   rows of multiples of 16 bytes; may be strided
        topk_ids        [T, K]   int32, 64, uint32      experts; those that nobody has are dropped; K to 64
        topk_weights    [T, K]   fp32
        scales          [T, G]   up to 4 bytes each     travel with the rows; rows of multiples of 4 bytes

        T may differ from rank to rank, and be 0; all else is the same. Returns Received, of this rank's N
        pairs or, with combine="partial", tokens; then k is K, else 1:
        hidden_states   [N, H]   as sent                sorted by the rank that sent them, then by token and k
        topk_ids        [N, k]   int32                  local ids of experts; -1: another rank's, or none
        topk_weights    [N, k]   fp32
        scales          [N, G]   as sent                None without
        handle                                          for `combine`

        With a `capacity` of C, N is num_ranks times `pair_capacity`, C * min(K, most experts of a rank) by
        default, or num_ranks * C; ids of rows that nobody has sent are -1, and the rows hold anything.

        Cost of exact sizes: 4 launches, or 3 with "partial" (route, counts, messages, pairs), one more to
        sort above 1024 pairs or 32 ranks, more above some 25 000; an exchange of counts, for which the host
        waits; one of rows. With a `capacity`: one launch less, and one exchange, of num_ranks * capacity
        rows, used or not. Allocates its results and messages.

        Raises TypeError and ValueError for wrong arguments, before anything is launched or sent; PeerError
        where an exchange fails, or takes longer than the group's timeout.
        """
        rows, layout = self._check(hidden_states, topk_ids, topk_weights, scales)
        ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
        if scales is not None:
            scales = scales.contiguous()
            scales = scales if scales.data_ptr() % 4 == 0 else scales.clone()  # they are read as words
        topk = layout.topk
        routed = messages.route(ids, self._replicas, self._most_local, self.num_ranks, self.rank, self._pairs)
        came, counts, handle = self._send(layout, rows, scales, weights, routed)
        if self._pairs:
            num_pairs = self._num_outputs(handle)
            capacity, room = self.capacity, self._room(topk)
            parts = messages.expand(layout, came, counts, num_pairs, capacity, room)
        else:
            words = came[:, layout.row_bytes : layout.scales].view(torch.int32)
            own_weights = words[:, topk : 2 * topk].view(torch.float32)
            scale_bytes = came[:, layout.scales : layout.scales + layout.scale_bytes]
            parts = came[:, : layout.row_bytes], words[:, :topk], own_weights, scale_bytes
        return Received(
            parts[0].view(hidden_states.dtype), parts[1], parts[2],
            None if scales is None else parts[3].view(scales.dtype), handle._replace(ids=parts[1]),
        )  # fmt: skip

    def combine(
        self,
        expert_outputs: torch.Tensor,
        handle: Handle,
        *,
        routed_scaling_factor: float = 1.0,
        shared_output: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send what experts made of rows back, and add up that of each token.

        out[t] = routed_scaling_factor * sum over k of expert_outputs of pair (t, k), plus shared_output[t]

        expert_outputs          [N, H]   bf16, fp16, fp32    of the N rows of `dispatch`, with their weights
        handle                                               of that `dispatch`
        routed_scaling_factor                                multiplies the sum, but not `shared_output`
        shared_output           [T, H]   as expert_outputs   added at the end
        out                     [T, H]   as expert_outputs   written instead of allocated

        Returns [T, H] of the type of `expert_outputs`. The sum is that of `moe_unpermute`, in fp32, rounded
        once: of pairs, k ascending, or, with combine="partial", of ranks, in the order in which the token's
        experts name them first. Pairs that were dropped add nothing.

        Cost: one exchange and one launch; no wait. Allocates what comes back, and the output.

        Raises TypeError and ValueError for wrong arguments, before anything is sent; PeerError as `dispatch`.
        """
        if not isinstance(handle, Handle):
            raise TypeError(f"handle: expected that of a dispatch, got {kind_of(handle)}")
        if not is_plain(expert_outputs):
            raise TypeError(f"expert_outputs: expected a plain torch.Tensor, got {kind_of(expert_outputs)}")
        check_layout("expert_outputs", expert_outputs)
        num_outputs = self._num_outputs(handle)
        if expert_outputs.dim() != 2 or len(expert_outputs) != num_outputs:
            raise ValueError(
                f"expert_outputs: expected shape [{num_outputs}, hidden], got {list(expert_outputs.shape)}"
            )
        shape, dtype = tuple(expert_outputs.shape), expert_outputs.dtype
        check_tensor("expert_outputs", expert_outputs, SUMMED_TYPES, shape, self.device, strided=True)
        self._check_sum(len(handle.slots), shape[1], dtype, routed_scaling_factor, shared_output, out)
        back = self._send_back(expert_outputs.contiguous(), handle)
        return moe_unpermute(
            back, handle.slots, out, routed_scaling_factor=routed_scaling_factor, shared_output=shared_output
        )

    def _check_sum(
        self, num_tokens: int, hidden: int, dtype: torch.dtype, factor: Any, shared_output: Any, out: Any
    ) -> None:
        """What `moe_unpermute` would refuse, before anything is sent, as others wait for what is."""
        check_fp32("routed_scaling_factor", as_factor(factor))
        for name, tensor in (("shared_output", shared_output), ("out", out)):
            if not (tensor is None or is_plain(tensor)):
                raise TypeError(f"{name}: expected a plain torch.Tensor, got {kind_of(tensor)}")
        shape = num_tokens, hidden
        if shared_output is not None:
            check_tensor("shared_output", shared_output, (dtype,), shape, self.device, strided=True)
        if out is not None:
            place_for_sum(out, *shape, torch.empty(0, dtype=dtype, device=self.device), shared_output)

    # ---- how rows get from rank to rank

    def _send(
        self,
        layout: MessageLayout,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        weights: torch.Tensor,
        routed: messages.Routed,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Handle]:
        """The messages that came, and, without a `capacity`, how many pairs and rows are of each rank."""
        packed = layout, rows, scales, weights, routed
        num_ranks, capacity = self.num_ranks, self.capacity
        sizes = self._most_local, num_ranks
        if capacity is not None:
            num_rows, room = num_ranks * capacity, self._room(layout.topk)
            sent, slots = messages.pack(*packed, *sizes, num_rows, capacity, room, self.dropped)
            came = torch.empty_like(sent)
            self._exchange("rows", came, sent)
            return came, None, Handle(slots, None, None, None)
        # Of each rank: its pairs, if these come back as such, and its rows.
        shape = 2, num_ranks, 2 if self._pairs else 1
        counts = torch.empty(shape, dtype=torch.int32, device=self.device)
        counts[0].copy_(routed.counts.view(-1, num_ranks).t())
        self._exchange("counts", counts[1], counts[0])
        of_both = counts.tolist()  # the host waits
        to_others, from_others = ([of_rank[-1] for of_rank in side] for side in of_both)
        sent, slots = messages.pack(*packed, *sizes, sum(to_others), None, 0, self.dropped)
        came = sent.new_empty((sum(from_others), layout.pitch))
        self._exchange("rows", came, sent, from_others, to_others)
        back, back_from = ([of_rank[0] for of_rank in side] for side in of_both)
        return came, counts[1], Handle(slots, back, back_from, None)

    def _send_back(self, outputs: torch.Tensor, handle: Handle) -> torch.Tensor:
        """What comes back, [slots, H]."""
        num_back = len(outputs) if handle.sent is None else sum(handle.sent)
        back = outputs.new_empty((num_back, outputs.shape[1]))
        self._exchange("outputs", back, outputs, handle.sent, handle.received)
        return back

    def _room(self, topk: int) -> int:
        """The slots of each rank for what comes back, with a `capacity`; else 0."""
        capacity = self.capacity or 0
        if not self._pairs:
            return capacity
        room = self._pair_capacity or capacity * min(topk, self._most_local)
        check_range("pair_capacity", room, INT32_MAX // self.num_ranks, 0)
        return room

    def _num_outputs(self, handle: Handle) -> int:
        if handle.received is None:
            return self.num_ranks * self._room(handle.slots.shape[1])
        return sum(handle.received)

    def _exchange(
        self,
        what: str,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
    ) -> None:
        """Part r of `input` to rank r, part r of `output` from there; in equal parts without splits."""
        try:
            dist.all_to_all_single(
                output.view(torch.uint8), input.view(torch.uint8), output_splits, input_splits, self.group
            )
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} of {self.num_ranks}: the exchange of {what} failed: another rank has"
                f" failed, is gone, or came later than the group's timeout allows: {error}"
            ) from error

    def _check(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, scales: Any
    ) -> tuple[torch.Tensor, MessageLayout]:
        """Rows as they can be read, and how messages are laid out."""
        device = self.device
        tensors = {"hidden_states": hidden_states, "topk_ids": topk_ids, "topk_weights": topk_weights}
        for name, tensor in (tensors if scales is None else {**tensors, "scales": scales}).items():
            if not is_plain(tensor):
                raise TypeError(f"{name}: expected a plain torch.Tensor, got {kind_of(tensor)}")
            check_layout(name, tensor)
            if tensor.dim() != 2:
                raise ValueError(f"{name}: expected two dimensions, got {list(tensor.shape)}")
        (num_tokens, hidden), topk, size = (
            hidden_states.shape,
            topk_ids.shape[1],
            hidden_states.element_size(),
        )
        check_range("topk_ids: topk", topk, MAX_TOPK)
        dtype, size = hidden_states.dtype, hidden_states.element_size()
        check_tensor("hidden_states", hidden_states, (dtype,), (num_tokens, hidden), device, strided=True)
        check_tensor("topk_ids", topk_ids, _ID_TYPES, (num_tokens, topk), device, strided=True)
        check_tensor("topk_weights", topk_weights, (torch.float32,), (num_tokens, topk), device, strided=True)
        row_bytes = hidden * size
        if row_bytes % 16 or not row_bytes:
            raise ValueError(f"hidden_states: expected rows of a multiple of 16 bytes, got {row_bytes}")
        scale_bytes = 0
        if scales is not None:
            groups = scales.shape[1]
            check_tensor("scales", scales, (scales.dtype,), (num_tokens, groups), device, strided=True)
            if scales.element_size() > 4:
                raise TypeError(f"scales: expected elements of up to 4 bytes, got {scales.dtype}; cast them")
            scale_bytes = groups * scales.element_size()
            if scale_bytes % 4:
                raise ValueError(f"scales: expected rows of a multiple of 4 bytes, got {scale_bytes}")
        is_read = hidden_states.stride(1) == 1 or hidden == 1
        aligned = (hidden_states.data_ptr() | hidden_states.stride(0) * size * (num_tokens > 1)) % 16 == 0
        rows = (
            hidden_states
            if is_read and aligned
            else hidden_states.clone(memory_format=torch.contiguous_format)
        )
        self._room(topk)
        return rows, MessageLayout(row_bytes, topk, scale_bytes)


def ep_fused_experts(
    parallel: ExpertParallel,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    routed_scaling_factor: float = 1.0,
    shared_output: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """`fused_experts` of experts that are on several ranks: dispatch, experts, combine.

    parallel         ExpertParallel   who has which experts
    hidden_states    [T, H]           bf16, fp16: this rank's tokens
    w1, w2           [E, ..]          of this rank's E experts, in the order of `parallel.experts`
    topk_weights     [T, K]           fp32
    topk_ids         [T, K]           int32, 64, uint32: experts of the whole layer
    routed_scaling_factor, shared_output, out    as in `fused_experts`
    options          activation, biases, quantization, kernel, ...: as in `fused_experts`, of this rank's
                     experts; no `expert_map` and no `workspace`

    Returns [T, H] of the type of `hidden_states`. With combine="pairs" it is what `fused_experts` with all
    experts gives, to the last bit, as long as both have the same kind of kernel: on a GPU with few pairs or
    on Hopper, `kernel=` may have to say which.

    >>> import torch.distributed as dist
    >>> from cupy_moe import ExpertParallel
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> parallel = ExpertParallel(dist.group.WORLD, num_experts=2)
    >>> eye, x = torch.eye(8, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16)
    >>> w1, weights, ids = torch.stack([eye, 2 * eye]), torch.tensor([[1.0, 0.5]]), torch.tensor([[0, 1]])
    >>> ep_fused_experts(parallel, x, w1, w1, weights, ids, activation="relu2_no_mul")[0, :3].tolist()
    [5.0, 5.0, 5.0]
    >>> dist.destroy_process_group()

    Cost: that of its three parts, and of the host, as all is checked before others wait, that of a call
    without tokens. Errors are theirs. Semantics: vLLM's modular fused MoE with all-to-all.
    """
    if not isinstance(parallel, ExpertParallel):
        raise TypeError(f"parallel: expected an ExpertParallel, got {kind_of(parallel)}")
    for name in ("expert_map", "global_num_experts", "workspace"):
        if name in options:
            raise TypeError(f"{name}: expected none, as `parallel` says which experts are where")
    parallel._check(hidden_states, topk_ids, topk_weights, None)
    (num_tokens, hidden), dtype = hidden_states.shape, hidden_states.dtype
    parallel._check_sum(num_tokens, hidden, dtype, routed_scaling_factor, shared_output, out)
    if parallel.experts:  # of no tokens, which launches nothing: what is wrong is refused before others wait
        fused_experts(hidden_states[:0], w1, w2, topk_weights[:0, :1], topk_ids[:0, :1], **options)
        if len(w1) != len(parallel.experts):
            raise ValueError(f"w1: expected the {len(parallel.experts)} experts of this rank, got {len(w1)}")
    received = parallel.dispatch(hidden_states, topk_ids, topk_weights)
    rows = received.hidden_states
    if parallel.experts:
        weights, ids = received.topk_weights, received.topk_ids
        outputs = fused_experts(rows, w1, w2, weights, ids, **options)
    else:
        outputs = rows.contiguous()  # of which no rank reads a row
    return parallel.combine(
        outputs,
        received.handle,
        routed_scaling_factor=routed_scaling_factor,
        shared_output=shared_output,
        out=out,
    )
