"""moe_align_block_size on a GPU: every kernel gives what the specification, cupy_moe/cpu/align.py, does.

Grids are loops: a few tests, thousands of cases. Sources of the grids: the tests of vLLM and SGLang.
"""

from __future__ import annotations

import itertools
import random

import pytest
import routing
import torch
from align_cases import ID_TYPES, layouts
from align_gpu import check, drawn, half_local, make, possible

from cupy_moe import moe_align_block_size

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 3, 256, 2256, 4096])
def test_grid_of_vllm(tokens: int) -> None:
    names = itertools.cycle(("uniform", "skewed", "with_invalid", "empty_experts", "all_to_one"))
    for num_experts, topk in itertools.product((32, 160, 256, 257), (1, 2, 16, 32)):
        ids = make(next(names), tokens, topk, num_experts)
        for block_size, pad in itertools.product((32, 128), (False, True)):
            check(ids, block_size, num_experts, pad=pad)


@pytest.mark.parametrize("name", routing.NAMES)
def test_routings(name: str) -> None:
    for tokens, topk, num_experts in (
        (16, 8, 256), (128, 2, 64), (512, 8, 128), (1024, 8, 256), (4096, 2, 64), (8192, 8, 256)
    ):  # fmt: skip
        check(make(name, tokens, topk, num_experts), 128, num_experts, every_kernel=True, note=name)


def test_invalid_ids() -> None:
    for tokens, topk, num_experts, block_size in (
        (8, 4, 8, 4),
        (300, 4, 8, 16),
        (8, 4, 80, 8),
        (3000, 8, 64, 16),
    ):
        for dtype, mapped, ignore in itertools.product(
            (torch.int32, torch.int64), (False, True), (False, True)
        ):
            limits = torch.iinfo(dtype)
            wrong = torch.tensor(
                [-1, -2, num_experts, num_experts + 7, limits.min, limits.max, 2**31 - 1, -(2**31)],
                device="cuda",
            )
            ids = drawn((tokens, topk), 0, num_experts, torch.int64)
            spoiled = wrong[drawn((tokens, topk), 0, len(wrong), torch.int64)]
            some = torch.where(drawn((tokens, topk), 0, 3) == 0, spoiled, ids).to(dtype)
            expert_map = half_local(num_experts) if mapped else None
            for topk_ids in (some, spoiled.to(dtype)):
                check(topk_ids, block_size, num_experts, expert_map, ignore=ignore, every_kernel=True)


def test_ids_beyond_32_bits() -> None:
    """Ids whose low 32 bits would be an expert."""
    ids = drawn((500, 4), 0, 8, torch.int64) + (drawn((500, 4), -2, 3, torch.int64) << 32)
    for view in layouts(ids).values():
        check(view, 16, 8, every_kernel=True)
    check(ids[:8], 16, 8, kernels=("small",))


def test_expert_maps() -> None:
    for tokens, topk, num_experts in itertools.product((16, 32, 2048, 8192), (2, 4), (8, 64, 257)):
        ids = make("with_invalid", tokens, topk, num_experts)
        none = torch.full((num_experts,), -1, dtype=torch.int32, device="cuda")
        every = torch.arange(num_experts, dtype=torch.int32, device="cuda")
        maps = {
            "half": half_local(num_experts), "garbage": half_local(num_experts, garbage=True), "none": none,
            "identity": every, "reversed": every.flip(0), "all the same": every * 0 + 1,
        }  # fmt: skip
        for (note, expert_map), ignore in itertools.product(maps.items(), (False, True)):
            check(ids, 64, num_experts, expert_map, ignore=ignore, every_kernel=True, note=note)


def test_tiny_grid_of_sglang() -> None:
    for num_experts, topk, tokens in itertools.product(
        (8, 64, 65, 1023, 1024, 4096, 9000), (1, 2, 4, 8), (1, 4, 8)
    ):
        for block_size in (4, 16, 64, 128):
            check(drawn((tokens, topk), 0, num_experts), block_size, num_experts)
    for num_experts in (8, 257, 1023):
        for topk, tokens in itertools.product((1, 2, 8), (16, 128, 1024, 4096)):
            check(drawn((tokens, topk), 0, num_experts), 64, num_experts)


def test_many_experts() -> None:
    for num_experts, tokens in itertools.product(
        (1025, 2048, 4095, 8191, 9000, 20_000, 65_535, 65_536), (1, 8, 32, 256, 3000)
    ):
        ids = drawn((tokens, 8), -1, num_experts + 2)
        check(ids, 64, num_experts, every_kernel=True)
        if tokens in (8, 256):
            for ignore in (False, True):
                expert_map = half_local(num_experts, garbage=True)
                check(ids, 16, num_experts, expert_map, ignore=ignore, every_kernel=True)


def test_any_block_size() -> None:
    for block_size in (1, 2, 3, 7, 48, 100, 127, 129, 1000, 4099, 32_768, 65_535, 65_536):
        for num_ids, num_experts in ((1, 1), (60, 8), (1000, 64), (20_000, 33)):
            ids = drawn((num_ids,), -1, num_experts)
            for pad in (False, True):
                check(ids, block_size, num_experts, pad=pad, every_kernel=True)
    for num_ids in (1, 3000):
        check(drawn((num_ids,), 0, 2), 65_536, 2, every_kernel=True)
    check(drawn((300,), 0, 65_536), 65_536, 65_536, kernels=(None, "global_large"))


def test_slots_close_to_the_limit_of_int32() -> None:
    num_experts, block_size = 32_760, 65_536
    ids = torch.arange(num_experts, dtype=torch.int32, device="cuda")  # each expert once: every block in use
    aligned = moe_align_block_size(ids, block_size, num_experts)
    assert aligned.sorted_token_ids.numel() == num_experts * block_size > 2**31 - 2**20
    assert aligned.num_tokens_post_pad.item() == num_experts * block_size
    assert torch.equal(aligned.expert_ids, ids)
    blocks = aligned.sorted_token_ids.view(num_experts, block_size)
    assert torch.equal(blocks[:, 0], ids)
    assert all(bool((part == num_experts).all()) for part in blocks[:, 1:].split(4096))


def test_a_million_ids() -> None:
    for name, num_experts in (("uniform", 8), ("skewed", 256), ("all_to_one", 64), ("with_invalid", 512)):
        ids = make(name, 131_072, 8, num_experts)
        check(ids, 128, num_experts, every_kernel=True, note=name)
    check(drawn((1_000_003,), 0, 65_536, torch.int64), 16, 65_536)


def test_no_ids() -> None:
    for shape, num_experts in itertools.product(((0,), (0, 8), (5, 0)), (1, 64, 65_536)):
        ids = torch.empty(shape, dtype=torch.int32, device="cuda")
        for kernel in (None, *possible(ids, num_experts)):
            aligned = moe_align_block_size(ids, 16, num_experts, kernel=kernel)
            assert [result.tolist() for result in aligned] == [[], [], [0]], (
                f"{shape=} {num_experts=} {kernel=}"
            )


def test_every_type_and_layout() -> None:
    # With 300 experts 255 is one and -1 is not, with 65,536 so are 65,535 and -1.
    for dtype, (tokens, topk), num_experts in itertools.product(
        ID_TYPES, ((1, 1), (12, 3), (600, 4), (4100, 5)), (100, 300, 65_536)
    ):
        limits = torch.iinfo(dtype)
        low, high = max(limits.min, -3), min(limits.max, num_experts + 2)
        ids = drawn((tokens, topk), low, high + 1, torch.int64)
        ids[0, 0], ids[-1, -1] = limits.min, limits.max if limits.max < 2**63 else -1
        ids = ids.to(dtype)
        for note, view in layouts(ids).items():
            check(view, 16, num_experts, every_kernel=True, note=note)
    expanded = drawn((700, 1), 0, 9).expand(700, 6)
    check(expanded, 16, 9, every_kernel=True, note="expanded")


def test_outputs_and_ids_at_any_address() -> None:
    for dtype, start, offset in itertools.product((torch.int32, torch.int64), (0, 1, 2, 3), (0, 1, 2, 3)):
        for num_ids in (50, 3000, 20_000):
            ids = drawn((num_ids + start,), 0, 64, dtype)[start:]
            check(ids, 13, 64, every_kernel=True, offset=offset, note=f"{start=} {offset=}")


def test_five_runs_give_the_same_bits() -> None:
    for tokens, topk, block_size, num_experts in ((128, 2, 32, 64), (4097, 16, 128, 256), (2048, 8, 128, 64)):
        ids = make("with_invalid", tokens, topk, num_experts)
        kernels = possible(ids, num_experts, block_size)
        check(ids, block_size, num_experts, every_kernel=True, runs=5)
        first = moe_align_block_size(ids, block_size, num_experts)
        for kernel in (*kernels, *kernels):
            for a, b in zip(
                first, moe_align_block_size(ids, block_size, num_experts, kernel=kernel), strict=True
            ):
                assert torch.equal(a, b), kernel


def test_random_calls() -> None:
    chance = random.Random(0)
    for _ in range(400):
        num_experts = int(2 ** chance.uniform(0, 12))
        num_ids = int(2 ** chance.uniform(0, 15))
        block_size = int(2 ** chance.uniform(0, 9))
        ids = drawn((num_ids,), -1, num_experts + 1, chance.choice((torch.int32, torch.int64, torch.int16)))
        expert_map = chance.choice((None, half_local(num_experts, garbage=True)))
        kernel = chance.choice((None, *possible(ids, num_experts, block_size)))
        pad, ignore = chance.random() < 0.5, chance.random() < 0.5
        check(
            ids,
            block_size,
            num_experts,
            expert_map,
            pad,
            ignore,
            kernels=(kernel,),
            offset=chance.randrange(4),
        )
