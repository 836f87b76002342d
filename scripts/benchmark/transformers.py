"""compat.transformers: layers of a model of Hugging Face transformers, on our experts or theirs."""

from __future__ import annotations

import copy
import functools
import importlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

import cupy_moe.compat.transformers as compat
from cupy_moe.errors import DependencyError

from . import base, timing
from .base import OURS, Bound, Operator, Results, Row
from .experts import MODELS
from .timing import Call

LAYERS, VOCABULARY = 4, 4096
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128  # of Qwen3-30B
CONTEXT = 256  # tokens in the cache when one more is decoded
TURNS, ROUNDS = 5, 5
# Rounding may choose another expert, which shows in its token alone: hence half of the tokens of many.
HALF, EVERY, MANY = 0.02, 0.1, 64


class ModelCase(NamedTuple):
    model: str
    batch: int
    tokens: int  # of a sequence: one is decoded, more are a prompt
    run: str  # "calls" or "graph"
    target_us: float | None = None


class Inputs(NamedTuple):
    model: Any
    ids: torch.Tensor
    cache: Any


@functools.lru_cache(1)
def model_of(name: str, device: str) -> Any:
    """With random weights, on eager experts."""
    transformers: Any = importlib.import_module("transformers")
    experts, topk, hidden, inner = MODELS[name]
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_size=hidden, moe_intermediate_size=inner,
        num_experts=experts, num_experts_per_tok=topk, norm_topk_prob=True,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="eager"
        )
    return model.eval().requires_grad_(False)


def with_experts(model: Any, implementation: str) -> Any:
    """A model with the same weights in memory."""
    compat.enable()
    other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    other.set_experts_implementation(implementation)
    return other


def call_of(model: Any, ids: torch.Tensor, cache: Any) -> Callable[[], Results]:
    """A forward call, which leaves the cache as it is."""

    @torch.no_grad()
    def call() -> Results:
        grown = copy.copy(cache)
        grown.layers = [copy.copy(layer) for layer in cache.layers]
        return (model(ids, past_key_values=grown).logits,)

    return call


class Graph:
    """A call that is captured once; all that it reads has to live as long."""

    def __init__(self, call: Callable[[], Results]) -> None:
        self.call = call
        self.graph, _ = timing.capture([self.record], 1)

    def record(self) -> None:
        self.results = self.call()

    def replay(self) -> Results:
        self.graph.replay()
        return self.results


class Model(Operator):
    section = "transformers"
    function = "compat.transformers"
    theirs: Mapping[str, str] = {name: name for name in ("eager", "grouped_mm", "batched_mm")}

    cases: Sequence[ModelCase] = (
        ModelCase("Qwen3-30B", 1, 1, "calls"),
        ModelCase("Qwen3-30B", 8, 1, "calls"),
        ModelCase("Qwen3-30B", 64, 1, "calls"),
        ModelCase("Qwen3-30B", 1, 1, "graph"),
        ModelCase("Qwen3-30B", 8, 1, "graph"),
        ModelCase("Qwen3-30B", 64, 1, "graph"),
        ModelCase("Qwen3-30B", 1, 4096, "calls"),
    )

    title = f"Qwen3-30B with {LAYERS} layers, bf16"
    unit = "tokens/s"
    columns: Mapping[str, Sequence[str]] = {"batch x tokens": ("batch", "tokens"), "run as": ("run",)}
    note = (
        f"By `experts_implementation=`: {LAYERS} layers of Qwen3-30B-A3B's shape, with random weights and a"
        f" vocabulary of {VOCABULARY}. One token is decoded after {CONTEXT} others; more are a prompt. What"
        " is timed is `model(ids, past_key_values=...)` with a dynamic cache, one call at a time, from its"
        ' start to the end of its work on the GPU: in "calls" with all that the host does, in "graph"'
        " replayed as a CUDA graph, which eager cannot be, as it waits for the GPU. Nothing is sampled."
        " batched_mm copies the weights of every token's experts, for which memory may not suffice. Logits"
        " are compared with eager's."
    )
    size = "{model}, {batch} x {tokens} tokens, {run}"
    telling: Sequence[ModelCase] = ()

    def libraries(self) -> dict[str, str]:
        try:
            compat.enable()
        except DependencyError:
            return {}
        return {"transformers": importlib.import_module("transformers").__version__}

    def contenders(self, found: Iterable[str]) -> list[str]:
        return [OURS, *self.theirs] if "transformers" in found else []

    def inputs(self, case: ModelCase, kind: str, seed: int) -> Inputs:
        torch.manual_seed(seed)
        ids = torch.randint(VOCABULARY, (case.batch, CONTEXT + case.tokens), device=base.device)
        model = model_of(case.model, base.device)
        cache = importlib.import_module("transformers").DynamicCache()
        if case.tokens == 1:
            with torch.no_grad():
                model(ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1)
        return Inputs(model, ids[:, CONTEXT:], cache)

    def expected(self, case: ModelCase, inputs: Inputs) -> torch.Tensor:
        """eager's logits."""
        return call_of(*inputs)()[0]

    def bind(self, contender: str, case: ModelCase, inputs: Inputs) -> Bound:
        call = call_of(with_experts(inputs.model, contender), inputs.ids, inputs.cache)
        if case.run == "calls":
            return Bound(call)
        if contender == "eager":
            raise RuntimeError("waits for the GPU")
        return Bound(Graph(call).replay)

    def time_us(self, calls: Mapping[str, Sequence[Call]], replays: int) -> dict[str, float]:
        """One call at a time, as the next one needs its token."""
        turns = [
            {name: timing.eager_us(call, ROUNDS) for name, (call,) in calls.items()} for _ in range(TURNS)
        ]
        return {name: statistics.median(turn[name] for turn in turns) for name in calls}

    def figure(self, row: Row, us: float) -> float:
        return row["batch"] * row["tokens"] * 1e6 / us

    def wrong(self, contender: str, case: ModelCase, results: Results, expected: torch.Tensor) -> str:
        want = expected.flatten(0, 1).float()
        off = (results[0].flatten(0, 1).float() - want).norm(dim=1) / want.norm(dim=1)
        right = off.max() <= EVERY and (len(off) < MANY or off.median() <= HALF)
        return "" if right else "logits"


OPERATORS = (Model(),)
