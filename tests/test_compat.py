"""The functions of vLLM and SGLang: signatures, alignment on the CPU, equality with the real ones.

The real ones come from a folder .peers, where there is one: its load.py loads their libraries into torch.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import routing
import torch
from align_cases import naive
from engine_signatures import RELEASES, of_function

from cupy_moe import aligned_sizes, batched_moe_align_block_size, moe_align_block_size
from cupy_moe.compat import sglang, vllm

PEERS = Path(__file__).parent.parent / ".peers" / "load.py"
VLLM_MODULE = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
FLAT = IDS.flatten().tolist()
vllm_align: Any = vllm.moe_align_block_size_into
sglang_align: Any = sglang.moe_align_block_size


def poisoned(*lengths: int, device: str = "cpu") -> Any:
    return tuple(torch.full((length,), 12_345, dtype=torch.int32, device=device) for length in lengths)


def as_lists(tensors: Any) -> tuple[list[int], ...]:
    return tuple(tensor.tolist() for tensor in tensors)


# ---- functions ---


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_that_a_release_takes_is_taken(release: str) -> None:
    functions = (sglang if release.startswith("sglang") else vllm)._switch._functions
    for place, theirs in RELEASES[release].items():
        ours = of_function(functions[place])
        assert f"{ours}, ".startswith(f"{theirs}, "), place
        assert all("=" in added for added in ours[len(theirs) :].split(", ")[1:]), place


def test_the_signature_of_everything_that_is_replaced_is_known() -> None:
    assert {*vllm._switch._functions, *sglang._switch._functions} == set().union(*RELEASES.values())


def test_vllm() -> None:
    expert_map = torch.tensor([0, -1, 1, -1, 2], dtype=torch.int32)
    for pad, ignore in itertools.product((False, True), (False, True)):
        results = vllm.moe_align_block_size(IDS, 4, 5, expert_map, pad, ignore)
        assert as_lists(results) == naive(FLAT, 4, 5, expert_map.tolist(), pad, ignore)
    results = vllm.batched_moe_align_block_size(8, 4, torch.tensor([2, 0, 5], dtype=torch.int32))
    assert as_lists(results)[1:] == ([0, 2, 2, -1, -1, -1], [12])


def test_wrong_arguments_are_named_before_anything_is_written() -> None:
    ids = IDS
    for function in (vllm_align, sglang_align):
        more = (poisoned(7),) if function is sglang_align else ()
        for wrong, error, message in (
            ({0: ids.half()}, TypeError, "topk_ids: expected an integer tensor"),
            ({0: ids.bool()}, TypeError, "topk_ids: expected an integer tensor"),
            ({1: torch.tensor(6)}, TypeError, "num_experts: expected an int, got"),
            ({1: 0}, ValueError, "num_experts: expected 1 to 65536, got 0"),
            ({2: torch.tensor(4)}, TypeError, "block_size: expected an int, got"),
            ({1: 4, 2: 600}, ValueError, "sorted_token_ids: expected at least 2408 elements .* got 40"),
            ({3: None}, TypeError, "sorted_token_ids: expected a tensor, got NoneType"),
            ({3: poisoned(40)[0].long()}, TypeError, "out: .*sorted_token_ids"),
            ({3: poisoned(80)[0][::2]}, ValueError, "out: .*sorted_token_ids.*strides"),
            ({4: poisoned(6)[0]}, ValueError, "experts_ids: expected at least 8 elements .* got 6"),
            ({5: poisoned(2)[0]}, ValueError, "out: .*num_tokens_post_pad"),
        ):
            buffers = poisoned(40, 10, 1)
            arguments = [ids, 6, 4, *buffers, *more]
            for position, value in wrong.items():
                arguments[position] = value
            with pytest.raises(error, match=message):
                function(*arguments)
            assert as_lists(buffers) == as_lists(poisoned(40, 10, 1)), message


def test_scatter_idx_of_vllm() -> None:
    ids = torch.tensor([[0, 5], [-1, 3], [4, 2]], dtype=torch.int32)
    expert_map = torch.tensor([0, -1, 1, -1, 2], dtype=torch.int32)
    results = vllm.moe_align_block_size(ids, 4, 5, return_scatter_idx=True)
    assert as_lists(results[:3]) == naive(ids.flatten().tolist(), 4, 5)
    assert results[3].tolist() == [[0], [-1], [-1], [3], [4], [5]]
    with pytest.raises(ValueError, match="requires ignore_invalid_experts"):
        vllm.moe_align_block_size(ids, 4, 5, expert_map, return_scatter_idx=True)
    results = vllm.moe_align_block_size(ids, 4, 5, expert_map, False, True, True)
    assert results[3].tolist() == [[0], [-1], [-1], [-1], [4], [5]]
    out = poisoned(*aligned_sizes(6, 5, 4), 1, 6)
    vllm_align(ids, 5, 4, *out[:3], expert_map, out[3].view(6, 1))
    assert as_lists(out[:3]) == naive(ids.flatten().tolist(), 4, 5, expert_map.tolist(), False, True)
    assert out[3].tolist() == [0, -1, -1, -1, 4, 5]


def test_buffers_of_vllm() -> None:
    sorted_token_ids, expert_ids, post_pad = naive(FLAT, 4, 5)
    for more in (0, 1, 13):  # engines may bring more room than is needed
        out = poisoned(27 + more, 7 + more, 1)
        vllm_align(IDS, 5, 4, *out)
        assert as_lists(out) == (sorted_token_ids + [12] * more, expert_ids + [-1] * more, post_pad)
    with pytest.raises(ValueError, match=r"sorted_token_ids: expected at least 27 elements .* got 26"):
        vllm.moe_align_block_size_into(IDS, 5, 4, *poisoned(26, 7, 1))
    out = poisoned(24, 6, 1)
    vllm.batched_moe_align_block_size_into(8, 4, torch.tensor([2, 0, 5], dtype=torch.int32), *out)
    assert out[2].tolist() == [12]


def sglang_naive(ids: list[int], buckets: int, block_size: int, ignore: bool) -> tuple[list[int], ...]:
    """Ids one up, -1 is the first bucket; or without it."""
    shifted = [-1 if ignore and i < 0 else i + 1 for i in ids]
    sorted_token_ids, expert_ids, post_pad = naive(shifted, block_size, buckets)
    return sorted_token_ids, [e - 1 if e >= 0 else -1 for e in expert_ids], post_pad


@pytest.mark.parametrize("ignore", [False, True])
def test_sglang(ignore: bool) -> None:
    for name in ["int8", "uint8", "uint16", "int32", "uint32", "int64", "uint64"]:
        dtype = getattr(torch, name)
        if ignore and name == "uint64":
            continue  # nothing is added then: the operator takes or refuses it
        limits = torch.iinfo(dtype)
        for ids in (FLAT, [4, -1, 0, -1, 0, 5, 6, limits.max], [-1] * 9, [0], []):
            topk_ids = torch.tensor([i for i in ids if i >= limits.min], dtype=dtype)
            num_slots, num_blocks = aligned_sizes(len(topk_ids), 6, 4)
            for more in (0, 3):
                out = poisoned(num_slots + more, num_blocks + more, 1, 7)
                sglang_align(topk_ids, 6, 4, *out, True, ignore)
                minus_one = limits.max if name in ("uint32", "uint64") else -1
                wanted = [-1 if i == minus_one else i for i in topk_ids.tolist()]
                expected = sglang_naive(wanted, 6, 4, ignore)
                n = len(topk_ids)
                assert out[0].tolist() == expected[0] + [n] * more, f"{dtype=} {ids=}"
                assert out[1].tolist() == expected[1] + [-1] * more, f"{dtype=} {ids=}"
                assert out[2].tolist() == expected[2], f"{dtype=} {ids=}"


# ---- equality with the real ones ---


@functools.cache
def peers() -> set[str]:
    if not PEERS.exists():
        return set()
    specification = importlib.util.spec_from_file_location("peers_load", PEERS)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.peers()


def require(peer: str) -> None:
    if peer not in peers():
        pytest.skip(f"{peer}'s library is not in .peers")


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], block_size: int, case: str) -> None:
    """Counts and blocks are equal, and each run of blocks of one expert holds the same ids in some order."""
    assert torch.equal(a[2], b[2]), f"{case}: {a[2].item()} and {b[2].item()} slots"
    used = int(a[2].item())
    blocks = used // block_size
    assert torch.equal(a[1][:blocks], b[1][:blocks]), f"{case}: experts of blocks"
    expert_of_slot = a[1][:blocks].repeat_interleave(block_size).long() << 32
    contents = [(expert_of_slot + result[0][:used]).sort().values for result in (a, b)]
    assert torch.equal(*contents), f"{case}: ids of experts"


def cases() -> Iterator[tuple[str, torch.Tensor, int, int]]:
    for name, tokens, (num_experts, topk) in itertools.product(
        ("uniform", "skewed", "all_to_one"), (1, 3, 64, 256, 2256), ((8, 2), (64, 6), (256, 8), (257, 4))
    ):
        ids = routing.make(name, tokens, topk, num_experts, device="cuda")
        for block_size in (16, 128):
            yield f"{name} {tokens=} {num_experts=} {topk=} {block_size=}", ids, num_experts, block_size


@pytest.mark.gpu
def test_equal_to_vllm() -> None:
    require("vllm")
    for case, ids, num_experts, block_size in cases():
        lengths = aligned_sizes(ids.numel(), num_experts, block_size)
        theirs, ours = poisoned(*lengths, 1, device="cuda"), poisoned(*lengths, 1, device="cuda")
        for expert_map in (
            None,
            torch.arange(num_experts, dtype=torch.int32, device="cuda") - num_experts // 2,
        ):
            if expert_map is not None:
                expert_map = expert_map.clamp(min=-1)
            vllm_op(ids, num_experts, block_size, *theirs, expert_map)
            vllm_align(ids, num_experts, block_size, *ours, expert_map)
            same(ours, theirs, block_size, f"{case} map={expert_map is not None}")
            assert torch.equal(ours[1], theirs[1]), f"{case}: the tail of expert_ids"


def vllm_op(*arguments: Any) -> None:
    operator = torch.ops._moe_C.moe_align_block_size
    missing = len(operator.default._schema.arguments) - len(arguments)
    operator(*arguments, *[None] * missing)  # newer ones fill a scatter_idx, too


@pytest.mark.gpu
def test_batched_equal_to_vllm() -> None:
    require("vllm")
    for max_tokens, num_batches, block_size in itertools.product((13, 16, 512), (8, 32, 64), (8, 16, 64)):
        generator = torch.Generator("cuda").manual_seed(num_batches)
        counts = torch.randint(
            0, max_tokens + 1, (num_batches,), dtype=torch.int32, device="cuda", generator=generator
        )
        ours = batched_moe_align_block_size(max_tokens, block_size, counts)
        theirs = tuple(torch.full_like(result, 12_345) for result in ours)
        torch.ops._moe_C.batched_moe_align_block_size(max_tokens, block_size, counts, *theirs)
        case = f"{max_tokens=} {num_batches=} {block_size=}"
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), case


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_sglang_in_a_graph(ignore: bool, warm: bool) -> None:
    """Whether its expert_map was made before the graph, or is made in it."""
    moe_align_block_size(torch.zeros(8, dtype=torch.int32, device="cuda"), 4, 6)  # loads the kernel
    sglang._expert_maps.clear()
    ids = torch.full((8,), 5, dtype=torch.int32, device="cuda")
    out = poisoned(*aligned_sizes(8, 6, 4), 1, 7, device="cuda")
    if warm:
        sglang_align(ids, 6, 4, *out, True, ignore)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sglang_align(ids, 6, 4, *out, True, ignore)
    assert bool(sglang._expert_maps) == warm
    sglang_align(ids, 6, 4, *poisoned(*aligned_sizes(8, 6, 4), 1, 7, device="cuda"), True, ignore)
    for wanted in ([0, -1, 4, 0, -1, 5, 6, 3], [-1] * 8, [4, 4, 3, 2, 1, 0, 0, 0]):
        ids.copy_(torch.tensor(wanted))
        for tensor in out:
            tensor.fill_(-77)
        graph.replay()
        expected = sglang_naive(wanted, 6, 4, ignore)
        assert [tensor.tolist() for tensor in out[:3]] == list(expected), f"{wanted=}"


@pytest.mark.gpu
def test_equal_to_sglang() -> None:
    require("sglang")
    operator = torch.ops.sgl_kernel.moe_align_block_size.default
    has_ignore = len(operator._schema.arguments) > 8
    for (case, ids, num_experts, block_size), ignore in itertools.product(cases(), (False, True)):
        if ignore and not has_ignore:
            continue
        buckets = num_experts + 1
        ids = torch.where(torch.rand(ids.shape, device="cuda") < 0.2, -1, ids)
        lengths = aligned_sizes(ids.numel(), buckets, block_size)
        room = -(-lengths[0] // 4) * 4  # it fills in steps of four
        theirs, ours = (
            poisoned(room, lengths[1], 1, device="cuda"),
            poisoned(room, lengths[1], 1, device="cuda"),
        )
        cumsum = torch.empty(buckets + 1, dtype=torch.int32, device="cuda")
        operator(ids, buckets, block_size, *theirs, cumsum, True, *([ignore] if has_ignore else []))
        sglang_align(ids, buckets, block_size, *ours, cumsum, True, ignore)
        same(ours, theirs, block_size, f"{case} {ignore=}")
        assert torch.equal(ours[0].sort().values, theirs[0].sort().values), f"{case}: padding"
