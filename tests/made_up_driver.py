"""What the package asks of CuPy's driver and runtime, made up: no GPU, and refusals as tests want them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cupy_moe.cuda import modules
from cupy_moe.images import elf


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA_ERROR_{status}")
        self.status = status


class Driver:
    """Refuses images by origin and target, records what it is told."""

    def __init__(self) -> None:
        self.refuses: dict[str, int] = {}  # bytes found in an image -> CUresult
        self.missing: dict[str, int] = {}  # entry -> CUresult
        self.loads: list[bytes] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.refused_attribute = 0
        self.current = [0]
        self.CUDADriverError = Refused

    def load(self, data: bytes) -> None:
        self.loads.append(data)
        kind = "compute" if data[:4] != b"\x7fELF" else f"sm_{elf.number(data)}"
        if kind in self.refuses:
            raise Refused(self.refuses[kind])

    def get_function(self, entry: str) -> Any:
        if entry in self.missing:
            raise Refused(self.missing[entry])
        return SimpleNamespace(ptr=1000 * (self.current[-1] + 1) + len(entry))

    def funcGetAttribute(self, attribute: int, function: int) -> int:
        cluster = 16 if function % 1000 == len("tiny_cluster") else 0
        return {modules._STATIC_SHARED: 1024, modules._CLUSTER_WIDTH: cluster}[attribute]

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        if attribute == self.refused_attribute:
            raise Refused(1)
        self.attributes.append((function, attribute, value))


def made_up(driver: Driver) -> SimpleNamespace:
    """CuPy with two devices: of compute capability 9.0, which has clusters, and of 8.0."""

    class Device:
        def __init__(self, device: int) -> None:
            self.device = device
            self.compute_capability = {0: "90", 1: "80"}[device]

        def __enter__(self) -> None:
            driver.current.append(self.device)

        def __exit__(self, *_: object) -> None:
            driver.current.pop()

    runtime = SimpleNamespace(
        CUDARuntimeError=Refused,
        getDevice=lambda: 0,
        getDeviceProperties=lambda device: {"name": b"Imaginary"},
        deviceGetAttribute=lambda attribute, device: {97: 232448, 120: int(device == 0), 16: 132}[attribute],
        driverGetVersion=lambda: 12_080,
        cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
        cudaDevAttrMultiProcessorCount=16,
        setDevice=lambda device: None,
        free=lambda address: None,
    )
    function = SimpleNamespace(Module=lambda: driver)
    return SimpleNamespace(
        cuda=SimpleNamespace(Device=Device, driver=driver, runtime=runtime, function=function)
    )
