"""Gating and sum with the signatures of vLLM and SGLang: on the CPU, and beside the real ones on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_compat import require

import cupy_moe.compat.sglang
import cupy_moe.compat.vllm
from cupy_moe import grouped_topk, moe_sum, topk_sigmoid, topk_softmax, topk_softplus_sqrt

vllm: Any = cupy_moe.compat.vllm
sglang: Any = cupy_moe.compat.sglang
SIZES = ((1, 8, 2), (33, 64, 6), (300, 128, 8), (77, 256, 8), (65, 60, 4), (9, 512, 10))


def outputs(tokens: int, topk: int, device: str = "cpu") -> Any:
    """Weights, ids and source rows, poisoned."""
    ids = torch.full((tokens, topk), 77, dtype=torch.int32, device=device)
    return torch.full((tokens, topk), 77.0, device=device), ids, ids.clone()


def test_vllm() -> None:
    x, experts = torch.randn(5, 3, 8), torch.tensor([[0, -1, 2]] * 5)
    out = torch.empty(5, 8)
    vllm.moe_sum(x, out, experts)
    assert torch.equal(out, moe_sum(x, topk_ids=experts))
    logits, bias = torch.randn(5, 8), torch.randn(8)
    for function, ours in ((vllm.topk_softmax, topk_softmax), (vllm.topk_sigmoid, topk_sigmoid)):
        weights, ids, rows = outputs(5, 3)
        function(weights, ids, rows, logits, True, bias)
        expected = ours(logits, 3, True, e_score_correction_bias=bias)
        assert torch.equal(weights, expected.topk_weights)
        assert torch.equal(ids, expected.topk_ids)
        assert rows.tolist() == [[t, 5 + t, 10 + t] for t in range(5)]
    for scoring, name in ((0, "none"), (1, "sigmoid")):
        result = vllm.grouped_topk(logits, 4, 2, 3, True, 2.5, bias, scoring)
        assert torch.equal(result[1], grouped_topk(logits, 3, True, 4, 2, name, 2.5, bias).topk_ids)


def test_sglang() -> None:
    x, out = torch.randn(5, 3, 8), torch.empty(5, 8)
    sglang.moe_sum_reduce(x, out, 2.5)
    assert torch.equal(out, moe_sum(x, routed_scaling_factor=2.5))
    logits, bias = torch.randn(5, 8), torch.randn(8)
    weights, ids, _ = outputs(5, 3)
    sglang.topk_softmax(weights, ids, logits, True, 30.0, bias)
    assert torch.equal(ids, topk_softmax(logits, 3, softcap=30.0, e_score_correction_bias=bias).topk_ids)
    sglang.topk_sigmoid(weights, ids, logits, True)
    assert torch.equal(weights, topk_sigmoid(logits, 3, True).topk_weights)
    routed = grouped_topk(logits, 2, True, 4, 2, "sigmoid", 2.5, bias)
    weights, ids = sglang.moe_fused_gate(logits, bias, 4, 2, 3, 1, 2.5, True)
    assert torch.equal(ids, torch.cat([routed.topk_ids, torch.full((5, 1), 8, dtype=torch.int32)], 1))
    assert torch.equal(weights, torch.cat([routed.topk_weights, torch.ones(5, 1)], 1))


def test_padding_of_vllm_has_no_experts() -> None:
    logits, is_padding = torch.randn(3, 8), torch.tensor([False, True, False])
    for function in (vllm.topk_softmax, vllm.topk_sigmoid):
        weights, ids, rows = outputs(3, 2)
        function(weights, ids, rows, logits, is_padding=is_padding)
        assert ids[1].tolist() == [-1, -1]
        assert weights[1].tolist() == [0, 0]
        assert (ids[::2] >= 0).all()


def test_rows_of_vllm_without_a_score_have_experts_of_no_weight() -> None:
    weights, ids = vllm.grouped_topk(torch.full((2, 8), torch.nan), 4, 2, 3, True, 2.5, torch.zeros(8))
    assert weights.tolist() == [[0, 0, 0]] * 2
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_the_default_factor_of_sglang_makes_zeros() -> None:
    out = torch.full((5, 8), 7.0)
    sglang.moe_sum_reduce(input_tensor=torch.randn(5, 3, 8), output_tensor=out)
    assert out.tolist() == torch.zeros(5, 8).tolist()


def test_shared_experts_of_sglang() -> None:
    logits, bias = torch.randn(5, 8), torch.randn(8).bfloat16()
    routed = grouped_topk(logits, 2, True, 4, 2, "sigmoid", 1.0, bias.float())
    weights, ids = sglang.moe_fused_gate(logits, bias, 4, 2, 4, 2, 2.5)  # the factor is for later
    assert torch.equal(weights, torch.cat([routed.topk_weights, torch.full((5, 2), 1 / 2.5)], 1))
    assert torch.equal(ids, torch.cat([routed.topk_ids, torch.tensor([[8, 9]] * 5)], 1))
    assert ids.dtype is torch.int32

    weights, ids, _ = outputs(5, 3)
    sglang.topk_sigmoid(weights, ids, logits, True, None, 2.5, 1)
    expected = topk_sigmoid(logits, 2, True, routed_scaling_factor=2.5)
    assert torch.equal(weights, torch.cat([expected.topk_weights, torch.ones(5, 1)], 1))
    assert torch.equal(ids, torch.cat([expected.topk_ids, torch.full((5, 1), 8)], 1))
    sglang.topk_sigmoid(weights, ids, logits, False, None, 2.5, 1)
    expected = topk_sigmoid(logits, 2)
    shared = expected.topk_weights.sum(1, keepdim=True) / 2.5
    assert torch.equal(weights, torch.cat([expected.topk_weights, shared], 1))


def test_the_one_gate_of_sglang() -> None:
    logits, bias = torch.randn(5, 8), torch.randn(8).bfloat16()
    shared: Any = {"num_fused_shared_experts": 1, "shared_expert_weight": 1 / 2.5}
    got = sglang.fused_gate(logits, bias, 3, "sqrtsoftplus", 1, True, 2.5)
    right = topk_softplus_sqrt(logits, 2, True, e_score_correction_bias=bias.float(), **shared)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    got = sglang.fused_gate(logits, bias, 3, "sigmoid", 1, False, 2.5, True, 0.0, 4, 2)
    right = grouped_topk(
        logits, 2, False, 4, 2, "sigmoid", 2.5, bias.float(), num_fused_shared_experts=1
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    got = sglang.fused_gate(logits, None, 3, "softmax", 0, True, None, False, 30.0)
    right = topk_softmax(logits, 3, True, softcap=30.0)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    left = []

    def original(*arguments: Any, **options: Any) -> str:
        left.append((arguments, options))
        return "SGLang's"

    for more in (
        {"renormalize_epsilon": 1e-6}, {"sqrtsoftplus_log1p": True}, {"packed_out": torch.ones(1)},
        {"num_token_non_padded": torch.ones(1)}, {"scoring_func": "softmax"}, {"moe_softcapping": 30.0},
    ):  # fmt: skip
        assert sglang.fused_gate(logits, bias, 3, original=original, **more) == "SGLang's", more
    assert sglang.fused_gate(logits, None, 3, "softmax", num_expert_group=2, original=original) == "SGLang's"
    assert left[0][0][:3] == (logits, bias, 3)


def test_tables_of_both_engines() -> None:
    logits, table = torch.randn(4, 8), torch.tensor([[5, 0], [1, 2], [7, 3]], dtype=torch.int32)
    taken: list[Any] = []
    input_ids = torch.tensor([2, 0, 1, 1])
    right = topk_softplus_sqrt(logits, 2, True, input_ids=input_ids, hash_table=table)
    weights, ids = sglang.hash_topk(logits, input_ids, table, 1, 2.5)
    assert torch.equal(ids, torch.cat([right.topk_ids, torch.full((4, 1), 8)], 1))
    assert torch.equal(weights, torch.cat([right.topk_weights, torch.full((4, 1), 1 / 2.5)], 1))
    weights, ids, rows = outputs(4, 2)
    vllm.topk_hash_softplus_sqrt(weights, ids, rows, logits, True, 1.0, torch.ones(8), input_ids, table)
    assert torch.equal(weights, right.topk_weights)
    assert torch.equal(ids, right.topk_ids)
    assert rows.tolist() == [[t, 4 + t] for t in range(4)]
    bias = torch.randn(8)
    vllm.topk_hash_softplus_sqrt(weights, ids, None, logits, True, 2.5, bias)
    right = topk_softplus_sqrt(logits, 2, True, e_score_correction_bias=bias, routed_scaling_factor=2.5)
    assert torch.equal(weights, right.topk_weights)
    given = weights, ids, None, logits, True, 2.5, bias, None, None, None, bias, 7
    vllm.topk_hash_softplus_sqrt(*given, original=lambda *arguments: taken.append(arguments))
    assert taken == [given]
    with pytest.raises(ValueError, match="scoring_func: expected 'sqrtsoftplus', got 'sigmoid'"):
        sglang.hash_topk(logits, input_ids, table, scoring_func="sigmoid")


def test_the_factor_of_sglang_is_for_renormalised_weights() -> None:
    logits = torch.randn(5, 8)
    for renormalize, factor in ((True, 2.5), (False, 1.0)):
        weights, ids, _ = outputs(5, 3)
        sglang.topk_sigmoid(weights, ids, logits, renormalize, None, 2.5)
        expected = topk_sigmoid(logits, 3, renormalize, routed_scaling_factor=factor)
        assert torch.equal(weights, expected.topk_weights)


def test_wrong_arguments_are_named() -> None:
    logits, bias, (weights, ids, rows) = torch.randn(5, 8), torch.zeros(8), outputs(5, 3)
    x, out = torch.randn(5, 3, 8), torch.empty(5, 8)
    zero = "routed_scaling_factor: expected other than 0 with fused shared experts, got 0"
    number, tensor = "routed_scaling_factor: expected a float, got torch.Tensor", torch.tensor(2.5)
    topk_ids = r"topk_ids: expected 2 dimensions, got \[5\]"
    for function, arguments, error, message in (
        (sglang.moe_fused_gate, (logits, bias, 4, 2, 3, 1), ValueError, zero),
        (sglang.moe_fused_gate, (logits, bias, 4, 2, 3, 1, 0.0, True), ValueError, zero),
        (sglang.moe_fused_gate, (logits, bias, 4, 2, 3, 1, tensor), TypeError, number),
        (sglang.moe_fused_gate, (logits, bias, 4, 2, 3, 3, 1.0), ValueError, "num_fused_shared_experts: exp"),
        (sglang.moe_fused_gate, (logits, 0.5, 4, 2, 3), TypeError, "e_score_correction_bias: expected"),
        (sglang.topk_sigmoid, (weights, ids, logits, False, None, 0.0, 1), ValueError, zero),
        (sglang.topk_sigmoid, (weights, ids[:, 0], logits), ValueError, topk_ids),
        (sglang.topk_softmax, (weights, ids[:, 0], logits), ValueError, topk_ids),
        (vllm.topk_sigmoid, (weights, ids[:, 0], rows, logits), ValueError, topk_ids),
        (vllm.topk_softmax, (weights, None, rows, logits), TypeError, "topk_ids: expected a tensor"),
        (vllm.grouped_topk, (logits, 4, 2, 3, True, 1.0, bias, 2), ValueError, "scoring_func: expected 0"),
        (vllm.grouped_topk, (logits, 4, 2, 3, True, 1.0, bias, -1), ValueError, "scoring_func: expected 0"),
        (vllm.moe_sum, (x, None), TypeError, "output: expected a tensor, got NoneType"),
        (sglang.moe_sum_reduce, (x, None), TypeError, "output_tensor: expected a tensor, got NoneType"),
        (vllm.moe_sum, (x, out, out), TypeError, "topk_ids: expected"),
    ):
        with pytest.raises(error, match=message):
            function(*arguments)


def same(ours: Any, theirs: Any, case: str) -> None:
    """Equal ids, but for a few whose scores differ by rounding, and weights that are as good as equal."""
    (weights, ids), (their_weights, their_ids) = ours, theirs
    assert (ids == their_ids).float().mean() > 0.995, case
    torch.testing.assert_close(weights, their_weights, rtol=2e-5, atol=1e-6, msg=case)


@pytest.mark.gpu
def test_equal_to_vllm() -> None:
    require("vllm")
    ops = torch.ops._moe_C
    for (tokens, topk, hidden), dtype in itertools.product(
        ((1, 2, 128), (33, 6, 511), (222, 8, 1024)), (torch.float32, torch.bfloat16)
    ):
        x = torch.randn(tokens, topk, hidden, device="cuda").to(dtype)
        ours, theirs = x.new_empty(tokens, hidden), x.new_empty(tokens, hidden)
        vllm.moe_sum(x, ours)
        ops.moe_sum(x, theirs, *[None] * (len(ops.moe_sum.default._schema.arguments) - 2))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for (tokens, num_experts, topk), renormalize in itertools.product(SIZES, (False, True)):
        logits = torch.randn(tokens, num_experts, device="cuda")
        ours, theirs = outputs(tokens, topk, "cuda"), outputs(tokens, topk, "cuda")
        bias = torch.randn(num_experts, device="cuda")
        for with_bias in (None, bias):
            if num_experts in (256, 512):
                vllm.topk_hash_softplus_sqrt(*ours, logits, renormalize, 2.5, with_bias)
                ops.topk_softplus_sqrt(*theirs, logits, renormalize, 2.5, with_bias, None, None)
                same(ours[:2], theirs[:2], f"softplus, {tokens=} {num_experts=} {renormalize=}")
            case = f"{tokens=} {num_experts=} {topk=} {renormalize=} bias={with_bias is not None}"
            vllm.topk_softmax(*ours, logits, renormalize, with_bias)
            ops.topk_softmax(*theirs, logits, renormalize, with_bias)
            same(ours[:2], theirs[:2], case)
            assert torch.equal(ours[2], theirs[2]), case
            vllm.topk_sigmoid(*ours, logits, renormalize, with_bias, 2.5)
            ops.topk_sigmoid(*theirs, logits, renormalize, with_bias, 2.5)
            same(ours[:2], theirs[:2], case)
    for tokens, num_experts, groups, chosen, topk in (
        (1, 256, 8, 4, 8),
        (64, 256, 8, 4, 8),
        (33, 160, 8, 3, 6),
    ):
        logits, bias = torch.randn(tokens, num_experts, device="cuda"), torch.rand(num_experts, device="cuda")
        arguments = logits, groups, chosen, topk, True, 2.5, bias, 1
        same(vllm.grouped_topk(*arguments), ops.grouped_topk(*arguments), str(arguments[1:6]))


@pytest.mark.gpu
def test_equal_to_sglang() -> None:
    require("sglang")
    ops = torch.ops.sgl_kernel
    for tokens, topk, hidden in ((1, 2, 128), (33, 6, 512), (222, 8, 1024), (1000, 8, 4096)):
        x = torch.randn(tokens, topk, hidden, device="cuda", dtype=torch.bfloat16)
        ours, theirs = x.new_empty(tokens, hidden), x.new_empty(tokens, hidden)
        sglang.moe_sum_reduce(x, ours, 2.5)
        ops.moe_sum_reduce(x, theirs, 2.5)
        torch.testing.assert_close(ours, theirs)
    for tokens, num_experts, topk in SIZES:
        logits = torch.randn(tokens, num_experts, device="cuda")
        ours, theirs = outputs(tokens, topk, "cuda")[:2], outputs(tokens, topk, "cuda")[:2]
        for softcap in (0.0, 30.0):
            sglang.topk_softmax(*ours, logits, True, softcap)
            ops.topk_softmax(*theirs, logits, True, softcap, None)
            same(ours, theirs, f"{tokens=} {num_experts=} {topk=} {softcap=}")
        for renormalize in (False, True):
            sglang.topk_sigmoid(*ours, logits, renormalize)
            ops.topk_sigmoid(*theirs, logits, renormalize, None)
            same(ours, theirs, f"sigmoid, {tokens=} {num_experts=} {topk=} {renormalize=}")
    for apply, shared in itertools.product((False, True), (0, 1, 2)):
        logits, bias = torch.randn(64, 256, device="cuda"), torch.rand(256, device="cuda")
        arguments = logits, bias, 8, 4, 8 + shared, shared, 2.5, apply
        same(sglang.moe_fused_gate(*arguments), ops.moe_fused_gate(*arguments), f"{apply=} {shared=}")
