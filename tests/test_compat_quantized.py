"""Quantised experts of vLLM and SGLang: what they say of their weights, and both ways in, on cardboard."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_compat_experts import (
    Call,
    K,
    MoEActivation,
    Quant,
    cardboard_sglang,
    cardboard_vllm,
    config,
    engines,
    run_sglang,
    run_triton,
)
from test_compat_experts import Layer as Given
from test_compat_experts import T as TOKENS
from test_quantization import quantized

import cupy_moe.compat.sglang
import cupy_moe.compat.vllm
from cupy_moe import Quantization, fused_experts
from cupy_moe.compat import _quantized
from cupy_moe.compat._quantized import quantization_of

vllm: Any = cupy_moe.compat.vllm
sglang: Any = cupy_moe.compat.sglang
SILU, E8 = MoEActivation.SILU, torch.float8_e4m3fn
__all__ = ["engines"]  # the fixture

# As `quantized` calls them; the types of activations and weights that vLLM says, the flag that SGLang sets.
KINDS = {
    "fp8 by blocks": (E8, E8, "use_fp8_w8a8"),
    "fp8 by wide blocks": (E8, E8, "use_fp8_w8a8"),
    "fp8 by channels": (E8, E8, "use_fp8_w8a8"),
    "fp8 by tensors": (E8, E8, "use_fp8_w8a8"),
    "int8 by channels": (None, torch.int8, "use_int8_w8a16"),
    "int4 by 32": (None, "int4", "use_int4_w4a16"),
    "int4 by 64 with zeros": (None, "int4", "use_int4_w4a16"),
    "int4 by 128 with zeros": (None, "int4", "use_int4_w4a16"),
}


class Said(NamedTuple):
    """What an engine says of weights, and what it means."""

    x: Given
    quantization: Quantization
    block_shape: list[int] | None
    scales: tuple[torch.Tensor, torch.Tensor]
    zeros: tuple[torch.Tensor | None, torch.Tensor | None]

    def made(self, format: str | None = None) -> Quantization:
        return quantization_of(
            format or self.quantization.format, self.block_shape, *self.scales, *self.zeros
        )

    def in_vllm(self, kind: str, **more: Any) -> Any:
        (s1, s2), (z1, z2), (activations, weights, _) = self.scales, self.zeros, KINDS[kind]
        said = {"w1_scale": s1, "w2_scale": s2, "w1_zp": z1, "w2_zp": z2, "block_shape": self.block_shape}
        return Quant(**{"quant_dtype": activations, "weight_quant_dtype": weights, **said, **more})

    def in_sglang(self, kind: str, **more: Any) -> dict[str, Any]:
        (s1, s2), (z1, z2) = self.scales, self.zeros
        said = {"w1_scale": s1, "w2_scale": s2, "w1_zp": z1, "w2_zp": z2, "block_shape": self.block_shape}
        return {KINDS[kind][2]: True, **said, **more}

    def expected(self, **options: Any) -> torch.Tensor:
        return fused_experts(*self.x[:5], quantization=self.quantization, **options)


def said(kind: str) -> Said:
    call, q = quantized(0, kind, tokens=TOKENS, topk=K, experts=4)
    t = call.tensors
    x = Given(
        t["hidden_states"].contiguous(), t["w1"], t["w2"], t["topk_weights"], t["topk_ids"],
        (torch.randn(t["w1"].shape[:2]).to(t["hidden_states"].dtype), torch.randn(t["w2"].shape[:2])),
    )  # fmt: skip
    scales: Any = q.w1_scale, q.w2_scale  # [E, rows, 1] of channels
    block_shape = [q.block_rows, q.block_columns] if "blocks" in kind else None
    if kind == "fp8 by tensors":
        scales = tuple(scale.flatten() for scale in scales)
    zeros: Any = q.w1_zeros, q.w2_zeros
    if q.format == "int4":
        block_shape = [0, q.block_columns]
        if q.w1_zeros is not None:  # ours may be 16, too
            zeros = tuple(zero.clamp(max=15) for zero in zeros)
            q = dataclasses.replace(q, w1_zeros=zeros[0], w2_zeros=zeros[1])
            zeros = tuple(zero[:, ::2] | zero[:, 1::2] << 4 for zero in zeros)
    return Said(x, q, block_shape, scales, zeros)


# ---- what is said ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_is_what_was_meant(kind: str) -> None:
    what = said(kind)
    made = what.made()
    for ours, meant in zip(vars(made).items(), vars(what.quantization).items(), strict=True):
        same = torch.equal(ours[1], meant[1]) if isinstance(meant[1], torch.Tensor) else ours == meant
        assert same, ours[0]


def test_dimensions_of_1_at_the_end_say_nothing() -> None:
    of_tensors, of_channels = torch.rand(3), torch.rand(3, 16)
    for scale in (of_tensors, of_tensors[:, None], of_tensors[:, None, None]):
        assert quantization_of("fp8", None, scale, scale).block_rows == 0
    for scale in (of_channels, of_channels[..., None]):
        assert quantization_of("fp8", None, scale, scale).block_rows == 1
    gate_and_up = quantization_of("fp8", None, torch.rand(3, 2, 1), of_tensors)
    assert (gate_and_up.block_rows, list(gate_and_up.w1_scale.shape)) == (0, [3, 2, 1])


ROWS, GROUPS = torch.rand(2, 16), torch.rand(2, 16, 4)
BYTES = torch.zeros(2, 8, 4, dtype=torch.uint8)
WITHOUT_A_FORM: dict[str, tuple[type[Exception], str, tuple[Any, ...]]] = {
    "no scale": (TypeError, "w1_scale: expected a tensor", ("fp8", None, None, ROWS)),
    "no second scale": (TypeError, "w2_scale: expected a tensor", ("fp8", None, ROWS, None)),
    "scales in e8m0": (TypeError, "w1_scale: expected", ("fp8", None, BYTES, BYTES)),
    "blocks of 16 columns": (ValueError, "a multiple of 32, got 16", ("fp8", [16, 16], GROUPS, GROUPS)),
    "GPTQ's int8": (ValueError, "8 bits with zeros", ("int8", [0, 32], GROUPS, GROUPS)),
    "int8 with zeros": (ValueError, "8 bits with zeros", ("int8", None, ROWS, ROWS, BYTES, BYTES)),
    "Marlin's int4": (ValueError, r"int4 in blocks of \[1, 32\]", ("int4", [1, 32], GROUPS, GROUPS)),
    "int4 by channels": (ValueError, "32, 64, 128, got 0", ("int4", None, GROUPS, GROUPS)),
    "groups of 256": (ValueError, "32, 64, 128, got 256", ("int4", [0, 256], GROUPS, GROUPS)),
    "one's zeros": (ValueError, "expected both or neither", ("int4", [0, 32], GROUPS, GROUPS, BYTES)),
    "zeros of two bytes": (
        TypeError,
        "w1_zeros: expected torch.uint8",
        ("int4", [0, 32], GROUPS, GROUPS, BYTES.short(), BYTES.short()),
    ),
    "flat zeros": (
        ValueError,
        "zeros: expected 3 dimensions",
        ("int4", [0, 32], GROUPS, GROUPS, BYTES[0], BYTES[0]),
    ),
}


@pytest.mark.parametrize("what", WITHOUT_A_FORM)
def test_what_no_quantization_is_made_of(what: str) -> None:
    error, message, arguments = WITHOUT_A_FORM[what]
    with pytest.raises(error, match=message):
        quantization_of(*arguments)
    assert id(arguments[2]) not in _quantized._made


def test_each_is_made_once() -> None:
    what = said("int4 by 64 with zeros")
    made = what.made()
    assert what.made() is made
    assert what._replace(block_shape=list(what.block_shape or ())).made() is made  # another list
    others = (
        what._replace(scales=(what.scales[0], what.scales[1].clone())),
        what._replace(zeros=(what.zeros[0], what.zeros[1].clone())),  # type: ignore[union-attr]
        what._replace(zeros=(None, None)),
        what._replace(block_shape=[0, 32]),
    )
    for other in others:
        assert other.made() is not made
        assert other.made() is other.made()
    assert what.made() is not made  # which others with its first scales have put aside


def test_scales_that_change_are_seen() -> None:
    scales: Any = tuple(torch.nn.Parameter(torch.rand(2, n), requires_grad=False) for n in (32, 16))
    made = quantization_of("int8", None, *scales)
    scales[0].data.fill_(3.0)
    assert quantization_of("int8", None, *scales) is made
    assert (made.w1_scale == 3).all()
    scales[1].data = torch.full((2, 16), 5.0)  # elsewhere
    again = quantization_of("int8", None, *scales)
    assert again is not made
    assert (again.w2_scale == 5).all()


def test_nothing_is_kept_of_tensors_that_are_gone() -> None:
    gc.collect()
    before = set(_quantized._made)
    what = said("int4 by 64 with zeros")
    what.made()
    assert len(set(_quantized._made) - before) == 1
    first = _quantized._made[id(what.scales[0])]
    del what
    gc.collect()
    assert set(_quantized._made) <= before
    scale = torch.rand(2, 16)
    quantization_of("int8", None, scale, scale)
    _quantized._forget(id(scale), first.parts[0][0])  # of one before, by the same number
    assert id(scale) in _quantized._made


# ---- vLLM ---


@pytest.mark.parametrize("class_name", ["TritonExperts", "TritonWNA16Experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_vllm(kind: str, class_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, what = cardboard_vllm(), said(kind)
    quant, expected = what.in_vllm(kind), what.expected()
    experts = getattr(engine, class_name)(quant)
    vllm.enable()
    assert torch.equal(engine.home.fused_experts(*what.x[:5], quant_config=quant), expected)
    monkeypatch.setattr(_quantized, "_make", lambda *_: pytest.fail("made again"))
    assert torch.equal(run_triton(experts, what.x, SILU), expected)
    assert torch.equal(engine.home.fused_experts(*what.x[:5], quant_config=quant), expected)
    assert experts.calls == []


def test_vllm_with_a_map_biases_and_weights_on_the_input() -> None:
    engine, what = cardboard_vllm(), said("fp8 by channels")
    local = torch.tensor([2, -1, 0, 1, -1, 3], dtype=torch.int32)
    biases = tuple(bias.to(what.x.x.dtype) for bias in what.x.biases)
    quant = what.in_vllm("fp8 by channels", w1_bias=biases[0], w2_bias=biases[1])
    vllm.enable()
    got = engine.home.fused_experts(*what.x[:5], SILU, True, 6, local, quant)
    options = {"w1_bias": biases[0], "w2_bias": biases[1], "expert_map": local}
    assert torch.equal(got, what.expected(apply_router_weight_on_input=True, **options))
    experts = engine.TritonExperts(quant)
    assert torch.equal(run_triton(experts, what.x, SILU, total=6, expert_map=local), what.expected(**options))
    assert experts.calls == []


UNQUANTISED: dict[str, tuple[bool, dict[str, Any], Callable[[Any], Any]]] = {
    "fp8": (True, {}, lambda e: None),
    "unquantised": (False, {"quant_dtype": None, "weight_quant_dtype": None}, lambda e: None),
    "int8_w8a8": (False, {"quant_dtype": torch.int8, "weight_quant_dtype": torch.int8}, lambda e: None),
    "scales in e8m0": (False, {"w1_scale": BYTES, "w2_scale": BYTES}, lambda e: None),
    "other ranks": (
        False,
        {},
        lambda e: setattr(e.moe_config.moe_parallel_config, "use_all2all_kernels", True),
    ),
    "LoRA": (True, {}, lambda e: setattr(e, "_lora_context", object())),  # says vLLM's own
    "hook": (False, {}, lambda e: setattr(e, "post_gemm2_hook", print)),
}


@pytest.mark.parametrize("what", UNQUANTISED)
def test_vllm_leaves_activations_as_they_are_for_what_runs_here(what: str) -> None:
    engine = cardboard_vllm()
    expected, more, change = UNQUANTISED[what]
    experts = engine.TritonExperts(said("fp8 by blocks").in_vllm("fp8 by blocks", **more))
    change(experts)
    inherits = engine.Inherits(experts.quant_config)
    assert experts.expects_unquantized_inputs is (what == "LoRA")
    with vllm.enabled():
        assert experts.expects_unquantized_inputs is expected
        assert inherits.expects_unquantized_inputs is False
    assert experts.expects_unquantized_inputs is (what == "LoRA")


@pytest.mark.parametrize("activation", [SILU, MoEActivation.SWIGLUSTEP])
def test_vllm_inside_of_a_class_that_has_activations_quantised(activation: MoEActivation) -> None:
    """Its own gets them, and by then is not told to quantise them."""
    engine, what = cardboard_vllm(), said("fp8 by blocks")
    experts = engine.TritonExperts(what.in_vllm("fp8 by blocks"))
    asked: list[bool] = []
    own = engine.TritonExperts.apply

    def apply(self: Any, *arguments: Any, **options: Any) -> None:
        asked.append(self.expects_unquantized_inputs)
        own(self, *arguments, **options)

    engine.TritonExperts.apply = apply
    vllm.enable()
    x = what.x._replace(x=what.x.x.to(E8))
    scale = torch.ones(TOKENS, 1)
    for _ in range(2):
        run_triton(experts, x, activation, a1q_scale=scale)
    assert asked == [False, False]
    assert experts.calls[0].arguments[1] is x.x
    assert experts.calls[0].arguments[9] is scale


def test_what_vllm_is_left_is_still_quantised_by_its_own() -> None:
    """It asks the same property as who has left activations as they are."""
    engine, what = cardboard_vllm(), said("fp8 by blocks")
    experts = engine.TritonExperts(what.in_vllm("fp8 by blocks"))
    vllm.enable()
    run_triton(experts, what.x, MoEActivation.SWIGLUSTEP)
    assert len(experts.calls) == 1
    assert experts.expects_unquantized_inputs is True


def test_workspaces_of_vllm() -> None:
    engine, what = cardboard_vllm(), said("int4 by 32")
    sizes = (9, what.x.w1.shape[1], what.x.x.shape[1], 2, 4, 4, None, SILU)
    for more, is_ours in (
        ({}, True),
        ({"block_shape": [1, 32]}, False),
        ({"weight_quant_dtype": "nvfp4"}, False),
        ({"w1_scale": None}, False),
    ):
        experts = engine.TritonExperts(what.in_vllm("int4 by 32", **more))
        own = experts.workspace_shapes(*sizes)
        with vllm.enabled():
            assert (experts.workspace_shapes(*sizes) != own) is is_ours, more


def test_what_vllm_keeps(caplog: pytest.LogCaptureFixture) -> None:
    engine, what = cardboard_vllm(), said("int8 by channels")
    unsigned = what.x._replace(w1=what.x.w1.view(torch.uint8), w2=what.x.w2.view(torch.uint8))
    vllm.enable()
    for x, more, reason in (
        (unsigned, {}, "w2: expected torch.int8, got torch.uint8"),
        (unsigned, {"block_shape": [0, 32]}, "weights of 8 bits with zeros"),
        (what.x, {"quant_dtype": torch.int8}, "activations of torch.int8 and weights of torch.int8"),
        (what.x, {"weight_quant_dtype": "mxfp4"}, "activations of None and weights of mxfp4"),
        (what.x, {"w1_scale": what.scales[0][:, 1:]}, "quantization: w1_scale: expected shape"),
    ):
        quant = what.in_vllm("int8 by channels", **more)
        got = engine.home.fused_experts(*x[:5], quant_config=quant)
        assert isinstance(got, Call)
        assert got.arguments[9] is quant
        assert reason in caplog.text


# ---- SGLang ---


@pytest.mark.parametrize("kind", KINDS)
def test_sglang(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, what = cardboard_sglang(), said(kind)
    sglang.enable()
    expected = what.expected(routed_scaling_factor=2.5)
    for _ in range(2):
        for result in run_sglang(
            engine, what.x, config(routed_scaling_factor=2.5), **what.in_sglang(kind, per_channel_quant=True)
        ):
            assert torch.equal(result, expected)
        monkeypatch.setattr(_quantized, "_make", lambda *_: pytest.fail("made again"))


def test_sglang_in_place_and_with_activations_that_were_quantised_before() -> None:
    engine, what = cardboard_sglang(), said("fp8 by blocks")
    sglang.enable()
    hidden = what.x.x.clone()
    more = what.in_sglang("fp8 by blocks", a1_q=hidden.to(E8), a1_scale=torch.ones(TOKENS, 1))
    top = what.x.weights, what.x.ids, None
    result = engine.home.fused_experts(hidden, what.x.w1, what.x.w2, top, config(inplace=True), **more)
    assert result is hidden
    assert torch.equal(hidden, what.expected())


def test_what_sglang_keeps() -> None:
    engine, what = cardboard_sglang(), said("int8 by channels")
    unsigned = what.x._replace(w1=what.x.w1.view(torch.uint8), w2=what.x.w2.view(torch.uint8))
    sglang.enable()
    for x, more in (
        (unsigned, {"block_shape": [0, 32]}),
        (unsigned, {}),
        (what.x, {"use_int8_w8a8": True}),
        (what.x, {"fuse_swiglu_interleaved": True}),
        (what.x, {"w2_scale": None}),
    ):
        for result in run_sglang(engine, x, config(), **what.in_sglang("int8 by channels", **more)):
            assert isinstance(result, Call), more


# ---- both ---


@pytest.mark.parametrize("kind", ["fp8 by tensors", "int4 by 64 with zeros"])
def test_compiled(kind: str) -> None:
    """Nothing is kept of what is traced."""
    what = said(kind)
    engine_of_vllm, engine_of_sglang = cardboard_vllm(), cardboard_sglang()
    vllm.enable()
    sglang.enable()
    quant, more, settings = what.in_vllm(kind), what.in_sglang(kind), config()
    top = what.x.weights, what.x.ids, None

    def of_vllm(x: torch.Tensor) -> Any:
        return engine_of_vllm.home.fused_experts(x, *what.x[1:5], quant_config=quant)

    def of_sglang(x: torch.Tensor) -> Any:
        return engine_of_sglang.home.fused_experts(x, what.x.w1, what.x.w2, top, settings, **more)

    before = set(_quantized._made)
    for function in (of_vllm, of_sglang):
        compiled: Any = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(what.x.x), what.expected())
    assert set(_quantized._made) == before
    torch.compiler.reset()


# ---- on a GPU ---


@pytest.mark.gpu
def test_zeros_that_a_graph_unpacks_are_its_own_on_a_gpu() -> None:
    what = said("int4 by 64 with zeros")
    scales: Any = tuple(scale.cuda() for scale in what.scales)
    zeros: Any = tuple(zero.cuda() for zero in what.zeros if zero is not None)
    meant: Any = what.quantization
    what = what._replace(scales=scales, zeros=zeros)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside: Any = what.made()
    outside: Any = what.made()
    assert outside is not inside
    assert what.made() is outside
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert what.made() is outside
        scales[0].clone()  # a graph of nothing is warned of
    assert outside.w1_zeros is not None
    assert torch.equal(outside.w1_zeros.cpu(), meant.w1_zeros)
    graph.replay()
    assert torch.equal(inside.w1_zeros.cpu(), meant.w1_zeros)
