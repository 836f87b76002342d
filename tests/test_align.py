"""moe_align_block_size on the CPU, compared with loops; arrays of other libraries."""

from __future__ import annotations

import random
import re
import subprocess
import sys
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
