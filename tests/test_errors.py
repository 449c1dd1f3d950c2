"""The exception tree: what the docstring draws is what the classes are."""

from __future__ import annotations

import pickle
import re

import pytest

import distavg
from distavg import errors


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Name -> names of the bases, read from the drawing in the module's docstring."""
    drawing = str(errors.__doc__).split("```")[1]
    bases: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in filter(None, drawing.splitlines()):
        match = re.match(r"([\s│├└─]*)(\w+)(?: \((\w+)\))?", line)
        assert match is not None
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        bases[match[2]] = tuple(filter(None, [path[depth - 1] if depth else "Exception", match[3]]))
    return bases


def test_the_docstring_draws_the_classes() -> None:
    classes = {
        name: tuple(base.__name__ for base in getattr(errors, name).__bases__)
        for name in errors.__all__
    }
    assert drawn_tree() == classes


def test_all_are_public() -> None:
    assert {name for name in distavg.__all__ if hasattr(errors, name)} == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_crosses_processes(name: str) -> None:
    error = pickle.loads(pickle.dumps(getattr(errors, name)("rank 1: head.weight")))
    assert type(error) is getattr(errors, name)
    assert str(error) == "rank 1: head.weight"
