"""moe_align_block_size on a GPU with arrays of CuPy and JAX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from align_gpu import drawn, half_local

from cupy_moe import moe_align_block_size
from cupy_moe.cpu import align as cpu_align

pytestmark = pytest.mark.gpu


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    ids = drawn((4096, 4), -1, 65)
    expected = cpu_align.moe_align_block_size(ids, 16, 64, half_local(64), True, True)
    aligned: Any = moe_align_block_size(cupy.asarray(ids), 16, 64, cupy.asarray(half_local(64)), True, True)
    for result, wanted in zip(aligned, expected, strict=True):
        assert isinstance(result, cupy.ndarray)
        assert (result.get() == wanted.cpu().numpy()).all()
    out: Any = tuple(cupy.full(len(wanted), 12_345, dtype=cupy.int32) for wanted in expected)
    again = moe_align_block_size(
        cupy.asarray(ids).T.copy().T, 16, 64, cupy.asarray(half_local(64)), True, True, out=out
    )
    assert all(a is b for a, b in zip(again, out, strict=True))
    assert all((a.get() == b.cpu().numpy()).all() for a, b in zip(out, expected, strict=True))


def test_cupy_arrays_of_another_stream() -> None:
    """torch waits for the producer's stream, and the consumer's reads wait for the kernel."""
    cupy = pytest.importorskip("cupy")
    late, before = cupy.asarray(drawn((4096,), 0, 64)), cupy.asarray(drawn((4096,), 0, 7))
    expected = cpu_align.moe_align_block_size(torch.from_dlpack(late), 16, 64)
    ids = before.copy()
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
            torch.cuda._sleep(20_000_000)
        ids[...] = late
        aligned: Any = moe_align_block_size(ids, 16, 64)
        copies = [result.copy() for result in aligned]
        assert not stream.done, "the call waited for its stream"
    stream.synchronize()
    assert all((a.get() == b.cpu().numpy()).all() for a, b in zip(copies, expected, strict=True))


def test_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"jax has no GPU here: {error}")
    ids = drawn((1024, 4), -1, 65)
    expected = cpu_align.moe_align_block_size(ids, 16, 64)
    aligned = moe_align_block_size(jax.device_put(ids.cpu().numpy(), device), 16, 64)
    for result, wanted in zip(aligned, expected, strict=True):
        assert isinstance(result, jax.Array)
        assert result.tolist() == wanted.tolist()
