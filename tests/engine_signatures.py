"""The functions and methods of vLLM and SGLang that `cupy_moe.compat` replaces, as releases declare them.

`scripts/engines` compares this with those releases: the first of them installed, the others in their wheels,

    python tests/engine_signatures.py WHEEL...
"""

from __future__ import annotations

import ast
import enum
import inspect
import sys
import zipfile
from pathlib import Path
from typing import Any

_VLLM_ALIGN = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
_ALIGN = "topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad"
_GATE = "topk_weights, topk_ids, gating_output, renormalize=False"
_VLLM_GATE = (
    "topk_weights, topk_ids, token_expert_indices, gating_output, renormalize=False,"
    " e_score_correction_bias=None"
)
_VLLM_MOE = "vllm.model_executor.layers.fused_moe"
_VLLM_TRITON = f"{_VLLM_MOE}.experts.triton_moe"
_VLLM_APPLY = (
    "self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,"
    " a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input"
)
_VLLM_OLD = {
    f"{_VLLM_MOE}.fused_moe:fused_experts": (
        "hidden_states, w1, w2, topk_weights, topk_ids, activation='silu',"
        " apply_router_weight_on_input=False, global_num_experts=-1, expert_map=None, quant_config=None"
    ),
    f"{_VLLM_TRITON}:TritonExperts.apply": _VLLM_APPLY,
    f"{_VLLM_TRITON}:TritonWNA16Experts.apply": _VLLM_APPLY,
    f"{_VLLM_TRITON}:TritonExperts.expects_unquantized_inputs": "self",
    f"{_VLLM_TRITON}:TritonExperts.workspace_shapes": (
        "self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation"
    ),
    f"{_VLLM_ALIGN}:moe_align_block_size": (
        "topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False,"
        " ignore_invalid_experts=False"
    ),
    f"{_VLLM_ALIGN}:batched_moe_align_block_size": "max_tokens_per_batch, block_size, expert_num_tokens",
    "vllm._custom_ops:moe_align_block_size": f"{_ALIGN}, expert_map=None",
    "vllm._custom_ops:batched_moe_align_block_size": (
        "max_tokens_per_batch, block_size, expert_num_tokens, sorted_ids, expert_ids, num_tokens_post_pad"
    ),
    "vllm._custom_ops:moe_lora_align_block_size": (
        "topk_ids, token_lora_mapping, num_experts, block_size, max_loras, max_num_tokens_padded,"
        " max_num_m_blocks, sorted_token_ids, experts_ids, num_tokens_post_pad, adapter_enabled, lora_ids,"
        " expert_map=None"
    ),
    f"{_VLLM_MOE}.moe_permute_unpermute:moe_permute": (
        "hidden_states, a1q_scale, topk_ids, n_expert, n_local_expert=-1, expert_map=None,"
        " permuted_hidden_states=None, scratch=None"
    ),
    f"{_VLLM_MOE}.moe_permute_unpermute:moe_unpermute": (
        "out, permuted_hidden_states, topk_weights, inv_permuted_idx, expert_first_token_offset=None"
    ),
    "vllm._custom_ops:moe_sum": "input, output, topk_ids=None, expert_map=None",
    "vllm._custom_ops:topk_softmax": _VLLM_GATE,
    "vllm._custom_ops:topk_sigmoid": f"{_VLLM_GATE}, routed_scaling_factor=1.0",
    "vllm._custom_ops:topk_hash_softplus_sqrt": (
        "topk_weights, topk_indices, token_expert_indices, gating_output, renormalize=False,"
        " routed_scaling_factor=1.0, e_score_correction_bias=None, input_tokens=None, hash_indices_table=None"
    ),
    "vllm._custom_ops:grouped_topk": (
        "scores, num_expert_group, topk_group, topk, renormalize, routed_scaling_factor, bias, scoring_func=0"
    ),
}
_VLLM_ADDED = {
    f"{_VLLM_ALIGN}:moe_align_block_size": "return_scatter_idx=False",
    "vllm._custom_ops:moe_align_block_size": "scatter_idx=None",
    "vllm._custom_ops:topk_softmax": "is_padding=None",
    "vllm._custom_ops:topk_sigmoid": "is_padding=None",
    "vllm._custom_ops:topk_hash_softplus_sqrt": "is_padding=None, bias_vl=None, image_sentinel_lo=0",
}

# Release -> module:function or module:Class.method -> its parameters and their defaults; of a member of an
# enumeration, the value.
RELEASES = {
    "vllm==0.26.0": _VLLM_OLD,
    "vllm==0.33.0": {
        place: f"{old}, {_VLLM_ADDED[place]}" if place in _VLLM_ADDED else old
        for place, old in _VLLM_OLD.items()
    },
    "sglang-kernel==0.4.3": {
        "sgl_kernel:moe_align_block_size": f"{_ALIGN}, cumsum_buffer, pad_sorted_token_ids=False",
        "sgl_kernel:prepare_moe_input": (
            "topk_ids, expert_offsets, problem_sizes1, problem_sizes2, input_permutation, output_permutation,"
            " num_experts, n, k, blockscale_offsets=None"
        ),
        "sgl_kernel:apply_shuffle_mul_sum": "input, output, permutation, factors",
        "sgl_kernel:moe_sum_reduce": "input_tensor, output_tensor, routed_scaling_factor=0",
        "sgl_kernel:topk_softmax": f"{_GATE}, moe_softcapping=0.0, correction_bias=None",
        "sgl_kernel:topk_sigmoid": f"{_GATE}, correction_bias=None",
        "sgl_kernel:moe_fused_gate": (
            "input_tensor, bias, num_expert_group, topk_group, topk, num_fused_shared_experts=0,"
            " routed_scaling_factor=0, apply_routed_scaling_factor_on_output=False"
        ),
    },
    "sglang==0.5.23": {
        "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts": (
            "hidden_states, w1, w2, topk_output, moe_runner_config, b1=None, b2=None, use_fp8_w8a8=False,"
            " use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False,"
            " w1_scale=None, w2_scale=None, w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None,"
            " block_shape=None, a1_q=None, fuse_swiglu_interleaved=False"
        ),
        "sglang.srt.layers.moe.moe_runner.triton:TritonRunnerCore.run": (
            "self, runner_input, quant_info, running_state, hooks=None"
        ),
        "sglang.kernels.ops.lora.moe.moe_lora_align:moe_lora_align_block_size": (
            "topk_ids, seg_indptr, req_to_lora, num_experts, block_size, max_loras, max_num_tokens_padded,"
            " max_num_m_blocks, sorted_token_ids, expert_ids, num_tokens_post_pad, adapter_enabled, lora_ids,"
            " maybe_expert_map=None, cumsum_buffer=None, token_mask=None"
        ),
        "sglang.kernels.ops.moe:moe_align_block_size": (
            f"{_ALIGN}, cumsum_buffer, pad_sorted_token_ids=False, ignore_invalid_expert=False"
        ),
        "sglang.kernels.ops.moe:topk_softmax": f"{_GATE}, moe_softcapping=0.0, correction_bias=None",
        "sglang.kernels.ops.moe.moe_topk_sigmoid:topk_sigmoid": (
            f"{_GATE}, correction_bias=None, routed_scaling_factor=1.0, num_fused_shared_experts=0"
        ),
        "sglang.kernels.ops.moe.moe_fused_gate:moe_fused_gate": (
            "scores, bias, topk, scoring_func='sigmoid', num_fused_shared_experts=0, renormalize=True,"
            " routed_scaling_factor=1.0, apply_routed_scaling_factor_on_output=False, moe_softcapping=0.0,"
            " num_expert_group=1, topk_group=1, *, bias_alt=None, input_ids=None, bias_alt_token_id=None,"
            " num_token_non_padded=None, renormalize_epsilon=0.0, packed_out=None, sqrtsoftplus_log1p=False"
        ),
        "sglang.kernels.ops.moe.dsv4:hash_topk": (
            "router_logits, input_ids, tid2eid, num_fused_shared_experts=0, routed_scaling_factor=1.0,"
            " scoring_func='sqrtsoftplus'"
        ),
    },
}


def of_function(function: Any) -> str:
    """The parameters of a function, or of a property, as they are written above, but for `original`, which
    is ours."""
    function = getattr(function, "fget", function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default.value if isinstance(parameter.default, enum.Enum) else parameter.default
        if parameter.name != "original":
            parameters.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(parameters))[1:-1]


def of_wheel(wheel: zipfile.ZipFile, module: str, path: str) -> str:
    """The same of a function that is read, and not imported, in a module or where that imports it from."""
    file, names = module.replace(".", "/"), wheel.namelist()
    source = wheel.read(f"{file}.py" if f"{file}.py" in names else f"{file}/__init__.py")
    nodes = list(ast.walk(ast.parse(source)))
    class_name, _, name = path.rpartition(".")
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            nodes = list(node.body)
    for node in reversed(nodes):  # the last definition counts: those before may be overloads
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            node.args.defaults = [_value(default) for default in node.args.defaults]
            return ast.unparse(node.args)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            return of_wheel(wheel, str(node.module), name)
    raise SystemExit(f"{wheel.filename}: {module} has no {path}")


def _value(default: ast.expr) -> ast.expr:
    """Of a member of an enumeration, as MoEActivation.SILU, its value: the name in lower case."""
    return ast.Constant(default.attr.lower()) if isinstance(default, ast.Attribute) else default


def main(paths: list[str]) -> None:
    for path in paths:
        distribution, version, *_ = Path(path).name.split("-")
        release = f"{distribution.replace('_', '-')}=={version}"
        for place, wanted in RELEASES[release].items():
            with zipfile.ZipFile(path) as wheel:
                got = of_wheel(wheel, *place.split(":"))
            if ast.dump(ast.parse(f"def f({got}): 0")) != ast.dump(ast.parse(f"def f({wanted}): 0")):
                raise SystemExit(f"{release}, {place}:\n got {got}\n not {wanted}")
        print(f"{release}: {len(RELEASES[release])} functions as declared")


if __name__ == "__main__":
    main(sys.argv[1:])
