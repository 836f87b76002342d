"""What arguments may be, for every operator alike: kinds of tensors, of arrays and of numbers."""

from __future__ import annotations

import fractions
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from operator_cases import IDS, LOGITS, all_cases, comparable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import cupy_moe
from cupy_moe import (
    aligned_sizes,
    moe_align_block_size,
    moe_sum,
    topk_softmax,
)
from cupy_moe.dispatch import operator
from cupy_moe.dispatch.tensors import address

pytestmark = [pytest.mark.filterwarnings("ignore")]  # torch's tracers warn about themselves
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


CASES = all_cases()
every_operator = pytest.mark.parametrize("name", CASES)
every_tensor = pytest.mark.parametrize(
    ("name", "tensor"), [(name, tensor) for name, case in CASES.items() for tensor in case.tensors]
)


def equal(results: Any, expected: Any) -> bool:
    pairs = zip(map(comparable, results), expected, strict=True)
    return all(torch.equal(a.as_subclass(torch.Tensor), b) for a, b in pairs)


def test_every_operator_has_a_case() -> None:
    functions = {
        getattr(cupy_moe, name) for name in cupy_moe.__all__ if inspect.isfunction(getattr(cupy_moe, name))
    }
    assert functions - {case.function for case in CASES.values()} == {
        aligned_sizes,
        cupy_moe.ep_fused_experts,  # no operator of torch.ops: ranks have to meet
        cupy_moe.replicate_experts,
        cupy_moe.experts_workspace_bytes,
        cupy_moe.fused_moe,  # two of the others
        cupy_moe.repack_awq,
        cupy_moe.repack_gptq,
        cupy_moe.warmup,
    }


# ---- kinds of tensors


class Subclass(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    """One without memory of its own: a kernel would get a null pointer for it."""

    inner: Any

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        unwrap = lambda value: value.inner if isinstance(value, Wrapper) else value  # noqa: E731
        return func(*map(unwrap, args), **{name: unwrap(value) for name, value in (kwargs or {}).items()})  # type: ignore[no-untyped-call]


@on_each_device
@every_tensor
def test_a_subclass_or_a_wrapper_counts_as_what_it_stands_for(name: str, tensor: str, device: str) -> None:
    case = CASES[name].on(device)
    expected, given = case(), case.arguments[tensor]
    assert equal(case(**{tensor: given.as_subclass(Subclass)}), expected)
    assert equal(case(**{tensor: torch.nn.Parameter(given, requires_grad=False)}), expected)
    assert equal(case(**{tensor: Wrapper(given)}), expected)


@every_operator
def test_a_wrapper_for_out_is_written(name: str) -> None:
    case = CASES[name]
    for i, expected in enumerate(case()):
        out = list(case.out())
        inner = out[i]
        out[i] = Wrapper(inner)
        case.with_out(tuple(out))
        assert torch.equal(inner, expected)


@on_each_device
@every_tensor
def test_a_pending_negation_is_done(name: str, tensor: str, device: str) -> None:
    case = CASES[name].on(device)
    given = case.arguments[tensor]
    if device == "cuda" and not given.is_floating_point():
        pytest.skip("only private functions of torch make such integers")
    if given.dtype is torch.bool:
        pytest.skip("bools have no negative")
    negative = torch._neg_view(-given)
    assert negative.is_neg()
    assert equal(case(**{tensor: negative}), case())


@every_operator
def test_out_with_a_pending_negation_is_refused(name: str) -> None:
    case = CASES[name]
    for i in range(len(case())):
        out = list(case.out())
        if not out[i].is_floating_point():
            continue  # of which only private functions make such views
        out[i] = torch._neg_view(out[i])
        with pytest.raises(ValueError, match=r"out: .*negative bit"):
            case.with_out(tuple(out))


@every_tensor
def test_sparse_and_nested_tensors_are_refused_by_name(name: str, tensor: str) -> None:
    case = CASES[name]
    given = case.arguments[tensor]
    nested = torch.nested.nested_tensor([given[0:1], given[0:1]])
    for other in (given.to_sparse(), nested):
        with pytest.raises(TypeError, match=f"{tensor}: expected a dense tensor"):
            case(**{tensor: other})


@pytest.mark.gpu
@every_tensor
def test_sparse_tensors_are_refused_by_name_on_a_gpu(name: str, tensor: str) -> None:
    case = CASES[name].on("cuda")
    with pytest.raises(TypeError, match=f"{tensor}: expected a dense tensor"):
        case(**{tensor: case.arguments[tensor].to_sparse()})


@every_operator
def test_sparse_out_is_refused_by_name(name: str) -> None:
    case = CASES[name]
    for i in range(len(case())):
        out = list(case.out())
        out[i] = out[i].to_sparse()
        with pytest.raises(TypeError, match=r"out: .*expected a dense tensor"):
            case.with_out(tuple(out))


# ---- who watches


def calls_in(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@on_each_device
@every_operator
def test_make_fx_records_the_operator(name: str, device: str) -> None:
    case = CASES[name].on(device)
    given = [case.arguments[tensor] for tensor in case.tensors]

    def call(*tensors: torch.Tensor) -> Any:
        return case(**dict(zip(case.tensors, tensors, strict=True)))

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(call, tracing_mode=mode)(*given)
        assert [target for target in calls_in(graph) if target.startswith("cupy_moe.")], mode
        assert equal(graph(*given), case()), mode


@on_each_device
@every_operator
def test_jit_trace_records_the_operator(name: str, device: str) -> None:
    case = CASES[name].on(device)
    tensor = case.tensors[0]
    traced = torch.jit.trace(lambda given: case(**{tensor: given}), (case.arguments[tensor],))
    assert "cupy_moe::" in str(traced.graph)
    assert equal(traced(case.arguments[tensor]), case())


@every_operator
def test_modes_see_the_operator(name: str) -> None:
    seen: list[tuple[Any, Any, Any]] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    case = CASES[name]
    expected, out = case(), case.out()
    with Mode():  # type: ignore[no-untyped-call]
        assert equal(case(), expected)
        case.with_out(out)
    assert equal(out, expected)
    ours = [func for func, *_ in seen if func.namespace == "cupy_moe"]
    assert [func._overloadname for func in ours] == ["default", "out"]
    for func, args, kwargs in seen:
        if func in ours:
            opcheck(func, args, kwargs)


@every_operator
def test_transforms_of_functions_reach_the_operator(name: str) -> None:
    case = CASES[name]
    tensor = case.tensors[0]
    given = case.arguments[tensor]
    assert equal(torch.func.functionalize(lambda x: case(**{tensor: x}))(given), case())
    twice = torch.func.vmap(lambda x: case(**{tensor: x}))(torch.stack([given, given]))
    assert all(equal(results, case()) for results in zip(*twice, strict=True))


@on_each_device
@every_operator
def test_no_gradient_from_the_dispatcher_either(name: str, device: str) -> None:
    case = CASES[name].on(device)
    tensors = {name: case.arguments[name] for name in case.tensors}
    changes = {n: t.clone().requires_grad_() for n, t in tensors.items() if t.is_floating_point()}
    assert not any(result.requires_grad for result in case(**changes))

    function, arguments, names = case.function, case.arguments, case.tensors

    def call(*given: torch.Tensor) -> Any:
        results = function(**{**arguments, **dict(zip(names, given, strict=True))})
        return results if isinstance(results, tuple) else (results,)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert not any(result.requires_grad for result in compiled(*{**tensors, **changes}.values()))
    torch.compiler.reset()
    first = case.tensors[0]  # and by way of torch.ops
    assert not any(
        result.requires_grad for result in case(**{**changes, first: Wrapper(case.arguments[first])})
    )


def test_the_dispatcher_is_asked_for_no_more_than_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls do not pass it: it costs as much as a launch."""
    monkeypatch.setattr(
        operator.Operator, "__call__", lambda *_, **__: pytest.fail("went through the dispatcher")
    )
    for case in CASES.values():
        expected = case()
        case.with_out(case.out())
        for tensor in case.tensors:
            parameter = torch.nn.Parameter(case.arguments[tensor], requires_grad=False)
            assert equal(case(**{tensor: parameter}), expected)


# ---- arrays of other libraries


@every_tensor
def test_numpy_for_any_of_the_tensors(name: str, tensor: str) -> None:
    case = CASES[name]
    results = case(**{tensor: case.arguments[tensor].numpy()})
    kind = np.ndarray if tensor == case.tensors[0] else torch.Tensor  # results are of the kind of the first
    assert all(type(result) is kind for result in results)
    assert equal(map(torch.as_tensor, results), case())


@every_tensor
def test_negative_strides_are_copied_and_read_only_arrays_read(name: str, tensor: str) -> None:
    case = CASES[name]
    array = case.arguments[tensor].numpy()
    backwards = array[::-1].copy()[::-1]
    assert backwards.strides[0] < 0
    assert equal(map(torch.as_tensor, case(**{tensor: backwards})), case())
    frozen = np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)
    assert not frozen.flags.writeable
    results = case(**{tensor: frozen})
    assert equal([torch.tensor(np.array(result)) for result in results], case())


@every_operator
def test_out_that_cannot_be_written_is_refused(name: str) -> None:
    case = CASES[name]
    for i in range(len(case())):
        arrays = [result.numpy() for result in case.out()]
        before = [array.copy() for array in arrays]
        frozen, backwards, text = list(arrays), list(arrays), list(arrays)
        frozen[i] = arrays[i].view()
        frozen[i].flags.writeable = False
        backwards[i] = arrays[i][::-1]
        text[i] = np.array(["no", "number"])
        for out, message in (
            (frozen, r"out: cannot be written, as this numpy\.ndarray is read-only"),
            (backwards, r"out: cannot be written, as this numpy\.ndarray has negative strides"),
            (text, r"out: torch cannot take this numpy\.ndarray"),
        ):
            if out is backwards and len(arrays[i]) == 1:
                continue  # strides of one element mean nothing
            with pytest.raises(ValueError, match=message):
                case.with_out(tuple(out))
        assert all((array == b).all() for array, b in zip(arrays, before, strict=True))


def test_jax_arrays_are_not_written() -> None:
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        out = tuple(
            jax.numpy.full(length, 77, dtype=jax.numpy.int32) for length in (*aligned_sizes(10, 8, 4), 1)
        )
        with pytest.raises(ValueError, match=r"out: cannot be written, as this .* is read-only"):
            moe_align_block_size(IDS.numpy(), 4, 8, out=out)
    assert all((array == 77).all() for array in out)


# ---- numbers

INTS = {
    "align": ("block_size", "num_experts"),
    "batched": ("max_tokens_per_batch", "block_size"),
    "sum": (),
    "softmax": ("topk",),
    "sigmoid": ("topk",),
    "grouped": ("topk", "num_expert_group", "topk_group"),
    "quantize": ("group_size", "topk"),
    "quantize_rows": ("topk",),
    "quantize_silu": ("group_size", "topk"),
    "sort": ("block_size", "num_experts"),
    "align_lora": ("block_size", "num_experts", "max_loras"),
    "permute": ("num_experts", "block_size"),
}
FLOATS = {
    "sum": ("routed_scaling_factor",),
    "softmax": ("routed_scaling_factor", "softcap"),
    "sigmoid": ("routed_scaling_factor", "softcap"),
    "grouped": ("routed_scaling_factor",),
    "quantize": ("eps",),
    "quantize_rows": ("eps",),
    "quantize_silu": ("eps",),
    "unpermute": ("routed_scaling_factor",),
}
BOOLS = {
    "align": ("pad_sorted_ids", "ignore_invalid_experts"),
    "softmax": ("renormalize",),
    "sigmoid": ("renormalize",),
    "grouped": ("renormalize",),
    "quantize": ("column_major_scales", "scales_power_of_2"),
    "quantize_rows": ("scales_power_of_2",),
    "quantize_silu": ("column_major_scales", "scales_power_of_2"),
    "sort": ("pad_sorted_ids", "ignore_invalid_experts"),
    "align_lora": ("pad_sorted_ids",),
    "permute": ("column_major_scales",),
}


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, names in INTS.items() for a in names])
def test_ints_are_what_has_an_index_but_bools_and_tensors(name: str, argument: str) -> None:
    case = CASES[name]
    value = case.arguments[argument]
    for _ in range(2):  # before and after the equal int is known
        for other in (np.int64(value), np.uint8(value), Index(value)):
            assert equal(case(**{argument: other}), case())
        for wrong in (
            float(value),
            True,
            np.float32(value),
            str(value),
            None,
            [value],
            torch.tensor(value),
            1j,
        ):
            with pytest.raises(TypeError, match=f"{argument}: expected an int, got"):
                case(**{argument: wrong})


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, names in FLOATS.items() for a in names])
def test_floats_are_real_numbers_but_bools_and_tensors(name: str, argument: str) -> None:
    case = CASES[name]
    expected = case(**{argument: 2.0})
    for other in (2, np.float32(2), np.int64(2), fractions.Fraction(2)):
        assert equal(case(**{argument: other}), expected)
    for wrong in ("2", None, True, [2.0], torch.tensor(2.0), 2j):
        with pytest.raises(TypeError, match=f"{argument}: expected a float, got"):
            case(**{argument: wrong})


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, names in BOOLS.items() for a in names])
def test_bools_are_bools_and_0_and_1(name: str, argument: str) -> None:
    case = CASES[name]
    for value in (False, True):
        expected = case(**{argument: value})
        for other in (int(value), np.bool_(value), np.int32(value)):
            assert equal(case(**{argument: other}), expected)
    for wrong in (2, "yes", None, [True], torch.tensor(True), torch.ones(3)):
        with pytest.raises(TypeError, match=f"{argument}: expected a bool, got"):
            case(**{argument: wrong})


def test_the_sign_of_a_zero_is_nobody_elses() -> None:
    x = torch.ones(1, 1, 4)
    first = moe_sum(x, routed_scaling_factor=0.0)
    assert not moe_sum(x, routed_scaling_factor=-0.0).signbit().any()
    assert torch.equal(first, moe_sum(x, routed_scaling_factor=0.0))


@pytest.mark.parametrize("kernel", ["bogus", ["small"], 3, True])
@pytest.mark.parametrize("name", ["align", "softmax", "sigmoid", "grouped"])
def test_a_kernel_that_is_none_is_refused_on_any_device(name: str, kernel: Any) -> None:
    with pytest.raises(ValueError, match="kernel: expected one of '"):
        CASES[name](kernel=kernel)


@pytest.mark.parametrize("scoring", ["tanh", ["softmax"], None, 1])
def test_a_scoring_function_that_is_none_is_refused(scoring: Any) -> None:
    with pytest.raises(
        ValueError, match="scoring_func: expected one of 'softmax', 'sigmoid', 'none', 'softplus_sqrt', got"
    ):
        CASES["grouped"](scoring_func=scoring)


@pytest.mark.parametrize("ids_dtype", [torch.int8, "int32", [torch.int32], int])
def test_types_of_ids_that_are_none_are_refused(ids_dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"ids_dtype: expected torch\.int32, int64 or uint32, got"):
        CASES["softmax"](ids_dtype=ids_dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((6, 4, 0), ValueError, "block_size: expected 1 to 65536, got 0"),
        ((6, 0, 4), ValueError, "num_experts: expected 1 to 65536, got 0"),
        ((-1, 4, 4), ValueError, "num_ids: expected 0 or more, got -1"),
        ((6, 4, 2.5), TypeError, "block_size: expected an int, got float"),
        ((6, 4, 4, "yes"), TypeError, "pad_sorted_ids: expected a bool, got str"),
    ],
)
def test_sizes_that_are_none(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        aligned_sizes(*arguments)


def test_the_order_of_another_library_is_answered_by_name() -> None:
    sorted_ids, expert_ids, post_pad = (torch.zeros(n, dtype=torch.int32) for n in (40, 10, 1))
    with pytest.raises((TypeError, ValueError), match=r"^(expert_map|pad_sorted_ids): "):
        moe_align_block_size(IDS, 8, 4, sorted_ids, expert_ids, post_pad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^topk: expected an int, got torch\.Tensor"):
        topk_softmax(LOGITS, IDS, LOGITS)  # type: ignore[arg-type]


# ---- tensors without memory


def test_an_address_is_where_elements_are() -> None:
    tensor = torch.ones(4)
    assert address("x", tensor) == tensor.data_ptr()
    assert address("x", torch.ones(0)) == 0
    tensor.untyped_storage().resize_(0)
    for nowhere in (tensor, torch._efficientzerotensor((4,)), torch._to_functional_tensor(torch.ones(4))):
        with pytest.raises(ValueError, match="x: expected a tensor with memory of its own"):
            address("x", nowhere)
    with pytest.raises(TypeError, match="x: expected a dense tensor"):
        address("x", torch.ones(4).to_sparse())


@pytest.mark.gpu
@every_tensor
def test_tensors_whose_memory_was_freed_are_refused_on_a_gpu(name: str, tensor: str) -> None:
    case = CASES[name].on("cuda")
    freed = case.arguments[tensor].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{tensor}: expected a tensor with memory of its own"):
        case(**{tensor: freed})


@pytest.mark.gpu
@every_operator
def test_out_whose_memory_was_freed_is_refused_on_a_gpu(name: str) -> None:
    case = CASES[name].on("cuda")
    for i in range(len(case())):
        out = case.out()
        out[i].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"out.*: expected a tensor with memory of its own"):
            case.with_out(out)


# ---- what else was taken in silence


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.masked_array(IDS.numpy(), mask=IDS.numpy() == 1)
    with pytest.raises(ValueError, match="topk_ids: expected an array without a mask"):
        moe_align_block_size(masked, 4, 8)


def test_an_array_that_cannot_be_exported_is_named() -> None:
    class Odd:
        def __dlpack__(self, **_: Any) -> Any:
            return {}

        def __dlpack_device__(self) -> Any:
            return 1, 0

    with pytest.raises(ValueError, match=r"topk_ids: torch cannot take this .*Odd"):
        moe_align_block_size(Odd(), 4, 8)


def test_results_are_of_the_library_of_a_subclass() -> None:
    class Mine(np.ndarray[Any, Any]):
        pass

    results = moe_align_block_size(IDS.numpy().view(Mine), 4, 8)
    assert all(type(result) is np.ndarray for result in results)


@pytest.mark.parametrize("rows", [torch.zeros(1, 4).expand(2, 4), torch.zeros(8).as_strided((2, 4), (1, 1))])
def test_rows_of_out_that_overlap_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="out: expected rows that do not overlap"):
        moe_sum(torch.ones(2, 3, 4), rows)


@pytest.mark.parametrize("factor", [1e300, -1e39, 10**400])
def test_factors_that_fp32_does_not_have_are_refused(factor: Any) -> None:
    for name in ("sum", "softmax", "sigmoid", "grouped"):
        with pytest.raises(ValueError, match="routed_scaling_factor: expected a number that fp32 has"):
            CASES[name](routed_scaling_factor=factor)
