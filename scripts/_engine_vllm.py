"""Runs the functions of cupy_moe.compat.vllm inside of the vLLM that is installed here, on CPU tensors.

    PYTHONPATH=.:tests python scripts/_engine_vllm.py

Most of vLLM's kernels have no CPU version, but its modules can be imported, and what calls the kernels is
Python. Results are compared with the specification (of align: with plain loops), and with vLLM's own PyTorch
code where it has any.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import pkgutil
import sys
from typing import Any

import torch
import vllm
import vllm.model_executor.layers.fused_moe as fused_moe
from align_cases import naive
from engine_signatures import RELEASES, of_function

from cupy_moe.compat import vllm as ours
from cupy_moe.cpu import align_batched as cpu_align_batched
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
        ours.disable()
        expect(holders(stand_ins), none, f"enabled {when}: names of ours that are left")
        expect(holders(originals), taken, f"enabled {when}: names given back")
        print(f"enabled {when}: {count(at_once)} names replaced, {count(taken)} given back")
    print(f"vLLM {vllm.__version__}: {len(places)} functions as declared, replaced, driven and given back")


def expect(got: Any, wanted: Any, what: str) -> None:
    same = torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted
    if not same:
        raise SystemExit(f"{what}:\n got {got}\n not {wanted}")


def look_up(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def import_all(package: Any) -> None:
    """All modules of a package, but those for libraries and hardware that are not here."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(f"left out: {module.name}: {error}")


def holders(functions: dict[str, Any]) -> Places:
    """Where vLLM keeps each function: modules and names. Fails if it keeps one elsewhere, out of reach."""
    modules = {id(vars(module)): name for name, module in sys.modules.items() if hasattr(module, "__dict__")}
    for known in (functions, ours._switch._functions, *ours._switch._pairs):
        modules[id(known)] = ours.__name__
    found: Places = {place: set() for place in functions}
    for place in functions:
        for holder in gc.get_referrers(functions[place]):
            module = modules.get(id(holder))
            if module is None:
                raise SystemExit(f"{place}: kept by a {type(holder)}: {str(holder)[:200]}")
            if module.startswith("vllm"):
                found[place] |= {(module, name) for name in holder if holder[name] is functions[place]}
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


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
