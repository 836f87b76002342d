"""The experts of vLLM and SGLang on `fused_experts`: with engines of cardboard on the CPU, and on a GPU."""

from __future__ import annotations

import enum
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from test_compat_switch import module

import cupy_moe.compat.sglang
import cupy_moe.compat.vllm
from cupy_moe import experts_workspace_bytes
from cupy_moe.compat import _engine
from cupy_moe.cpu import experts as cpu
from cupy_moe.errors import ConfigError
from cupy_moe.operators.experts import ACTIVATIONS, fused_experts

ALPHA, _, LIMIT = cpu.SWIGLU["swigluoai"]

vllm: Any = cupy_moe.compat.vllm
sglang: Any = cupy_moe.compat.sglang
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
RUNNER = "sglang.srt.layers.moe.moe_runner"
T, K, E, H, I = 5, 2, 4, 16, 24  # noqa: E741


class MoEActivation(enum.Enum):
    """Of vLLM 0.26."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"


def is_of_experts(place: str) -> bool:
    return place.endswith((":fused_experts", "Experts.apply", "TritonRunnerCore.run"))


class Call(NamedTuple):
    """What the engine's own got, and gave."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Layer(NamedTuple):
    x: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor]


def layer(activation: str = "silu", dtype: torch.dtype = torch.bfloat16, tokens: int = T) -> Layer:
    torch.manual_seed(len(activation))

    def some(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.3).to(dtype)

    rows = 2 * I if activation in cpu.GATED else I
    ids = torch.randint(-1, E + 1, (tokens, K), dtype=torch.int32)
    biases = some(E, rows), some(E, H)
    return Layer(some(tokens, H), some(E, rows, H), some(E, H, I), torch.rand(tokens, K), ids, biases)


def package(name: str, **content: Any) -> Any:
    """A module that can be imported from now on, in packages that have its parents' names."""
    parent, _, last = name.rpartition(".")
    made = module(name, __path__=[], **content)
    if parent:
        setattr(sys.modules.get(parent) or package(parent), last, made)
    return made


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang", "sgl_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(_engine, "_warned", set())
    yield
    for switch in (vllm, sglang):
        switch.disable()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang", "sgl_kernel")]:
        del sys.modules[name]


# ---- vLLM ---


class Quant(SimpleNamespace):
    """A FusedMoEQuantConfig."""

    def __init__(self, **more: Any) -> None:
        types, of_weights = ("quant_dtype", "weight_quant_dtype", "block_shape"), ("bias", "scale", "zp")
        nothing = dict.fromkeys((*types, *(f"{w}_{name}" for w in ("w1", "w2") for name in of_weights)))
        super().__init__(**{**nothing, **more})


def cardboard_vllm() -> Any:
    """Of vLLM, what leads to the experts; its own functions give what they got."""

    def fused_experts(*arguments: Any, **options: Any) -> Call:
        return Call(arguments, options)

    class TritonExperts:
        _lora_context = None

        def __init__(self, quant_config: Any) -> None:
            self.quant_config = quant_config
            parallel = SimpleNamespace(use_all2all_kernels=False)
            self.moe_config = SimpleNamespace(moe_parallel_config=parallel)
            self.gemm1_clamp_limit, self.gemm1_alpha, self.gemm1_beta = None, 1.0, 0.0
            self.calls: list[Call] = []

        @property
        def expects_unquantized_inputs(self) -> bool:
            return self._lora_context is not None

        def apply(self, *arguments: Any, **options: Any) -> None:
            self.calls.append(Call(arguments, options))

        def workspace_shapes(
            self,
            M: int,
            N: int,
            K: int,
            topk: int,
            total: int,
            local: int,
            meta: Any,
            activation: MoEActivation,
        ) -> Any:
            out = N // 2 if not activation.value.endswith("_no_mul") else N
            return (M, topk, max(out, K)), (M, topk, max(N, K)), (M, K)

    class Inherits(TritonExperts):
        pass

    class TritonWNA16Experts(TritonExperts):
        def apply(self, *arguments: Any, **options: Any) -> None:
            self.calls.append(Call(("wna16", *arguments), options))

    package("vllm.envs", VLLM_BATCH_INVARIANT=False)
    package(f"{FUSED_MOE}.activation", MoEActivation=MoEActivation)
    home = package(f"{FUSED_MOE}.fused_moe", fused_experts=fused_experts)
    classes = {cls.__name__: cls for cls in (TritonExperts, TritonWNA16Experts, Inherits)}
    triton_moe = package(f"{FUSED_MOE}.experts.triton_moe", **classes)
    package("vllm.user", experts=fused_experts, Triton=TritonExperts)
    return SimpleNamespace(home=home, **vars(triton_moe))


def shapes_of(experts: Any, x: Layer, activation: MoEActivation, total: int = E) -> Any:
    (tokens, hidden), rows = x.x.shape, x.w1.shape[1]
    return experts.workspace_shapes(tokens, rows, hidden, K, total, len(x.w1), None, activation)


def arguments(
    x: Layer, activation: MoEActivation, shapes: Any, memory: torch.Tensor, second: int, total: int = E
) -> dict[str, Any]:
    """Of `apply`, as vLLM's modular kernel brings them: buffers lie in one allocation, which may be larger,
    the output at the head of workspace13, and workspace2 from `second` on."""
    views = [memory[: math.prod(shape)].view(shape) for shape in (shapes[2], shapes[0])]
    views.append(memory[second : second + math.prod(shapes[1])].view(shapes[1]))
    return {
        "output": views[0], "hidden_states": x.x, "w1": x.w1, "w2": x.w2, "topk_weights": x.weights,
        "topk_ids": x.ids, "activation": activation, "global_num_experts": total, "expert_map": None,
        "a1q_scale": None, "a2_scale": None, "workspace13": views[1], "workspace2": views[2],
        "expert_tokens_meta": None, "apply_router_weight_on_input": False,
    }  # fmt: skip


def run_triton(
    experts: Any, x: Layer, activation: MoEActivation, total: int = E, **more: Any
) -> torch.Tensor:
    shapes = shapes_of(experts, x, activation, total)
    first, second, output = map(math.prod, shapes)
    dtype = x.x.dtype if x.x.dtype.itemsize == 2 else torch.bfloat16
    memory = torch.full((max(first, output) + second,), 7.0, dtype=dtype)
    given = {**arguments(x, activation, shapes, memory, max(first, output), total), **more}
    assert experts.apply(**given) is None
    return given["output"]


def test_both_of_vllm_are_replaced_and_come_back() -> None:
    engine = cardboard_vllm()
    cls, user = engine.TritonExperts, sys.modules["vllm.user"]
    before, own, made_before = dict(vars(cls)), engine.home.fused_experts, cls(Quant())
    with vllm.enabled():
        assert engine.home.fused_experts is user.experts is not own
        assert engine.home.fused_experts.__wrapped__ is vllm.fused_experts
        assert cls.apply.__wrapped__ is vllm.triton_experts_apply
        assert engine.Inherits.workspace_shapes is cls.workspace_shapes is not before["workspace_shapes"]
        run_triton(made_before, layer(), MoEActivation.SILU)
    assert made_before.calls == []
    assert dict(vars(cls)) == before
    assert engine.home.fused_experts is user.experts is own
    run_triton(made_before, layer(), MoEActivation.SILU)
    assert len(made_before.calls) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_of_vllm_give_what_fused_experts_gives(activation: str, dtype: torch.dtype) -> None:
    engine, kind = cardboard_vllm(), MoEActivation(activation)
    x = layer(activation, dtype)
    local = torch.tensor([2, -1, 0, 1, -1, 3], dtype=torch.int32)
    vllm.enable()
    for biases, (mapped, total) in ((None, (None, E)), (x.biases, (local, 6)), (x.biases, (None, 9))):
        w1_bias, w2_bias = biases or (None, None)
        quant = Quant(w1_bias=w1_bias, w2_bias=w2_bias)
        expected = fused_experts(
            *x[:5], activation, expert_map=mapped, w1_bias=w1_bias, w2_bias=w2_bias, global_num_experts=-1
        )
        experts = engine.TritonExperts(quant)
        if activation == "swigluoai_uninterleave":  # the function has no limits to tell, and vLLM's fails
            experts.gemm1_clamp_limit, experts.gemm1_alpha, experts.gemm1_beta = LIMIT, ALPHA, 1.0
        else:
            result = engine.home.fused_experts(*x[:5], kind, False, total, mapped, quant)
            assert torch.equal(result, expected)
        assert torch.equal(run_triton(experts, x, kind, total, expert_map=mapped), expected)
        assert experts.calls == []


def test_router_weights_on_the_input() -> None:
    """The function multiplies them in; for the class, vLLM has done so before it is called."""
    engine, x = cardboard_vllm(), layer()
    vllm.enable()
    result = engine.home.fused_experts(*x[:5], MoEActivation.SILU, apply_router_weight_on_input=True)
    assert torch.equal(result, fused_experts(*x[:5], apply_router_weight_on_input=True))
    experts = engine.TritonExperts(Quant())
    result = run_triton(experts, x, MoEActivation.SILU, apply_router_weight_on_input=True)
    assert torch.equal(result, fused_experts(*x[:3], torch.ones(T, K), x.ids))
    assert experts.calls == []


@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("weights_type", [torch.float32, torch.bfloat16])
def test_types_of_ids_and_weights(ids_type: torch.dtype, weights_type: torch.dtype) -> None:
    engine, x = cardboard_vllm(), layer()
    x = x._replace(ids=x.ids.clamp(min=0).to(ids_type), weights=x.weights.to(weights_type))
    experts = engine.TritonExperts(Quant())
    expected = fused_experts(*x[:3], x.weights.float(), x.ids)
    vllm.enable()
    assert torch.equal(run_triton(experts, x, MoEActivation.SILU), expected)
    assert torch.equal(engine.home.fused_experts(*x[:5]), expected)
    assert experts.calls == []


def with_limits(experts: Any, *limits: Any) -> None:
    experts.gemm1_clamp_limit, experts.gemm1_alpha, experts.gemm1_beta = limits


LEFT_BY_VLLM: dict[str, Callable[[Any], Any]] = {
    "quantised": lambda e: setattr(e.quant_config, "quant_dtype", torch.float8_e4m3fn),
    "weights": lambda e: setattr(e.quant_config, "weight_quant_dtype", "int4"),
    "LoRA": lambda e: setattr(e, "_lora_context", object()),
    "hook": lambda e: setattr(e, "post_gemm2_hook", print),
    "clamped": lambda e: with_limits(e, 7.0, 1.0, 0.0),
    "invariant": lambda e: setattr(sys.modules["vllm.envs"], "VLLM_BATCH_INVARIANT", True),
}


@pytest.mark.parametrize("what", LEFT_BY_VLLM)
def test_what_the_class_of_vllm_keeps(what: str, caplog: pytest.LogCaptureFixture) -> None:
    engine, x = cardboard_vllm(), layer()
    experts = engine.TritonExperts(Quant())
    own = experts.workspace_shapes(9, 2 * I, H, K, E, E, None, MoEActivation.SILU)
    vllm.enable()
    assert experts.workspace_shapes(9, 2 * I, H, K, E, E, None, MoEActivation.SILU) != own
    LEFT_BY_VLLM[what](experts)
    assert experts.workspace_shapes(9, 2 * I, H, K, E, E, None, MoEActivation.SILU) == own
    for _ in range(2):
        output = run_triton(experts, x, MoEActivation.SILU)
    assert (output == 7).all()
    assert len(experts.calls) == 2
    kept = experts.calls[0].arguments
    assert len(kept) == 15
    assert all(a is b for a, b in zip(kept[1:6], x, strict=False))
    assert caplog.text.count("TritonExperts.apply runs as the engine's own") == 1


def test_what_inherits_from_the_class_of_vllm_keeps_its_own() -> None:
    engine = cardboard_vllm()
    experts = engine.Inherits(Quant())
    own = experts.workspace_shapes(9, 2 * I, H, K, E, E, None, MoEActivation.SILU)
    with vllm.enabled():
        assert experts.workspace_shapes(9, 2 * I, H, K, E, E, None, MoEActivation.SILU) == own
        run_triton(experts, layer(), MoEActivation.SILU)
    assert len(experts.calls) == 1


def test_limits_of_newer_vllm() -> None:
    """They are in an `activation_config`."""
    engine, x = cardboard_vllm(), layer("swigluoai_uninterleave")
    vllm.enable()
    for beta, is_ours in ((1.0, True), (0.5, False)):
        experts = engine.TritonExperts(Quant())
        experts.activation_config = SimpleNamespace(clamp_limit=LIMIT, alpha=1.5, beta=beta)
        run_triton(experts, x, MoEActivation.SWIGLUOAI_UNINTERLEAVE)
        assert (experts.calls == []) is is_ours


def test_what_the_function_of_vllm_keeps(caplog: pytest.LogCaptureFixture) -> None:
    engine, x, odd = cardboard_vllm(), layer(), torch.zeros(3, 12, dtype=torch.bfloat16)
    vllm.enable()
    run = engine.home.fused_experts
    for number, arguments in enumerate(
        (
            (*x[:5], MoEActivation.SWIGLUSTEP),
            (*x[:5], MoEActivation.RELU2),
            (*x[:5], MoEActivation.SWIGLUOAI_UNINTERLEAVE),
            (*x[:5], MoEActivation.SILU, False, -1, None, Quant(quant_dtype=torch.int8)),
            (*x[:5], MoEActivation.SILU, False, 7, torch.zeros(6, dtype=torch.int32)),
            (x.x.float(), *x[1:5], MoEActivation.SILU),
            (x.x, x.w1.float(), *x[2:5], MoEActivation.SILU),
            (*x[:4], x.ids.short(), MoEActivation.SILU),
            (odd, odd[None].repeat(1, 8, 1), odd[None, :, :12], x.weights[:3], x.ids[:3], MoEActivation.SILU),
        )
    ):
        result = run(*arguments)
        assert isinstance(result, Call), number
        assert all(a is b for a, b in zip(result.arguments, arguments, strict=False)), number
    assert run(x.x.float(), *x[1:5]).arguments[5] is MoEActivation.SILU  # its default
    assert caplog.text.count("fused_experts runs as the engine's own: activations of torch.int8") == 1
    assert caplog.text.count("fused_experts runs as the engine's own: hidden_states: ") == 1


def test_a_broken_configuration_is_not_left_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cardboard_vllm()
    vllm.enable()

    def broken(*_: Any, **__: Any) -> None:
        raise ConfigError("CUPY_MOE_TARGET")

    monkeypatch.setattr(vllm, "_fused_experts", broken)
    with pytest.raises(ConfigError):
        engine.home.fused_experts(*layer()[:5])


def test_without_an_engine_errors_say_why() -> None:
    x = layer()
    assert torch.equal(vllm.fused_experts(*x[:5]), fused_experts(*x[:5]))
    with pytest.raises(TypeError, match="hidden_states: expected"):
        vllm.fused_experts(x.x.float(), *x[1:5])
    with pytest.raises(ValueError, match="the activation swiglustep"):
        vllm.fused_experts(*x[:5], "swiglustep")


def test_the_workspace_of_the_most_tokens_is_enough_for_fewer() -> None:
    """vLLM allocates once, for the most tokens, and refuses what takes more later."""
    experts = cardboard_vllm().TritonExperts(Quant())
    vllm.enable()
    pick = random.Random(0)
    for case in range(200):
        kind = MoEActivation(pick.choice(ACTIVATIONS))
        is_limited = kind is MoEActivation.SWIGLUOAI_UNINTERLEAVE
        with_limits(experts, *((LIMIT, ALPHA, 1.0) if is_limited else (None, 1.0, 0.0)))
        inner, hidden, topk = pick.choice((8, 96, 768)), pick.choice((8, 256, 2048)), pick.choice((1, 2, 8))
        local = pick.choice((1, 8, 60, 256))
        total, most = local * pick.choice((1, 4)), pick.choice((1, 40, 513, 8192, 200_000))
        rows = 2 * inner if kind.value in cpu.GATED else inner
        sizes = {}
        for tokens in (1, pick.randint(1, most), max(1, most - 1), most):
            shapes = experts.workspace_shapes(tokens, rows, hidden, topk, total, local, None, kind)
            sizes[tokens] = [2 * math.prod(shape) for shape in shapes]
        for tokens, (first, second, output) in sizes.items():
            assert first <= sizes[most][0], case
            assert second <= sizes[most][1], case
            assert output == 2 * tokens * hidden, case
            for num_experts in (total, local):  # with a map, and without
                assert second >= experts_workspace_bytes(tokens, topk, hidden, inner, num_experts), case


def test_the_workspace_is_all_of_the_second_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, seen = cardboard_vllm().TritonExperts(Quant()), []
    vllm.enable()

    def spy(*arguments: Any, workspace: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(workspace)
        return fused_experts(*arguments, workspace=workspace, **options)

    monkeypatch.setattr(vllm, "_fused_experts", spy)
    output = run_triton(experts, layer(), MoEActivation.SILU)
    (workspace,) = seen
    assert workspace.dtype is torch.uint8
    assert workspace.numel() >= experts_workspace_bytes(T, K, H, I, E)
    assert not overlap(workspace, output)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (a_begin, a_size), (b_begin, b_size) = ((t.data_ptr(), t.numel() * t.element_size()) for t in (a, b))
    return a_begin < b_begin + b_size and b_begin < a_begin + a_size


def test_the_original_is_kept_by_who_kept_ours() -> None:
    engine = cardboard_vllm()
    experts = engine.TritonExperts(Quant(quant_dtype=torch.int8))
    with vllm.enabled():
        kept, kept_apply = engine.home.fused_experts, experts.apply
    assert isinstance(kept(layer().x.float(), *layer()[1:5]), Call)
    kept_apply(*[None] * 5, None, MoEActivation.SILU, *[None] * 8)
    assert len(experts.calls) == 1


# ---- SGLang ---


def config(**more: Any) -> Any:
    """A MoeRunnerConfig."""
    return SimpleNamespace(
        **{
            "activation": "silu", "is_gated": True, "apply_router_weight_on_input": False, "inplace": False,
            "no_combine": False, "routed_scaling_factor": None, "gemm1_alpha": None,
            "gemm1_clamp_limit": None, "swiglu_limit": None, "gate_up_interleaved": True, **more,
        }
    )  # fmt: skip


def cardboard_sglang() -> Any:
    class TritonRunnerOutput(NamedTuple):
        hidden_states: torch.Tensor

    class TritonRunnerCore:
        def __init__(self, config: Any) -> None:
            self.config = config

        def run(self, *arguments: Any, **options: Any) -> Call:
            return Call(arguments, options)

    def fused_experts(*arguments: Any, **options: Any) -> Call:
        return Call(arguments, options)

    home = package(f"{RUNNER}.triton_utils.fused_moe", fused_experts=fused_experts)
    vars(sys.modules[f"{RUNNER}.triton_utils"]).update(fused_experts=fused_experts)
    triton = package(
        f"{RUNNER}.triton", TritonRunnerCore=TritonRunnerCore, TritonRunnerOutput=TritonRunnerOutput
    )
    state = SimpleNamespace(is_batch_invariant_mode_enabled=lambda: False)
    package("sglang.srt.batch_invariant_ops", **vars(state))
    return SimpleNamespace(home=home, **vars(triton))


FLAGS_OF_SGLANG = (
    *("use_mxfp8", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"),
    "fuse_swiglu_interleaved",
)
STORED_OF_SGLANG = ("w13_scale", "w2_scale", "w13_zp", "w2_zp", "block_shape")


def in_class(more: dict[str, Any]) -> dict[str, Any]:
    """What the function calls w1, a TritonMoeQuantInfo calls w13."""
    return {name.replace("w1_", "w13_"): value for name, value in more.items()}


def run_sglang(engine: Any, x: Layer, settings: Any, biases: Any = (None, None), **more: Any) -> list[Any]:
    """By the function and by the class, each on a copy of the hidden states."""
    top = x.weights, x.ids, None
    by_function = engine.home.fused_experts(x.x.clone(), x.w1, x.w2, top, settings, *biases, **more)
    quant = SimpleNamespace(
        w13_weight=x.w1, w2_weight=x.w2, b13=biases[0], b2=biases[1],
        **{**dict.fromkeys(FLAGS_OF_SGLANG, False), **dict.fromkeys(STORED_OF_SGLANG), **in_class(more)},
    )  # fmt: skip
    inputs = SimpleNamespace(hidden_states=x.x.clone(), topk_weights=x.weights, topk_ids=x.ids)
    by_class = engine.TritonRunnerCore(settings).run(inputs, quant, {}, hooks=None)
    return [by_function, by_class if isinstance(by_class, Call) else by_class.hidden_states]


ACTIVATIONS_OF_SGLANG: dict[str, dict[str, Any]] = {
    **{name: {"activation": name} for name in ("silu", "gelu", "gelu_tanh")},
    **{
        f"{name}_no_mul": {"activation": name, "is_gated": False}
        for name in ("silu", "gelu", "gelu_tanh", "relu2")
    },
    "swigluoai": {"gemm1_alpha": ALPHA, "gemm1_clamp_limit": LIMIT},
    "swigluoai_uninterleave": {
        "gemm1_alpha": ALPHA,
        "gemm1_clamp_limit": LIMIT,
        "gate_up_interleaved": False,
    },
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_of_sglang_give_what_fused_experts_gives(activation: str) -> None:
    engine, x = cardboard_sglang(), layer(activation)
    sglang.enable()
    assert sys.modules[f"{RUNNER}.triton_utils"].fused_experts is engine.home.fused_experts
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"apply_router_weight_on_input": True, "routed_scaling_factor": 2.5},
        {"inplace": True},
    )
    for more in calls:
        ours = {name: value for name, value in more.items() if name != "inplace"}
        for biases in ((None, None), x.biases):
            expected = fused_experts(*x[:5], activation, w1_bias=biases[0], w2_bias=biases[1], **ours)
            settings = config(**ACTIVATIONS_OF_SGLANG[activation], **more)
            for result in run_sglang(engine, x, settings, biases):
                assert torch.equal(result, expected), more


def test_in_place_sglang_gets_its_hidden_states_back() -> None:
    engine, x = cardboard_sglang(), layer()
    expected = fused_experts(*x[:5])
    sglang.enable()
    result = engine.home.fused_experts(x.x, x.w1, x.w2, (x.weights, x.ids, None), config(inplace=True))
    assert result is x.x
    assert torch.equal(x.x, expected)
    other = x.x.clone()
    result = engine.home.fused_experts(x.x, x.w1, x.w2, (x.weights, x.ids, None), config())
    assert result is not x.x
    assert torch.equal(x.x, other)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"activation": "silu_rounded"}, {}),
        ({"activation": "situ"}, {}),
        ({"swiglu_limit": 10}, {}),
        ({"gemm1_clamp_limit": 7.0}, {}),
        ({"gemm1_alpha": 1.0}, {}),
        ({"no_combine": True}, {}),
        *[({}, {flag: True}) for flag in FLAGS_OF_SGLANG if flag != "use_mxfp8"],
    ],
)
def test_what_sglang_keeps(
    settings: dict[str, Any], more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine, x = cardboard_sglang(), layer()
    sglang.enable()
    for _ in range(2):
        by_function, by_class = run_sglang(engine, x, config(**settings), **more)
    assert isinstance(by_function, Call)
    assert isinstance(by_class, Call)
    assert len(by_function.arguments) == 21
    assert all(a is b for a, b in zip(by_function.arguments[1:3], (x.w1, x.w2), strict=True))
    assert by_class.arguments[2:] == ({}, None)
    assert caplog.text.count(".fused_experts runs as the engine's own: ") == 1
    assert caplog.text.count("TritonRunnerCore.run runs as the engine's own: ") == 1


def test_hooks_and_the_batch_invariant_mode_of_sglang() -> None:
    engine, x = cardboard_sglang(), layer()
    sglang.enable()
    core = engine.TritonRunnerCore(config())
    assert core.run(None, None, {}, object()).arguments[:2] == (None, None)
    sys.modules["sglang.srt.batch_invariant_ops"].is_batch_invariant_mode_enabled = lambda: True  # type: ignore
    assert all(isinstance(result, Call) for result in run_sglang(engine, x, config()))


def test_sglang_compiled() -> None:
    engine, x = cardboard_sglang(), layer()
    sglang.enable()
    compiled: Any = torch.compile(engine.home.fused_experts, fullgraph=True, backend="eager")
    for settings in (config(), config(inplace=True)):
        hidden = x.x.clone()
        result = compiled(hidden, x.w1, x.w2, (x.weights, x.ids, None), settings)
        assert torch.equal(result, fused_experts(*x[:5]))
        assert torch.equal(hidden, result if settings.inplace else x.x)
    torch.compiler.reset()


# ---- both ---


@pytest.mark.parametrize(
    "place",
    [place for place in {**vllm._switch._functions, **sglang._switch._functions} if is_of_experts(place)],
)
def test_what_is_left_to_an_engine_gets_every_argument(place: str) -> None:
    """In whatever way it came, each in its place."""
    engine: Any = cardboard_sglang() if place.startswith("sglang") else cardboard_vllm()
    switch = sglang if place.startswith("sglang") else vllm
    parameters = list(inspect.signature(switch._switch._functions[place]).parameters)[
        :-1
    ]  # without `original`
    given: dict[str, Any] = {name: object() for name in parameters if name != "self"}
    if "activation" in given:
        given["activation"] = MoEActivation.SWIGLUSTEP
    switch.enable()
    if place.endswith("Experts.apply"):
        class_name = place.rpartition(":")[2].removesuffix(".apply")
        experts = getattr(engine, class_name)(Quant())
        experts.apply(**given)
        (call,) = experts.calls
        if class_name == "TritonWNA16Experts":  # whose own tells that it is
            call = call._replace(arguments=call.arguments[1:])
    elif place.endswith("TritonRunnerCore.run"):
        call = engine.TritonRunnerCore(config()).run(**given)
    else:
        call = engine.home.fused_experts(**given)
    assert call == Call(tuple(given.values()), {})


# ---- on a GPU ---


@pytest.mark.gpu
def test_in_graphs_that_share_a_workspace_on_a_gpu() -> None:
    """What vLLM allocates for the most tokens serves them all, and nothing else is written."""
    experts: Any = cardboard_vllm().TritonExperts(Quant())
    vllm.enable()
    most = shapes_of(experts, layer(tokens=300), MoEActivation.SILU)
    begin = -(-math.prod(most[0]) // 128) * 128  # at a multiple of 256 bytes, as vLLM's
    end = begin + math.prod(most[1])
    memory = torch.empty(end + 1000, dtype=torch.bfloat16, device="cuda")
    for tokens in (300, 64, 17, 1):
        x = layer(tokens=tokens)
        here = Layer(x.x.cuda(), x.w1.cuda(), x.w2.cuda(), x.weights.cuda(), x.ids.cuda(), x.biases)
        shapes = shapes_of(experts, x, MoEActivation.SILU)
        given = arguments(here, MoEActivation.SILU, shapes, memory, begin)
        experts.apply(**given)  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            experts.apply(**given)
        memory.fill_(7.0)
        graph.replay()
        expected = fused_experts(x.x, x.w1, x.w2, x.weights, x.ids)
        torch.testing.assert_close(given["output"].cpu(), expected, rtol=0.02, atol=0.005)
        assert (memory[tokens * H : begin] == 7).all(), tokens
        assert (memory[begin + math.prod(shapes[1]) :] == 7).all(), tokens
    assert experts.calls == []


@pytest.mark.gpu
def test_in_place_on_a_gpu() -> None:
    x = layer(tokens=300)
    expected = fused_experts(x.x, x.w1, x.w2, x.weights, x.ids)
    hidden, top = x.x.cuda(), (x.weights.cuda(), x.ids.cuda(), None)
    assert sglang.fused_experts(hidden, x.w1.cuda(), x.w2.cuda(), top, config(inplace=True)) is hidden
    torch.testing.assert_close(hidden.cpu(), expected, rtol=0.02, atol=0.005)
