"""Random calls of every operator, for scripts/fuzz, sanitize and soak, which compare them with the CPU.

A name, OPERATOR:SEED or OPERATOR:SEED:KERNEL, tells a call, and makes it again; so do the changes behind it,
which make it smaller: `-expert_map` leaves an argument out, `topk_ids<3` keeps the first of what has as many
rows as that tensor; and `topk_ids=300` repeats these rows until there are so many.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import pytest
import test_experts
import test_parallel
import test_quantization
import test_quantized_experts
import test_route
import torch
from emulator import cases
from emulator.cases import Call, Results

from cupy_moe import fused_experts, route
from cupy_moe.parallel import messages
from cupy_moe.plans.experts import EXPERTS_KERNELS, FP8_KERNELS
from cupy_moe.plans.route import ROUTE_KERNELS


def _many_rows(seed: int) -> Call:
    """More than GPUs hold at once, for which there are kernels of their own."""
    call = cases.unpermute(seed)
    topk, dtype = (1, 4, 6, 8)[seed % 4], cases.DTYPES[seed % 3]
    tensors = {
        "permuted": torch.randn(40, 7168).to(dtype),
        "inverse_ids": torch.randint(-2, 42, (64, topk), dtype=torch.int32),
    }
    return call._replace(tensors=tensors, rest={})


def _route(seed: int) -> Call:
    """The two functions say what it has to give, on the same device, as gating's weights are its own."""
    arguments = test_route.random_call(seed)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in arguments.items() if name not in tensors}

    def both(kernel: str | None = None, **arguments: Any) -> tuple[torch.Tensor, ...]:
        return *route(**arguments, kernel=kernel), *test_route.in_turn(arguments)

    def compare(_: Call, results: Results, __: Results) -> str:
        return "" if test_route.equal(results[:5], results[5:]) else "other results"

    return Call(both, tensors, rest, lambda **_: (), ROUTE_KERNELS, compare)


def _experts(seed: int) -> Call:
    call = test_experts.layer(seed, 300 if seed % 6 == 0 else 40)
    kernels = test_experts.kernels_for(call, list(EXPERTS_KERNELS))
    return Call(fused_experts, call.tensors, call.options, fused_experts, tuple(kernels), _are_close)


def _quantized_experts(seed: int) -> Call:
    formats = list(test_quantization.FORMATS)
    call, quantization = test_quantization.quantized(seed, formats[seed % len(formats)])
    return _of_quantization(call, quantization, test_quantized_experts.kernels_for(call), None, _are_close)


def _fp8_rows(seed: int) -> Call:
    call, quantization = test_quantized_experts.fp8_rows(seed)

    def compare(_: Call, results: Results, expected: Results) -> str:
        # One code may make most of a small result.
        return "" if test_quantized_experts.nearly(results[0], expected[0], 0.06) else "other results"

    return _of_quantization(call, quantization, FP8_KERNELS, FP8_KERNELS[0], compare)


def _of_quantization(
    call: test_experts.Layer,
    quantization: Any,
    kernels: Collection[str],
    specified_by: str | None,
    compare: Callable[..., str],
) -> Call:
    """Each kernel by itself, as the choice of the plan decides whether rows become fp8."""
    scales = {n: t for n, t in vars(quantization).items() if isinstance(t, torch.Tensor)}

    def run(**arguments: Any) -> torch.Tensor:
        placed = {name: arguments.pop(name) for name in scales}
        return fused_experts(**arguments, quantization=dataclasses.replace(quantization, **placed))

    specified = functools.partial(run, kernel=specified_by)
    return Call(run, {**call.tensors, **scales}, call.options, specified, tuple(kernels), compare, False)


def _are_close(_: Call, results: Results, expected: Results) -> str:
    return "" if test_experts.close(results[0], expected[0]) else "other results"


def _messages(seed: int) -> Call:
    call = test_parallel.Sent(seed)
    names = ("replicas", "ids", "rows", "weights", "scales")
    tensors = {name: getattr(call, name) for name in names if getattr(call, name) is not None}

    def run(**placed: Any) -> tuple[torch.Tensor, ...]:
        mine = {id(tensor): placed[name] for name, tensor in tensors.items()}

        def place(tensor: torch.Tensor) -> torch.Tensor:
            """What is made on the way lies between guards, too."""
            if id(tensor) in mine:
                return mine[id(tensor)]
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=placed["ids"].device).copy_(tensor)

        return tuple(call.run(place).values())

    return Call(run, tensors, {}, run)


def _stores(seed: int) -> Call:
    """Ranks of one device, in turn: flags say that all have come. Sums of whole numbers are exact."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    num_ranks, topk, hidden = pick.choice((1, 2, 3, 5)), pick.choice((1, 2, 6)), 8 * pick.choice((1, 3, 200))
    num_tokens, num_experts = pick.choice((1, 6, 40)), num_ranks * pick.randint(1, 4) + 4
    sizes = {"capacity": num_tokens, "max_row_bytes": 4 * hidden, "max_topk": topk + 1}
    combine = pick.choice(("pairs", "partial"))
    tensors = {
        "x": torch.randint(-9, 10, (num_ranks, num_tokens, hidden)).float(),
        # From -1 to num_experts, and of a token different ones, as pair_capacity has it.
        "ids": torch.rand(num_ranks, num_tokens, num_experts + 2).argsort(2)[..., :topk] - 1,
        "weights": torch.randint(-3, 4, (num_ranks, num_tokens, topk)).float(),
    }

    def expected(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        exists = (ids >= 0) & (ids < num_experts)
        return 0 + x * torch.where(exists, weights, 0).sum(2, keepdim=True)  # no -0

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if messages.cuda_index("x", x.device) is None:
            return expected(x, ids, weights)
        with pytest.MonkeyPatch.context() as patch:
            buffers = test_parallel.Buffers(num_ranks, x.device, patch)
            ranks = [
                buffers.rank(r, num_experts=num_experts, combine=combine, **sizes) for r in range(num_ranks)
            ]

            def in_turn(step: Callable[[int], Any]) -> list[Any]:
                """Twice, so that each rank finds what all have written."""
                for _ in range(2):
                    for rank in range(num_ranks):
                        buffers.flags(rank).fill_(1000)
                    results = [step(rank) for rank in range(num_ranks)]
                return results

            came = in_turn(lambda rank: ranks[rank].dispatch(x[rank], ids[rank], weights[rank]))
            outputs = []
            for part in came:
                own = torch.where(part.topk_ids >= 0, part.topk_weights, 0).sum(1, keepdim=True)
                outputs.append(buffers.placed(part.hidden_states * own))
            back = in_turn(lambda rank: ranks[rank].combine(outputs[rank], came[rank].handle))
            return torch.stack(back)

    return Call(run, tensors, {}, expected)


CALLS: dict[str, Callable[[int], Call]] = {
    **cases.OPERATORS,
    "many_rows": _many_rows,
    "route": _route,
    "experts": _experts,
    "quantized_experts": _quantized_experts,
    "fp8_rows": _fp8_rows,
    "messages": _messages,
    "stores": _stores,
}


CALLS_KEPT = 100
SLOW = ("many_rows", "experts", "quantized_experts", "fp8_rows", "messages")


class Named(NamedTuple):
    call: Call
    kernel: str | None


@functools.lru_cache(CALLS_KEPT)
def _of_seed(function: Callable[[int], Call], seed: int) -> Call:
    """Once for all kernels."""
    return function(seed)


@functools.lru_cache(CALLS_KEPT)
def _specified(function: Callable[[int], Call], seed: int) -> Results:
    return _of_seed(function, seed).specified()


def specified(name: str, call: Call) -> Results:
    """What a call of this name has to give; once for all kernels, where nothing was changed."""
    operator, seed, *rest = name.split(":")
    is_whole = all(word in call.kernels for word in rest)
    return _specified(CALLS[operator], int(seed)) if is_whole else call.specified()


def make(name: str) -> Named:
    operator, seed, *rest = name.split(":")
    call, kernel = _of_seed(CALLS[operator], int(seed)), None
    for word in rest:
        if word.startswith("-"):
            call = without(call, word[1:])
        elif "<" in word:
            like, _, length = word.partition("<")
            call = shortened(call, like, int(length))
        elif "=" in word:
            like, _, length = word.partition("=")
            call = repeated(call, like, int(length))
        else:
            kernel = word
    return Named(call, kernel)


def without(call: Call, name: str) -> Call:
    return call._replace(
        tensors={n: t for n, t in call.tensors.items() if n != name},
        rest={n: value for n, value in call.rest.items() if n != name},
    )


def shortened(call: Call, like: str, length: int) -> Call:
    whole = len(call.tensors[like])
    tensors = {n: t[:length] if t.dim() and len(t) == whole else t for n, t in call.tensors.items()}
    return call._replace(tensors=tensors)


def repeated(call: Call, like: str, length: int) -> Call:
    """Of any length; also what makes of one call calls of thousands of sizes."""
    whole = len(call.tensors[like])
    rows = torch.arange(length) % whole
    tensors = {n: t[rows] if t.dim() and len(t) == whole else t for n, t in call.tensors.items()}
    return call._replace(tensors=tensors)


def names(seeds: range, operators: Collection[str], seldom: int = 1) -> Iterator[str]:
    """Of calls of each operator, in turn: with the kernel of the plan, and each that can be forced. Those
    that take the CPU long only for one of so many seeds."""
    for number, seed in enumerate(seeds):
        for operator in operators:
            if number % seldom and operator in SLOW:
                continue
            call = _of_seed(CALLS[operator], seed)
            for kernel in (*((None,) if call.plans else ()), *call.kernels):
                yield f"{operator}:{seed}" + (f":{kernel}" if kernel else "")


def smaller(name: str, fails: Callable[[str], bool]) -> str:
    """A call that fails, too, and of which nothing more can be left out."""
    found = True
    while found:
        found = False
        call = make(name).call
        for change in (*(f"-{n}" for n in (*call.tensors, *call.rest)), *_cuts(call)):
            try:
                found = fails(f"{name}:{change}")
            except Exception:  # it is no call any more
                continue
            if found:
                name = f"{name}:{change}"
                break
    return name


def _cuts(call: Call) -> Iterator[str]:
    for like, tensor in call.tensors.items():
        if tensor.dim() and len(tensor) > 0:
            for length in dict.fromkeys((0, len(tensor) // 2, len(tensor) - 1)):
                yield f"{like}<{length}"
