"""What Python and CUDA share, found in the sources: structs, enums, constants and formulas. No GPU."""

from __future__ import annotations

import enum
import re
from typing import Any

import pytest
from cache_helpers import Everything
from gpus import H200

import cupy_moe.ops
from cupy_moe.cuda import structs
from cupy_moe.cuda.structs import ArgumentStruct
from cupy_moe.images import sources, targets
from cupy_moe.operators import align, gate
from cupy_moe.plans import align as align_plans
from cupy_moe.plans import base
from cupy_moe.plans import gate as gate_plans

FOLDER = sources.source_folder()
FILES = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*.cu*")}
assert cupy_moe.ops.__name__  # is imported, so all operators are, and all their structs declared


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def fields_of(place: str) -> list[tuple[str, str]]:
    """Type and name of each field of a struct, in order; pointers are all of one type."""
    file, _, name = place.partition(":")
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", without_comments(FILES[file]), re.DOTALL)
    assert body, f"no struct {place}"
    fields = []
    for declaration in filter(None, map(str.strip, body[1].split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+\*?)\s+(.*)", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
        for field in re.split(r",\s*", names):
            fields.append(("pointer" if kind.endswith("*") else kind, field))
    return fields


def constant(file: str, name: str) -> int:
    found = re.search(rf"\b{name} = (\w+)[,;]", without_comments(FILES[file]))
    assert found, f"no constant {name} in {file}"
    return int(found[1], 0)


ours = [declared for declared in structs.DECLARED if declared.file in FILES]


def test_every_argument_struct_is_declared() -> None:
    in_sources = {
        f"{file}:{name}" for file, text in FILES.items() for name in re.findall(r"struct (\w+Args) \{", text)
    }
    assert {f"{declared.file}:{declared.name}" for declared in ours} == in_sources


@pytest.mark.parametrize("declared", ours, ids=lambda declared: declared.name)
def test_fields_have_the_names_the_order_and_the_types_of_the_source(declared: ArgumentStruct) -> None:
    pointers = [("pointer", name) for name in declared.pointers]
    if declared.tensor_map:
        pointers.insert(0, ("TensorMap", declared.tensor_map))
    others = [(kind, name) for name, kind in declared.fields.items()]
    assert fields_of(f"{declared.file}:{declared.name}") == pointers + others


def test_a_divisor_is_three_words() -> None:
    assert "struct Divisor {\n  u32 value, magic, shift;\n" in FILES["common.cuh"]
    assert base.divisor(7)[0] == 7


def test_the_compiler_lays_structs_out_with_the_same_size(everything: Everything) -> None:
    entries = 0
    for path in (everything.folder / "v1" / targets.PTX_TARGET).glob("*.ptx"):
        text = path.read_text()
        unit = path.stem.rpartition("-")[0]
        (source,) = (name for name in FILES if name.endswith(f"/{unit}.cu"))
        included = re.findall(r'#include "(\S+)"', FILES[source])
        # Its own, or that of its family.
        declared = next(one for file in (source, *included) for one in ours if one.file == file)
        for size in re.findall(r"\.entry \w+\(\s*\.param \.align 8 \.b8 \w+\[(\d+)\]\s*\)", text):
            assert int(size) == -(-declared.size // 8) * 8, unit
            entries += 1
    assert entries == sum(len(r.kernels) for r in everything.results if r.target == targets.PTX_TARGET)


def test_a_field_by_another_name_is_refused() -> None:
    declared = ArgumentStruct("nowhere.cu:Args", "data", "u32 count, width")
    structs.DECLARED.remove(declared)
    assert declared.pack(width=2, count=1) == declared.pack(count=1, width=2)
    with pytest.raises(TypeError, match="Args: missing or unknown: height, width"):
        declared.pack(count=1, height=2)


def enumerators(file: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum {name} : u32 \{{(.*?)\}}", without_comments(FILES[file]), re.DOTALL)
    assert body, f"no enum {name} in {file}"
    found, value = {}, 0
    for enumerator in filter(None, map(str.strip, body[1].split(","))):
        label, _, given = enumerator.partition(" = ")
        value = int(given) if given else value
        found[label] = value
        value += 1
    return found


def camel(name: str) -> str:
    """`MAP_IDS` as the sources write it."""
    return "k" + name.title().replace("_", "")


@pytest.mark.parametrize(
    ("file", "enumeration"),
    [
        ("align/align.cuh", align.IdType),
        ("align/align.cuh", align.MapMode),
        ("gate/gate.cuh", gate.ElementType),
        ("gate/gate.cuh", gate.Scoring),
    ],
)
def test_enums_have_the_names_and_values_of_the_source(file: str, enumeration: type[enum.IntEnum]) -> None:
    expected = {label.lower(): value for label, value in enumerators(file, enumeration.__name__).items()}
    assert {camel(member.name).lower(): member.value for member in enumeration} == expected


def test_constants_that_plans_share_with_kernels() -> None:
    assert len(base.Constant.declared) >= 6
    for declared in base.Constant.declared:
        assert constant(*declared.place.split(":")) == declared, declared.place


def evaluated(expression: str, **names: Any) -> int:
    """A C expression of unsigned numbers."""
    python = re.sub(r"\bargs\.", "", expression).replace("/", "//").replace("~3u", "~3").replace("~7u", "~7")
    return int(eval(python, {}, names))


def formula(file: str, pattern: str) -> str:
    found = re.search(pattern, FILES[file], re.DOTALL)
    assert found, f"{file} has nothing like {pattern}"
    return found[1]


def table_words(num_experts: int, num_rows: int) -> int:
    """What the kernels take for the table, as align.cuh says it."""
    rounding = formula("align/align.cuh", r"round_up_4\(u32 value\) \{ return (.*?); \}")
    stride = evaluated(
        formula("align/align.cuh", r"stride\((round_up_4\(.*?\))\),"),
        num_experts=num_experts,
        round_up_4=lambda value: evaluated(rounding, value=value),
    )
    height = evaluated(
        formula("align/align.cuh", r"height\((.*?)\),\n"),
        num_rows=num_rows,
        kRows=constant("align/align.cuh", "kRows"),
    )
    return evaluated(
        formula("align/align.cuh", r"words\(\) const \{ return (.*?); \}"), height=height, stride=stride
    )


def test_the_table_is_as_large_as_the_kernels_take_it() -> None:
    for num_experts in (1, 2, 3, 4, 5, 8, 63, 64, 255, 256, 257, 1500):
        for num_rows in range(1, 33):
            planned = align_plans.table_bytes(num_experts, num_rows)
            assert planned == 4 * table_words(num_experts, num_rows), f"{num_experts=} {num_rows=}"


def test_what_clusters_exchange_is_as_large_as_the_kernels_take_it() -> None:
    source = FILES["align/align_shared.cu"]
    assert "u16* all_counts = chunk_counts + stride;" in source
    assert "u32* stage = (u32*)(all_counts + kCluster * stride);" in source
    rounding = formula("align/align_shared.cu", r"const u32 stride = (\(.*?\) & ~7u);")
    for num_experts in (1, 7, 8, 9, 256, 257):
        for cluster in (8, 16):
            stride = evaluated(rounding, num_experts=num_experts)
            words = 4 * table_words(num_experts, 20) + 2 * (cluster + 1) * stride
            assert align_plans.table_bytes(num_experts, 20, cluster) == words
    staged = align_plans.plan_align(131_072, 256, 163_584, 128, "i32", H200)
    assert staged.kernel == "cluster16"
    table = align_plans.table_bytes(256, staged.arguments["num_rows"], 16)
    assert staged.launches[0].shared_bytes == table + 4 * staged.arguments["per_block"]


def test_static_shared_memory_is_within_what_plans_leave_for_it(everything: Everything) -> None:
    reserved = {"gate_wide": gate_plans.WIDE_STATIC_SHARED, "align_shared": align_plans.STATIC_SHARED}
    reserved["align_global"] = align_plans.STATIC_SHARED
    for result in everything.results:
        for entry, figures in result.kernels.items():
            if result.unit in reserved and figures:
                assert figures["smem"] <= reserved[result.unit], f"{entry} for {result.target}"


def test_gate_wide_has_the_words_that_are_planned() -> None:
    said = formula("gate/gate_wide.cu", r"// shared   \((.*?)\) words")
    for num_experts, num_groups, topk in ((8, 1, 2), (5000, 10, 64)):
        words = evaluated(said, num_experts=num_experts, num_groups=num_groups, topk=topk)
        launch = gate_plans.plan_gate(1, num_experts, topk, num_groups, 4, True, True, H200).launch
        assert launch.shared_bytes == 4 * words
    source = FILES["gate/gate_wide.cu"]
    assert "u32* group_keys = keys + num_experts;" in source
    assert "u32* winners = group_keys + args.num_groups;" in source
    assert "reinterpret_cast<float*>(winners + args.topk)" in source
