"""Runs the functions and methods of cupy_moe.compat.vllm inside of the vLLM installed here, on CPU tensors.

    CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 PYTHONPATH=.:tests python scripts/_engine_vllm.py

Most of vLLM's kernels have no CPU version, but its modules can be imported, and what calls the kernels is
Python, and so are the workspaces and the modular kernel around the experts. Results are compared with the
specification (of align: with plain loops), with vLLM's own PyTorch code where it has any, and those of
experts with vLLM's own kernels, which Triton can interpret.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import os
import pkgutil
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import vllm
import vllm.model_executor.layers.fused_moe as fused_moe
from align_cases import naive
from engine_signatures import RELEASES, of_function
from vllm.v1.worker import workspace

from cupy_moe.compat import vllm as ours
from cupy_moe.cpu import align_batched as cpu_align_batched
from cupy_moe.cpu import experts as cpu_experts
from cupy_moe.cpu import moe_sum as cpu_moe_sum
from cupy_moe.cpu import quantize as cpu_quantize

Places = dict[str, set[tuple[str, str]]]


def main() -> None:
    places = RELEASES[f"vllm=={vllm.__version__}"]
    originals = {place: look_up(place) for place in places}
    for place, declared in places.items():
        expect(of_function(originals[place]), declared, place)

    none: Places = {place: set() for place in places}
    for when in ("before the rest of vLLM is imported", "after it"):
        ours.enable()
        stand_ins = {place: look_up(place) for place in places}
        at_once = holders(stand_ins)
        import_all(fused_moe)
        taken = holders(stand_ins)
        expect(holders(originals), none, f"enabled {when}: names of vLLM's functions")
        align(originals)
        gate()
        add_up()
        experts(originals)
        beside_vllm(originals)
        quantised_experts(originals)
        ours.disable()
        expect(holders(stand_ins), none, f"enabled {when}: names of ours that are left")
        expect(holders(originals), taken, f"enabled {when}: names given back")
        print(f"enabled {when}: {count(at_once)} names replaced, {count(taken)} given back")
    print(f"vLLM {vllm.__version__}: {len(places)} as declared, replaced, driven and given back")


def expect(got: Any, wanted: Any, what: str) -> None:
    same = torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted
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
    owners = {id(vars(module)): name for name, module in sys.modules.items() if hasattr(module, "__dict__")}
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


def count(places: Places) -> int:
    return sum(map(len, places.values()))


def align(originals: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as home
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

    expert_map = torch.tensor([0, -1, 1, -1, 2, 3, -1, 4], dtype=torch.int32)
    for dtype, ignore, local in itertools.product(
        (torch.int32, torch.int64), (False, True), (None, expert_map)
    ):
        ids = torch.randint(-1, 9, (7, 3)).to(dtype)  # with ids of nobody
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

    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32)
    wanted = cpu_align_batched.batched_moe_align_block_size(8, 4, counts)
    by_wrapper = originals[f"{home.__name__}:batched_moe_align_block_size"](8, 4, counts)
    by_marlin = marlin_moe.batched_moe_align_block_size(
        max_tokens_per_batch=8, block_size=4, expert_num_tokens=counts
    )
    for got, by in ((by_wrapper, "vLLM's wrapper"), (by_marlin, "marlin_moe")):
        expect([t.tolist() for t in got], [t.tolist() for t in wanted], f"batched align, by {by}")


def gate() -> None:
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import grouped_topk
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import fused_grouped_topk

    hidden, logits, bias = torch.randn(33, 4), torch.randn(33, 64), torch.rand(64)
    for scoring, renormalize, dtype in itertools.product(
        ("softmax", "sigmoid"), (False, True), (torch.int32, torch.int64, torch.uint32)
    ):
        case = f"{scoring}, {renormalize=} {dtype=}"
        theirs = functools.partial(grouped_topk, hidden, logits, 6, renormalize, scoring_func=scoring)
        weights, ids, rows = fused_topk(hidden, logits, 6, renormalize, dtype, scoring)
        close((weights, ids), theirs(1, 1), f"fused_topk, {case}")
        expect(ids.dtype, dtype, f"fused_topk, {case}")
        expect(rows, torch.arange(33 * 6, dtype=torch.int32).view(6, 33).T, f"source rows, {case}")
        biased = {"e_score_correction_bias": bias, "routed_scaling_factor": 2.5}
        got = fused_topk_bias(hidden, logits, scoring, bias, 6, renormalize, dtype, routed_scaling_factor=2.5)
        close(got, theirs(1, 1, **biased), f"fused_topk_bias, {case}")
        got = fused_grouped_topk(hidden, logits, 6, renormalize, bias, 8, 3, scoring, 2.5)
        close(got, theirs(8, 3, **biased), f"grouped_topk, {case}")


def close(got: Any, wanted: Any, case: str) -> None:
    """The same experts of each token, in whatever order, and weights that differ by rounding."""
    by_id = []
    for weights, ids in (got[:2], wanted[:2]):
        order = ids.long().sort(1)
        by_id.append((weights.float().gather(1, order.indices), order.values))
    (weights, ids), (their_weights, their_ids) = by_id
    expect(ids, their_ids, f"{case}: experts")
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-6, msg=f"{case}: weights")


def add_up() -> None:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceContiguous

    expert_map = torch.tensor([0, -1, 1, -1, 2, 3, -1, 4], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        x, ids, weights = torch.randn(5, 3, 64).to(dtype), torch.randint(0, 8, (5, 3)), torch.rand(5, 3)
        out = torch.empty(5, 64, dtype=dtype)
        TritonExperts.moe_sum(None, x, out)
        expect(out, cpu_moe_sum.moe_sum(x), f"TritonExperts.moe_sum, {dtype}")
        x[expert_map[ids] < 0] = torch.nan  # is not read
        MarlinExperts.moe_sum(None, x, out, ids, expert_map)
        expect(out, cpu_moe_sum.moe_sum(x, None, ids, expert_map), f"MarlinExperts.moe_sum, {dtype}")
        x = torch.randn(5, 3, 64).to(dtype)
        wanted = cpu_moe_sum.moe_sum(x * weights[..., None].to(dtype))
        got = TopKWeightAndReduceContiguous().apply(None, x, weights.to(dtype), ids, False)
        expect(got, wanted, f"TopKWeightAndReduceContiguous, {dtype}")


def experts(originals: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe as home
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        biased_moe_quant_config,
        int8_w8a16_moe_quant_config,
    )

    known = (*cpu_experts.GATED, *cpu_experts.PLAIN)
    expect({*known} - {kind.value for kind in MoEActivation}, set(), "activations that vLLM does not have")
    expert_map = torch.tensor([0, -1, 1, -1, 2, 3, -1, 4], dtype=torch.int32)
    for name, dtype, local, biased in itertools.product(
        known, (torch.bfloat16, torch.float16), (None, expert_map), (False, True)
    ):
        case = f"{name}, {dtype=} map={local is not None} {biased=}"
        kind, total = MoEActivation(name), 5 if local is None else 8
        x, w1, w2, *biases = layer(40, name, dtype)
        weights, ids = torch.rand(40, 3), torch.randint(-1, total, (40, 3))  # -1: of padding
        ids = ids if biased else ids.int()
        w1_bias, w2_bias = biases if biased else (None, None)
        limited = name == "swigluoai_uninterleave"
        quant_config = biased_moe_quant_config(w1_bias, w2_bias, *((1.702, 1.0, 7.0) if limited else ()))
        options = (name, False, local, w1_bias, w2_bias)
        if not limited:  # vLLM's function knows no limits, and refuses
            wanted = cpu_experts.fused_experts(x, w1, w2, weights, ids, *options)
            got = home.fused_experts(x, w1, w2, weights, ids, kind, False, total, local, quant_config)
            expect(got, wanted, f"fused_experts, {case}")
        kernel = modular_kernel(dtype, total, quant_config)
        workspaces = set()
        for tokens in (40, 39, 7, 1):
            part = x[:tokens], w1, w2, weights[:tokens], ids[:tokens]
            got = kernel.apply(*part, kind, total, local, False)
            wanted = cpu_experts.fused_experts(*part, *options)
            expect(got, wanted, f"the modular kernel, {tokens} tokens, {case}")
            workspaces.add(workspace.current_workspace_manager()._current_workspaces[0].data_ptr())
            workspace.lock_workspace()  # that of the most tokens is enough from now on
        expect(len(workspaces), 1, f"allocations of a workspace, {case}")

    x, w1, w2, *_ = layer(40, "silu", torch.bfloat16)
    weights, ids, silu = torch.rand(40, 1), torch.randint(0, 5, (40, 1)), MoEActivation.SILU
    unquantised = biased_moe_quant_config(None, None)
    kernel = modular_kernel(x.dtype, 5, unquantised)
    got = kernel.apply(x, w1, w2, weights, ids, silu, 5, None, True)
    wanted = cpu_experts.fused_experts(x * weights.to(x.dtype), w1, w2, torch.ones(40, 1), ids)
    expect(got, wanted, "the modular kernel, weights on the input")
    got = home.fused_experts(x, w1, w2, weights, ids, apply_router_weight_on_input=True)
    wanted = cpu_experts.fused_experts(x, w1, w2, weights, ids, "silu", True)
    expect(got, wanted, "fused_experts, weights on the input")

    own = originals["vllm.model_executor.layers.fused_moe.fused_moe:fused_experts"]
    fails_in(own, home.fused_experts, x.float(), w1.float(), w2.float(), weights, ids)
    own = originals["vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts.apply"]
    call = (x, w1, w2, weights, ids, silu, 5, None, False)
    scales = torch.ones(5), torch.ones(5), None, None
    fails_in(own, modular_kernel(x.dtype, 5, int8_w8a16_moe_quant_config(*scales)).apply, *call)
    kernel.fused_experts.set_lora_context(types.SimpleNamespace(aux_stream=None))
    fails_in(own, kernel.apply, *call)
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    fails_in(own, modular_kernel(x.dtype, 5, unquantised).apply, *call)
    del os.environ["VLLM_BATCH_INVARIANT"]


def beside_vllm(originals: dict[str, Any]) -> None:
    """The same as vLLM's own, but for rounding. Activations are those of the specification for both: vLLM's
    are compiled for GPUs."""
    from vllm.model_executor.layers.fused_moe import fused_moe as home
    from vllm.model_executor.layers.fused_moe import modular_kernel as modular
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    def activate(activation: Any, output: torch.Tensor, input: torch.Tensor, **_: Any) -> None:
        output.copy_(cpu_experts.activate(activation.value, input.float()))

    own_apply = originals["vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts.apply"]
    expert_map = torch.tensor([0, -1, 1, -1, 2, 3, -1, 4], dtype=torch.int32)
    with (
        mock.patch.object(home, "get_moe_configs", return_value=None),  # tiles by default, as of no GPU
        mock.patch.object(home, "apply_moe_activation", activate),
        mock.patch.object(modular, "apply_moe_activation", activate),
    ):
        for name, mapped, on_input in itertools.product(
            (*cpu_experts.GATED, *cpu_experts.PLAIN), (False, True), (False, True)
        ):
            kind, local, total = MoEActivation(name), expert_map if mapped else None, 8 if mapped else 5
            x, w1, w2, *biases = layer(9, name, torch.float16)
            topk = 1 if on_input else 3
            weights, ids = torch.rand(9, topk), torch.randint(0, total, (9, topk), dtype=torch.int32)
            limits = (1.702, 1.0, 7.0) if name == "swigluoai_uninterleave" else ()
            quant_config = biased_moe_quant_config(*biases, *limits)
            kernel = modular_kernel(x.dtype, total, quant_config)
            call = functools.partial(kernel.apply, x, w1, w2, weights, ids, kind, total, local, on_input)
            got = call()
            with mock.patch.object(TritonExperts, "apply", own_apply):
                near(got, call(), f"TritonExperts, {name} {mapped=} {on_input=}")
            if not limits:
                got = home.fused_experts(x, w1, w2, weights, ids, kind, on_input, total, local, quant_config)
                theirs = home.fused_experts_impl(
                    x, w1, w2, weights, ids, name, on_input, global_num_experts=total, expert_map=local,
                    w1_bias=biases[0], w2_bias=biases[1],
                )  # fmt: skip
                near(got, theirs, f"fused_experts, {name} {mapped=} {on_input=}")


def near(got: torch.Tensor, wanted: torch.Tensor, case: str) -> None:
    torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.005, msg=f"{case}: not as vLLM's own")


def layer(tokens: int, activation: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states of 16, weights of five experts with an intermediate size of 24, and biases."""
    rows = 48 if activation in cpu_experts.GATED else 24
    shapes = ((tokens, 16), (5, rows, 16), (5, 16, 24), (5, rows), (5, 16))
    return tuple((torch.randn(shape) * 0.3).to(dtype) for shape in shapes)


def modular_kernel(dtype: torch.dtype, num_experts: int, quant_config: Any) -> Any:
    """What vLLM makes of a layer whose oracle says Triton, and a workspace that nobody has used. Activations
    come with each call: without a GPU, a configuration refuses those that have no gate."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle

    moe_config = config.FusedMoEConfig(
        num_experts=num_experts, experts_per_token=3, hidden_dim=16, intermediate_size=24,
        num_local_experts=5, num_logical_experts=num_experts, activation=MoEActivation.SILU, device="cpu",
        routing_method=config.RoutingMethodType.Default, in_dtype=dtype,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cpu"))
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
    expert_map = torch.tensor([0, -1, 1, -1, 2, 3, -1, 4], dtype=torch.int32)
    own_applies = {cls: originals[f"{triton_moe.__name__}:{cls.__name__}.apply"] for cls in (triton, wna16)}
    for format, mapped in itertools.product(FORMATS, (False, True)):
        case = f"{format}, {mapped=}"
        x, w1, w2, quant_config, values = quantised_layer(format)
        cls = wna16 if format.startswith("int4") else triton
        local, total = (expert_map, 8) if mapped else (None, 5)
        weights, ids = torch.rand(9, 3), torch.randint(0, total, (9, 3), dtype=torch.int32)
        wanted = cpu_experts.fused_experts(x, *values, weights, ids, "silu", False, local)
        got = home.fused_experts(x, w1, w2, weights, ids, silu, False, total, local, quant_config)
        near_in_fp32(got, wanted, f"fused_experts, {case}")
        kernel = quantised_kernel(cls, x.dtype, total, quant_config)
        call = functools.partial(kernel.apply, x, w1, w2, weights, ids, silu, total, local, False)
        expect(call(), got, f"{cls.__name__}, {case}")
        ours_again = home.fused_experts(x, w1, w2, weights, ids, silu, False, total, local, quant_config)
        expect(ours_again, got, f"a second call, {case}")
        limit = 0.06 if quant_config.quant_dtype else 0.002  # of activations in fp8, of weights in 16 bits
        with as_of_no_gpu():
            # With a map, vLLM's function takes the largest value of rows that it has not written.
            if not (mapped and format == "fp8 by tensors"):
                theirs = home.fused_experts_impl(
                    x, w1, w2, weights, ids, "silu", per_channel_quant=quant_config.per_act_token_quant,
                    global_num_experts=total, expert_map=local,
                    **{name: getattr(quant_config, name) for name in SAID},
                )  # fmt: skip
                quite_near(got, theirs, limit, f"fused_experts, {case}")
            # As ours would leave it: with activations that nobody has quantised, until vLLM's own does.
            with mock.patch.object(cls, "apply", own_applies[cls]):
                quite_near(got, call(), limit, f"{cls.__name__}, {case}")
            if quant_config.quant_dtype:
                inner = quantised_kernel(inside_of(FallbackExperts, triton), x.dtype, total, quant_config)
                for _ in range(2):  # the first call is when ours learns where it is
                    theirs = inner.apply(x, w1, w2, weights, ids, silu, total, local, False)
                    quite_near(theirs, got, limit, f"inside of another class, {case}")

    x, w1, w2, quant_config, _ = quantised_layer("fp8 by blocks")
    weights, ids = torch.rand(9, 3), torch.randint(0, 5, (9, 3), dtype=torch.int32)
    many = x.repeat(5, 1), w1, w2, weights.repeat(5, 1), ids.repeat(5, 1)
    kernel = quantised_kernel(triton, x.dtype, 5, quant_config)
    for tokens in (45, 44, 1):
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
        call = functools.partial(home.fused_experts, x, *stored, weights, ids, quant_config=left)
        with mock.patch.object(home, "fused_experts_impl", side_effect=NotImplementedError):
            fails_in(own, call)
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
    x = torch.randn(9, 128).to(torch.bfloat16 if kind == "fp8" else torch.float16)
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
        packed = [zero[:, ::2] | zero[:, 1::2] << 4 for zero in zeros]
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
        num_local_experts=5, num_logical_experts=num_experts, activation=MoEActivation.SILU, device="cpu",
        routing_method=config.RoutingMethodType.Default, in_dtype=dtype,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cpu"))
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
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    if not error < limit:
        raise SystemExit(f"{case}: {error:.4f} from vLLM's own")


def fails_in(own: Any, call: Any, *arguments: Any) -> None:
    """That vLLM's own function runs, as far as something that needs a GPU."""
    try:
        call(*arguments)
    except Exception as error:
        if own.__code__ in (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)):
            return
        raise
    raise SystemExit(f"{own.__qualname__}: was not called")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
