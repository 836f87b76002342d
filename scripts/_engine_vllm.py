"""Runs the functions and methods of cupy_moe.compat.vllm inside of the vLLM installed here: on a GPU where
torch sees one, else on CPU tensors.

    PYTHONPATH=.:tests python scripts/_engine_vllm.py
    CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 PYTHONPATH=.:tests python scripts/_engine_vllm.py

Results are compared with the specification on the CPU (of align: with plain loops), and with vLLM's own
PyTorch code where it has any. On a GPU, vLLM's own kernels get the same calls, by the same names, as soon as
ours are taken out. Most of them have no CPU version, but vLLM's modules can be imported there, and what calls
the kernels is Python, and so are the workspaces and the modular kernel around the experts; of the kernels,
only those of the experts run there, too, as Triton can interpret them.

A check that fails keeps no other from running.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import os
import pkgutil
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import vllm
import vllm.model_executor.layers.fused_moe as fused_moe
from align_cases import naive
from engine_signatures import RELEASES, of_function
from vllm.platforms import current_platform
from vllm.v1.worker import workspace

from cupy_moe.compat import _engine
from cupy_moe.compat import vllm as ours
from cupy_moe.cpu import align_batched as cpu_align_batched
from cupy_moe.cpu import experts as cpu_experts
from cupy_moe.cpu import moe_sum as cpu_moe_sum
from cupy_moe.cpu import quantize as cpu_quantize

Places = dict[str, set[tuple[str, str]]]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
QWEN = 128, 2048, 768  # experts, hidden and intermediate size of Qwen3-30B-A3B
EXPERT_MAP = torch.tensor([0, -1, 1, -1, 2, 3, -1, 4], dtype=torch.int32, device=DEVICE)
ROWS = (
    16  # tokens of quantised layers: of fewer, vLLM takes tiles that its Triton kernel for int4 cannot have
)
BATCHES = (4096, 512, 64, 8, 1)  # tokens, the most first: vLLM's workspace does not grow later


def main() -> None:
    print(f"vLLM {vllm.__version__} on {torch.cuda.get_device_name() if ON_GPU else 'the CPU'}")
    expect(current_platform.is_cuda(), ON_GPU, "that vLLM sees a GPU")
    places = RELEASES[f"vllm=={vllm.__version__}"]
    originals = {place: look_up(place) for place in places}
    for place, declared in places.items():
        expect(of_function(originals[place]), declared, place)

    failed: list[str] = []
    for when in ("before the rest of vLLM is imported", "after it"):
        one_round(originals, f"enabled {when}", functools.partial(step, failed, when))
    if not ON_GPU:
        print(
            "not compared, for want of a GPU: vLLM's own kernels for alignment, gating, sum and activations,"
            " a large layer, CUDA graphs"
        )
    if failed:
        raise SystemExit("\n".join(("failed:", *failed)))
    print(f"vLLM {vllm.__version__}: {len(places)} as declared, replaced, driven and given back")


def one_round(originals: dict[str, Any], when: str, check: Callable[..., Any]) -> None:
    none: Places = {place: set() for place in originals}
    ours.enable()
    stand_ins = {place: look_up(place) for place in originals}
    at_once = check("names of ours", holders, stand_ins)
    check("vLLM's modules imported", import_all, fused_moe)
    taken = check("names of ours, all modules imported", holders, stand_ins)
    check("no names of vLLM's functions", held, originals, none)
    check("align", align, originals)
    check("gate", gate)
    check("sum", add_up)
    check("experts", experts, originals)
    check("experts beside vLLM's kernels", beside_vllm, originals)
    if ON_GPU:
        check("align beside vLLM's kernels", align_beside_vllm)
        check("gate beside vLLM's kernels", gate_beside_vllm)
        check("sum beside vLLM's kernels", add_up_beside_vllm)
        check("a large layer in CUDA graphs, beside vLLM's kernels", in_graphs)
    check("quantised experts, also beside vLLM's kernels", quantised_experts, originals)
    ours.disable()
    check("no names of ours are left", held, stand_ins, none)
    check("names given back", held, originals, taken)
    if at_once and taken:
        print(f"{when}: {count(at_once)} names replaced, {count(taken)} given back")


def step(failed: list[str], when: str, what: str, check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check gives; None, and a line in `failed`, where it fails."""
    began, result, verdict = time.perf_counter(), None, "ok"
    try:
        result = check(*arguments)
        if ON_GPU:
            torch.cuda.synchronize()  # an error of a kernel belongs to the check that launched it
    except (Exception, SystemExit) as error:
        traceback.print_exc(file=sys.stdout)
        failed.append(f"{what}, enabled {when}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        verdict = "FAILED"
    print(f"{verdict}: {what} ({time.perf_counter() - began:.1f} s)", flush=True)
    return result


def by_both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What it gives with our functions in vLLM's places, and with vLLM's own. It looks their names up."""
    got = call()
    ours.disable()
    try:
        return got, call()
    finally:
        ours.enable()


def specified(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the specification makes of tensors, on the CPU."""
    return function(*(given.cpu() if isinstance(given, torch.Tensor) else given for given in arguments))


def near(got: torch.Tensor, wanted: torch.Tensor, case: str) -> None:
    """But for rounding: each value within 3 % of the largest, and all of them together within 1 %."""
    expect(got.shape, wanted.shape, f"{case}: shape")
    got, wanted = got.float().cpu(), wanted.float().cpu()
    error, size = got - wanted, wanted.abs().max()
    if error.abs().max() <= 0.03 * size + 1e-3 and error.norm() <= 0.01 * wanted.norm() + 1e-3:
        return
    most, all_of_it = error.abs().max(), error.norm() / wanted.norm()
    raise SystemExit(f"{case}: off by up to {most:.3g} of {size:.3g}, on the whole by {all_of_it:.2%}")


def alike(got: torch.Tensor, wanted: torch.Tensor, case: str) -> None:
    """The experts on the CPU are the specification; a GPU adds up in another order."""
    (near if ON_GPU else expect)(got, wanted, case)


def expect(got: Any, wanted: Any, what: str) -> None:
    same = torch.equal(got.cpu(), wanted.cpu()) if isinstance(got, torch.Tensor) else got == wanted
    if not same:
        raise SystemExit(f"{what}:\n got {got}\n not {wanted}")


def look_up(place: str) -> Any:
    module, _, path = place.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def import_all(package: Any) -> None:
    """All modules of a package, but those for libraries and hardware that are not here."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(f"left out: {module.name}: {error}")


def holders(functions: dict[str, Any]) -> Places:
    """Where vLLM keeps each: modules or classes, and names. Fails if it keeps one elsewhere, out of reach."""
    owners = {
        id(vars(module)): name for name, module in sys.modules.copy().items() if hasattr(module, "__dict__")
    }
    for known in (functions, ours._switch._functions, *ours._switch._pairs):
        owners[id(known)] = ours.__name__
    for place in functions:
        if "." in place.partition(":")[2]:
            class_place = place.rpartition(".")[0]
            (names,) = gc.get_referents(vars(look_up(class_place)))  # the dictionary behind the view
            owners[id(names)] = class_place
    found: Places = {place: set() for place in functions}
    gc.collect()  # frames of what has failed
    for place in functions:
        for holder in gc.get_referrers(functions[place]):
            if isinstance(holder, dict) and holder.keys() == {"original"}:
                continue  # the argument of one of ours
            owner = owners.get(id(holder))
            if owner is None:
                raise SystemExit(f"{place}: kept by a {type(holder)}: {str(holder)[:200]}")
            if owner.startswith("vllm"):
                found[place] |= {(owner, name) for name in holder if holder[name] is functions[place]}
    return found


def held(functions: dict[str, Any], wanted: Places) -> None:
    expect(holders(functions), wanted, "who keeps them")


def count(places: Places) -> int:
    return sum(map(len, places.values()))


def align(originals: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as home
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

    for dtype, ignore, local in itertools.product(
        (torch.int32, torch.int64), (False, True), (None, EXPERT_MAP)
    ):
        ids = torch.randint(-1, 9, (7, 3)).to(DEVICE, dtype)  # with ids of nobody
        flat, mapped = ids.flatten().tolist(), None if local is None else local.tolist()
        wanted = naive(flat, 4, 8, mapped, False, ignore)
        case = f"align, {dtype=} {ignore=} map={local is not None}"
        results = _prepare_expert_assignment(
            ids, {"BLOCK_SIZE_M": 4}, 7, 3, 8, local, ignore_invalid_experts=ignore
        )
        expect([result.tolist() for result in results], list(wanted), case)
        # vLLM's wrapper, which calls what fills buffers, and then maps what is past the last block, too.
        slots, experts, used = originals[f"{home.__name__}:moe_align_block_size"](
            ids, 4, 8, local, ignore_invalid_experts=ignore
        )
        blocks = int(used) // 4
        expect([slots.tolist(), used.tolist()], [wanted[0], wanted[2]], f"{case}, by vLLM's wrapper")
        expect(experts.tolist()[:blocks], wanted[1][:blocks], f"{case}, by vLLM's wrapper")

    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32, device=DEVICE)
    wanted = specified(cpu_align_batched.batched_moe_align_block_size, 8, 4, counts)
    by_wrapper = originals[f"{home.__name__}:batched_moe_align_block_size"](8, 4, counts)
    by_marlin = marlin_moe.batched_moe_align_block_size(
        max_tokens_per_batch=8, block_size=4, expert_num_tokens=counts
    )
    for got, by in ((by_wrapper, "vLLM's wrapper"), (by_marlin, "marlin_moe")):
        expect([t.tolist() for t in got], [t.tolist() for t in wanted], f"batched align, by {by}")


def align_beside_vllm() -> None:
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as home
    from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

    sizes = (7, 3, 8, 4), (300, 8, 64, 16), (4096, 8, 128, 64)
    for (tokens, topk, total, block_size), mapped, ignore in itertools.product(
        sizes, (False, True), (False, True)
    ):
        case = f"align, {tokens} x {topk} of {total}, blocks of {block_size}, {mapped=} {ignore=}"
        ids = torch.rand(tokens, total, device=DEVICE).topk(topk).indices.int()
        every_second = torch.arange(total, dtype=torch.int32, device=DEVICE)
        every_second = torch.where(every_second % 2 == 0, every_second // 2, -1)
        got, theirs = by_both(
            functools.partial(
                _prepare_expert_assignment, ids, {"BLOCK_SIZE_M": block_size}, tokens, topk, total,
                every_second if mapped else None, ignore_invalid_experts=ignore,
            )
        )  # fmt: skip
        expect(placed(got, block_size), placed(theirs, block_size), case)

    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32, device=DEVICE)
    got, theirs = by_both(lambda: home.batched_moe_align_block_size(8, 4, counts))
    expect(placed(got, 4), placed(theirs, 4), "batched align")


def placed(aligned: tuple[torch.Tensor, ...], block_size: int) -> list[tuple[int, int]]:
    """The expert and the position in each slot that is in use, sorted: vLLM leaves their order open."""
    slots, experts, used = (tensor.tolist() for tensor in aligned)
    of_slots = (experts[slot // block_size] for slot in range(used[0]))
    return sorted(zip(of_slots, slots[: used[0]], strict=True))


def gate() -> None:
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import grouped_topk
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import fused_grouped_topk

    on_cpu = torch.randn(33, 4), torch.randn(33, 64), torch.rand(64)
    hidden, logits, bias = (tensor.to(DEVICE) for tensor in on_cpu)
    for scoring, renormalize, dtype in itertools.product(
        ("softmax", "sigmoid"), (False, True), (torch.int32, torch.int64, torch.uint32)
    ):
        case = f"{scoring}, {renormalize=} {dtype=}"
        theirs = functools.partial(grouped_topk, *on_cpu[:2], 6, renormalize, scoring_func=scoring)
        weights, ids, rows = fused_topk(hidden, logits, 6, renormalize, dtype, scoring)
        close((weights, ids), theirs(1, 1), f"fused_topk, {case}")
        expect(ids.dtype, dtype, f"fused_topk, {case}")
        expect(rows, torch.arange(33 * 6, dtype=torch.int32).view(6, 33).T, f"source rows, {case}")
        biased = {"e_score_correction_bias": on_cpu[2], "routed_scaling_factor": 2.5}
        got = fused_topk_bias(hidden, logits, scoring, bias, 6, renormalize, dtype, routed_scaling_factor=2.5)
        close(got, theirs(1, 1, **biased), f"fused_topk_bias, {case}")
        got = fused_grouped_topk(hidden, logits, 6, renormalize, bias, 8, 3, scoring, 2.5)
        close(got, theirs(8, 3, **biased), f"grouped_topk, {case}")


def gate_beside_vllm() -> None:
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import fused_grouped_topk

    for (tokens, total, topk), scoring, renormalize in itertools.product(
        ((33, 64, 6), (1, 128, 8), (4096, 256, 8)), ("softmax", "sigmoid"), (False, True)
    ):
        case = f"{tokens} x {total}, {scoring}, {renormalize=}"
        hidden, bias = torch.randn(tokens, 4, device=DEVICE), torch.rand(total, device=DEVICE)
        logits = distinct(tokens, total)
        dtypes = (torch.float32, torch.int32), (torch.bfloat16, torch.int64), (torch.float16, torch.uint32)
        for of_logits, of_ids in dtypes:
            arguments = hidden, logits.to(of_logits), topk, renormalize, of_ids, scoring
            got, theirs = by_both(functools.partial(fused_topk, *arguments))
            close(got, theirs, f"fused_topk, {case}, {of_logits} {of_ids}", 1e-4)
            expect(got[2], theirs[2], f"source rows, {case}")
        if tokens > 33:
            continue  # among as many sums of scores and biases, some are equal but for rounding
        call = functools.partial(fused_topk_bias, hidden, logits, scoring, bias, topk, renormalize)
        got, theirs = by_both(functools.partial(call, routed_scaling_factor=2.5))
        close(got, theirs, f"fused_topk_bias, {case}", 1e-4)
        call = functools.partial(fused_grouped_topk, hidden, logits, topk, renormalize, bias, 8, 4)
        got, theirs = by_both(functools.partial(call, scoring, 2.5))
        close(got, theirs, f"grouped_topk, {case}", 1e-4)


def distinct(tokens: int, total: int) -> torch.Tensor:
    """Logits of which no two of a token are equal, in bf16, too: of equals, either could be taken."""
    return torch.rand(tokens, total, device=DEVICE).argsort(1) / 32 - 4


def close(got: Any, wanted: Any, case: str, rtol: float = 1e-5) -> None:
    """The same experts of each token, in whatever order, and weights that differ by rounding."""
    by_id = []
    for weights, ids in (got[:2], wanted[:2]):
        order = ids.cpu().long().sort(1)
        by_id.append((weights.cpu().float().gather(1, order.indices), order.values))
    (weights, ids), (their_weights, their_ids) = by_id
    expect(ids, their_ids, f"{case}: experts")
    torch.testing.assert_close(weights, their_weights, rtol=rtol, atol=1e-6, msg=f"{case}: weights")


def add_up() -> None:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceContiguous

    for dtype in (torch.float32, torch.bfloat16):
        x, weights = torch.randn(5, 3, 64).to(DEVICE, dtype), torch.rand(5, 3).to(DEVICE, dtype)
        ids = torch.randint(0, 8, (5, 3)).to(DEVICE)
        out = torch.empty(5, 64, dtype=dtype, device=DEVICE)
        TritonExperts.moe_sum(None, x, out)
        expect(out, specified(cpu_moe_sum.moe_sum, x), f"TritonExperts.moe_sum, {dtype}")
        x[EXPERT_MAP[ids] < 0] = torch.nan  # is not read
        MarlinExperts.moe_sum(None, x, out, ids, EXPERT_MAP)
        wanted = specified(cpu_moe_sum.moe_sum, x, None, ids, EXPERT_MAP)
        expect(out, wanted, f"MarlinExperts.moe_sum, {dtype}")
        x = torch.randn(5, 3, 64).to(DEVICE, dtype)
        wanted = specified(cpu_moe_sum.moe_sum, x * weights[..., None])
        got = TopKWeightAndReduceContiguous().apply(None, x, weights, ids, False)
        expect(got, wanted, f"TopKWeightAndReduceContiguous, {dtype}")


def add_up_beside_vllm() -> None:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    def total(of: Any, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x[:, 0], torch.nan)
        of.moe_sum(None, x, out, *more)
        return out

    for dtype, (tokens, topk, hidden) in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ((5, 3, 64), (33, 8, 2048), (2000, 2, 512))
    ):
        x = torch.randn(tokens, topk, hidden, device=DEVICE, dtype=dtype)
        ids = torch.randint(0, 8, (tokens, topk), dtype=torch.int32, device=DEVICE)
        near(*by_both(functools.partial(total, TritonExperts, x)), f"sum of {tokens} x {topk}, {dtype}")
        x[EXPERT_MAP[ids] < 0] = torch.nan
        both = by_both(functools.partial(total, MarlinExperts, x, ids, EXPERT_MAP))
        near(*both, f"sum of {tokens} x {topk}, mapped, {dtype}")


def experts(originals: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe as home
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        biased_moe_quant_config,
        int8_w8a16_moe_quant_config,
    )
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    known = (*cpu_experts.GATED, *cpu_experts.PLAIN)
    expect({*known} - {kind.value for kind in MoEActivation}, set(), "activations that vLLM does not have")
    _engine._warned.clear()
    for name, dtype, local, biased in itertools.product(
        known, (torch.bfloat16, torch.float16), (None, EXPERT_MAP), (False, True)
    ):
        case = f"{name}, {dtype=} map={local is not None} {biased=}"
        kind, total = MoEActivation(name), 5 if local is None else 8
        x, w1, w2, *biases = layer(40, name, dtype)
        weights, ids = torch.rand(40, 3).to(DEVICE), torch.randint(-1, total, (40, 3))  # -1: of padding
        ids = ids.to(DEVICE, torch.int64 if biased else torch.int32)
        w1_bias, w2_bias = biases if biased else (None, None)
        limited = name == "swigluoai_uninterleave"
        quant_config = biased_moe_quant_config(w1_bias, w2_bias, *((1.702, 1.0, 7.0) if limited else ()))
        options = (name, False, local, w1_bias, w2_bias)
        if not limited:  # vLLM's function knows no limits, and refuses
            wanted = specified(cpu_experts.fused_experts, x, w1, w2, weights, ids, *options)
            got = home.fused_experts(x, w1, w2, weights, ids, kind, False, total, local, quant_config)
            alike(got, wanted, f"fused_experts, {case}")
        kernel = modular_kernel(dtype, total, quant_config)
        workspaces = set()
        for tokens in (40, 39, 7, 1):
            part = x[:tokens], w1, w2, weights[:tokens], ids[:tokens]
            got = kernel.apply(*part, kind, total, local, False)
            wanted = specified(cpu_experts.fused_experts, *part, *options)
            alike(got, wanted, f"the modular kernel, {tokens} tokens, {case}")
            workspaces.add(workspace.current_workspace_manager()._current_workspaces[0].data_ptr())
            workspace.lock_workspace()  # that of the most tokens is enough from now on
        expect(len(workspaces), 1, f"allocations of a workspace, {case}")

    x, w1, w2, *_ = layer(40, "silu", torch.bfloat16)
    weights, ids, silu = torch.rand(40, 1).to(DEVICE), torch.randint(0, 5, (40, 1)), MoEActivation.SILU
    ids, ones = ids.to(DEVICE), torch.ones(40, 1)
    unquantised = biased_moe_quant_config(None, None)
    kernel = modular_kernel(x.dtype, 5, unquantised)
    got = kernel.apply(x, w1, w2, weights, ids, silu, 5, None, True)
    wanted = specified(cpu_experts.fused_experts, x * weights.to(x.dtype), w1, w2, ones, ids)
    alike(got, wanted, "the modular kernel, weights on the input")
    got = home.fused_experts(x, w1, w2, weights, ids, apply_router_weight_on_input=True)
    wanted = specified(cpu_experts.fused_experts, x, w1, w2, weights, ids, "silu", True)
    alike(got, wanted, "fused_experts, weights on the input")
    expect(_engine._warned, set(), "experts that were left to vLLM")

    own = originals["vllm.model_executor.layers.fused_moe.fused_moe:fused_experts"]
    in_fp32 = x.float(), w1.float(), w2.float(), weights, ids
    left_to(own, lambda: home.fused_experts(*in_fp32))
    own = originals["vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts.apply"]
    call = weights, ids, silu, 5, None, False
    ones = torch.ones(5, device=DEVICE)  # say int8, of weights that are not
    kernel_of_ints = modular_kernel(x.dtype, 5, int8_w8a16_moe_quant_config(ones, ones, None, None))
    left_to(own, functools.partial(kernel_of_ints.apply, x, w1, w2, *call))
    with (  # an adapter that adds nothing
        mock.patch.object(TritonExperts, "apply_w13_lora", return_value=(None,) * 4),
        mock.patch.object(TritonExperts, "apply_w2_lora"),
    ):
        kernel.fused_experts.set_lora_context(types.SimpleNamespace(aux_stream=None))
        left_to(own, functools.partial(kernel.apply, x, w1, w2, *call))
    with mock.patch.dict(os.environ, VLLM_BATCH_INVARIANT="1"):
        kernel = modular_kernel(x.dtype, 5, unquantised)
        left_to(own, functools.partial(kernel.apply, x, w1, w2, *call))


def left_to(own: Any, call: Callable[[], Any]) -> None:
    """That vLLM's own function runs, and gives what it does without ours; on the CPU, as far as something
    that needs a GPU."""
    called = []

    def note(frame: types.FrameType, *_: Any) -> None:
        if frame.f_code is own.__code__:
            called.append(frame.f_lineno)
            sys.setprofile(None)  # it slows down what comes now

    sys.setprofile(note)
    try:
        call()
    except Exception:
        if ON_GPU or not called:
            raise
    finally:
        sys.setprofile(None)
    expect(len(called), 1, f"calls of {own.__qualname__}")
    if ON_GPU:
        near(*by_both(call), f"what {own.__qualname__} gives")


def beside_vllm(originals: dict[str, Any]) -> None:
    """The same as vLLM's own, but for rounding. On the CPU, activations are those of the specification for
    both: vLLM's are compiled for GPUs."""
    from vllm.model_executor.layers.fused_moe import fused_moe as home
    from vllm.model_executor.layers.fused_moe import modular_kernel as modular
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    def activate(activation: Any, output: torch.Tensor, input: torch.Tensor, **_: Any) -> None:
        output.copy_(cpu_experts.activate(activation.value, input.float()))

    def fused_experts(*arguments: Any) -> torch.Tensor:
        return home.fused_experts(*arguments)

    own_apply = originals["vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts.apply"]
    with contextlib.ExitStack() as stack:
        if not ON_GPU:
            # Tiles by default, as there is no GPU that they could be tuned for.
            stack.enter_context(mock.patch.object(home, "get_moe_configs", return_value=None))
            for module in (home, modular):
                stack.enter_context(mock.patch.object(module, "apply_moe_activation", activate))
        for name, mapped, on_input, dtype in itertools.product(
            (*cpu_experts.GATED, *cpu_experts.PLAIN), (False, True), (False, True),
            (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,),
        ):  # fmt: skip
            case = f"{name}, {mapped=} {on_input=} {dtype=}"
            kind, local, total = MoEActivation(name), EXPERT_MAP if mapped else None, 8 if mapped else 5
            x, w1, w2, *biases = layer(9, name, dtype)
            topk = 1 if on_input else 3
            weights = torch.rand(9, topk).to(DEVICE)
            ids = torch.randint(0, total, (9, topk), dtype=torch.int32).to(DEVICE)
            limits = (1.702, 1.0, 7.0) if name == "swigluoai_uninterleave" else ()
            quant_config = biased_moe_quant_config(*biases, *limits)
            kernel = modular_kernel(dtype, total, quant_config)
            call = functools.partial(kernel.apply, x, w1, w2, weights, ids, kind, total, local, on_input)
            if ON_GPU:
                got, theirs = by_both(call)
            else:
                got = call()
                with mock.patch.object(TritonExperts, "apply", own_apply):
                    theirs = call()
            near(got, theirs, f"TritonExperts, {case}")
            if limits:
                continue  # vLLM's function knows none
            options = kind, on_input, total, local, quant_config
            call = functools.partial(fused_experts, x, w1, w2, weights, ids, *options)
            if ON_GPU:
                got, theirs = by_both(call)
            else:
                got = call()
                theirs = home.fused_experts_impl(
                    x, w1, w2, weights, ids, name, on_input, global_num_experts=total, expert_map=local,
                    w1_bias=biases[0], w2_bias=biases[1],
                )  # fmt: skip
            near(got, theirs, f"fused_experts, {case}")


def in_graphs() -> None:
    """Router and experts, as vLLM decodes: in CUDA graphs that share a workspace, which was locked before.
    Says how long they take, as a hint: numbers to keep are those of scripts/bench."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    def route_and_run(tokens: int) -> torch.Tensor:
        weights, ids, _ = fused_topk(x[:tokens], logits[:tokens], 8, True)
        return kernel.apply(x[:tokens], w1, w2, weights, ids, MoEActivation.SILU, total, None, False)

    def captured(tokens: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        route_and_run(tokens)  # loads and compiles kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, route_and_run(tokens)

    total, hidden, inner = QWEN
    x = torch.randn(BATCHES[0], hidden, device=DEVICE, dtype=torch.bfloat16)
    logits = distinct(BATCHES[0], total)
    w1 = torch.randn(total, 2 * inner, hidden, device=DEVICE, dtype=x.dtype) / 32
    w2 = torch.randn(total, hidden, inner, device=DEVICE, dtype=x.dtype) / 16
    kernel = modular_kernel(x.dtype, total, biased_moe_quant_config(None, None), (total, hidden, inner))
    route_and_run(BATCHES[0])
    workspace.lock_workspace()
    for tokens in BATCHES:
        graphs = by_both(functools.partial(captured, tokens))
        x.normal_()
        logits.copy_(distinct(BATCHES[0], total))
        times = [replayed(graph) for graph, _ in graphs]
        (_, got), (_, theirs) = graphs
        expect(got, route_and_run(tokens), f"{tokens} tokens, a graph and the same call")
        near(got, theirs, f"{tokens} tokens, in graphs")
        if tokens <= 8:
            weights, ids, _ = fused_topk(x[:tokens], logits[:tokens], 8, True)
            wanted = specified(cpu_experts.fused_experts, x[:tokens], w1, w2, weights, ids)
            near(got, wanted, f"{tokens} tokens")
        print(f"  {tokens} tokens: {times[0]:.1f} us, with vLLM's own {times[1]:.1f} us")


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds, the median of 20."""
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def layer(tokens: int, activation: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states of 16, weights of five experts with an intermediate size of 24, and biases."""
    rows = 48 if activation in cpu_experts.GATED else 24
    shapes = ((tokens, 16), (5, rows, 16), (5, 16, 24), (5, rows), (5, 16))
    return tuple((torch.randn(shape) * 0.3).to(DEVICE, dtype) for shape in shapes)


def modular_kernel(
    dtype: torch.dtype, num_experts: int, quant_config: Any, sizes: tuple[int, int, int] = (5, 16, 24)
) -> Any:
    """What vLLM makes of a layer whose oracle says Triton, and a workspace that nobody has used. Activations
    come with each call: without a GPU, a configuration refuses those that have no gate."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle

    local, hidden, inner = sizes
    moe_config = config.FusedMoEConfig(
        num_experts=num_experts, experts_per_token=3, hidden_dim=hidden, intermediate_size=inner,
        num_local_experts=local, num_logical_experts=num_experts, activation=MoEActivation.SILU,
        device=DEVICE, routing_method=config.RoutingMethodType.Default, in_dtype=dtype,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(DEVICE)
    backend = oracle.UnquantizedMoeBackend.TRITON
    (cls,) = oracle.backend_to_kernel_cls(backend)
    return oracle.make_unquantized_moe_kernel(quant_config, moe_config, backend, cls)


def quantised_experts(originals: dict[str, Any]) -> None:
    """Each format that runs here: as the specification, in both ways in, and nearly as vLLM's own kernels.
    Others are left to vLLM, activations as it wants them."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe import fused_moe as home
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.model_executor.layers.fused_moe.experts.fallback import FallbackExperts

    silu, triton, wna16 = MoEActivation.SILU, triton_moe.TritonExperts, triton_moe.TritonWNA16Experts

    def fused_experts(*arguments: Any) -> torch.Tensor:
        return home.fused_experts(*arguments)

    own_applies = {cls: originals[f"{triton_moe.__name__}:{cls.__name__}.apply"] for cls in (triton, wna16)}
    for format, mapped in itertools.product(FORMATS, (False, True)):
        case = f"{format}, {mapped=}"
        with DEVICE:
            x, w1, w2, quant_config, values = quantised_layer(format)
        cls = wna16 if format.startswith("int4") else triton
        local, total = (EXPERT_MAP, 8) if mapped else (None, 5)
        weights = torch.rand(ROWS, 3).to(DEVICE)
        ids = torch.randint(0, total, (ROWS, 3), dtype=torch.int32).to(DEVICE)
        limit = 0.06 if quant_config.quant_dtype else 0.002  # of activations in fp8, of weights in 16 bits
        apart = 0.09 if quant_config.quant_dtype and ON_GPU else limit  # where both have them in fp8
        arguments = x, w1, w2, weights, ids, silu, False, total, local, quant_config
        got = fused_experts(*arguments)
        wanted = specified(cpu_experts.fused_experts, x, *values, weights, ids, "silu", False, local)
        if ON_GPU:  # wgmma takes activations in fp8
            quite_near(got, wanted, limit, f"fused_experts, {case}")
        else:
            near_in_fp32(got, wanted, f"fused_experts, {case}")
        kernel = quantised_kernel(cls, x.dtype, total, quant_config)
        call = functools.partial(kernel.apply, x, w1, w2, weights, ids, silu, total, local, False)
        expect(call(), got, f"{cls.__name__}, {case}")
        expect(fused_experts(*arguments), got, f"a second call, {case}")
        with contextlib.nullcontext() if ON_GPU else as_of_no_gpu():
            # With a map, vLLM's function takes the largest value of rows that it has not written.
            if not (mapped and format == "fp8 by tensors"):
                if ON_GPU:
                    _, theirs = by_both(functools.partial(fused_experts, *arguments))
                else:
                    theirs = home.fused_experts_impl(
                        x, w1, w2, weights, ids, "silu", per_channel_quant=quant_config.per_act_token_quant,
                        global_num_experts=total, expert_map=local,
                        **{name: getattr(quant_config, name) for name in SAID},
                    )  # fmt: skip
                quite_near(got, theirs, apart, f"fused_experts, beside vLLM's, {case}")
            if ON_GPU:
                quite_near(got, by_both(call)[1], apart, f"{cls.__name__}, beside vLLM's, {case}")
            # As ours would leave it: with activations that nobody has quantised, until vLLM's own does.
            with mock.patch.object(cls, "apply", own_applies[cls]):
                quite_near(got, call(), apart, f"{cls.__name__}, as it is left, {case}")
            if quant_config.quant_dtype:
                inner = quantised_kernel(inside_of(FallbackExperts, triton), x.dtype, total, quant_config)
                for _ in range(2):  # the first call is when ours learns where it is
                    theirs = inner.apply(x, w1, w2, weights, ids, silu, total, local, False)
                    quite_near(theirs, got, apart, f"inside of another class, {case}")

    with DEVICE:
        x, w1, w2, quant_config, _ = quantised_layer("fp8 by blocks")
    weights = torch.rand(ROWS, 3).to(DEVICE)
    ids = torch.randint(0, 5, (ROWS, 3), dtype=torch.int32).to(DEVICE)
    many = x.repeat(5, 1), w1, w2, weights.repeat(5, 1), ids.repeat(5, 1)
    kernel = quantised_kernel(triton, x.dtype, 5, quant_config)
    for tokens in (80, 79, 1):
        part = (many[0][:tokens], w1, w2, many[3][:tokens], many[4][:tokens])
        got = kernel.apply(*part, silu, 5, None, False)
        expect(got, home.fused_experts(*part, silu, quant_config=quant_config), f"{tokens} tokens")
        workspace.lock_workspace()  # that of the most tokens is enough from now on

    scales = quant_config.w1_scale, quant_config.w2_scale
    unsigned = w1.view(torch.uint8), w2.view(torch.uint8)
    of_gptq = config.int8_w8a16_moe_quant_config(*scales, block_shape=[0, 128])
    w8a8 = config.int8_w8a8_moe_quant_config(*scales, None, None, per_act_token_quant=True)
    own = originals["vllm.model_executor.layers.fused_moe.fused_moe:fused_experts"]
    for stored, left in ((unsigned, of_gptq), ((w1, w2), w8a8), ((w1.int(), w2.int()), quant_config)):
        call = functools.partial(fused_experts, x, *stored, weights, ids, silu, False, -1, None, left)
        with mock.patch.object(home, "fused_experts_impl", return_value=torch.zeros_like(x)):
            left_to(own, call)
    kernel = quantised_kernel(triton, x.dtype, 5, w8a8)
    expect(kernel.fused_experts.expects_unquantized_inputs, False, "inputs of int8_w8a8")


FORMATS = (
    *("fp8 by blocks", "fp8 by channels", "fp8 by tensors", "fp8 by tensors, static"),
    *("int8 by channels", "int4", "int4 with zeros"),
)
SAID = (
    *("use_fp8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "block_shape"),
    *("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale"),
)


def quantised_layer(format: str) -> Any:
    """Hidden states of 128, weights of five experts with an intermediate size of 128, vLLM's configuration,
    and the values of those weights, made from it in the simplest way."""
    from vllm.model_executor.layers.fused_moe import config

    def some(rows: int, of: tuple[int, ...]) -> torch.Tensor:
        return (torch.rand(5, rows, *of) + 0.5) / (300 if format.startswith("fp8") else 60)

    kind, _, by = format.partition(" by ")
    # Triton's interpreter makes no bf16 of integers, and vLLM's kernels take fp8 for that of a bf16 model.
    x = torch.randn(ROWS, 128).to(torch.bfloat16 if kind == "fp8" else torch.float16)
    if kind == "fp8":
        codes = [(torch.randn(5, rows, 128) * 9).to(torch.float8_e4m3fn) for rows in (256, 128)]
        if by == "blocks":
            scales = some(2, (1,)), some(1, (1,))
            quant_config = config.fp8_w8a8_moe_quant_config(*scales, block_shape=[128, 128])
            factors = [scale.repeat_interleave(128, 1) for scale in scales]
        elif by == "channels":
            scales = some(256, (1,)), some(128, (1,))
            more = {"per_act_token_quant": True, "per_out_ch_quant": True}
            quant_config, factors = config.fp8_w8a8_moe_quant_config(*scales, **more), list(scales)
        else:
            inputs = (torch.tensor(0.02), torch.tensor(0.1)) if "static" in by else (None, None)
            scales = some(1, ())[:, 0], some(1, ())[:, 0]
            quant_config = config.fp8_w8a8_moe_quant_config(*scales, *inputs)
            factors = [scale.view(5, 1, 1) for scale in scales]
        values = [code.float() * factor for code, factor in zip(codes, factors, strict=True)]
    elif kind == "int8":
        codes = [torch.randint(-128, 128, (5, rows, 128)).to(torch.int8) for rows in (256, 128)]
        scales = some(256, ()) / 10, some(128, ()) / 10
        quant_config = config.int8_w8a16_moe_quant_config(*scales)
        values = [code.float() * scale[..., None] for code, scale in zip(codes, scales, strict=True)]
    else:
        halves = [torch.randint(0, 16, (5, rows, 128), dtype=torch.uint8) for rows in (256, 128)]
        codes = [half[..., ::2] | half[..., 1::2] << 4 for half in halves]
        scales = some(256, (4,)).to(x.dtype), some(128, (4,)).to(x.dtype)
        zeros = [torch.randint(0, 16, (5, rows, 4), dtype=torch.uint8) for rows in (256, 128)]
        packed: list[Any] = [zero[:, ::2] | zero[:, 1::2] << 4 for zero in zeros]
        if "zeros" not in format:
            packed, zeros = [None, None], [torch.full_like(zero, 8) for zero in zeros]
        quant_config = config.int4_w4a16_moe_quant_config(*scales, *packed, block_shape=[0, 32])
        spread = [[t.float().repeat_interleave(32, 2) for t in pair] for pair in (zeros, scales)]
        values = [(half.float() - zero) * scale for half, zero, scale in zip(halves, *spread, strict=True)]
    return x, *codes, quant_config, values


def quantised_kernel(cls: Any, dtype: torch.dtype, num_experts: int, quant_config: Any) -> Any:
    """As `modular_kernel`, of a class."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle

    moe_config = config.FusedMoEConfig(
        num_experts=num_experts, experts_per_token=3, hidden_dim=128, intermediate_size=128,
        num_local_experts=5, num_logical_experts=num_experts, activation=MoEActivation.SILU, device=DEVICE,
        routing_method=config.RoutingMethodType.Default, in_dtype=dtype,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(DEVICE)
    return oracle.make_fp8_moe_kernel(quant_config, moe_config, cls, oracle.Fp8MoeBackend.TRITON)


def inside_of(base: Any, cls: Any) -> Any:
    """A class of vLLM's kind that has experts of another class, and its activations quantised before."""

    class Outer(base):  # type: ignore[misc]
        def __init__(self, moe_config: Any, quant_config: Any) -> None:
            super().__init__(cls(moe_config, quant_config), cls(moe_config, quant_config))

        get_clses = staticmethod(lambda: (cls, cls))

        def workspace_shapes(self, *sizes: Any) -> Any:
            return self.experts.workspace_shapes(*sizes)

        def _select_experts_impl(self, *_: Any) -> Any:
            return self.experts

    return Outer


@contextlib.contextmanager
def as_of_no_gpu() -> Iterator[None]:
    """What vLLM's own needs beside kernels that Triton can interpret, in PyTorch; so is all that makes fp8,
    as Triton's interpreter rounds 127.8 to 64."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe import fused_moe as home
    from vllm.model_executor.layers.fused_moe import modular_kernel as modular
    from vllm.model_executor.layers.fused_moe import utils

    def activate(activation: Any, output: torch.Tensor, input: torch.Tensor, **_: Any) -> None:
        output.copy_(cpu_experts.activate(activation.value, input.float()))

    def silu_and_mul(x: torch.Tensor, group_size: int, quant_dtype: Any) -> Any:
        return cpu_quantize.quantize(x, group_size, gated=True)

    def to_fp8(x: torch.Tensor, scale: Any = None, use_per_token_if_dynamic: bool = False) -> Any:
        if use_per_token_if_dynamic:
            return cpu_quantize.quantize(x, 0)
        scale = (x.abs().max().float() / 448).view(1) if scale is None else scale
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale.view(1)

    with (
        mock.patch.object(home, "get_moe_configs", return_value=None),
        mock.patch.object(home, "apply_moe_activation", activate),
        mock.patch.object(modular, "apply_moe_activation", activate),
        mock.patch.object(utils, "per_token_group_quant_fp8", cpu_quantize.quantize),
        mock.patch.object(ops, "scaled_fp8_quant", to_fp8),
        mock.patch.object(ops, "silu_and_mul_per_block_quant", silu_and_mul),
    ):
        yield


def near_in_fp32(got: torch.Tensor, wanted: torch.Tensor, case: str) -> None:
    """As products of the same values that are summed in another order."""
    torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01 * wanted.abs().max().item(), msg=case)


def quite_near(got: torch.Tensor, wanted: torch.Tensor, limit: float, case: str) -> None:
    got, wanted = got.float().cpu(), wanted.float().cpu()
    error = (got - wanted).norm() / wanted.norm()
    if not error < limit:
        raise SystemExit(f"{case}: {error:.4f} off")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
