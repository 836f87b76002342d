"""Expert parallelism by kernels that write into the memory of other GPUs: torch's symmetric memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..errors import DependencyError, PeerError
from ..plans.base import round_up
from ..plans.parallel import MAX_TOPK, MessageLayout
from ..values import as_float, as_int, check_range
from . import ExpertParallel, Handle, messages

_FLAG_BYTES = 4096  # before all else: a word for each rank, of up to 256
_ALIGNMENT = 256


class SymmetricExpertParallel(ExpertParallel):
    """`ExpertParallel` with a capacity, whose kernels store rows in the memory of their ranks: no NCCL.

    group           ProcessGroup     of GPUs that reach each other's memory, as those of one host by NVLink
    num_experts, placement, combine, capacity, pair_capacity    as in `ExpertParallel`; with a capacity
    max_row_bytes   int              of a row of hidden states with its scales, and of what experts make of it
    max_topk        1 to 64          experts of a token
    timeout         float            seconds that kernels wait for other ranks

    Results are those of `ExpertParallel`, to the last bit. A `combine` has to follow each `dispatch` before
    the next, also in CUDA graphs: with combine="partial", what is returned lies in memory that others write
    to, and stays until then. Two batches that overlap need one of these each.

    A rank that does not come within the timeout is no longer waited for: results are then wrong, but no
    kernel waits for ever, and `late` [num_ranks] int32, on the device, has a 1 for it. `check` raises
    PeerError then; it waits for the GPU, so call it when there is time.

    Memory: num_ranks * (capacity messages and room for what comes back), once, on each rank. Cost of a
    dispatch: 4 launches, or 3 with "partial", more to sort above 1024 pairs; of a combine: 3. No wait of the
    host. NVLink multicast is not used; TORCH_SYMM_MEM_DISABLE_MULTICAST=1 keeps torch from setting it up.

    Raises TypeError and ValueError for wrong arguments, and DependencyError where there is no symmetric
    memory between the GPUs. Semantics: those of DeepEP's kernels within a host.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        *,
        capacity: int,
        max_row_bytes: int,
        max_topk: int,
        placement: Any = "linear",
        combine: str = "pairs",
        pair_capacity: int | None = None,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(
            group, num_experts, placement=placement, combine=combine, capacity=as_int("capacity", capacity),
            pair_capacity=pair_capacity,
        )  # fmt: skip
        self.max_row_bytes = round_up(as_int("max_row_bytes", max_row_bytes), 16)
        self.max_topk = as_int("max_topk", max_topk)
        check_range("max_topk", self.max_topk, MAX_TOPK)
        self._timeout = int(1e9 * as_float("timeout", timeout))
        pitch = MessageLayout(self.max_row_bytes, self.max_topk, 0).pitch
        self._back = round_up(_FLAG_BYTES + self.num_ranks * capacity * pitch, _ALIGNMENT)
        size = self._back + self.num_ranks * self._room(self.max_topk) * self.max_row_bytes
        self._memory, addresses = symmetric_memory(group, size, self.device)
        peers = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self._flags_of, self._rooms_of, self._back_of = peers, peers + _FLAG_BYTES, peers + self._back
        self._flags = self._memory[: 4 * self.num_ranks].view(torch.int32)
        self._epoch = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.late = torch.zeros(self.num_ranks, dtype=torch.int32, device=self.device)

    def check(self) -> None:
        """Raises PeerError if any rank has come too late; waits for the GPU."""
        late = [rank for rank, is_late in enumerate(self.late.tolist()) if is_late]
        if late:
            raise PeerError(
                f"rank {self.rank} of {self.num_ranks}: ranks {late} did not come within"
                f" {self._timeout / 1e9} s: they have failed, are gone, or are too slow"
            )

    def _check(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, scales: Any
    ) -> tuple[torch.Tensor, MessageLayout]:
        rows, layout = super()._check(hidden_states, topk_ids, topk_weights, scales)
        row_bytes = layout.row_bytes + layout.scale_bytes
        check_range("hidden_states: bytes of a row with its scales", row_bytes, self.max_row_bytes)
        check_range("topk_ids: topk", layout.topk, self.max_topk)
        return rows, layout

    def _send(
        self,
        layout: MessageLayout,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        weights: torch.Tensor,
        routed: messages.Routed,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Handle]:
        num_rows = self.num_ranks * (self.capacity or 0)
        _, slots = messages.pack(
            layout, rows, scales, weights, routed, self._most_local, self.num_ranks, num_rows, self.capacity,
            self._room(layout.topk), self.dropped, self.rank, self._rooms_of,
        )  # fmt: skip
        self._sync()
        came = self._memory[_FLAG_BYTES : _FLAG_BYTES + num_rows * layout.pitch]
        return came.view(num_rows, layout.pitch), None, Handle(slots, None, None, None)

    def _send_back(self, outputs: torch.Tensor, handle: Handle) -> torch.Tensor:
        num_bytes, row_bytes = outputs.nbytes, outputs.shape[1] * outputs.element_size()
        check_range("expert_outputs: bytes of a row", row_bytes, self.max_row_bytes)
        if row_bytes % 16:
            raise ValueError(f"expert_outputs: expected rows of a multiple of 16 bytes, got {row_bytes}")
        assert handle.ids is not None
        messages.push(outputs, handle.ids, self._back_of, self._room(handle.slots.shape[1]), self.rank)
        self._sync()
        return self._memory[self._back : self._back + num_bytes].view(outputs.dtype).view(outputs.shape)

    def _sync(self) -> None:
        messages.sync(self._flags, self._flags_of, self._epoch, self.late, self.rank, self._timeout)


def symmetric_memory(
    group: dist.ProcessGroup, num_bytes: int, device: torch.device
) -> tuple[torch.Tensor, list[int]]:
    """Zeros, [num_bytes] uint8, that all ranks of a group have, and where that of each rank is, as this one
    sees it. All ranks wait for each other."""
    try:
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        shared = symmetric.rendezvous(memory, group)
        # It may be a part of an allocation: on all ranks the same part.
        offset = memory.data_ptr() - int(shared.buffer_ptrs[shared.rank])
        addresses = [int(pointer) + offset for pointer in shared.buffer_ptrs]
    except (ImportError, AttributeError, RuntimeError) as error:
        raise DependencyError(f"there is no symmetric memory between these GPUs: {error}") from error
    memory.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)
    return memory, addresses
