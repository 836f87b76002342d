"""Every kernel on the CPU, through the operators, and what the emulator finds in kernels that are wrong."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import emulator
import gpus
import pytest
import torch
from emulator import Emulator, EmulatorError, cases
from operator_cases import all_cases

from cupy_moe import moe_align_block_size
from cupy_moe.images import compiler, sources
from cupy_moe.operators.gate import GateOptions
from cupy_moe.plans import align as plans
from cupy_moe.plans.align import ALIGN_KERNELS
from cupy_moe.plans.gate import GATE_KERNELS
from cupy_moe.plans.permute import PERMUTE_KERNELS

pytestmark = pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))

DEVICES = {75: gpus.T4, 80: gpus.A100, 89: gpus.RTX4090, 90: gpus.H200, 120: gpus.RTX5090}
SEEDS = {
    "align": 24,
    "align_batched": 40,
    "moe_sum": 60,
    "gate": 50,
    "quantize": 120,
    "sort": 12,
    "align_lora": 12,
    "permute": 28,
    "unpermute": 25,
}


def run(device: Emulator, call: cases.Call, kernel: str | None, what: str) -> bool:
    """Whether the kernel can do it; then the results are as specified."""
    try:
        results = call.run(device.tensor, kernel)
    except ValueError:
        assert kernel is not None, what
        return False
    assert call.compare(call, results, call.specified()) == "", what
    return True


@pytest.mark.parametrize("operator", cases.OPERATORS)
@pytest.mark.parametrize("arch", DEVICES)
def test_random_calls_with_every_kernel(operator: str, arch: int) -> None:
    done = dict.fromkeys((None, *ALIGN_KERNELS, *GATE_KERNELS, *PERMUTE_KERNELS), 0)
    for seed in range(1000 * arch, 1000 * arch + SEEDS[operator]):
        call = cases.OPERATORS[operator](seed)
        with Emulator(DEVICES[arch], arch, seed)() as device:
            for kernel in (None, *call.kernels):
                done[kernel] += run(device, call, kernel, f"{operator} {seed=} {kernel=} on {arch}")
    can = call.kernels if arch == 90 else [kernel for kernel in call.kernels if kernel != "cluster16"]
    if arch < 90:
        can = [kernel for kernel in can if kernel != "cluster8"]
    assert all(done[kernel] > 0 for kernel in (None, *can)), done


@pytest.mark.parametrize("name", all_cases())
def test_every_operator_on_every_device(name: str) -> None:
    """Of a new operator, this is the first that runs its kernels."""
    case = all_cases()[name]
    expected = case()
    for arch, limits in DEVICES.items():
        with Emulator(limits, arch)() as device:
            placed = {n: device.tensor(case.arguments[n]) for n in case.tensors}
            if arch < 80 and name == "experts":
                with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.0"):
                    case(**placed)
                continue
            results = case(**placed)
            for result, right in zip(results, expected, strict=True):
                rounding = 0.01 if result.dtype in (torch.float16, torch.bfloat16) else 1e-6
                assert torch.allclose(result, right, rtol=rounding, atol=rounding / 10), f"on {arch}"
            assert device.launched


@pytest.mark.parametrize(
    ("threshold", "arch"),
    [
        (plans.SMALL_FAST_IDS, 80),
        (plans.SMALL_MAX_IDS, 90),
        (plans.SHARED_FAST_IDS, 89),
        (plans.SHARED_FAST_IDS, 90),
        (plans.CLUSTER8_FAST_IDS, 80),
        (plans.CLUSTER8_FAST_IDS, 90),
    ],
)
def test_thresholds_of_align(threshold: int, arch: int) -> None:
    for num_ids in (threshold - 1, threshold, threshold + 1):
        ids = torch.randint(-1, 9, (num_ids,), dtype=torch.int32)
        call = cases.align(0)._replace(
            tensors={"topk_ids": ids}, rest={"block_size": 64, "num_experts": 8}, kernels=()
        )
        with Emulator(DEVICES[arch], arch)() as device:
            run(device, call, None, f"{num_ids=}")
        limits = DEVICES[arch]
        slots, _ = plans.aligned_sizes(num_ids, 8, 64)
        planned = plans.plan_align(num_ids, 8, slots, 64, "i32", limits)
        assert device.launched == [launch.entry for launch in planned.launches]


def test_thresholds_of_gating_and_sum() -> None:
    """On a GPU with one SM, whose thresholds are small."""
    limits = gpus.H200._replace(num_sms=1)
    ran = set()
    for tokens in (1, 3, 8, 9, 1023, 1024, 1025):
        logits = torch.randn(tokens, 8)
        call = cases.gate(0)._replace(
            tensors={"gating_output": logits}, rest=GateOptions(2, True, "softmax")._asdict()
        )
        with Emulator(limits, 90)() as device:
            run(device, call, None, f"gating {tokens=}")
        ran |= set(device.launched)
    assert ran == {"gate_plain_4", "gate_several_4"}
    ran = set()
    for units, topk in itertools.product((127, 128, 129, 1023, 1024, 1025, 16383, 16384), (2, 8, 10)):
        if units < 16383 or topk == 8:
            call = cases.sum_up(0)._replace(tensors={"input": torch.randn(units, topk, 4)}, rest={})
            with Emulator(limits, 90)() as device:
                run(device, call, None, f"sum {units=} {topk=}")
            ran |= set(device.launched)
    assert ran == {"moe_sum_2_f32", "moe_sum_8_f32", "moe_sum_4_f32", "moe_sum_n_f32"}


def test_every_kernel_of_sum() -> None:
    with Emulator(gpus.H200, 90)() as device:
        for dtype, topk, hidden in itertools.product(cases.DTYPES, (2, 4, 8, 10), (64, 33)):
            plain = cases.sum_up(0)._replace(
                tensors={"input": torch.randn(3, topk, hidden).to(dtype)}, rest={}
            )
            for call in (plain, plain._replace(rest={"routed_scaling_factor": 2.5})):
                run(device, call, None, f"{dtype} {topk=} {hidden=} {call.rest}")
    of_sum = {entry for entry in emulator.library("moe_sum", 90).entries if "rows" not in entry}
    assert set(device.launched) == of_sum


def test_the_order_of_threads_is_of_no_consequence() -> None:
    ids = torch.randint(-1, 70, (600,), dtype=torch.int32)
    call = cases.align(7)._replace(tensors={"topk_ids": ids}, rest={"block_size": 16, "num_experts": 64})
    orders = []
    for seed in range(5):
        with Emulator(gpus.H200, 90, seed)() as device:
            orders.append([result.tolist() for result in call.run(device.tensor, "cluster8")])
    assert orders.count(orders[0]) == 5


def test_many_experts_and_many_ids() -> None:
    for num_experts, num_ids, kernel in (
        (8, 75_000, "cluster16"),  # 21 pieces of 32 ids for 20 warps, in several clusters
        (65_536, 40, "small"),
        (5000, 3000, "global_large"),
        (1500, 5000, None),
    ):
        call = cases.align(num_ids)._replace(
            tensors={"topk_ids": torch.randint(-1, num_experts, (num_ids,))},
            rest={"block_size": 16, "num_experts": num_experts},
        )
        with Emulator(gpus.H200, 90)() as device:
            assert run(device, call, kernel, f"{num_experts=}")


# ---- what it finds in kernels that are wrong

HEAD = """\
#include "common.cuh"
#include "cluster.cuh"
#include "hopper.cuh"
#include "experts/experts.cuh"
struct TestArgs {
  u32* data;
  u32 count;
};
// Dynamic shared memory: a barrier that all threads know to be open, and what follows it.
#define OPEN(arrivals)                                                   \\
  extern __shared__ uint4 memory[];                                      \\
  Barrier& barrier = *reinterpret_cast<Barrier*>(memory);                \\
  u32* words = reinterpret_cast<u32*>(memory + 1);                       \\
  if (threadIdx.x == 0) barrier.open(arrivals), fence_open_barriers();   \\
  __syncthreads(), cluster_arrive<2>(), cluster_wait<2>();
// Matrices of both warps: the row of a thread, and the words that it stores.
#define MATRICES(lanes)                                                  \\
  __shared__ uint4 rows[64];                                             \\
  const u32 t = threadIdx.x * 4, words[4] = {t, t + 1, t + 2, t + 3};    \\
  uint4* row = rows + (threadIdx.x ^ (lanes));
#define BODY(name) extern "C" __global__ void name(const __grid_constant__ TestArgs args)
"""
WRONG = {
    "reads past a buffer": (
        "args.data[0] = args.data[args.count];",
        "reads 4 bytes at 256 of a buffer of 256",
    ),
    "writes before a buffer": ("args.data[(int)threadIdx.x - 1] = 1;", "writes 4 bytes"),
    "writes far away": ("args.data[1ll << 40] = 1;", "outside of all buffers"),
    "past dynamic shared memory": (
        "extern __shared__ uint4 memory[]; reinterpret_cast<u32*>(memory)[threadIdx.x + 33] = 1;",
        ", of 256 planned",
    ),
    "unwritten shared memory": (
        "__shared__ u32 x[64]; if (threadIdx.x) x[threadIdx.x] = 1; __syncthreads(); args.data[threadIdx.x] ="
        " x[threadIdx.x];",
        "reads shared memory that nobody has written",
    ),
    "no barrier": (
        "__shared__ u32 x[64]; x[threadIdx.x] = 1; args.data[threadIdx.x] = x[63 - threadIdx.x];",
        "race|nobody has written",
    ),
    "a warp's barrier for two warps": (
        "__shared__ u32 x[64]; x[threadIdx.x] = 1; __syncthreads(); x[threadIdx.x] = 2; __syncwarp();"
        " args.data[threadIdx.x] = x[63 - threadIdx.x];",
        "race",
    ),
    "a write after a read": (
        "__shared__ u32 x; if (threadIdx.x == 0) x = 1; __syncthreads(); args.data[threadIdx.x] = x;"
        " if (threadIdx.x == 5) x = 2;",
        "race",
    ),
    "an atomic after a write": (
        "__shared__ u32 x; if (threadIdx.x == 0) x = 1; if (threadIdx.x) atomicAdd(&x, 1);",
        "race|nobody has written",
    ),
    "a barrier that some skip": ("if (threadIdx.x < 63) __syncthreads();", "barrier"),
    "two barriers": (
        "if (threadIdx.x < 32) __syncthreads();\\\n else\\\n __syncthreads();",
        "barrier of line",
    ),
    "a vote that some skip": (
        "if (threadIdx.x != 3) args.data[0] = __ballot_sync(kFullWarp, 1);",
        "deadlock",
    ),
    "different votes": (
        "if (threadIdx.x % 2) args.data[0] = __ballot_sync(kFullWarp, 1);\n else args.data[1] ="
        " __reduce_add_sync(kFullWarp, 1);",
        "others of its warp",
    ),
    "an inbox without mail": (
        "__shared__ Inbox inbox; if (threadIdx.x == 0) inbox.open(); __syncthreads();"
        " if (threadIdx.x == 0) inbox.expect(16); inbox.wait();",
        "deadlock: 64 threads of block 0 at its inbox",
    ),
    "mail before all run": (
        "extern __shared__ uint4 memory[]; __shared__ Inbox inbox; if (threadIdx.x == 0) inbox.open();"
        " __syncthreads(); inbox.send(memory, 0, make_uint4(0, 0, 0, 0));",
        "sends before all blocks run",
    ),
    "a barrier that is not open": ("__shared__ Barrier barrier; barrier.arrive();", "that is not open"),
    "a barrier that is opened twice": ("OPEN(1) if (threadIdx.x == 0) barrier.open(1);", "once more"),
    "a barrier without a fence": (
        "extern __shared__ uint4 memory[]; Barrier& barrier = *reinterpret_cast<Barrier*>(memory);"
        " if (threadIdx.x == 0) barrier.open(64); cluster_arrive<2>(); cluster_wait<2>();"
        " barrier.arrive_in(0);",
        "without a fence",
    ),
    "more arrivals than expected": (
        "OPEN(63) barrier.expect(4); barrier.arrive();",
        "more arrive at a barrier than the 63",
    ),
    "fewer arrivals than expected": (
        "OPEN(65) barrier.arrive(); barrier.wait(0);",
        "deadlock: 64 threads of block 0 at an mbarrier",
    ),
    "bytes that nobody sends": (
        "OPEN(64) barrier.expect(4); barrier.arrive(); barrier.wait(0);",
        "deadlock: 64 threads of block 0 at an mbarrier",
    ),
    "more bytes than announced": (
        "OPEN(64) if (threadIdx.x == 0) barrier.send(words, 0, 1), barrier.send(words + 1, 0, 1),"
        " barrier.expect(4); barrier.arrive(); barrier.wait(0);",
        "counts 4 bytes more|deadlock",
    ),
    "a phase that ended long ago": (
        "OPEN(1) if (threadIdx.x == 0) barrier.arrive(), barrier.arrive(); __syncthreads(); barrier.wait(0);",
        "after which another has ended",
    ),
    "what is sent is not waited for": (
        "OPEN(1) if (threadIdx.x == 0) barrier.expect_and_arrive(4), barrier.send(words, 0, 1);"
        " __syncthreads(); args.data[0] = words[0]; barrier.wait(0);",
        "nobody has written",
    ),
    "copies that are not waited for": (
        "OPEN(64) copy_async_if(true, memory + 1, args.data, true); barrier.arrive_with_copies();"
        " args.data[0] = words[0]; barrier.wait(0);",
        "nobody has written|race",
    ),
    "ends before what is sent": (
        "OPEN(1) if (threadIdx.x == 0) barrier.expect_and_arrive(4), barrier.send(words, 0, 1);",
        "ends before copies of thread 0",
    ),
    "matrices that some lanes do not store": (
        "MATRICES(0) if (threadIdx.x != 3) store_matrices(row, words);",
        "deadlock: 31 threads of block 0 at a warp's vote",
    ),
    "matrices that other lanes have stored": (
        "MATRICES(1) store_matrices(row, words); args.data[threadIdx.x] = rows[threadIdx.x].x;",
        "race",
    ),
    "matrices over what other lanes read": (
        "MATRICES(1) store_matrices(row, words); __syncwarp(); args.data[threadIdx.x] = rows[threadIdx.x].x;"
        " store_matrices(row, words);",
        "race",
    ),
    "matrices past dynamic shared memory": (
        "extern __shared__ uint4 memory[]; const u32 words[4] = {};"
        " store_matrices(memory + threadIdx.x, words);",
        ", of 256 planned",
    ),
    "matrices that nobody has stored": (
        "MATRICES(0) u32 back[4]; load_matrices(back, row); args.data[0] = words[0];",
        "nobody has written",
    ),
    "products without a fence": (
        "float sums[32][4] = {}; multiply_256<F16>(sums, 0, 0, 0);",
        "multiplies without a fence",
    ),
    "products of what is not there": (
        "float sums[32][4] = {}; begin_products(); multiply_256<F16>(sums, 0, 0, 0);",
        "outside of shared memory",
    ),
}


RIGHT = {
    "through barriers": "__shared__ u32 x[64]; x[threadIdx.x] = threadIdx.x; __syncthreads();"
    " args.data[threadIdx.x] = x[63 - threadIdx.x]; __syncthreads(); x[threadIdx.x] = 2;",
    "in a warp": "__shared__ u32 x[64]; x[threadIdx.x] = 1; __syncwarp(); args.data[threadIdx.x] ="
    " x[threadIdx.x ^ 1]; __syncwarp(); x[threadIdx.x] = 2;",
    "atomics": "__shared__ u32 x; if (threadIdx.x == 0) x = 0; __syncthreads(); atomicAdd(&x, 1);"
    " __syncthreads(); args.data[threadIdx.x] = x == 64 ? x : args.data[1 << 20];",
    "halves of a word": "__shared__ u16 x[64]; x[threadIdx.x] = 1; __syncthreads(); args.data[0] = x[3];",
    "through an mbarrier": "OPEN(64) for (u32 i = 0; i < 3; ++i) {"
    " if (threadIdx.x < 48) words[threadIdx.x] = i;"
    " barrier.arrive(); barrier.wait(0); args.data[threadIdx.x] = words[47 - threadIdx.x % 48];"
    " barrier.arrive(); barrier.wait(1); } __syncthreads(); if (threadIdx.x == 9) words[0] = 1;",
    "what is sent": "OPEN(1) if (threadIdx.x == 0) barrier.expect_and_arrive(4), barrier.send(words, 0, 7);"
    " barrier.wait_for_cluster(0); args.data[threadIdx.x] = words[0] == 7 ? 1 : args.data[1 << 20];",
    "copies": "OPEN(64) if (threadIdx.x < 8) args.data[threadIdx.x] = 5; __syncthreads();"
    " copy_async_if(threadIdx.x == 0, memory + 1, args.data, true);"
    " copy_async_if(threadIdx.x == 1, memory + 2, args.data, false); barrier.arrive_with_copies();"
    " barrier.wait(0); args.data[threadIdx.x] = words[3] == 5 && words[4] == 0 ? 5 : args.data[1 << 20];",
    # Word w of row l % 8 of matrix l / 8, which lies where lane l says, is of lane l % 8 * 4 + w.
    "matrices": "MATRICES(5) store_matrices(row, words); __syncwarp();"
    " const u32 lane = threadIdx.x % 32, first = (threadIdx.x - lane + lane % 8 * 4) * 4 + lane / 8;"
    " const bool is_right = row->x == first && row->y == first + 4 && row->z == first + 8"
    " && row->w == first + 12; args.data[threadIdx.x] = is_right ? 1 : args.data[1 << 20];",
    "matrices there and back": "MATRICES(9) u32 back[4], wrong = 0;"
    " store_matrices(row, words); __syncwarp(); load_matrices(back, row);"
    " for (u32 i = 0; i < 4; ++i) wrong += back[i] != words[i];"
    " args.data[threadIdx.x] = wrong == 0 ? 1 : args.data[1 << 20];",
    "shuffles": "const u32 all = warp_sum(threadIdx.x), expected = threadIdx.x < 32 ? 496 : 1520;"
    " args.data[threadIdx.x] = all == expected ? all : args.data[1 << 20];",
}


BODIES = [body for body, _ in WRONG.values()] + list(RIGHT.values())


@pytest.fixture(scope="module")
def made_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], emulator.Library]:
    """All of them, made for an architecture."""
    folder = tmp_path_factory.mktemp("bodies")
    for name in ("common.cuh", "convert.cuh", "cluster.cuh", "hopper.cuh", "experts/experts.cuh"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((sources.source_folder() / name).read_text())
    kernels = [f"BODY(body_{number}) {{\n {body}\n}}\n" for number, body in enumerate(BODIES)]
    (folder / "bodies.cu").write_text(HEAD + "".join(kernels))

    @functools.cache
    def library(arch: int) -> emulator.Library:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "source_folder", lambda: folder)
            return emulator.Library("bodies", arch)

    return library


def launched(library: emulator.Library, body: str, seed: int = 0) -> str | None:
    """What is found in a kernel of 64 threads, with 64 words of data and of dynamic shared memory."""
    data = (ctypes.c_uint32 * 64)()
    begin = ctypes.addressof(data)
    arguments = ctypes.create_string_buffer(begin.to_bytes(8, "little") + (64).to_bytes(8, "little"))
    entry, place = f"body_{BODIES.index(body)}", ctypes.addressof(arguments)
    return library.launch(entry, place, 1, 64, 256, seed, [(begin, begin + 256)])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str, made_for: Callable[[int], emulator.Library]) -> None:
    body, said = WRONG[name]
    found = next(filter(None, (launched(made_for(90), body, seed) for seed in range(20))), None)
    assert found is not None
    assert any(part in found for part in said.split("|")), found


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_left_alone(name: str, made_for: Callable[[int], emulator.Library]) -> None:
    for seed in range(10):
        assert launched(made_for(90), RIGHT[name], seed) is None
    assert launched(made_for(75), RIGHT[name]) is None


def test_an_operator_says_what_its_kernel_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "STATIC_SHARED", -4)
    monkeypatch.setattr(plans, "table_bytes", lambda *_: 1000)
    with (
        Emulator(gpus.H200, 90)() as device,
        pytest.raises(EmulatorError, match=r"align_shared_i32, .* of 1000 planned"),
    ):
        moe_align_block_size(device.tensor(torch.zeros(500, dtype=torch.int32)), 16, 64, kernel="shared")


# ---- beside a GPU

COUNT = int(os.environ.get("CUPY_MOE_EMULATED_CALLS", "60"))


def on_the_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return cases.place(tensor, "cuda").tensor


@pytest.mark.gpu
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_a_gpu_gives_the_same(operator: str) -> None:
    """All but the weights of gating to the last bit: PTX does not say how exponentials are rounded."""
    for seed in range(COUNT):
        call = cases.OPERATORS[operator](seed)
        kernel = (None, *call.kernels)[seed % (1 + len(call.kernels))]
        try:
            on_gpu = call.run(on_the_gpu, kernel)
        except ValueError:  # it cannot do this
            kernel = None
            on_gpu = call.run(on_the_gpu)
        with Emulator(gpus.H200, 90, seed)() as device:
            emulated = call.run(device.tensor, kernel)
        on_gpu = tuple(result.cpu() for result in on_gpu)
        assert call.compare(call, emulated, on_gpu) == "", f"{operator} {seed=} {kernel=}"


PLAIN = """
#include "convert.cuh"
#include "hopper.cuh"
#include "align/align.cuh"
struct PlainArgs { u32* results; u32 begin; };
// What differs, of 2^16 values of fp16 and 2^24 of fp32 a launch.
extern "C" __global__ void compare(const __grid_constant__ PlainArgs args) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, bits = args.begin + i;
  const float value = __uint_as_float(bits);
  u32 wrong = F16::from_float(value) != plain_float_to_f16(value);
  wrong |= (u32)(BF16::from_float(value) != plain_float_to_bf16(value)) << 1;
  const float ours = plain_f16_to_float((u16)i), theirs = F16::to_float((u16)i);
  wrong |= (u32)(__float_as_uint(ours) != __float_as_uint(theirs)) << 2;
  wrong |= (u32)(lanes_below() != plain_lanes_below()) << 3;
  u32 lanes = kFullWarp, plain = kFullWarp;
  const u32 hash = bits * 2654435761u >> 20;
  for (u32 k = 0; k < 4; ++k) keep_equal_bit(lanes, hash, k), plain_keep_equal_bit(plain, hash, k);
  wrong |= (u32)(lanes != plain) << 4;
#if __CUDA_ARCH__ >= 900
  // Word w of row l % 8 of matrix l / 8 is what lane l % 8 * 4 + w has of it.
  __shared__ uint4 rows[256];
  const u32 lane = threadIdx.x % 32, words[4] = {hash, hash * 3 + lane, hash * 5 + 1, ~hash};
  store_matrices(rows + threadIdx.x, words);
  __syncwarp();
  const u32* row = reinterpret_cast<const u32*>(rows + threadIdx.x);
  for (u32 m = 0; m < 4; ++m) {
    for (u32 w = 0; w < 4; ++w) {
      const u32 theirs = __shfl_sync(kFullWarp, words[m], lane % 8 * 4 + w);
      wrong |= (u32)(m == lane / 8 && row[w] != theirs) << 5;
    }
  }
#endif
  const u32 pair = (u32)plain_float_to_e4m3(value) | (u32)plain_float_to_e4m3(-value) << 8;
  wrong |= (u32)(pack_e4m3(value, -value) != pair) << 6;
  const bool in_range = bits >= 1u << 23 && bits <= 252u << 23;  // 2^-126 to 2^125
  wrong |= (u32)(in_range && inverse(value) != plain_inverse(value)) << 7;
  if (wrong) atomicOr(args.results, wrong);
}
"""


@pytest.mark.gpu
def test_plain_functions_do_what_ptx_does() -> None:
    from cupy_moe._cupy import cupy
    from cupy_moe.cuda import modules

    folder = sources.source_folder()
    headers = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.cuh")}
    major, minor = modules.capability(0)
    unit = sources.Unit("plain", PLAIN.encode(), headers, sources.OPTIONS)
    module = cupy.cuda.function.Module()
    module.load(compiler.compile(unit, f"sm_{major}{minor}").data)
    compare = module.get_function("compare")
    wrong = cupy.zeros(1, dtype=cupy.uint32)
    for begin in range(0, 2**32, 2**24):
        compare((2**16,), (256,), (wrong, cupy.uint32(begin)))
    assert int(wrong[0]) == 0, (
        "1: fp16, 2: bf16, 4: from fp16, 8: lanes, 16: equal bits, 32: matrices, 64: fp8, 128: 1 / x"
    )
