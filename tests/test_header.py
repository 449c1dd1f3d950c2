"""Headers that the safetensors library reads, with data where copies are fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distavg.checkpoint import header as header_module
from distavg.checkpoint.header import check_dtypes, encode_header, read_header
from distavg.checkpoint.manifest import SavedTensor
from distavg.errors import UnsupportedError

LIBRARY_DTYPES = [*header_module._TYPES]


def arrays(shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> dict[str, SavedTensor]:
    return {name: SavedTensor(name, shape, dtype, ()) for name, shape in shapes.items()}


def test_data_begins_aligned_and_odd_sizes_go_last() -> None:
    shapes = {"a": (3,), "b": (16,), "c": (5, 5), "d": (4, 16)}
    for count in range(70):  # headers of every length
        header, begins = encode_header(arrays(shapes), {"format": "pt", "x": "x" * count})
        assert list(begins) == ["b", "d", "a", "c"]
        assert len(header) == begins["b"]
        assert [begins[name] % 64 for name in ("b", "d", "a")] == [0, 0, 0]
        assert begins["c"] == begins["a"] + 12


def test_every_dtype_is_aligned_as_it_needs() -> None:
    tensors = {
        "mask": SavedTensor("mask", (3,), "bool", ()),
        "half": SavedTensor("half", (5,), "float16", ()),
        "weight": SavedTensor("weight", (5, 5), "float32", ()),
        "count": SavedTensor("count", (), "int64", ()),
        "big": SavedTensor("big", (64,), "bool", ()),
    }
    _, begins = encode_header(tensors, {})
    assert list(begins) == ["big", "count", "weight", "half", "mask"]
    assert all(begins[name] % tensor.item_bytes == 0 for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES)
def test_the_library_reads_every_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = arrays({"größe": (2, 3), "nothing": (0, 4), "scalar": ()}, dtype)
    header, begins = encode_header(tensors, {"format": "pt", "note": 'a "b" \n'})
    content = bytes(index % 2 for index in range(sum(t.nbytes for t in tensors.values())))
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + content)
    assert read_header(path) == header
    found = load_file(path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        name: (t.shape, getattr(torch, dtype)) for name, t in tensors.items()
    }
    start = begins["größe"] - len(header)
    found_bytes = found["größe"].view(torch.uint8).numpy().tobytes()
    assert found_bytes == content[start : start + len(found_bytes)]
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["note"] == 'a "b" \n'


def test_what_the_format_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="a: safetensors files cannot hold complex128"):
        check_dtypes(arrays({"a": (1,)}, "complex128").values())
    with pytest.raises(UnsupportedError, match="a tensor called __metadata__"):
        encode_header(arrays({"__metadata__": (1,)}), {})
    monkeypatch.setattr(header_module, "_MAX_HEADER_BYTES", 100)
    with pytest.raises(UnsupportedError, match="at most 100 bytes; that of 9 tensors would have"):
        encode_header(arrays({str(index): (1,) for index in range(9)}), {})


@pytest.mark.parametrize("content", [b"", b"1234567", (2**40).to_bytes(8, "little") + b"{}"])
def test_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        read_header(tmp_path / "a")
