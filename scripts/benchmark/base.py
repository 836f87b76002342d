"""What an operator says of itself, for everything else here to be free of operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import peers, timing
from .timing import Call

# A case's fields, "us": kind of inputs -> contender -> microseconds, and "errors", if measured: contender ->
# measure -> how far off.
Row = dict[str, Any]
Results = tuple[torch.Tensor, ...]
OURS, TORCH = "cupy_moe", "torch"
FORCED = "kernel "  # begins the names of contenders that are one kernel of ours
COLD = "cold"  # stands among the kinds of inputs of a row

device = "cuda"  # tests put "cpu"


class Bound(NamedTuple):
    """A contender with its inputs, and where it writes."""

    call: Callable[[], Any]
    outputs: Results = ()  # none: it returns what it allocates

    def results(self) -> Results:
        """Of the last call, or of another one."""
        return self.outputs or tuple(self.call())


class Kernels(NamedTuple):
    """Kernels of ours that can be forced, to time each by itself; those that refuse a case are left out."""

    section: str
    names: Sequence[str]


class Sweep(NamedTuple):
    """Many sizes, for a picture."""

    section: str
    cases: Sequence[Any]


class Picture(NamedTuple):
    """Of a section's rows."""

    section: str
    ending: str  # of its name, after that of the JSON file
    text: str  # for those who do not see it
    draw: Callable[[list[Row], dict[str, Any], Path], None]  # of the rows and the whole result


class Host(NamedTuple):
    """Ways to call an operator whose time on the host is compared."""

    section: str
    title: str
    calls: Callable[[Sequence[str], int], dict[str, Call]]  # of the peers and a seed
    targets: Mapping[str, float]  # call -> part of vLLM's time


class Operator(ABC):
    """One operator: what is measured, by whom it is computed, and its table.

    A case is a NamedTuple of sizes with `target_us`, microseconds of GPU time to reach on an H200, or None.
    """

    section: str  # its name in the options and in the JSON
    function: str  # in cupy_moe
    theirs: Mapping[str, str]  # peer -> the name of its function for this

    cases: Sequence[Any]  # a small one first, which the tests compute without a GPU
    checked: Sequence[str] = ("random",)  # kinds of inputs
    timed: Sequence[str] = ("random",)
    ours_only: Sequence[str] = ()  # kinds of inputs on which peers may crash
    quick = False  # part of --quick
    times_torch = False  # also what `expected` takes on the GPU, which is PyTorch's time
    kernels: Kernels | None = None
    sweep: Sweep | None = None
    host: Host | None = None
    pictures: Sequence[Picture] = ()

    title: str  # of its table
    unit = "us of GPU time"  # of the figures in it
    columns: Mapping[str, Sequence[str]]  # heading -> fields of the case
    more_columns: Mapping[str, Callable[[Row], str]] = {}
    note = ""  # on what cannot be seen from its tables
    size: str  # a case in words, for the short table
    telling: Sequence[Any]  # cases in the short table

    @abstractmethod
    def inputs(self, case: Any, kind: str, seed: int) -> Any:
        """One tensor, or whatever `expected` and `bind` take."""

    @abstractmethod
    def expected(self, case: Any, inputs: Any) -> Any:
        """The specification's results, in a form that `wrong` understands."""

    @abstractmethod
    def bind(self, contender: str, case: Any, inputs: Any) -> Bound: ...

    @abstractmethod
    def wrong(self, contender: str, case: Any, results: Results, expected: Any) -> str:
        """Which of the results are wrong; "" if none is."""

    def turns(self, case: Any, inputs: Any) -> Sequence[Any]:
        """Inputs that the calls of a graph take in turn, `inputs` first."""
        return [inputs]

    def time_us(self, calls: Mapping[str, Sequence[Call]], replays: int) -> dict[str, float]:
        """Time of a call of each contender, which take turns."""
        return timing.gpu_us(calls, replays)

    def figure(self, row: Row, us: float) -> float:
        """What the table has of such a time."""
        return us

    def references(self, case: Any, inputs: Any) -> Mapping[str, Call]:
        """What else is timed beside the contenders: something smaller, whose results nobody compares."""
        return {}

    def errors(self, case: Any, results: Results, expected: Any) -> dict[str, float]:
        """How far off right results are, by several measures; none where they are the same to the bit."""
        return {}

    def is_timed_cold(self, case: Any) -> bool:
        """Whether the case is timed with a cold L2, too; its inputs have to be one tensor, a row a token."""
        return False

    def libraries(self) -> dict[str, str]:
        """Libraries besides the peers that it is measured with, if they are here, and their versions."""
        return {}

    def contenders(self, found: Iterable[str]) -> list[str]:
        """We, and those of the peers found whose version has such a function."""
        return [OURS, *(peer for peer in found if peer in self.theirs and self.their(peer) is not None)]

    def their(self, peer: str) -> Any:
        return peers.function(peer, self.theirs[peer])

    def sections(self) -> list[str]:
        """What --only takes."""
        return [self.section, *(part.section for part in (self.sweep, self.host) if part)]


class WrongResultError(Exception):
    """A contender gave a wrong result, or crashed. If we did, no times of this run are worth anything."""


def poison(outputs: Sequence[torch.Tensor]) -> None:
    """Fill with what no operator writes, so that an element that is left out is noticed."""
    for tensor in outputs:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def finish(contender: str) -> None:
    """Wait for the GPU, so that a failure is blamed on the one whose it is."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise WrongResultError(f"{contender}: {error}") from error


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def unequal(names: Sequence[str], results: Results, expected: Results) -> str:
    """The names of the results that are not equal to the last bit."""
    triples = zip(names, results, expected, strict=True)
    return ", ".join(name for name, got, want in triples if not torch.equal(got, want))
