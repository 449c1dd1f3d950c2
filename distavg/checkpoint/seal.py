"""JSON files that end in their own checksum, and what may stand in them.

The last key of such a file is a checksum of everything before it, so that a torn or spoiled one
shows by itself. Every value is validated before use: an adversary can write a checksum, too.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import xxhash

from distavg.errors import CheckpointCorrupt

__all__ = ["count", "decode", "encode", "expect", "sealed", "text"]

T = TypeVar("T")


def encode(body: Mapping[str, Any]) -> bytes:
    """A file's content: the inverse of `decode`."""
    return sealed(
        json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    )


def decode(content: bytes, name: str, read: Callable[[Any], T]) -> T:
    """What a function makes of a file's content.

    Args:
        content: All of the file.
        name: Of the file, for errors.
        read: Takes the JSON value, and raises an error of Python's own where it cannot be.

    Raises:
        CheckpointCorrupt: It is torn or spoiled, or not valid.
    """
    body, _, _ = content.rpartition(b',"checksum":"')
    if not body or sealed(body + b"}") != content:
        raise CheckpointCorrupt(
            f"{name} is torn or spoiled: {len(content)} bytes that do not end in their own checksum"
        )
    try:
        return read(json.loads(body + b"}"))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointCorrupt(f"{name} is not valid: {error!r}") from error
    except RecursionError as error:
        raise CheckpointCorrupt(f"{name} is not valid: nested too deeply") from error


def sealed(body: bytes) -> bytes:
    """A JSON object with its checksum as a last key."""
    return body[:-1] + f',"checksum":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()


def count(value: object) -> int:
    """An integer that is not negative."""
    expect(type(value) is int and value >= 0, "count", value)
    return value  # type: ignore[return-value]  # just proved


def text(value: object, pattern: str | None = None) -> str:
    """Text that can be printed, and matches a pattern as a whole."""
    expect(type(value) is str and (pattern is None or re.fullmatch(pattern, value)), "text", value)
    value.encode()  # type: ignore[attr-defined]  # half a surrogate pair could not be printed
    return value  # type: ignore[return-value]  # just proved


def expect(condition: object, what: str, value: object) -> None:
    """Raise a `ValueError` that shows a value, unless a condition holds."""
    if not condition:
        raise ValueError(f"{what}: {value!r}")
