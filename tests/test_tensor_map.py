"""tensor_map: what the driver is given, by one made up for the purpose that reads it as C does; no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cupy_moe import _cupy
from cupy_moe.cuda import driver
from cupy_moe.cuda.driver import INVALID_CONTEXT
from cupy_moe.cuda.tensor_map import tensor_map
from cupy_moe.errors import KernelLaunchError
from cupy_moe.operators import _experts_launches as launches

POINTER, WORD = ctypes.c_void_p, ctypes.c_uint32
# CUresult cuTensorMapEncodeTiled(map, type, rank, address, sizes, strides, box, steps, four enums)
PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, POINTER, WORD, WORD, *[POINTER] * 5, *[WORD] * 4)
NO_INTERLEAVE, SWIZZLE_128_BYTES, ZEROS_OUTSIDE = 0, 3, 0
WORDS = tuple(0x0101010101010101 * word for word in range(16))


class Encoder:
    def __init__(self) -> None:
        self.statuses: list[int] = []  # CUresult of the next calls
        self.given: list[dict[str, Any]] = []
        self.cuTensorMapEncodeTiled = PROTOTYPE(self.encode)

    def encode(self, map_address: int, element: int, rank: int, address: int, *rest: int) -> int:
        sizes, strides, box, steps, *enums = rest

        def array(kind: Any, at: int, length: int) -> tuple[int, ...]:
            return tuple((kind * length).from_address(at))

        self.given.append(
            {
                "is_aligned": map_address % 64 == 0,
                "element": element,
                "address": address,
                "sizes": array(ctypes.c_uint64, sizes, rank),
                "strides": array(ctypes.c_uint64, strides, rank - 1),
                "box": array(WORD, box, rank),
                "steps": array(WORD, steps, rank),
                "enums": (*enums[:2], enums[3]),  # not how much L2 fetches at once, which is for speed
            }
        )
        (ctypes.c_uint64 * 16).from_address(map_address)[:] = list(WORDS)
        return self.statuses.pop(0) if self.statuses else 0


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoder]:
    made = Encoder()
    libraries = {"libcuda.so.1": made}
    monkeypatch.setattr(driver, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": libraries.__getitem__}))
    for cached in (driver.driver_function, tensor_map):
        cached.cache_clear()
    yield made
    for cached in (driver.driver_function, tensor_map):
        cached.cache_clear()


SIZES, STRIDES, BOX = (72, 8, 2, 5, 2**31), (144, 2**39, 1152, 2**33), (64, 8, 2, 8, 1)


def test_the_driver_is_given_all_of_it(encoder: Encoder) -> None:
    assert tensor_map(2**47 - 16, "bf16", SIZES, STRIDES, BOX) == WORDS
    assert encoder.given == [
        {
            "is_aligned": True,
            "element": 9,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
            "address": 2**47 - 16,
            "sizes": SIZES,
            "strides": STRIDES,
            "box": BOX,
            "steps": (1,) * 5,
            "enums": (NO_INTERLEAVE, SWIZZLE_128_BYTES, ZEROS_OUTSIDE),
        }
    ]
    tensor_map(16, "f16", SIZES, STRIDES, BOX)
    assert encoder.given[1]["element"] == 6  # CU_TENSOR_MAP_DATA_TYPE_FLOAT16


def test_maps_are_remembered_by_what_they_are_made_from(encoder: Encoder) -> None:
    for address in (256, 512, 256):
        tensor_map(address, "bf16", SIZES, STRIDES, BOX)
    assert [given["address"] for given in encoder.given] == [256, 512]


def test_a_refusal_is_a_launch_error_and_not_remembered(encoder: Encoder) -> None:
    encoder.statuses = [1]
    with pytest.raises(KernelLaunchError, match=r"cannot map a tensor of \(72, 8, 2, 5, \d+\), .*: error 1$"):
        tensor_map(256, "bf16", SIZES, STRIDES, BOX)
    assert tensor_map(256, "bf16", SIZES, STRIDES, BOX) == WORDS


def test_a_thread_without_a_context_gets_one(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    runtime = SimpleNamespace(free=freed.append)
    monkeypatch.setattr(_cupy, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    encoder.statuses = [INVALID_CONTEXT]
    assert tensor_map(256, "bf16", SIZES, STRIDES, BOX) == WORDS
    assert freed == [0]
    assert encoder.given[0] == encoder.given[1]


# ---- the maps of the experts' weights


def rows_of_box(map_: Any, at: tuple[int, ...]) -> list[int | None]:
    """Where the rows of a box begin, in bytes, in the order in which they then lie; None: outside."""
    _, sizes, strides, box = map_
    places: list[int | None] = []
    for expert in range(box[4]):
        for fourth in range(box[3]):
            for third in range(box[2]):
                for row in range(box[1]):
                    index = at[1] + row, at[2] + third, at[3] + fourth, at[4] + expert
                    is_within = all(i < size for i, size in zip(index, sizes[1:], strict=True))
                    offset = 2 * at[0] + sum(i * stride for i, stride in zip(index, strides, strict=True))
                    places.append(offset if is_within else None)
    return places


@pytest.mark.parametrize("alternate", [False, True])
def test_a_box_has_eight_gates_then_their_ups(alternate: bool) -> None:
    """As `TileOf::weight_row` has it, for tiles and experts that no map could mix up."""
    columns, depth, row, expert = 200, 72, 80, 100_000
    gate, up = (2 * row, row) if alternate else (row, columns * row)
    map_ = launches._map_gated("bf16", 3, columns, depth, expert, gate, up)
    box_columns = 64
    for first in range(0, 256, box_columns):
        found = rows_of_box(map_, (64, 0, 0, first // 8, 2))
        expected = []
        for r in range(2 * box_columns):
            column, is_up = first + r // 16 * 8 + r % 8, r // 8 % 2
            weight_row = (2 * column + is_up) if alternate else column + is_up * columns
            expected.append(2 * (2 * expert + weight_row * row + 64) if column < columns else None)
        assert found == expected, first


def test_a_box_without_a_gate_has_its_rows_in_order() -> None:
    map_ = launches._map_plain("bf16", 3, 136, 72, 100_000, 80)
    for first in (0, 128):
        expected = [2 * (100_000 + r * 80) if r < 136 else None for r in range(first, first + 128)]
        assert rows_of_box(map_, (0, 0, first // 8, 0, 1)) == expected
