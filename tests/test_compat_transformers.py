"""cupy_moe.compat.transformers: models from small configurations give what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import cupy_moe.compat.transformers as compat  # noqa: E402
from cupy_moe import Quantization  # noqa: E402
from cupy_moe.compat import _engine  # noqa: E402
from cupy_moe.errors import DependencyError  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "head_dim": 16,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    compat.enable()
    yield
    compat.disable()


def model_of(name: str, dtype: torch.dtype = torch.float16) -> Any:
    config_name, more = CONFIGS[name]
    config = getattr(transformers, config_name)(**SMALL, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="cupy_moe").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too, and logits that are far from each other
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 1.0))
    return model.eval()


def generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        tokens: torch.Tensor = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_tokens_as_eager(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    fused = compat.fused_experts

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return fused(*arguments, **options)

    monkeypatch.setattr(compat, "fused_experts", counted)
    model = model_of(name).to(device)
    eager = copy.deepcopy(model)
    eager.set_experts_implementation("eager")
    ids = torch.randint(1, 128, (3, 7), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), eager(ids).logits.float()
    assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()
    assert torch.equal(generated(model, ids), generated(eager, ids))
    assert len(calls) >= 2 * 12
    assert "runs as" not in caplog.text


def test_what_is_not_supported_runs_as_eager(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "_warned", set())
    monkeypatch.setattr(compat, "fused_experts", lambda *_, **__: pytest.fail("was called"))
    ids = torch.randint(1, 128, (1, 5))
    full = model_of("mixtral", torch.float32)
    eager = copy.deepcopy(full)
    eager.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(full(ids).logits, eager(ids).logits)
    assert caplog.text.count("weights of torch.float32") == 1
    half = model_of("mixtral")
    half(ids).logits.sum().backward()
    assert half.model.layers[0].mlp.experts.down_proj.grad is not None
    assert "gradients" in caplog.text


def test_activations_are_found_by_trying() -> None:
    found = {name: compat._activation(experts(model_of(name))) for name in CONFIGS}
    assert found == {"mixtral": "silu", "qwen3_moe": "silu", "gpt_oss": "swigluoai"}
    other = experts(model_of("mixtral"))
    other.act_fn = torch.nn.Tanh()
    del other._cupy_moe_activation
    assert compat._activation(other) is None


def experts(model: Any) -> Any:
    module = model.model.layers[0].mlp.experts
    compat._activation(module)
    return module


# ---- fp8


def in_fp8(name: str, block_size: tuple[int, int] | None) -> tuple[Any, Any]:
    """A model whose experts are in fp8, and one with the values of these, both as transformers makes them."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    plain = model_of(name)
    plain.set_experts_implementation("eager")
    model = copy.deepcopy(plain)
    settings = transformers.FineGrainedFP8Config(weight_block_size=block_size)
    others = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    fp8.replace_with_fp8_linear(model, others, settings)
    model.set_experts_implementation("cupy_moe")
    for old, layer in zip(plain.model.layers, model.model.layers, strict=True):
        theirs, module = old.mlp.experts, layer.mlp.experts
        assert type(module).__mro__[-3].__name__ == "FP8Experts"
        w1, w2 = ((w.data / 0.05).to(torch.float8_e4m3fn) for w in (theirs.gate_up_proj, theirs.down_proj))
        shapes = module.gate_up_proj_scale_inv.shape, module.down_proj_scale_inv.shape
        s1, s2 = ((torch.rand(shape) + 0.5) * 0.05 for shape in shapes)
        names = "gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv"
        for its_name, value in zip(names, (w1, s1, w2, s2), strict=True):
            setattr(module, its_name, torch.nn.Parameter(value, requires_grad=False))
        quantization = (
            Quantization.fp8_block(s1, s2, block_size)
            if block_size
            else Quantization.fp8_tensor(s1[..., 0], s2[:, 0, 0])
        )
        for weights, values in zip(
            (theirs.gate_up_proj, theirs.down_proj), quantization.dequantize(w1, w2), strict=True
        ):
            weights.data = values.to(weights.dtype)
    return model, plain


@pytest.mark.parametrize("block_size", [(16, 32), None])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fp8(
    name: str,
    block_size: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []
    fused = compat.fused_experts

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(options["quantization"])
        return fused(*arguments, **options)

    monkeypatch.setattr(compat, "fused_experts", counted)
    model, plain = in_fp8(name, block_size)
    ids = torch.randint(1, 128, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()
    assert torch.equal(generated(model, ids), generated(plain, ids))
    assert None not in calls
    assert len(set(map(id, calls))) == 2  # one for each layer
    assert "runs as" not in caplog.text


def test_fp8_that_is_not_supported_runs_as_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose own products need a GPU."""
    monkeypatch.setattr(_engine, "_warned", set())
    model, _ = in_fp8("mixtral", None)
    for layer in model.model.layers:
        module = layer.mlp.experts
        for name in ("gate_up_proj_scale_inv", "down_proj_scale_inv"):
            scale = getattr(module, name).data.log2().round().exp2()
            setattr(module, name, torch.nn.Parameter(scale.to(torch.float8_e8m0fnu), requires_grad=False))
        monkeypatch.setattr(module, "linear", lambda x, w, *_, **__: x @ w.to(x.dtype).T / 20)
    with torch.no_grad():
        assert model(torch.randint(1, 128, (1, 5))).logits.isfinite().all()
    assert (
        caplog.text.count("FP8Experts.forward runs as the engine's own: w1_scale: expected torch.float32")
        == 1
    )


def test_limits_that_only_large_values_meet_are_found() -> None:
    other = experts(model_of("mixtral"))
    other._apply_gate = lambda x: compat.activate("silu", x, limit=10.0)
    del other._cupy_moe_activation
    assert compat._activation(other) is None


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(DependencyError, match=r"pip install 'transformers>=5'"):
        compat.enable()
    monkeypatch.undo()
