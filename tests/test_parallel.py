"""Expert parallelism: ranks that are processes, placements, and kernels against the CPU."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulator
import gpus
import pytest
import torch
import torch.distributed as dist
from emulator import Emulator
from hypothesis import given
from hypothesis import strategies as st

from cupy_moe import DependencyError, ExpertParallel, PeerError, ep_fused_experts, replicate_experts
from cupy_moe.cpu import parallel as cpu
from cupy_moe.parallel import messages, symmetric
from cupy_moe.parallel.placement import place_experts, replica_table
from cupy_moe.plans import parallel as plans
from cupy_moe.plans.parallel import MessageLayout

ROOT = Path(__file__).parents[1]


def test_four_ranks_and_twice_two(tmp_path: Path) -> None:
    """All that parallel_ranks.py checks, the end of a rank among it, in processes that are started once."""
    command = [sys.executable, str(ROOT / "tests" / "parallel_ranks.py")]
    runs = [
        subprocess.Popen(
            [*command, str(rank), "4", str(tmp_path / "store")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        said = [run.communicate(timeout=120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [text.strip().endswith("done") for text in said] == [True] * 4, "\n".join(said)


# ---- placement


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["linear", "round_robin"]))
def test_each_expert_has_one_rank(num_experts: int, num_ranks: int, name: str) -> None:
    ranks = place_experts(num_experts, num_ranks, name)
    assert sorted(expert for experts in ranks for expert in experts) == list(range(num_experts))
    sizes = [len(experts) for experts in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    for experts in ranks:
        step = 1 if name == "linear" else num_ranks
        assert experts == list(range(experts[0], experts[0] + step * len(experts), step)) if experts else True


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 12))
def test_replicas(loads: list[float], num_ranks: int, num_redundant: int) -> None:
    if len(loads) + num_redundant > len(loads) * num_ranks:
        with pytest.raises(ValueError, match="num_redundant: "):
            replicate_experts(loads, num_ranks, num_redundant)
        return
    ranks = replicate_experts(loads, num_ranks, num_redundant)
    assert place_experts(len(loads), num_ranks, ranks) == ranks  # none is twice on a rank
    assert sum(map(len, ranks)) == len(loads) + num_redundant
    assert {expert for experts in ranks for expert in experts} == set(range(len(loads)))
    assert max(map(len, ranks)) <= -(-(len(loads) + num_redundant) // num_ranks)


def test_hot_experts_are_shared() -> None:
    ranks = replicate_experts([100, 1, 1, 1, 1, 1, 1, 1], 4, 4)
    assert sum(0 in experts for experts in ranks) == 4
    table, most_local = replica_table(ranks, 8)
    assert [row[0] for row in table] == [4, *[row[0] for row in table[1:]]]
    assert {place // most_local for place in table[0][1:]} == {0, 1, 2, 3}


WRONG_PLACEMENTS: dict[str, tuple[Any, str]] = {
    "a name": ("zigzag", "placement: expected one of 'linear', 'round_robin'"),
    "too few ranks": ([[0, 1, 2]], "placement: expected the experts of 2 ranks, got 1 lists"),
    "an expert that is none": ([[0, 3], [1]], "placement: experts of rank 0: expected 0 to 2, got 3"),
    "twice": ([[0, 0], [1]], "placement: rank 0 has an expert twice"),
    "a map of one rank": (torch.tensor([0, 1, -1]), r"placement: .* shape \[2, 3\]"),
    "a map with gaps": (torch.tensor([[0, 2, -1], [-1, -1, 0]]), "local ids of rank 0 are not 0 to 1"),
}


@pytest.mark.parametrize("name", WRONG_PLACEMENTS)
def test_what_is_no_placement(name: str) -> None:
    placement, message = WRONG_PLACEMENTS[name]
    with pytest.raises(ValueError, match=message):
        place_experts(3, 2, placement)


# ---- one rank


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


X, IDS, WEIGHTS = torch.ones(3, 8), torch.tensor([[0, 1], [1, 0], [2, 5]]), torch.ones(3, 2)


def test_layouts_that_have_to_be_copied(group: dist.ProcessGroup) -> None:
    eye = torch.eye(8, dtype=torch.bfloat16).repeat(3, 1, 1)
    parallel = ExpertParallel(group, 3)
    x = torch.arange(24).view(3, 8).bfloat16()
    expected = ep_fused_experts(parallel, x, eye, eye, WEIGHTS, IDS, activation="relu2_no_mul")
    for other in (x.t().contiguous().t(), torch.cat([x[:, :1], x], dim=1)[:, 1:]):
        ids, weights = IDS.t().contiguous().t(), WEIGHTS.t().contiguous().t()
        assert torch.equal(
            ep_fused_experts(parallel, other, eye, eye, weights, ids, activation="relu2_no_mul"), expected
        )


# ---- kernels


class Sent:
    """A random call of all that is done with messages, between garbage and thresholds."""

    def __init__(self, seed: int) -> None:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.num_ranks, self.rank = pick.choice((1, 2, 3, 8, 32, 33)), 0
        num_experts = pick.choice((1, 4, 9, 64))
        self.topk = pick.choice((1, 2, 3, 8, 9, 64 if num_experts == 64 else 4))
        num_redundant = pick.randint(0, num_experts * (self.num_ranks - 1))
        placement = replicate_experts([1.0] * num_experts, self.num_ranks, num_redundant)
        if pick.random() < 0.3:
            placement[0] = []
        table, self.most_local = replica_table(placement, num_experts)
        self.replicas = torch.tensor(table, dtype=torch.int32)
        self.rank = pick.randrange(self.num_ranks)
        num_tokens = pick.choice((0, 1, 2, 7, pick.randint(8, 40), 1024 // self.topk))
        low, high = pick.choice(((0, num_experts), (-2, num_experts + 2), (-(2**31), 2**31 - 1)))
        self.ids = torch.randint(
            low, high, (num_tokens, self.topk), dtype=pick.choice((torch.int32, torch.int64))
        )
        if self.ids.dtype == torch.int64:  # of which the lower words alone would be experts
            self.ids[torch.rand(self.ids.shape) < 0.1] += 2**32
        scale_bytes = pick.choice((0, 4, 28))
        row_bytes = pick.choice((16, 16, 48, 2048, 8000))
        self.layout = MessageLayout(row_bytes, self.topk, scale_bytes)
        self.rows = torch.randint(0, 256, (num_tokens, row_bytes), dtype=torch.uint8)
        if pick.random() < 0.3:
            self.rows = torch.cat([self.rows] * 2, dim=1)[:, :row_bytes]
        self.scales = (
            torch.randint(0, 256, (num_tokens, scale_bytes), dtype=torch.uint8) if scale_bytes else None
        )
        self.weights = torch.rand(num_tokens, self.topk)
        self.pairs = pick.random() < 0.6
        self.capacity = pick.choice((None, 1, 2, 5, 20))
        self.pair_capacity = 0 if self.capacity is None else pick.choice((1, 3, 8, 50))

    def run(self, place: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Everything, through the functions that choose between kernels and the CPU."""
        num_ranks, pairs, layout = self.num_ranks, self.pairs, self.layout
        replicas, ids, rows, weights = map(place, (self.replicas, self.ids, self.rows, self.weights))
        scales = None if self.scales is None else place(self.scales)
        routed = messages.route(ids, replicas, self.most_local, num_ranks, self.rank, pairs)
        counts = routed.counts.view(-1, num_ranks).t().contiguous()
        num_rows = int(counts[:, -1].sum()) if self.capacity is None else num_ranks * self.capacity
        dropped = place(torch.zeros(1, dtype=torch.int32))
        sent, slots = messages.pack(
            layout, rows, scales, weights, routed, self.most_local, num_ranks, num_rows, self.capacity,
            self.pair_capacity, dropped, self.rank,
        )  # fmt: skip
        words = sent[:, layout.row_bytes : layout.scales].view(torch.int32)
        used = (words[:, : self.topk] >= 0).any(dim=1)
        # Without pairs, where the first of them comes back means nothing; behind the scales is padding.
        first_pair = () if pairs else range(layout.scales - 4, layout.scales)
        compared = [n for n in range(layout.scales + layout.scale_bytes) if n not in first_pair]
        kept = sent[used.nonzero(), torch.tensor(compared, device=sent.device)]
        results = routed._asdict() | {"slots": slots, "dropped": dropped, "kept": kept}
        results["ids"] = words[:, : self.topk]
        if pairs:  # as if all had been sent to one rank
            num_pairs = int(counts[:, 0].sum()) if self.capacity is None else num_ranks * self.pair_capacity
            came = messages.expand(
                layout, sent, place(counts) if self.capacity is None else None, num_pairs, self.capacity,
                self.pair_capacity,
            )  # fmt: skip
            has = came[1][:, 0] >= 0
            results |= {f"expanded {n}": part[has] for n, part in enumerate(came)}
            results["expanded ids"] = came[1]
        return results


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_kernels_against_the_cpu() -> None:
    ran: set[str] = set()
    for seed in range(25):
        call = Sent(seed)
        expected = call.run(lambda tensor: tensor)
        limits = gpus.H200._replace(num_sms=random.Random(seed).choice((1, 4, 40)))
        with Emulator(limits, 90, seed)() as device:
            results = call.run(device.tensor)
            ran |= set(device.launched)
        for name, right in expected.items():
            assert torch.equal(results[name], right), f"{name} of {seed=}"
    assert {"ep_route", "ep_route_few", "ep_pack", "ep_expand"} <= ran


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_messages_of_garbage_stay_within_bounds() -> None:
    """As where a rank did not come, and what it should have written is as it was."""
    layout = MessageLayout(32, 3, 4)
    for seed in range(8):
        torch.manual_seed(seed)
        came = torch.randint(0, 256, (12, layout.pitch), dtype=torch.uint8)
        counts = torch.randint(-4, 5, (4, 2), dtype=torch.int32)
        with Emulator(gpus.H200, 90, seed)() as device:
            for capacity in (None, 3):
                given = device.tensor(counts) if capacity is None else None
                messages.expand(layout, device.tensor(came), given, 7, capacity, 2)
            back = [device.tensor(torch.zeros(4, 3, 8)) for _ in range(4)]
            peers = device.tensor(torch.tensor([memory.data_ptr() for memory in back]))
            ids = torch.randint(-(2**31), 2**31 - 1, (12, 3), dtype=torch.int32)
            messages.push(device.tensor(torch.ones(12, 8)), device.tensor(ids), peers, 3, seed % 4)


def test_messages_of_garbage_on_the_cpu() -> None:
    layout = MessageLayout(32, 3, 4)
    for seed in range(8):
        torch.manual_seed(seed)
        came = torch.randint(0, 256, (12, layout.pitch), dtype=torch.uint8)
        counts = torch.randint(0, 5, (4, 2), dtype=torch.int32)
        counts[:, 1] = 3  # the rows that came
        for told, capacity in ((counts, None), (None, 3)):
            results = messages.expand(layout, came, told, 7, capacity, 2)
            assert [len(result) for result in results] == [7] * 4


@pytest.mark.gpu
def test_kernels_of_messages_on_a_gpu() -> None:
    for seed in range(40):
        call = Sent(seed)
        expected = call.run(lambda tensor: tensor)
        results = call.run(lambda tensor: tensor.cuda())
        for name, right in expected.items():
            assert torch.equal(results[name].cpu(), right), f"{name} of {seed=}"


# ---- symmetric memory


class Buffers:
    """Symmetric memory of ranks that take turns: plain buffers, and groups that are numbers of ranks."""

    def __init__(self, num_ranks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_ranks, self.device, self.memory = num_ranks, device, [torch.empty(0)] * num_ranks
        monkeypatch.setattr(symmetric, "symmetric_memory", self.give)
        monkeypatch.setattr(dist, "get_rank", lambda group: group)
        monkeypatch.setattr(dist, "get_world_size", lambda group: num_ranks)
        monkeypatch.setattr(dist, "get_backend", lambda group: "gloo" if device.type == "cpu" else "nccl")

    def give(self, group: Any, num_bytes: int, device: Any) -> tuple[torch.Tensor, list[int]]:
        if not len(self.memory[0]):
            self.memory = [self.placed(torch.zeros(num_bytes, dtype=torch.uint8)) for _ in self.memory]
        return self.memory[group], [memory.data_ptr() for memory in self.memory]

    def placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor)

    def rank(self, rank: int, **options: Any) -> symmetric.SymmetricExpertParallel:
        made = symmetric.SymmetricExpertParallel(rank, **options)  # type: ignore[arg-type]
        for name, value in vars(made).items():
            if isinstance(value, torch.Tensor) and name not in ("_memory", "_flags"):
                setattr(made, name, self.placed(value))  # in memory that the emulator knows
        return made

    def flags(self, of_rank: int) -> torch.Tensor:
        return self.memory[of_rank][: 4 * self.num_ranks].view(torch.int32)


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
@pytest.mark.parametrize("combine", ["pairs", "partial"])
def test_rows_by_way_of_symmetric_memory(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks take turns, and none waits: each step is done twice, so that it finds what all have written."""
    num_ranks, num_experts, topk, hidden = 3, 7, 4, 24
    with Emulator(gpus.H200._replace(num_sms=2), 90)() as device:
        buffers = Buffers(num_ranks, torch.device("cpu"), monkeypatch)
        options: dict[str, Any] = {"num_experts": num_experts, "combine": combine, "capacity": 6}
        placement = replicate_experts([5, 1, 1, 1, 4, 1, 1], num_ranks, 3)
        sizes = {"max_row_bytes": 4 * hidden + 20, "max_topk": 5}
        ranks = [
            buffers.rank(rank, **options, **sizes, placement=placement, pair_capacity=None)
            for rank in range(num_ranks)
        ]
        torch.manual_seed(1)
        inputs = []
        for tokens in (6, 0, 4):  # whole numbers and quarters, whose sums are exact
            x, weights = torch.randint(-9, 10, (tokens, hidden)), torch.randint(-3, 4, (tokens, topk)) / 4
            ids = torch.randint(-1, num_experts + 1, (tokens, topk), dtype=torch.int32)
            scales = torch.randint(0, 256, (tokens, 4), dtype=torch.uint8)
            inputs.append(tuple(map(device.tensor, (x.float(), ids, weights, scales))))

        def in_turn(step: Callable[[int], Any], epoch: int) -> list[Any]:
            for _ in range(2):
                for rank in range(num_ranks):
                    buffers.flags(rank).fill_(1000)  # as if all had come
                results = [step(rank) for rank in range(num_ranks)]
                epoch += 1
                for rank in range(num_ranks):
                    assert buffers.flags(rank).tolist() == [epoch] * num_ranks
            return results

        received: list[Any] = []
        outputs: list[torch.Tensor] = []

        def send(rank: int) -> Any:
            x, ids, weights, scales = inputs[rank]
            return ranks[rank].dispatch(x, ids, weights, scales=scales)

        def send_back(rank: int) -> Any:
            return ranks[rank].combine(outputs[rank], received[rank].handle)

        for epoch in (0, 4):
            received[:] = in_turn(send, epoch)
            outputs.clear()
            for rows, ids, weights, _, _ in received:
                own = torch.where(ids >= 0, weights, 0).sum(1, keepdim=True)
                outputs.append(device.tensor(torch.where((ids >= 0).any(1, keepdim=True), rows * own, 77)))
            back = in_turn(send_back, epoch + 2)
            for (x, ids, weights, _), result in zip(inputs, back, strict=True):
                exists = (ids >= 0) & (ids < num_experts)
                assert torch.equal(result, x * torch.where(exists, weights, 0).sum(1, keepdim=True))
        for rank in ranks:
            rank.check()
        told = {tuple(row.tolist()) for *_, scales in inputs for row in scales}
        for _, ids, _, scales, _ in received:
            assert {tuple(row.tolist()) for row in scales[(ids >= 0).any(1)]} <= told
        assert {"ep_pack", "ep_push", "ep_sync"} <= set(device.launched)


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_a_rank_that_does_not_come_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Emulator(gpus.H200, 90)() as device:
        buffers = Buffers(4, torch.device("cpu"), monkeypatch)
        sizes: dict[str, Any] = {"capacity": 2, "max_row_bytes": 32, "max_topk": 2}
        parallel = buffers.rank(1, num_experts=4, **sizes, timeout=1e-4)
        buffers.flags(1)[:] = torch.tensor([1, 0, 0, 2**31 - 1])
        for _ in range(2):
            parallel.dispatch(*map(device.tensor, (X[:2], IDS[:2].int(), WEIGHTS[:2])))
        assert parallel.late.tolist() == [1, 0, 1, 0]  # the first came once, but not twice
        with pytest.raises(PeerError, match=r"rank 1 of 4: ranks \[0, 2\] did not come within 0.0001 s"):
            parallel.check()
        launched = len(device.launched)
        with pytest.raises(
            ValueError, match="hidden_states: bytes of a row with its scales: expected 1 to 32"
        ):
            parallel.dispatch(*map(device.tensor, (torch.ones(1, 16), IDS[:1], WEIGHTS[:1])))
        assert len(device.launched) == launched


def test_there_is_no_symmetric_memory_on_a_cpu(group: dist.ProcessGroup) -> None:
    with pytest.raises(DependencyError, match="there is no symmetric memory"):
        symmetric.SymmetricExpertParallel(group, 4, capacity=1, max_row_bytes=16, max_topk=1)


def test_a_token_goes_once_to_a_rank() -> None:
    for seed in range(20):
        call = Sent(seed)
        places, buckets = cpu.route(call.ids, call.replicas, call.most_local, call.num_ranks, 0, False)
        for token, row in zip(places.tolist(), buckets.tolist(), strict=True):
            ranks = [place // call.most_local for place in token if place >= 0]
            assert [rank for rank in row if rank >= 0] == list(dict.fromkeys(ranks))


def test_plans() -> None:
    for num_rows in (0, 1, 100, 4096):
        for row_bytes in (16, 4096, 14336, 100_000):
            plan = plans.plan_rows("ep_pack", num_rows, row_bytes, 132)
            assert plan.launch.grid == max(1, num_rows * plan.parts)
            assert (
                (plan.parts - 1) * plan.units_per_part < row_bytes // 16 <= plan.parts * plan.units_per_part
            )
            assert plan.units_per_part <= plans.MESSAGE_THREADS * plans.MESSAGE_HELD
    assert plans.plan_rows("ep_pack", 4096, 14336, 132).parts == 1
    assert plans.plan_rows("ep_pack", 1, 14336, 132).parts > 8
    routes = [plans.plan_route(*sizes) for sizes in ((0, 1), (40, 32), (1024, 32), (1025, 32), (9, 33))]
    assert [(plan.entry, plan.grid, plan.block) for plan in routes] == [
        ("ep_route_few", 1, 32), ("ep_route_few", 1, 64), ("ep_route_few", 1, 1024), ("ep_route", 9, 128),
        ("ep_route", 1, 128),
    ]  # fmt: skip
