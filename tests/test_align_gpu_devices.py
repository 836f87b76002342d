"""moe_align_block_size with tensors of several devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from align_gpu import drawn, equal, half_local, possible

from cupy_moe import batched_moe_align_block_size, moe_align_block_size
from cupy_moe.cpu import align as cpu_align
from cupy_moe.cpu import align_batched as cpu_align_batched

pytestmark = pytest.mark.gpu


def test_tensors_on_different_devices() -> None:
    ids = drawn((12,), 0, 5)
    with pytest.raises(
        ValueError, match=r"expert_map: expected it beside the other tensors on cuda:0, got cpu"
    ):
        moe_align_block_size(ids, 4, 5, torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"out: sorted_token_ids: .* beside .* on cuda:0, got cpu"):
        moe_align_block_size(ids, 4, 5, out=tuple(torch.zeros(k, dtype=torch.int32) for k in (27, 7, 1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expert_map: .* beside .* on cpu, got cuda:0"):
        moe_align_block_size(ids.cpu(), 4, 5, torch.zeros(5, dtype=torch.int32, device="cuda"))


on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


@on_two_gpus
def test_on_the_device_of_the_ids() -> None:
    ids = drawn((4096,), 0, 64).to("cuda:1")
    counts = drawn((64,), 0, 33).to("cuda:1")
    expected = cpu_align.moe_align_block_size(ids, 16, 64)
    expected_batched = cpu_align_batched.batched_moe_align_block_size(32, 16, counts)
    for kernel in (None, *possible(ids, 64)):
        for current in (0, 1):
            with torch.cuda.device(current):
                aligned = moe_align_block_size(ids, 16, 64, kernel=kernel)
                assert all(result.device == ids.device for result in aligned)
                assert equal(aligned, expected), f"{kernel=} {current=}"
                assert equal(torch.ops.cupy_moe.moe_align_block_size(ids, 16, 64), expected)
                assert equal(batched_moe_align_block_size(32, 16, counts), expected_batched)
                assert torch.cuda.current_device() == current
    with pytest.raises(ValueError, match="expert_map: expected it beside topk_ids on cuda:1, got cuda:0"):
        moe_align_block_size(ids, 16, 64, half_local(64))
    with pytest.raises(ValueError, match=r"out: expected sorted_token_ids .* on cuda:1.* on cuda:0"):
        moe_align_block_size(ids, 16, 64, out=tuple(r.to("cuda:0") for r in expected))  # type: ignore[arg-type]


@on_two_gpus
def test_on_the_current_stream_of_the_other_device() -> None:
    late, before = drawn((4096,), 0, 64).to("cuda:1"), drawn((4096,), 0, 7).to("cuda:1")
    expected = cpu_align.moe_align_block_size(late, 16, 64)
    ids, stream = before.clone(), torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        ids.copy_(late)
        with torch.cuda.device(0):
            result = moe_align_block_size(ids, 16, 64)
        assert not stream.query(), "the call waited for its stream"
    stream.synchronize()
    assert equal(result, expected)


@on_two_gpus
def test_threads_on_two_devices() -> None:
    batches = [drawn((3000 + index,), -1, 65).to(f"cuda:{index % 2}") for index in range(4)]
    expected = [cpu_align.moe_align_block_size(batch, 16, 64) for batch in batches]

    def work(index: int) -> bool:
        results = [moe_align_block_size(batches[index], 16, 64) for _ in range(50)]
        return all(equal(result, expected[index]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4
