"""The layers of DESIGN.md, proved from the sources: imports only go down, and who may know what.

Each check is a function from a module's name and source to the offences in it, and beside its test
stands one that feeds it an offender.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distavg"

# From the ground up. A module may import those that stand before it, and no other.
LEVELS = (
    "errors",
    "layout",
    "rules",
    "schedule",
    "names",
    "foreach",
    "rollcall",
    "comm",
    "replicas",
    "tensors",
    "placements",
    "wrappers",
    "shards",
    "streams",
    "average",
    "offload",
    "updates",
    "swap",
    "gather",
    "batchnorm",
    "checkpoint.seal",
    "checkpoint.manifest",
    "checkpoint.header",
    "checkpoint.plan",
    "checkpoint.records",
    "checkpoint.files",
    "checkpoint.cover",
    "checkpoint.folders",
    "checkpoint.save",
    "checkpoint.export",
    "checkpoint.load",
    "checkpoint.read",
    "checkpoint",  # its __init__
    "hooks",
    "state",
    "foreign",
    "averager",
    "learning_rate",
    "integrations.ema_optimizer",
    "integrations.composer",
    "integrations",
    "plot",
    "cli",
    "",  # distavg/__init__.py
    "__main__",
)

# What a module may not import, not even by way of the modules that it imports.
FORBIDDEN_IMPORTS = {
    "errors": ("torch",),
    "layout": ("torch",),
    "rules": ("torch",),
    "schedule": ("torch",),
    "checkpoint.manifest": ("torch.distributed",),
    "checkpoint.records": ("torch",),
    "checkpoint.plan": ("torch.distributed",),
}

# Names, attributes and strings that only some modules may know.
WRAPPERS = frozenset({"wrappers", "placements", "names"})
DTENSOR_USERS = WRAPPERS | {"state"}  # DCP takes DTensors, and nothing else that is sharded
KNOWN_TO = {
    "DistributedDataParallel": WRAPPERS,
    "FullyShardedDataParallel": WRAPPERS,
    "FSDP": WRAPPERS,
    "FSDPModule": WRAPPERS,
    "fully_shard": WRAPPERS,
    "OptimizedModule": WRAPPERS,
    "CheckpointWrapper": WRAPPERS,
    "_orig_mod": WRAPPERS,
    "_fsdp_wrapped_module": WRAPPERS,
    "_checkpoint_wrapped_module": WRAPPERS,
    "_flat_param": WRAPPERS,
    "_get_fsdp_state": WRAPPERS,
    "_fsdp_param_group": WRAPPERS,
    "_local_tensor": WRAPPERS,
    "DTensor": DTENSOR_USERS,
    "DeviceMesh": DTENSOR_USERS,
    "Replicate": DTENSOR_USERS,
    "_StridedShard": WRAPPERS,
}


def module_names() -> list[str]:
    return sorted(map(name_of, PACKAGE.rglob("*.py")))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_of(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def is_package(module: str) -> bool:
    return PACKAGE.joinpath(*module.split(".")).is_dir()


def imports_of(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, also inside functions.

    `from a import b` gives "a.b": whether b is a module is for the reader of the name to say.
    """
    package = ["distavg", *filter(None, module.split("."))]
    if not is_package(module):
        package.pop()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*origin, alias.name])) for alias in node.names)


def level_of(imported: str) -> str | None:
    """The module of LEVELS that an imported name belongs to; None outside of distavg.

    "distavg.shards.Shard" is of "shards", "distavg.Shard" of the package's own __init__.
    """
    first, *rest = imported.split(".")
    if first != "distavg":
        return None
    while ".".join(rest) not in LEVELS:
        rest.pop()
    return ".".join(rest)


def upward_imports(module: str, source: str) -> list[str]:
    """Imports of a module that does not stand below this one.

    `from distavg.checkpoint import x` in a module of that package is an import of its __init__.
    """
    own = LEVELS.index(module)
    return [
        f"{module or '__init__'}:{line} imports {imported}"
        for line, imported in imports_of(module, source)
        if (level := level_of(imported)) is not None and LEVELS.index(level) >= own
    ]


def forbidden_imports(module: str, source: str) -> list[str]:
    """Imports of what FORBIDDEN_IMPORTS names for this module, here or in what it imports."""
    forbidden = FORBIDDEN_IMPORTS.get(module, ())
    offences = []
    todo, seen = [(module, source)], {module}
    while todo:
        where, text = todo.pop()
        for line, imported in imports_of(where, text):
            level = level_of(imported)
            if level is not None and level not in seen:
                seen.add(level)
                todo.append((level, source_of(level)))
            if any(f"{imported}.".startswith(f"{name}.") for name in forbidden):
                offences.append(f"{module}: {where}:{line} imports {imported}")
    return offences


def knowledge_of_wrappers(module: str, source: str) -> list[str]:
    """Uses of a name of KNOWN_TO in a module that may not know it; docstrings may."""
    offences = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.alias):
            names = node.name.split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]  # getattr(module, "_orig_mod")
        offences += [
            f"{module or '__init__'}:{getattr(node, 'lineno', '?')} knows {name}"
            for name in names
            if name in KNOWN_TO and module not in KNOWN_TO[name]
        ]
    return offences


def asserts_and_prints(module: str, source: str) -> list[str]:
    """`assert` statements, which -O removes, and calls of `print`."""
    offences = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            offences.append(f"{module or '__init__'}:{node.lineno} asserts")
        elif isinstance(node, ast.Name) and node.id == "print":
            offences.append(f"{module or '__init__'}:{node.lineno} prints")
    return offences


@pytest.mark.parametrize("module", module_names())
def test_module_keeps_to_its_layer(module: str) -> None:
    source = source_of(module)
    assert module in LEVELS, "a new module: give it a place in LEVELS and in DESIGN.md"
    assert upward_imports(module, source) == []
    assert forbidden_imports(module, source) == []
    assert knowledge_of_wrappers(module, source) == []
    assert asserts_and_prints(module, source) == []


def test_there_is_a_package_to_check() -> None:
    assert {"", "errors", "layout", "rules", "schedule", "shards"} <= set(module_names())
    assert set(FORBIDDEN_IMPORTS) | WRAPPERS <= set(LEVELS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layout", "import distavg.rules"),
        ("layout", "from distavg import rules"),
        ("layout", "from distavg.shards import Shard"),
        ("layout", "from .shards import Shard"),
        ("layout", "from . import shards"),
        ("layout", "import distavg"),
        ("layout", "from distavg import EMA"),
        ("layout", "def f():\n    from distavg.averager import Averager"),
        ("layout", "if TYPE_CHECKING:\n    from distavg.averager import Averager"),
        ("layout", "import distavg.layout"),
        ("checkpoint.plan", "from .files import read"),
        ("checkpoint.plan", "from distavg.checkpoint import files"),
        ("checkpoint.plan", "from distavg.checkpoint import save_average"),
        ("checkpoint.plan", "from ..averager import Averager"),
        ("checkpoint", "from ..averager import Averager"),
    ],
)
def test_upward_import_is_found(module: str, source: str) -> None:
    assert len(upward_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("shards", "from distavg.layout import Box"),
        ("shards", "from distavg import layout, errors"),
        ("shards", "from .layout import Box"),
        ("shards", "import torch, distavgx.averager"),
        ("checkpoint.plan", "from .manifest import Entry"),
        ("checkpoint.plan", "from ..layout import Box"),
        ("checkpoint", "from .save import save"),
        ("averager", "from .checkpoint import save"),
        ("averager", "from distavg.checkpoint.save import save"),
        ("", "from distavg.averager import Averager"),
        ("", "from .averager import Averager"),
    ],
)
def test_downward_import_passes(module: str, source: str) -> None:
    assert upward_imports(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "offences"),
    [
        ("rules", "import torch", 1),
        ("rules", "from torch import nn", 1),
        ("rules", "import torch.distributed as dist", 1),
        ("rules", "import torchvision", 0),
        ("rules", "import math", 0),
        ("shards", "import torch", 0),
        ("checkpoint.plan", "import torch", 0),
        ("checkpoint.plan", "from torch import distributed", 1),
        ("checkpoint.plan", "import torch.distributed.tensor", 1),
    ],
)
def test_forbidden_import_is_found(module: str, source: str, offences: int) -> None:
    assert len(forbidden_imports(module, source)) == offences


def test_forbidden_import_is_found_behind_another_module() -> None:
    found = forbidden_imports("rules", "import math\nfrom distavg.shards import Shard")
    assert any("rules: shards:" in offence for offence in found)


@pytest.mark.parametrize(
    "source",
    [
        "from torch.distributed.fsdp import FSDPModule",
        "from torch.distributed.fsdp import FSDPModule as F",
        "isinstance(m, torch.nn.parallel.DistributedDataParallel)",
        "isinstance(p, DTensor)",
        "model._orig_mod",
        "getattr(model, '_orig_mod')",
    ],
)
def test_knowledge_of_wrappers_is_found(source: str) -> None:
    assert len(knowledge_of_wrappers("average", source)) == 1
    assert knowledge_of_wrappers("wrappers", source) == []


def test_docstring_may_name_wrappers() -> None:
    assert (
        knowledge_of_wrappers("average", '"""Unlike DTensor, FSDPModule and the others."""') == []
    )


@pytest.mark.parametrize(
    "source", ["assert x", "def f():\n    assert x, y", "print(x)", "f(print)"]
)
def test_assert_and_print_are_found(source: str) -> None:
    assert len(asserts_and_prints("average", source)) == 1


def test_other_output_passes() -> None:
    assert asserts_and_prints("cli", "click.echo(x)\nprinter.print(x)\nassert_equal(x)") == []
