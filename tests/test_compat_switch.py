"""`enable`, `disable` and `enabled` of `cupy_moe.compat`, on engines of cardboard and on engines on disk."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cupy_moe.compat.sglang
import cupy_moe.compat.vllm
from cupy_moe.compat._engine import Switch
from cupy_moe.errors import DependencyError

vllm: Any = cupy_moe.compat.vllm
sglang: Any = cupy_moe.compat.sglang
HOME = "vllm.model_executor.layers.fused_moe.moe_align_block_size"


def module(name: str, **content: Any) -> Any:
    """A module that can be imported from now on."""
    made = sys.modules[name] = types.ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture(autouse=True)
def no_engine_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engines = ("vllm", "sgl_kernel", "sglang", "elsewhere")

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in engines]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    yield
    for switch in (vllm, sglang):
        switch.disable()
        assert switch._switch._blocks == 0
    for name in ours():
        del sys.modules[name]


@pytest.fixture
def cardboard() -> dict[str, Any]:
    """Modules with the names of the engines' own, and others that have imported from them."""

    def align() -> str:
        return "vllm"

    def batched() -> str:
        return "vllm"

    def low_level() -> str:
        return "vllm"

    def sgl() -> str:
        return "sgl_kernel"

    def sglang_wrapper() -> str:
        return "sglang"

    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        module(parent)
    for parent in ("sglang", "sglang.kernels", "sglang.kernels.ops"):
        module(parent)
    return {
        "home": module(HOME, moe_align_block_size=align, batched_moe_align_block_size=batched),
        "package": module("vllm.model_executor.layers.fused_moe", moe_align_block_size=align, other=len),
        "renamed": module("vllm.marlin", align_tokens=align),
        "low": module("vllm._custom_ops", moe_align_block_size=low_level),
        "foreign": module("elsewhere", moe_align_block_size=align),
        "sgl_kernel": module("sgl_kernel", moe_align_block_size=sgl),
        "sglang": module("sglang.kernels.ops.moe", moe_align_block_size=sglang_wrapper),
        "layers": module("sglang.layers", sgl_moe_align_block_size=sgl),
    }


def contents(modules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in modules.items()}


def test_switch(cardboard: dict[str, Any]) -> None:
    before = contents(cardboard)
    vllm.enable()
    vllm.enable()
    assert cardboard["home"].moe_align_block_size is vllm.moe_align_block_size
    assert cardboard["home"].batched_moe_align_block_size is vllm.batched_moe_align_block_size
    assert cardboard["package"].moe_align_block_size is vllm.moe_align_block_size
    assert cardboard["renamed"].align_tokens is vllm.moe_align_block_size
    assert cardboard["low"].moe_align_block_size is vllm.moe_align_block_size_into
    assert cardboard["foreign"].moe_align_block_size() == "vllm"
    assert cardboard["sgl_kernel"].moe_align_block_size() == "sgl_kernel"
    vllm.disable()
    vllm.disable()
    assert contents(cardboard) == before

    with sglang.enabled():
        assert cardboard["sgl_kernel"].moe_align_block_size is sglang.moe_align_block_size
        assert cardboard["layers"].sgl_moe_align_block_size is sglang.moe_align_block_size
        with sglang.enabled():
            pass
        assert cardboard["sgl_kernel"].moe_align_block_size is sglang.moe_align_block_size
    assert contents(cardboard) == before


def test_the_context_ends_with_an_error(cardboard: dict[str, Any]) -> None:
    with pytest.raises(KeyError), vllm.enabled():
        raise KeyError
    assert cardboard["home"].moe_align_block_size() == "vllm"


def test_a_module_that_is_imported_in_between_gets_the_engines_function(cardboard: dict[str, Any]) -> None:
    original = cardboard["home"].moe_align_block_size
    vllm.enable()
    late = module("vllm.late", align=cardboard["home"].moe_align_block_size)
    assert late.align is vllm.moe_align_block_size
    vllm.disable()
    assert late.align is original
    vllm.enable()
    assert late.align is vllm.moe_align_block_size


def test_of_two_functions_that_one_of_ours_replaces_each_comes_back_to_its_place(
    cardboard: dict[str, Any],
) -> None:
    before = contents(cardboard)
    with sglang.enabled():
        ours = [cardboard[name].moe_align_block_size for name in ("sgl_kernel", "sglang")]
        assert {function.__code__ for function in ours} == {sglang.moe_align_block_size.__code__}
        assert [function.__kwdefaults__ for function in ours] == [None, None]
        assert {function.__defaults__ for function in ours} == {sglang.moe_align_block_size.__defaults__}
        late = module("sglang.late", first=ours[0], second=ours[1])
    assert contents(cardboard) == before
    assert [late.first(), late.second()] == ["sgl_kernel", "sglang"]


def test_a_function_that_two_places_share_is_replaced_once(cardboard: dict[str, Any]) -> None:
    shared = cardboard["sglang"].moe_align_block_size = cardboard["sgl_kernel"].moe_align_block_size
    with sglang.enabled():
        assert cardboard["sglang"].moe_align_block_size is sglang.moe_align_block_size
        assert cardboard["sgl_kernel"].moe_align_block_size is sglang.moe_align_block_size
    assert cardboard["sglang"].moe_align_block_size is shared
    assert cardboard["sgl_kernel"].moe_align_block_size is shared


def test_what_others_have_replaced_since_is_left_alone(cardboard: dict[str, Any]) -> None:
    vllm.enable()
    cardboard["renamed"].align_tokens = print
    vllm.enable()
    vllm.disable()
    assert cardboard["renamed"].align_tokens is print
    assert cardboard["home"].moe_align_block_size() == "vllm"


def test_what_others_have_replaced_at_home_comes_back(cardboard: dict[str, Any]) -> None:
    cardboard["home"].moe_align_block_size = print
    with vllm.enabled():
        assert cardboard["home"].moe_align_block_size is vllm.moe_align_block_size
        assert cardboard["renamed"].align_tokens() == "vllm"
    assert cardboard["home"].moe_align_block_size is print


def test_references_that_are_no_names_of_modules_stay_what_they_are(cardboard: dict[str, Any]) -> None:
    home = cardboard["home"]

    def kept() -> Any:
        function = home.moe_align_block_size
        cls = type("Layer", (), {"align": staticmethod(function)})
        return module("vllm.keeper", table={"align": function}, cls=cls, partial=functools.partial(function))

    def functions(keeper: Any) -> list[Any]:
        return [keeper.table["align"], keeper.cls.align, keeper.partial.func]

    before, original = kept(), home.moe_align_block_size
    with vllm.enabled():
        assert functions(before) == [original] * 3
        between = kept()
    assert functions(between) == [vllm.moe_align_block_size] * 3


def test_what_is_in_sys_modules_may_be_anything(
    cardboard: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unequal:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise TypeError

    for name, entry in (("vllm.none", None), ("vllm.object", object()), ("vllm.named", module("vllm.x"))):
        monkeypatch.setitem(sys.modules, name, entry)
    cardboard["renamed"].unequal = Unequal()
    sys.modules["vllm.named"].__name__ = 7  # type: ignore[assignment]
    with vllm.enabled():
        assert cardboard["renamed"].align_tokens is vllm.moe_align_block_size
    assert cardboard["renamed"].align_tokens() == "vllm"


# ---- methods ---


def ours(self: Any, number: int = 1, *, original: Any = None) -> str:
    return f"ours, {number}; {original(self, number)}"


@pytest.fixture
def methods() -> Iterator[Any]:
    """Two classes of an engine, one that inherits, and a switch of one of ours for both."""

    class First:
        def run(self, number: int = 1) -> str:
            return f"first, {number}"

    class Second:
        def run(self, number: int = 1) -> str:
            return f"second, {number}"

    class Inherits(First):
        pass

    home = module("elsewhere", First=First, Second=Second, Inherits=Inherits)
    places = ("First.run", "Second.run", "Inherits.run", "First.not_there", "NotThere.run")
    switch = Switch("an engine", {f"elsewhere:{place}": ours for place in places})
    yield types.SimpleNamespace(switch=switch, **vars(home))
    switch.disable()


def test_methods_are_replaced_and_come_back(methods: Any) -> None:
    classes = methods.First, methods.Second, methods.Inherits
    first, before = methods.First(), [dict(vars(cls)) for cls in classes]
    with methods.switch.enabled():
        assert first.run(2) == "ours, 2; first, 2"
        assert methods.Second().run(number=3) == "ours, 3; second, 3"
        assert methods.Inherits().run() == "ours, 1; first, 1"
        assert dict(vars(methods.Inherits)) == before[2]
        kept = first.run
    assert [dict(vars(cls)) for cls in classes] == before
    assert kept(4) == "ours, 4; first, 4"


def test_a_method_that_others_have_replaced_since_is_left_alone(methods: Any) -> None:
    methods.switch.enable()
    methods.First.run = print
    methods.switch.disable()
    assert methods.First.run is print
    assert methods.Second().run() == "second, 1"


# ---- blocks and threads ---


def test_the_last_of_overlapping_blocks_gives_back(cardboard: dict[str, Any]) -> None:
    first, second = vllm.enabled(), vllm.enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert cardboard["home"].moe_align_block_size is vllm.moe_align_block_size
    second.__exit__(None, None, None)
    assert cardboard["home"].moe_align_block_size() == "vllm"


def test_what_is_enabled_outside_or_inside_of_a_block_stays_so(cardboard: dict[str, Any]) -> None:
    vllm.enable()
    with vllm.enabled():
        pass
    assert cardboard["home"].moe_align_block_size is vllm.moe_align_block_size
    vllm.disable()
    with vllm.enabled():
        vllm.enable()
    assert cardboard["home"].moe_align_block_size is vllm.moe_align_block_size


def test_disable_inside_of_a_block_gives_back(cardboard: dict[str, Any]) -> None:
    with vllm.enabled():
        vllm.disable()
        assert cardboard["home"].moe_align_block_size() == "vllm"
        with vllm.enabled():
            assert cardboard["home"].moe_align_block_size is vllm.moe_align_block_size
    assert cardboard["home"].moe_align_block_size() == "vllm"


def test_threads_that_enable_while_others_import(cardboard: dict[str, Any]) -> None:
    before, wrong = contents(cardboard), []

    def enable_often() -> None:
        for _ in range(20):
            with vllm.enabled():
                if cardboard["home"].moe_align_block_size is not vllm.moe_align_block_size:
                    wrong.append("not enabled")

    def import_often(number: int) -> None:
        for i in range(100):
            module(f"vllm.late{number}_{i}", align=cardboard["home"].moe_align_block_size)

    threads = [threading.Thread(target=enable_often) for _ in range(4)]
    threads += [threading.Thread(target=import_often, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert contents(cardboard) == before
    with vllm.enabled():
        pass  # for what was about to be imported when it was disabled
    late = [made for name, made in sys.modules.items() if name.startswith("vllm.late")]
    assert {made.align for made in late} == {cardboard["home"].moe_align_block_size}


# ---- engines on disk ---


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module, and the packages around it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, source: str) -> None:
        *packages, last = name.split(".")
        folder = tmp_path
        for package in packages:
            folder /= package
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / f"{last}.py").write_text(source)
        importlib.invalidate_caches()

    return write


FUNCTION = "def {}(*_): return 'the engine'\n"


@pytest.mark.parametrize("fault", ["raise ImportError('no libcudart')", "1 / 0", "import not_installed"])
def test_an_engine_that_cannot_be_imported_is_left_as_it_is(install: Any, fault: str) -> None:
    install(HOME, FUNCTION.format("moe_align_block_size"))
    install("vllm._custom_ops", fault)
    message = r"vLLM: vllm._custom_ops cannot be imported: .*(no libcudart|division by zero|not_installed)"
    for _ in range(2):
        with pytest.raises(DependencyError, match=message):
            vllm.enable()
        with pytest.raises(DependencyError, match=message), vllm.enabled():
            pass
        assert importlib.import_module(HOME).moe_align_block_size() == "the engine"


def test_what_another_version_lacks_is_no_fault(install: Any) -> None:
    install("vllm._custom_ops", FUNCTION.format("moe_sum"))
    install("sgl_kernel.moe", FUNCTION.format("topk_softmax"))
    with vllm.enabled():
        assert sys.modules["vllm._custom_ops"].moe_sum is vllm.moe_sum
    with pytest.raises(DependencyError, match="SGLang is not installed, or has none of sgl_kernel:"):
        sglang.enable()


def test_a_module_of_the_engine_that_is_reloaded(install: Any) -> None:
    install("vllm._custom_ops", FUNCTION.format("moe_sum"))
    install("vllm.user", "from vllm._custom_ops import moe_sum")
    home, user = importlib.import_module("vllm._custom_ops"), importlib.import_module("vllm.user")
    first = home.moe_sum
    vllm.enable()
    importlib.reload(home)
    second = home.moe_sum
    assert second is not vllm.moe_sum  # until disabled and enabled again
    vllm.disable()
    assert user.moe_sum is first
    assert home.moe_sum is second
    with vllm.enabled():
        importlib.reload(user)
        assert user.moe_sum is home.moe_sum is vllm.moe_sum
    assert user.moe_sum is home.moe_sum is second


@pytest.mark.parametrize("switch", [vllm, sglang])
def test_without_the_engine(switch: Any) -> None:
    if importlib.util.find_spec("vllm") or importlib.util.find_spec("sgl_kernel"):
        pytest.skip("there is an engine here")
    with pytest.raises(DependencyError, match="is not installed"):
        switch.enable()
    with pytest.raises(DependencyError), switch.enabled():
        pass
    switch.disable()
