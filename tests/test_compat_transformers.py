"""cupy_moe.compat.transformers: models from small configurations give what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import cupy_moe.compat.transformers as compat  # noqa: E402
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
    assert "runs as in" not in caplog.text


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


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(DependencyError, match=r"pip install 'transformers>=5'"):
        compat.enable()
    monkeypatch.undo()
