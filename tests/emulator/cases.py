"""Random calls of every operator, by a seed: sizes around what kernels and plans care about, and garbage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from operator_cases import comparable

from cupy_moe import (
    batched_moe_align_block_size,
    moe_align_block_size,
    moe_lora_align_block_size,
    moe_permute,
    moe_sort,
    moe_sum,
    moe_unpermute,
)
from cupy_moe.cpu import align as cpu_align
from cupy_moe.cpu import align_batched as cpu_align_batched
from cupy_moe.cpu import align_lora as cpu_align_lora
from cupy_moe.cpu import gate as cpu_gate
from cupy_moe.cpu import moe_sum as cpu_moe_sum
from cupy_moe.cpu import permute as cpu_permute
from cupy_moe.cpu import quantize as cpu_quantize
from cupy_moe.cpu import sort as cpu_sort
from cupy_moe.operators import quantize as quantize_operator
from cupy_moe.operators.gate import GateOptions, _run
from cupy_moe.plans.align import ALIGN_KERNELS
from cupy_moe.plans.base import round_up
from cupy_moe.plans.gate import GATE_KERNELS
from cupy_moe.plans.permute import PERMUTE_KERNELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID_TYPES = (torch.int32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Placed(NamedTuple):
    """A copy of a tensor between guards, with its strides, and as far off a multiple of 16 bytes."""

    tensor: torch.Tensor
    memory: torch.Tensor  # bytes, the guards too
    begin: int
    end: int


GUARD, POISON = 256, 0x5A


def place(tensor: torch.Tensor, device: str = "cpu") -> Placed:
    return place_all([tensor], device)[0]


def place_all(tensors: Iterable[torch.Tensor], device: str) -> list[Placed]:
    """Of tensors on the CPU, in one piece of memory, as each copy to a GPU takes its time."""
    like, sizes = list(tensors), [_guarded_bytes(tensor) for tensor in tensors]
    memory = torch.full((sum(sizes),), POISON, dtype=torch.uint8)
    for placed, tensor in zip(_views(memory, like, sizes), like, strict=True):
        placed.tensor.copy_(tensor)
    return _views(memory.to(device), like, sizes)


def place_poison(like: torch.Tensor) -> Placed:
    """Memory beside `like` that nobody has written."""
    size = _guarded_bytes(like)
    memory = torch.full((size,), POISON, dtype=torch.uint8, device=like.device)
    return _views(memory, [like], [size])[0]


def _num_bytes(tensor: torch.Tensor) -> int:
    reach = sum(stride * (length - 1) for stride, length in zip(tensor.stride(), tensor.shape, strict=True))
    return (reach + 1) * tensor.element_size() if tensor.numel() else 0


def _guarded_bytes(tensor: torch.Tensor) -> int:
    return round_up(2 * GUARD + tensor.data_ptr() % 16 + _num_bytes(tensor), 16)


def _views(memory: torch.Tensor, like: list[torch.Tensor], sizes: list[int]) -> list[Placed]:
    found = []
    for part, tensor in zip(memory.split(sizes), like, strict=True):
        first, num_bytes = GUARD + tensor.data_ptr() % 16, _num_bytes(tensor)
        inner = part[first : first + num_bytes].view(tensor.dtype)
        begin = part.data_ptr() + first
        copy = inner.as_strided(tensor.shape, tensor.stride())
        found.append(Placed(copy, part, begin, begin + num_bytes))
    return found


Results = tuple[torch.Tensor, ...]


def same_results(call: Call, results: Results, expected: Results) -> str:
    """What is wrong with results; "" if nothing is."""
    pairs = zip(results, expected, strict=True)
    return "" if all(same_bits(a, b) for a, b in pairs) else "other results"


class Call(NamedTuple):
    """A call of an operator, its tensors by name apart from the rest, and what it has to give."""

    function: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    rest: dict[str, Any]
    expected: Callable[..., Any]
    kernels: tuple[str, ...] = ()  # that can be forced
    compare: Callable[[Call, Results, Results], str] = same_results
    plans: bool = True  # the kernel that the plan chooses gives the same

    def specified(self) -> tuple[torch.Tensor, ...]:
        return as_tuple(self.expected(**self.tensors, **self.rest))

    def run(self, place: Callable[[torch.Tensor], torch.Tensor], kernel: str | None = None) -> Any:
        """The results, of tensors that `place` has moved to where they belong."""
        forced = {} if kernel is None else {"kernel": kernel}
        placed = {name: place(tensor) for name, tensor in self.tensors.items()}
        return as_tuple(self.function(**placed, **self.rest, **forced))


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    """Those that were asked for."""
    results = results if isinstance(results, tuple) else (results,)
    return tuple(comparable(result) for result in results if result is not None)


def align(seed: int, most_ids: int = 700) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    num_experts = pick.choice((1, 2, 3, 7, 8, 31, 32, 33, 64, 100, 255, 256, 257, 700))
    num_ids = pick.choice(
        (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, pick.randint(130, most_ids))
    )
    low, high = pick.choice(
        ((0, num_experts), (0, num_experts), (-3, num_experts + 3), (0, 1), (-(2**31), 2**31 - 1))
    )
    ids = torch.randint(low, high, (num_ids,), dtype=torch.int64)
    dtype = pick.choice(ID_TYPES)
    ids = ids.to(dtype)
    layout = pick.choice(("plain", "plain", "plain", "columns", "offset"))
    if layout == "columns" and num_ids > 1:
        ids = torch.stack([ids, ids.flip(0)], dim=1)[:, 0]
    elif layout == "offset" and num_ids > 1:
        ids = ids[1:]
    tensors = {"topk_ids": ids}
    if pick.random() < 0.4:
        tensors["expert_map"] = torch.randint(-1, num_experts + 2, (num_experts,), dtype=torch.int32)
    rest = {
        "block_size": pick.choice((1, 2, 3, 4, 16, 17, 64, 128)),
        "num_experts": num_experts,
        "pad_sorted_ids": pick.random() < 0.5,
        "ignore_invalid_experts": pick.random() < 0.5,
    }
    return Call(moe_align_block_size, tensors, rest, cpu_align.moe_align_block_size, ALIGN_KERNELS)


def sort(seed: int, most_ids: int = 700) -> Call:
    call, pick = align(seed, most_ids), random.Random(-seed)
    asked = {f"return_{name}": pick.random() < 0.7 for name in ("inverse", "offsets", "counts")}
    more: dict[str, Any] = {"fine_block_size": None, "offsets_dtype": pick.choice((torch.int32, torch.int64))}
    if pick.random() < 0.6:
        block_size = call.rest["block_size"]
        divisors = [size for size in range(1, block_size + 1) if block_size % size == 0]
        more["fine_block_size"] = pick.choice(divisors)
    tensors = dict(call.tensors)
    if pick.random() < 0.6:
        weights = torch.randn(2, *tensors["topk_ids"].shape)
        tensors["topk_weights"] = weights[0] if pick.random() < 0.8 else weights.t().contiguous().t()[0]

    def expected(**arguments: Any) -> Any:
        flags = [arguments.pop(name) for name in asked]
        kept = (True, True, True, *flags, True, True)
        results = cpu_sort.moe_sort(**arguments)
        return tuple(result if keep else None for result, keep in zip(results, kept, strict=True))

    return Call(moe_sort, tensors, {**call.rest, **asked, **more}, expected, call.kernels[1:])


def align_lora(seed: int, most_ids: int = 700) -> Call:
    call, pick = align(seed, most_ids), random.Random(-seed)
    ids, topk, max_loras = (
        call.tensors["topk_ids"],
        pick.choice((1, 1, 2, 3, 8)),
        pick.choice((1, 2, 3, 5, 9)),
    )
    num_tokens = len(ids) // topk
    ids = ids[: num_tokens * topk].view(num_tokens, topk)
    low, high = pick.choice(((0, max_loras), (0, max_loras), (-2, max_loras + 2), (-(2**31), 2**31 - 1)))
    tensors = {
        "topk_ids": ids,
        "token_lora_mapping": torch.randint(low, high, (num_tokens,), dtype=torch.int32),
        **{name: tensor for name, tensor in call.tensors.items() if name == "expert_map"},
    }
    if pick.random() < 0.5:
        flags = torch.randint(-1, 2, (max_loras + pick.choice((0, 1)),), dtype=torch.int32)
        tensors["adapter_enabled"] = flags if pick.random() < 0.5 else flags > 0
    rest = {**call.rest, "max_loras": max_loras}
    del rest["ignore_invalid_experts"]
    specified = cpu_align_lora.moe_lora_align_block_size
    return Call(moe_lora_align_block_size, tensors, rest, specified, ALIGN_KERNELS)


ROW_TYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float32, torch.int64, torch.float16)


def rows(pick: random.Random, number: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits, in any layout but with elements that lie apart."""
    if width == 0:
        return torch.empty((number, 0), dtype=dtype)
    as_bytes = torch.randint(0, 256, (number, width * dtype.itemsize), dtype=torch.uint8)
    result = as_bytes.view(dtype)
    layout = pick.choice(("plain", "plain", "plain", "wide", "offset"))
    if layout == "wide":
        result = torch.cat([as_bytes, as_bytes], dim=1).view(dtype)[:, :width]
    elif layout == "offset" and number:
        flat = torch.cat([as_bytes.new_ones(dtype.itemsize), as_bytes.flatten()])
        result = flat.view(dtype)[1:].view(number, width)
    return result


def permute(seed: int, most_tokens: int = 90) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    num_experts = pick.choice((1, 2, 7, 8, 33, 64, 257, 700))
    num_tokens = pick.choice((0, 1, 1, 2, 3, 8, 9, 31, pick.randint(4, most_tokens)))
    topk = pick.choice((1, 2, 3, 4, 6, 8, 9))
    low, high = pick.choice(
        ((0, num_experts), (0, num_experts), (-3, num_experts + 3), (-(2**31), 2**31 - 1))
    )
    ids = torch.randint(low, high, (num_tokens, topk)).to(pick.choice(ID_TYPES))
    if pick.random() < 0.2:
        ids = ids.t().contiguous().t()
    dtype = pick.choice(ROW_TYPES)
    width = pick.choice((0, 1, 8, 16, 33, 64, 64, 128, 256, 520))
    tensors = {"hidden_states": rows(pick, num_tokens, width, dtype), "topk_ids": ids}
    if pick.random() < 0.4:
        tensors["expert_map"] = torch.randint(-1, num_experts + 2, (num_experts,), dtype=torch.int32)
    if pick.random() < 0.5:
        scales = rows(pick, num_tokens, pick.choice((0, 1, 3, 40)), pick.choice(ROW_TYPES))
        tensors["scales"] = scales if pick.random() < 0.7 else scales.t().contiguous().t()
    rest = {
        "num_experts": num_experts,
        "block_size": pick.choice((1, 1, 1, 2, 3, 16, 64)) if num_experts < 100 else 1,
        "offsets_dtype": pick.choice((torch.int32, torch.int64)),
    }
    options: dict[str, Any] = {"column_major_scales": pick.random() < 0.4, "fill_tail": pick.random() < 0.7}

    def run(**arguments: Any) -> Any:
        return _bits(moe_permute(**arguments, **options), options["fill_tail"])

    def expected(**arguments: Any) -> Any:
        return _bits(cpu_permute.moe_permute(**arguments), options["fill_tail"])

    return Call(run, tensors, rest, expected, PERMUTE_KERNELS)


def _bits(results: tuple[Any, ...], has_tail: bool) -> tuple[Any, ...]:
    """The bits of rows and scales; without the tail, if that is not written, which the emulator can tell."""
    permuted, *indices, scales = results
    used = len(permuted) if has_tail else int(indices[1][-1])
    bits = [None if kept is None else cpu_permute.as_integers(kept) for kept in (permuted, scales)]
    for kept in bits if hasattr(results, "_fields") and permuted.device.type == "cpu" else ():
        if kept is not None:
            poison = torch.full((kept.element_size(),), POISON, dtype=torch.uint8).view(kept.dtype)
            assert (kept[used:] == poison).all()
    return *indices, *(kept if kept is None else kept[:used] for kept in bits)


def unpermute(seed: int) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    tokens, topk = pick.choice((0, 1, 2, 3, 9)), pick.choice((1, 2, 3, 5, 8, 9, 17))
    num_rows, hidden = pick.choice((0, 1, 5, 60)), pick.choice((1, 8, 16, 33, 64, 96))
    values = torch.randn(num_rows, hidden) * pick.choice((1.0, 1e-5, 3e4))
    if pick.random() < 0.3:
        values[torch.rand(values.shape) < 0.2] = pick.choice((torch.nan, torch.inf, -0.0, 1e-40))
    permuted = values.to(pick.choice(DTYPES))
    if pick.random() < 0.3:
        permuted = (
            permuted.t().contiguous().t() if pick.random() < 0.5 else torch.cat([permuted] * 2, 1)[:, :hidden]
        )
    low, high = pick.choice(((0, max(1, num_rows)), (-2, num_rows + 2), (-(2**31), 2**31 - 1)))
    tensors = {
        "permuted": permuted,
        "inverse_ids": torch.randint(low, high, (tokens, topk), dtype=torch.int32),
    }
    if pick.random() < 0.6:
        tensors["topk_weights"] = torch.randn(tokens, topk)
    if pick.random() < 0.4:
        tensors["shared_output"] = torch.randn(tokens, hidden).to(permuted.dtype)
    if pick.random() < 0.4:
        offsets = torch.randint(-1, num_rows + 2, (3,), dtype=pick.choice((torch.int32, torch.int64)))
        tensors["expert_offsets"] = offsets
    rest = {"routed_scaling_factor": pick.choice((1.0, 2.5, 0.0, -1.0))}
    return Call(moe_unpermute, tensors, rest, cpu_permute.moe_unpermute)


def align_batched(seed: int) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    num_batches, most = pick.choice((0, 1, 2, 8, 33, 100)), pick.choice((1, 5, 16, 64, 100))
    counts = torch.randint(-2, most + 3, (num_batches,), dtype=torch.int32)
    if pick.random() < 0.2:
        counts = torch.randint(-(2**31), 2**31 - 1, (num_batches,), dtype=torch.int32)
    rest = {"max_tokens_per_batch": most, "block_size": pick.choice((1, 3, 16, 64))}
    tensors = {"expert_num_tokens": counts}
    return Call(batched_moe_align_block_size, tensors, rest, cpu_align_batched.batched_moe_align_block_size)


def sum_up(seed: int) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    dtype = pick.choice(DTYPES)
    tokens, topk = pick.choice((1, 2, 3, 9)), pick.choice((1, 2, 3, 4, 5, 6, 8, 9, 10, 16))
    hidden = pick.choice((1, 8, 16, 33, 64, 96, 136))
    values = torch.randn(tokens, topk, hidden) * pick.choice((1.0, 1e-5, 3e4))
    if pick.random() < 0.3:
        values[torch.rand(values.shape) < 0.2] = pick.choice((torch.nan, torch.inf, -0.0, 1e-40))
    input = values.to(dtype)
    if pick.random() < 0.3:
        input = input.transpose(0, 1).contiguous().transpose(0, 1)
    tensors = {"input": input}
    rest: dict[str, Any] = {}
    if pick.random() < 0.3:  # the plain sum, for which there are kernels of its own
        return Call(moe_sum, tensors, rest, cpu_moe_sum.moe_sum)
    if pick.random() < 0.5:
        tensors["topk_weights"] = torch.randn(tokens, topk)
    if pick.random() < 0.5:
        num_experts = pick.choice((1, 4, 9))
        ids = torch.randint(-2, num_experts + 2, (tokens, topk), dtype=pick.choice(ID_TYPES[:2]))
        if ids.dtype == torch.int64:  # of which the lower words alone would be experts
            ids[torch.rand(ids.shape) < 0.2] += 2**32
        tensors["topk_ids"] = ids
        if pick.random() < 0.5:
            tensors["expert_map"] = torch.randint(-1, num_experts + 1, (num_experts,), dtype=torch.int32)
    if pick.random() < 0.4:
        tensors["shared_output"] = torch.randn(tokens, hidden).to(dtype)
    if pick.random() < 0.4:
        rest["routed_scaling_factor"] = pick.choice((2.5, 0.0, -1.0))
    return Call(moe_sum, tensors, rest, cpu_moe_sum.moe_sum)


def gate(seed: int) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    num_experts = pick.choice((1, 2, 5, 8, 16, 31, 32, 33, 64, 65, 128, 160, 256, 300, 512, 700))
    tokens, groups, chosen = pick.choice((1, 2, 3, 7)), 1, 1
    divisors = [g for g in (2, 3, 4, 5, 8, 32, 64) if num_experts % g == 0]
    if divisors and pick.random() < 0.4:
        groups = pick.choice(divisors)
        chosen = pick.randint(1, groups)
    topk = pick.randint(1, min(pick.choice((1, 2, 8, 32, 64)), chosen * (num_experts // groups)))
    logits = torch.randn(tokens, num_experts) * pick.choice((1.0, 1.0, 10.0, 60.0))
    if pick.random() < 0.3:
        logits = torch.round(logits)  # ties
    if pick.random() < 0.15:
        logits[torch.rand(logits.shape) < 0.1] = pick.choice((torch.nan, torch.inf, -torch.inf))
    tensors = {"gating_output": logits.to(pick.choice(DTYPES))}
    if pick.random() < 0.3:
        tensors["gating_output"] = torch.cat([tensors["gating_output"]] * 2, dim=1)[:, :num_experts]
    if pick.random() < 0.4:
        tensors["e_score_correction_bias"] = torch.randn(num_experts) * 0.3
    if pick.random() < 0.2:
        tensors["padding_mask"] = torch.rand(tokens) < 0.4
    scoring = pick.choice(("softmax", "sigmoid", "none", "softplus_sqrt"))
    num_shared, softcap = pick.choice((0, 0, 1, 3)), pick.choice((0.0, 0.0, 0.0, 30.0))
    if scoring == "softplus_sqrt" and pick.random() < 0.3:
        groups, chosen, softcap = 1, 1, 0.0
        tensors.pop("e_score_correction_bias", None)
        most = pick.choice((num_experts, num_experts + 2, 2**31 - 1))
        low = -1 if most > num_experts else 0
        index = pick.choice((torch.int32, torch.int64))
        tensors["hash_table"] = torch.randint(low, most, (5, topk), dtype=index)
        low, high = pick.choice(((0, 5), (-2, 7), (-(2**31), 2**31 - 1)))
        tensors["input_ids"] = torch.randint(
            low, high, (tokens,), dtype=pick.choice((torch.int32, torch.int64))
        )
    factor = pick.choice((1.0, 2.5))
    options = GateOptions(
        topk, pick.random() < 0.5, scoring, groups, chosen, factor, softcap, num_shared, 0.4
    )  # fmt: skip
    names = ("e_score_correction_bias", "padding_mask")

    def run(**arguments: Any) -> Any:
        return _run(**{**dict.fromkeys(names), "ids_dtype": torch.int32, **arguments})

    forced = () if "hash_table" in tensors else GATE_KERNELS
    return Call(run, tensors, options._asdict(), cpu_gate.gate, forced, _same_gating)


def quantize(seed: int) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    tokens, group_size = pick.choice((0, 1, 2, 3, 9, 40)), pick.choice((0, 32, 64, 128))
    gated = group_size > 0 and pick.random() < 0.4
    hidden = group_size * pick.choice((1, 2, 3, 5)) or pick.choice((0, 1, 16, 33, 496, 512, 513, 528, 1024))
    if group_size == 0 and pick.random() < 0.1:
        tokens, hidden = 2, pick.choice((16_384, 16_385, 33_000))
    values = torch.randn(tokens, hidden * (2 if gated else 1)) * pick.choice(
        (1.0, 1e-4, 30.0, 3e4, 1e-40, 1e38)
    )
    if pick.random() < 0.5:
        values *= torch.randn(values.shape).exp2() * 2.0 ** torch.randint(-9, 9, (tokens, 1))
    for _ in range(pick.choice((0, 0, 1, 3))):
        special = pick.choice((torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 3.4e38, 1e-45))
        values[torch.rand(values.shape) < pick.choice((0.01, 0.3, 0.9))] = special
    x = values.to(pick.choice(DTYPES))
    layout = pick.choice(("plain", "plain", "wide", "offset", "columns"))
    if layout == "wide":
        x = torch.cat([x, x.new_ones(tokens, pick.choice((1, 8, 16)))], dim=1)[:, : x.shape[1]]
    elif layout == "offset":
        x = torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)
    elif layout == "columns":
        x = x.t().contiguous().t()
    tensors = {"x": x}
    topk = pick.choice((1, 2, 3, 8))
    if pick.random() < 0.4:
        low, high = pick.choice(((0, max(1, tokens * topk)), (-2, tokens * topk + 3), (-(2**31), 2**31 - 1)))
        ids = torch.randint(low, high, (pick.choice((0, 1, 5, 70)),), dtype=torch.int32)
        tensors["sorted_token_ids"] = ids if pick.random() < 0.8 else torch.stack([ids, ids], dim=1)[:, 0]
    rest = {
        "group_size": group_size,
        "gated": gated,
        "eps": pick.choice((1e-10, 1e-10, 5.3e-36, 1e-3, 3e38)),
        "scales_power_of_2": pick.random() < 0.4,
        "topk": topk,
    }
    column_major = pick.random() < 0.4

    def run(**arguments: Any) -> Any:
        return quantize_operator._run(**arguments, column_major_scales=column_major)

    return Call(run, tensors, rest, cpu_quantize.quantize)


OPERATORS: dict[str, Callable[[int], Call]] = {
    "align": align,
    "align_batched": align_batched,
    "moe_sum": sum_up,
    "gate": gate,
    "quantize": quantize,
    "sort": sort,
    "align_lora": align_lora,
    "permute": permute,
    "unpermute": unpermute,
}


def _same_gating(call: Call, results: Results, expected: Results) -> str:
    """Only ids can be the same to the last bit."""
    weights, ids = results
    theirs, their_ids = expected
    same = ids.long() == their_ids.long()
    if "e_score_correction_bias" not in call.tensors and not same.all():
        return "other ids"
    rows = same.all(dim=1)
    if rows.float().mean() < 0.5:  # equal within rounding may change places
        return "other ids in most rows"
    bound = 1e-5 if call.rest["softcap"] or call.rest["scoring_func"] == "none" else 2e-6
    error = ((weights - theirs).abs() - bound * theirs.abs())[rows]
    return "" if not len(error) or error.max() <= 1e-37 else f"other weights, by {error.max()}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, and NaN where the other is."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a.long(), b.long())
    both_nan = a.isnan() & b.isnan()
    if a.dtype != b.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool((both_nan | (a.contiguous().view(bits) == b.contiguous().view(bits))).all())
