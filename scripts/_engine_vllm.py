"""Runs the functions and methods of cupy_moe.compat.vllm inside of the vLLM installed here, on CPU tensors.

    CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 PYTHONPATH=.:tests python scripts/_engine_vllm.py

Most of vLLM's kernels have no CPU version, but its modules can be imported, and what calls the kernels is
Python, and so are the workspaces and the modular kernel around the experts. Results are compared with the
specification (of align: with plain loops), with vLLM's own PyTorch code where it has any, and those of
experts with vLLM's own kernels, which Triton can interpret.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import os
import pkgutil
import sys
import traceback
import types
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
