"""Random calls of every operator on a GPU, compared with the CPU: what scripts/sanitize runs.

A name, OPERATOR:SEED or OPERATOR:SEED:KERNEL, tells a call, and makes it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import test_experts
import test_quantization
import test_quantized_experts
import torch
from emulator import cases

from cupy_moe.plans.experts import EXPERTS_KERNELS, FP8_KERNELS

Results = tuple[torch.Tensor, ...]


class RandomCall(NamedTuple):
    kernels: tuple[str | None, ...]  # that may do it; None: that of the plan
    run: Callable[[str | None], Results]  # on the current device
    wrong: Callable[[Results, str | None], str]  # what is, of results that are on the CPU; "" if nothing is


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides and alignment, in no more memory than it has, for overruns to be seen."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _of_cases(make: Callable[[int], cases.Call]) -> Callable[[int], RandomCall]:
    def make_call(seed: int) -> RandomCall:
        call = make(seed)
        return RandomCall(
            (None, *call.kernels),
            lambda kernel: call.run(on_gpu, kernel),
            lambda results, _: cases.difference(call, results, call.specified()),
        )

    return make_call


def _many_rows(seed: int) -> cases.Call:
    """More than GPUs hold at once, for which there are kernels of their own."""
    call = cases.unpermute(seed)
    topk, dtype = (1, 4, 6, 8)[seed % 4], cases.DTYPES[seed % 3]
    tensors = {
        "permuted": torch.randn(40, 7168).to(dtype),
        "inverse_ids": torch.randint(-2, 42, (64, topk), dtype=torch.int32),
    }
    return call._replace(tensors=tensors, rest={})


def _experts(seed: int) -> RandomCall:
    call = test_experts.layer(seed, 300 if seed % 6 == 0 else 40)

    def wrong(results: Results, _: str | None) -> str:
        return "" if test_experts.close(*results, call(torch.clone)) else "other results"

    kernels = test_experts.kernels_for(call, list(EXPERTS_KERNELS))
    return RandomCall((None, *kernels), lambda kernel: (call(on_gpu, kernel=kernel),), wrong)


def _quantized_experts(seed: int) -> RandomCall:
    """Each kernel by itself, as the plan's choice decides whether rows become fp8."""
    if seed % 3 == 0:
        call, quantization = test_quantized_experts.fp8_rows(seed // 3)
        kernels = [*test_quantized_experts.kernels_for(call), *FP8_KERNELS]
    else:
        formats = list(test_quantization.FORMATS)
        call, quantization = test_quantization.quantized(seed, formats[seed % len(formats)])
        kernels = test_quantized_experts.kernels_for(call)
    run = functools.partial(test_quantized_experts.called, call, quantization)

    def wrong(results: Results, kernel: str | None) -> str:
        (result,), expected = results, run(torch.clone, kernel=kernel)
        if kernel in FP8_KERNELS:  # of which one code may make most of a small result
            return "" if test_quantized_experts.nearly(result, expected, 0.06) else "other results"
        return "" if test_experts.close(result, expected) else "other results"

    return RandomCall(tuple(kernels), lambda kernel: (run(on_gpu, kernel=kernel),), wrong)


CALLS: dict[str, Callable[[int], RandomCall]] = {
    **{name: _of_cases(make) for name, make in cases.OPERATORS.items()},
    "many_rows": _of_cases(_many_rows),
    "experts": _experts,
    "quantized_experts": _quantized_experts,
}


def run(name: str) -> str:
    """What is wrong with the results of a call; "" if nothing is."""
    operator, seed, *forced = name.split(":")
    call, kernel = CALLS[operator](int(seed)), forced[0] if forced else None
    return call.wrong(tuple(result.cpu() for result in call.run(kernel)), kernel)


def names(seeds: int, operators: Collection[str]) -> Iterator[str]:
    """Of so many calls of each operator, in turn, with each kernel that may do it."""
    for seed in range(seeds):
        for operator in operators:
            for kernel in CALLS[operator](seed).kernels:
                yield f"{operator}:{seed}" + (f":{kernel}" if kernel else "")
