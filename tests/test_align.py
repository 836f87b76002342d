"""moe_align_block_size on the CPU, compared with loops; every wrong call; arrays of other libraries."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from align_cases import ID_TYPES, layouts, naive
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import IDS, MAP, Case

from cupy_moe import MoEAlignment, aligned_sizes, moe_align_block_size

CASES = {
    "align": Case(
        moe_align_block_size, {"topk_ids": IDS, "block_size": 4, "num_experts": 8, "expert_map": MAP}
    )
}

EXAMPLE = [[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]
IDS = torch.tensor(EXAMPLE, dtype=torch.int32)


def as_lists(aligned: MoEAlignment[Any]) -> tuple[list[int], list[int], list[int]]:
    assert all(result.dtype == torch.int32 for result in aligned)
    sorted_token_ids, expert_ids, num_tokens_post_pad = (result.tolist() for result in aligned)
    return sorted_token_ids, expert_ids, num_tokens_post_pad


def make_out(num_ids: int, num_experts: int, block_size: int, pad: bool = False) -> tuple[torch.Tensor, ...]:
    lengths = *aligned_sizes(num_ids, num_experts, block_size, pad), 1
    return tuple(torch.full((length,), 12_345, dtype=torch.int32) for length in lengths)


def test_example() -> None:
    aligned = moe_align_block_size(IDS, 4, 5)
    assert aligned.sorted_token_ids.tolist() == [
        3, 6, 9, 12,  0, 4, 10, 12,  1, 7, 11, 12,  2, 5, 8, 12,  12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12
    ]  # fmt: skip
    assert aligned.expert_ids.tolist() == [1, 2, 3, 4, -1, -1, -1]
    assert aligned.num_tokens_post_pad.tolist() == [16]
    assert as_lists(aligned) == naive(IDS.flatten().tolist(), 4, 5)


@given(data=st.data())
def test_any_routing(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(ID_TYPES))
    num_experts, block_size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    tokens, topk = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 5))
    limits = torch.iinfo(dtype)
    near = st.integers(max(-3, limits.min), num_experts + 3)
    ids = data.draw(
        st.lists(
            near | st.sampled_from([limits.min, limits.max]), min_size=tokens * topk, max_size=tokens * topk
        )
    )
    entries = st.integers(-3, num_experts + 3) | st.sampled_from([-(2**31), 2**31 - 1])
    expert_map = data.draw(st.none() | st.lists(entries, min_size=num_experts, max_size=num_experts))
    pad, ignore = data.draw(st.booleans()), data.draw(st.booleans())
    topk_ids = torch.tensor(ids, dtype=dtype).reshape(tokens, topk)
    layout = data.draw(st.sampled_from(sorted(layouts(topk_ids))))
    mapping = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)

    expected = naive(ids, block_size, num_experts, expert_map, pad, ignore)
    aligned = moe_align_block_size(layouts(topk_ids)[layout], block_size, num_experts, mapping, pad, ignore)
    assert as_lists(aligned) == expected
    out = make_out(len(ids), num_experts, block_size, pad)
    moe_align_block_size(topk_ids, block_size, num_experts, mapping, pad, ignore, out=out)  # type: ignore[arg-type]
    assert tuple(result.tolist() for result in out) == expected


def test_larger_than_hypothesis_goes() -> None:
    random.seed(0)
    few, many = ((40, 3, 65_536), (999, 1000, 7), (1000, 1000, 16)), ((5000, 64, 128), (2000, 65_536, 3))
    for num_ids, num_experts, block_size in (*few, *many, (7, 65_536, 32_768)):
        ids = [random.randrange(-1, num_experts + 1) for _ in range(num_ids)]
        aligned = moe_align_block_size(torch.tensor(ids), block_size, num_experts)
        assert as_lists(aligned) == naive(ids, block_size, num_experts), f"{num_ids=} {num_experts=}"


@pytest.mark.parametrize("shape", [(0,), (0, 2), (3, 0), (1, 0, 4)])
def test_no_ids(shape: tuple[int, ...]) -> None:
    for num_experts in (1, 5):
        for pad in (False, True):
            aligned = moe_align_block_size(torch.empty(shape, dtype=torch.int32), 4, num_experts, None, pad)
            assert as_lists(aligned) == ([], [], [0])


def test_any_shape() -> None:
    expected = naive(IDS.flatten().tolist(), 4, 5)
    for shape in ((12,), (12, 1), (1, 12), (2, 2, 3), (1, 4, 1, 3, 1)):
        assert as_lists(moe_align_block_size(IDS.reshape(shape), 4, 5)) == expected
    assert as_lists(moe_align_block_size(torch.tensor(2), 4, 5)) == naive([2], 4, 5)
    expanded = torch.tensor([[1], [3]]).expand(2, 4)
    assert as_lists(moe_align_block_size(expanded, 4, 5)) == naive([1] * 4 + [3] * 4, 4, 5)


def test_keywords_are_those_of_vllm() -> None:
    expert_map = torch.tensor([0, -1, 1, -1, 2], dtype=torch.int32)
    aligned = moe_align_block_size(
        topk_ids=IDS, block_size=4, num_experts=5, expert_map=expert_map, pad_sorted_ids=True,
        ignore_invalid_experts=True,
    )  # fmt: skip
    assert as_lists(aligned) == naive(IDS.flatten().tolist(), 4, 5, expert_map.tolist(), True, True)


def test_expert_map_by_hand() -> None:
    ids, expert_map = torch.tensor([3, 1, 0, 1]), torch.tensor([1, -1, 0, 0], dtype=torch.int32)
    every_block = moe_align_block_size(ids, 2, 4, expert_map)
    assert as_lists(every_block) == ([2, 4, 1, 3, 0, 4, 4, 4], [1, -1, 0, -1], [6])
    local_only = moe_align_block_size(ids, 2, 4, expert_map, ignore_invalid_experts=True)
    assert as_lists(local_only) == ([0, 4, 2, 4, 4, 4, 4, 4], [0, 1, -1, -1], [4])


def test_input_is_left_alone() -> None:
    ids, expert_map = IDS.clone(), torch.tensor([0, -1, 1, 9, 2], dtype=torch.int32)
    moe_align_block_size(ids, 4, 5, expert_map)
    assert torch.equal(ids, IDS)
    assert expert_map.tolist() == [0, -1, 1, 9, 2]


def test_out_is_what_comes_back() -> None:
    out = make_out(12, 5, 4)
    aligned = moe_align_block_size(IDS, 4, 5, out=out)  # type: ignore[arg-type]
    assert all(result is given for result, given in zip(aligned, out, strict=True))
    assert as_lists(aligned) == naive(IDS.flatten().tolist(), 4, 5)
    again = moe_align_block_size(IDS, 4, 5, out=aligned)
    assert again.expert_ids is out[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_out_of_other_shapes(device: str) -> None:
    expected = naive(IDS.flatten().tolist(), 4, 5)
    for shapes in (((3, 9), 7, 1), ((27, 1), 7, 1), (27, (7, 1), 1), (27, 7, ())):
        out: Any = [
            torch.full(torch.empty(shape).shape, -77, dtype=torch.int32, device=device) for shape in shapes
        ]
        aligned = moe_align_block_size(IDS.to(device), 4, 5, out=out)
        assert tuple(result.flatten().tolist() for result in aligned) == expected, f"{shapes=}"


# ---- wrong calls ----------------------------------------------------------------------------

MAP = torch.zeros(5, dtype=torch.int32)
OUT = make_out(12, 5, 4)
WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "float ids": (TypeError, r"topk_ids: expected an integer .*torch\.float32", lambda: align(IDS.float())),
    "bool ids": (TypeError, r"topk_ids: .*torch\.bool", lambda: align(IDS.bool())),
    "a list for ids": (TypeError, r"topk_ids: .*__dlpack__.* got list", lambda: align(EXAMPLE)),
    "None for ids": (TypeError, "topk_ids: .* got None", lambda: align(None)),
    "block_size 0": (ValueError, "block_size: expected 1 to 65536, got 0", lambda: align(IDS, 0)),
    "block_size -1": (ValueError, "block_size: .*got -1", lambda: align(IDS, -1)),
    "block_size too large": (ValueError, "block_size: .*got 65537", lambda: align(IDS, 65_537)),
    "block_size 4.5": (TypeError, "block_size: expected an int, got float", lambda: align(IDS, 4.5)),
    "block_size a string": (TypeError, "block_size: expected an int, got str", lambda: align(IDS, "4")),
    "num_experts 0": (ValueError, "num_experts: expected 1 to 65536, got 0", lambda: align(IDS, 4, 0)),
    "num_experts too large": (ValueError, "num_experts: .*got 65537", lambda: align(IDS, 4, 65_537)),
    "num_experts None": (
        TypeError,
        "num_experts: expected an int, got NoneType",
        lambda: align(IDS, 4, None),
    ),
    "the order of another library": (
        TypeError,
        r"expert_map: .* got the int 3; the order is \(topk_ids, block_size, num_experts, expert_map\)",
        lambda: align(IDS, 5, 4, 3),
    ),
    "a map of int64": (
        TypeError,
        r"expert_map: expected torch\.int32, got torch\.int64",
        lambda: align(map=MAP.long()),
    ),
    "a map of 4": (
        ValueError,
        r"expert_map: .* shape \[5\], got \[4\]",
        lambda: align(map=MAP[:4]),
    ),
    "a map of [5, 1]": (ValueError, r"expert_map: .*got \[5, 1\]", lambda: align(map=MAP[:, None])),
    "a strided map": (ValueError, "expert_map: expected a contiguous", lambda: align(map=MAP.repeat(2)[::2])),
    "a map on another device": (
        ValueError,
        "expert_map: .*on cpu, got meta",
        lambda: align(map=MAP.to("meta")),
    ),
    "a list for the map": (TypeError, "expert_map: .*got list", lambda: align(map=MAP.tolist())),
    "one tensor for out": (
        TypeError,
        "out: expected the tensors sorted_token_ids, .* got torch.Tensor",
        lambda: align(out=MAP),
    ),
    "two for out": (TypeError, "out: expected the tensors .* got 2 of them", lambda: align(out=OUT[:2])),
    "a list in out": (TypeError, "out: .*for expert_ids, got list", lambda: align(out=(OUT[0], [0], OUT[2]))),
    "int64 in out": (TypeError, r"out: .*num_tokens.*int64", lambda: align(out=(*OUT[:2], OUT[2].long()))),
    "a short out": (
        ValueError,
        r"out: .*sorted.*\[27\].*got \[26\]",
        lambda: align(out=(OUT[0][1:], *OUT[1:])),
    ),
    "a long out": (
        ValueError,
        r"out: .*expert_ids.*\[7\].*got \[14\]",
        lambda: align(out=(OUT[0], OUT[1].repeat(2), OUT[2])),
    ),
    "a strided out": (ValueError, "out: .*strides", lambda: align(out=(OUT[0].repeat(2)[::2], *OUT[1:]))),
    "out elsewhere": (
        ValueError,
        "out: sorted_token_ids: .* beside .* got meta",
        lambda: align(out=(OUT[0].to("meta"), *OUT[1:])),
    ),
    "out for other flags": (ValueError, r"out: .*\[28\]", lambda: align(pad_sorted_ids=True, out=OUT)),
    "ids on no known device": (ValueError, "topk_ids: .*meta", lambda: align(IDS.to("meta"))),
    "more than int32 numbers": (
        ValueError,
        "40000 ids, num_experts=65536 .* more than int32 can number",
        lambda: align(torch.zeros(40_000, dtype=torch.int32), 65_536, 65_536),
    ),
}


def align(ids: Any = IDS, block_size: Any = 4, num_experts: Any = 5, map: Any = None, **keywords: Any) -> Any:
    return moe_align_block_size(ids, block_size, num_experts, map, **keywords)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_says_what_is_wrong(name: str) -> None:
    error, message, call = WRONG[name]
    poison = [tensor.clone() for tensor in OUT]
    for _ in range(2):  # the second time from a cache, if there is one
        with pytest.raises(error, match=message):
            call()
    assert all(torch.equal(tensor, before) for tensor, before in zip(OUT, poison, strict=True))


# ---- arrays of other libraries --------------------------------------------------------------


def test_numpy() -> None:
    expert_map = np.array([0, -1, 1, -1, 2], dtype=np.int32)
    for dtype in (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64):
        ids = np.array(EXAMPLE, dtype=dtype)
        aligned = moe_align_block_size(ids, 4, 5)
        assert all(isinstance(result, np.ndarray) and result.dtype == np.int32 for result in aligned)
        assert tuple(result.tolist() for result in aligned) == naive(IDS.flatten().tolist(), 4, 5)
        mapped = moe_align_block_size(ids, 4, 5, expert_map, True, True)
        expected = naive(IDS.flatten().tolist(), 4, 5, expert_map.tolist(), True, True)
        assert tuple(result.tolist() for result in mapped) == expected


def test_numpy_strided() -> None:
    ids = np.array(EXAMPLE, dtype=np.int64)
    expected = naive(IDS.T.flatten().tolist(), 4, 5)
    assert tuple(r.tolist() for r in moe_align_block_size(ids.T, 4, 5)) == expected


def test_numpy_out() -> None:
    out = tuple(np.full(length, 12_345, dtype=np.int32) for length in (27, 7, 1))
    aligned: Any = moe_align_block_size(np.array(EXAMPLE), 4, 5, out=out)  # type: ignore[arg-type]
    assert all(result is given for result, given in zip(aligned, out, strict=True))
    assert tuple(result.tolist() for result in out) == naive(IDS.flatten().tolist(), 4, 5)


def test_numpy_errors() -> None:
    ids = np.array(EXAMPLE)
    with pytest.raises(TypeError, match="the order is"):
        moe_align_block_size(ids, 5, 4, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"topk_ids: expected an integer .*float64"):
        moe_align_block_size(ids.astype(np.float64), 4, 5)
    with pytest.raises(TypeError, match="out: "):
        moe_align_block_size(ids, 4, 5, out=ids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out: "):
        moe_align_block_size(ids, 4, 5, out=3)  # type: ignore[arg-type]


def test_any_array_with_dlpack() -> None:
    class Array:
        """An array of a library that has no from_dlpack to give results back to."""

        def __dlpack__(self, **keywords: Any) -> Any:
            return IDS.__dlpack__(**keywords)

        def __dlpack_device__(self) -> Any:
            return IDS.__dlpack_device__()

    aligned = moe_align_block_size(Array(), 4, 5)
    assert as_lists(aligned) == naive(IDS.flatten().tolist(), 4, 5)  # as tensors, then


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    ids = jax.numpy.array(EXAMPLE, dtype=jax.numpy.int32, device=jax.devices("cpu")[0])
    aligned = moe_align_block_size(ids, 4, 5)
    assert all(isinstance(result, jax.Array) for result in aligned)
    assert tuple(result.tolist() for result in aligned) == naive(IDS.flatten().tolist(), 4, 5)


# ---- the package ----------------------------------------------------------------------------


def test_importing_the_package_imports_neither_torch_nor_cupy() -> None:
    code = "import cupy_moe, sys; print([m for m in ('torch', 'cupy', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cpu_path_needs_no_cupy() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None; import torch, cupy_moe;"
        " print(cupy_moe.moe_align_block_size(torch.tensor([1, 0]), 2, 2)[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 2, 0, 2]"


def test_docstring_names_every_argument() -> None:
    import inspect

    text = inspect.getdoc(moe_align_block_size) or ""  # Python 3.13 itself takes the indentation off
    for name in inspect.signature(moe_align_block_size).parameters:
        assert re.search(rf"^{name}  ", text, re.M), name
