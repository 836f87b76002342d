"""What Python and CUDA share, found in the sources: structs, enums, constants and formulas. No GPU."""

from __future__ import annotations

import enum
import re
import subprocess
from pathlib import Path
from typing import Any

import emulator
import pytest
from cache_helpers import Everything
from gpus import H200, RTX4090

import cupy_moe.ops
import cupy_moe.parallel.messages
from cupy_moe.cuda import structs
from cupy_moe.cuda.structs import ArgumentStruct
from cupy_moe.images import compiler, sources, targets
from cupy_moe.operators import _experts_launches, align, gate
from cupy_moe.plans import align as align_plans
from cupy_moe.plans import base
from cupy_moe.plans import experts as experts_plans
from cupy_moe.plans import gate as gate_plans
from cupy_moe.plans import moe_sum as sum_plans
from cupy_moe.plans import permute as permute_plans
from cupy_moe.plans import route as route_plans

FOLDER = sources.source_folder()
FILES = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*.cu*")}
# These are imported, so all operators are, and all structs declared.
assert cupy_moe.ops.__name__
assert cupy_moe.parallel.messages.__name__


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def fields_of(place: str) -> list[tuple[str, str]]:
    """Type, with `alignas`, and name of each field of a struct, in order; pointers are all of one type."""
    file, _, name = place.partition(":")
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", without_comments(FILES[file]), re.DOTALL)
    assert body, f"no struct {place}"
    fields = []
    for declaration in filter(None, map(str.strip, body[1].split(";"))):
        kind, names = re.fullmatch(
            r"((?:const |alignas\(\d+\) )?\w+\*?)\s+(.*)", declaration, re.DOTALL
        ).groups()  # type: ignore[union-attr]
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
        of_family = [file for file in included if file.partition("/")[0] == source.partition("/")[0]]
        # Its own, or that of its family.
        declared = next(one for file in (source, *of_family) for one in ours if one.file == file)
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
        ("experts/experts.cuh", _experts_launches.Activation),
        ("experts/formats.cuh", _experts_launches.ScaleType),
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
    source = FILES["align/shared.cuh"]
    assert "u16* all_counts = chunk_counts + stride;" in source
    assert "u32* stage = (u32*)(all_counts + kCluster * stride);" in source
    rounding = formula("align/shared.cuh", r"const u32 stride = (\(.*?\) & ~7u);")
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
    reserved |= dict.fromkeys(
        ("align_global", "align_sort", "permute_direct", "route_cluster8"), align_plans.STATIC_SHARED
    )
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


def test_ids_of_a_cluster_have_the_words_that_are_planned() -> None:
    source = FILES["route/route_cluster8.cu"]
    assert (
        "shared   the table (align.cuh), and kCluster * rows_per_block * (topk + num_shared) words" in source
    )
    for tokens, topk in ((17, 8), (50, 1), (64, 3)):
        gate = gate_plans.plan_gate(tokens, 256, topk, 1, 4, False, False, H200)
        slots, _ = align_plans.aligned_sizes(tokens * topk, 256, 16)
        plan = route_plans.plan_route(gate, route_plans.RouteSizes(tokens, topk, 256, slots, 16), H200)
        assert plan.launch
        rows = plan.arguments["rows_per_block"]
        table = align_plans.table_bytes(256, plan.arguments["num_rows"])
        assert plan.launch.shared_bytes == table + 4 * 8 * rows * topk
        assert rows * 8 >= tokens
        assert rows * topk % 4 == 0


# ---- the experts


def files_of(unit: str) -> tuple[str, ...]:
    """Those that have its structs."""
    header = "wgmma" if "wgmma" in unit else "mma" if "mma" in unit else "swapped"
    return f"experts/{header}.cuh", f"experts/{unit}.cu"


def constants_of(unit: str) -> dict[str, int]:
    """All of a unit of the experts and of what it includes."""
    values: dict[str, int] = {}
    for file in ("common.cuh", "experts/experts.cuh", *files_of(unit)):
        for declaration in re.findall(r"^constexpr u32 (.*?);", without_comments(FILES[file]), re.MULTILINE):
            for name, _, value in (part.partition(" = ") for part in declaration.split(", ")):
                values[name] = int(eval(re.sub(r"u\b", "", value).replace("/", "//"), {}, values))
    return values


def struct_layout(unit: str, name: str) -> tuple[int, int]:
    """sizeof and alignof of a struct of words, flags, barriers, other structs of its unit, and arrays."""
    known = {"bool": (1, 1), "u32": (4, 4), "float": (4, 4), "Barrier": (8, 8), "uint4": (16, 16)}
    offset, alignment = 0, 1
    (file,) = (file for file in files_of(unit) if f"struct {name} {{" in FILES[file])
    for kind, field in fields_of(f"{file}:{name}"):
        aligned = re.fullmatch(r"(?:alignas\((\d+)\) )?(\w+)", kind)
        assert aligned, kind
        size, align = known.get(aligned[2]) or struct_layout(unit, aligned[2])
        align = max(align, int(aligned[1] or 1))
        count = 1
        for length in re.findall(r"\[(.*?)\]", field):
            count *= int(eval(length.replace("/", "//"), {}, constants_of(unit)))
        offset = base.round_up(offset, align) + size * count
        alignment = max(alignment, align)
    return base.round_up(offset, alignment), alignment


def struct_bytes(unit: str, name: str) -> int:
    barrier = re.search(r"struct Barrier \{(.*?);", FILES["hopper.cuh"], re.DOTALL)
    assert barrier
    assert barrier[1].split() == ["u64", "word"]
    return struct_layout(unit, name)[0]


def experts_plan(kernel: str, num_pairs: int = 100, intermediate: int = 768, gated: bool = True) -> Any:
    sizes = num_pairs, 8, 8, 2048, intermediate, "bf16", gated
    stored = ("fp8", True) if kernel in experts_plans.FP8_KERNELS else ()
    return experts_plans.plan_experts(*sizes, RTX4090 if kernel == "mma_fp8" else H200, kernel, *stored)


def test_wgmma_has_the_shared_memory_that_it_lays_out() -> None:
    sizes = constants_of("experts_wgmma")
    assert sizes["kStageBytes"] == (sizes["kTileRows"] + sizes["kWeightRows"]) * sizes["kRowBytes"]
    assert sizes["kStageBytes"] % 1024 == 0  # of each stage, or operands would not lie where wgmma wants them
    source = FILES["experts/wgmma.cuh"]
    assert "Shared& shared = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes);" in source
    assert "StageScales* scales = reinterpret_cast<StageScales*>(&shared + 1);" in source
    assert "(misaligned ? 1024 - misaligned : 0)" in source
    expected = 1024 + sizes["kStages"] * sizes["kStageBytes"] + struct_bytes("experts_wgmma", "Shared")
    scales = sizes["kStages"] * struct_bytes("experts_wgmma", "StageScales")
    for gated in (True, False):
        of_16_bits, of_fp8 = (experts_plan(kernel, gated=gated) for kernel in ("wgmma", "wgmma_fp8"))
        for launch in of_16_bits.products + of_fp8.products:
            assert launch.shared_bytes == expected + (scales if launch.unit == "experts_wgmma_fp8" else 0)
            assert launch.shared_bytes <= H200.shared_bytes
            assert launch.block == sizes["kThreads"]


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
@pytest.mark.parametrize(
    ("unit", "names"),
    [
        ("experts_wgmma", ("Job", "Shared")),
        ("experts_direct", ("Groups",)),
        ("experts_mma_fp8", ("StageScales",)),
    ],
)
def test_a_compiler_lays_shared_memory_out_the_same(
    unit: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    lines = [f'#include "experts/{unit}.cu"']
    for name in names:
        size, alignment = struct_layout(unit, name)
        lines.append(f"static_assert(sizeof({name}) == {size} && alignof({name}) == {alignment});")
    if unit == "experts_wgmma":  # cp.async writes 16 bytes
        lines.append("static_assert(offsetof(Shared, pairs) % 16 == 0);")
    (tmp_path / "sizes.cpp").write_text("#include <cstddef>\n" + "\n".join(lines))
    options = "-std=c++17", "-w", "-fsyntax-only", "-D__CUDA_ARCH__=900"
    include = "-include", emulator.HERE / "cuda.hpp", "-I", FOLDER
    subprocess.run([emulator.COMPILER, *options, *include, tmp_path / "sizes.cpp"], check=True)


def test_wgmma_is_consistent_in_itself() -> None:
    """What one of its constants says that follows from others."""
    sizes = constants_of("experts_wgmma")
    assert sizes["kWeightRows"] == 2 * sizes["kBoxRows"]  # each block of a cluster loads a box for both
    others = sizes["kThreads"] - sizes["kLoaders"]
    assert others == sizes["kTileRows"] // 64 * 128  # a warpgroup for 64 rows
    assert sizes["kProductWarps"] == others // base.WARP
    assert sizes["kWriteRows"] == sizes["kTileRows"] // sizes["kProductWarps"] == 16  # as wgmma has them
    # Each loader has chunks of as many rows, and eight rows at once keep their swizzle.
    assert sizes["kTileRows"] % (sizes["kLoaders"] // sizes["kChunks"]) == 0
    assert sizes["kLoaders"] // sizes["kChunks"] % 8 == 0
    # The place of the next tile is told while a tile is loaded, which is before that one is done.
    assert sizes["kRing"] >= 2
    assert sizes["kTileRows"] == base.WARP * 4  # a warp copies the pairs of a tile, 16 bytes a lane
    assert sizes["kMaxLocalExperts"] <= base.WARP * base.WARP  # it finds an expert in two votes
    # Roles get registers of those that the block was launched with, or one of them would wait for ever.
    roles = formula("experts/wgmma.cuh", r"  if \(threadIdx\.x >= kLoaders\) \{\n(.*?)\n  \}\n")
    others_take, loaders_give = (
        r"take_registers<Product::kProductRegisters>\(\);\s+multiply<",
        r"give_back_registers<Product::kLoaderRegisters>\(\);\s+load<",
    )
    assert re.fullmatch(rf"\s+{others_take}.* else \{{\s+{loaders_give}.*", roles, re.DOTALL)
    launched = 65_536 // sizes["kThreads"] // 8 * 8
    for unit in ("experts_wgmma", "experts_wgmma_fp8"):
        said = r"kProductRegisters = (\d+), kLoaderRegisters = (\d+);"
        ((taken, given),) = (map(int, pair) for pair in re.findall(said, FILES[f"experts/{unit}.cu"]))
        assert given % 8 == taken % 8 == 0
        assert given < launched < taken
        assert sizes["kLoaders"] * given + others * taken <= sizes["kThreads"] * launched
    assert sizes["kLoaders"] % 128 == others % 128 == 0  # by whole warpgroups


def test_direct_has_the_shared_memory_that_it_lays_out() -> None:
    sizes = constants_of("experts_direct")
    said = formula("experts/experts_direct.cu", r"// shared   (.*)\n// limits")
    assert struct_bytes("experts_direct", "Groups") <= experts_plans.DIRECT_STATIC_BYTES
    assert H200.shared_bytes // 2 < experts_plans.DIRECT_ALONE_BYTES
    for num_pairs in (1, 128):
        for launch in experts_plan("direct", num_pairs).products:
            assert launch.block == sizes["kThreads"]
            expected = evaluated(said, **sizes)
            if launch.grid <= H200.num_sms:  # more, so that no two share an SM
                expected = max(expected, experts_plans.DIRECT_ALONE_BYTES)
            assert launch.shared_bytes == expected


def test_direct_is_consistent_in_itself() -> None:
    """What one of its constants says that follows from others."""
    sizes = constants_of("experts_direct")
    assert sizes["kStageBytes"] == (sizes["kTileWeights"] + sizes["kGroupPairs"]) * sizes["kRowBytes"]
    assert sizes["kTileWeights"] == sizes["kThreads"] // base.WARP * 16  # rows of weights of a warp
    assert sizes["kGroupPairs"] == 8  # columns of mma.sync
    assert sizes["kThreads"] // sizes["kChunks"] >= sizes["kGroupPairs"]  # rows that are copied at once


def test_mma_fp8_has_the_shared_memory_that_it_lays_out() -> None:
    sizes = constants_of("experts_mma_fp8")
    said = formula("experts/experts_mma_fp8.cu", r"// shared   (.*) bytes\n")
    source = FILES["experts/experts_mma_fp8.cu"]
    assert "reinterpret_cast<StageScales*>(stages + kStages * Tile::kStageBytes);" in source
    scales = str(struct_bytes("experts_mma_fp8", "StageScales"))
    expected = evaluated(said.replace("sizeof(StageScales)", scales), **sizes)
    for gated in (True, False):
        for launch in experts_plan("mma_fp8", gated=gated).products:
            assert launch.shared_bytes == expected
            assert launch.shared_bytes + 4 * sizes["kTileRows"] <= RTX4090.shared_bytes
            assert launch.block == sizes["kThreads"]


def test_tiles_are_those_of_the_entries() -> None:
    entries = re.findall(r"ENTRY\(name, type, Element, kGated, ([\d, ]+)\)", FILES["experts/experts_mma.cu"])
    rows_of = {}
    for rows, weight_rows, warp_rows, warp_columns, stages in (map(int, e.split(", ")) for e in entries):
        rows_of[f"mma_{rows}"] = rows, weight_rows, stages
        assert warp_rows * warp_columns * base.WARP == experts_plans.TILES[f"mma_{rows}"].threads
    assert rows_of == {name: tile[:3] for name, tile in experts_plans.TILES.items()}


def test_kernels_that_overlap_wait_before_they_write_or_let_others_begin(everything: Everything) -> None:
    chosen = ("direct", 8), ("mma_16", 10_000), ("mma_fp8", 100_000)
    plans = [experts_plan(kernel, num_pairs) for kernel, num_pairs in chosen]
    launches = [launch for plan in plans for launch in plan.products]
    launches.append(sum_plans.plan_sum(9, 8, 64, "bf16", 2, True, True, H200, True).launch)
    rows = permute_plans.PermuteSizes(9000, 8, 64, 72_000, 896, True, False, "i32")
    launches.append(permute_plans.plan_permute(rows, H200).launch)
    assert not sum_plans.plan_sum(
        9, 8, 64, "bf16", 2, True, True, H200
    ).launch.overlaps  # costs the host time
    assert all(launch.overlaps for launch in launches)
    entries = 0
    for unit in {launch.unit for launch in launches}:
        # An image for Hopper alone has no PTX.
        texts = [
            path.read_text() for path in (everything.folder / "v1" / targets.PTX_TARGET).glob(f"{unit}-*.ptx")
        ]
        if unit == "experts_mma_fp8":
            texts.append(compiler.compile(sources.unit(unit), targets.PTX_TARGET).data.decode())
        for text in texts:
            for body in re.split(r"\.entry ", text)[1:]:
                name = body.partition("(")[0]
                waits = body.find("griddepcontrol.wait")
                assert waits >= 0, name
                for later in ("st.global", "griddepcontrol.launch_dependents"):
                    assert later not in body[:waits], f"{name} has {later} before it waits"
                # The kernel before may still write what is read through the read-only cache.
                assert "ld.global.nc" not in body, name
                entries += 1
    assert entries >= 36
