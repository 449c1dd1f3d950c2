"""The manifest: it comes back bit for bit, and nothing in it can do harm."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from distavg.checkpoint import manifest as module
from distavg.checkpoint.manifest import (
    BLOCK_BYTES,
    ITEM_BYTES,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
    read_manifest,
)
from distavg.checkpoint.read import verify_checkpoint
from distavg.cli import main
from distavg.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from distavg.layout import Box, divide
from distavg.rules import EMA, SWA

HEX = "0123456789abcdef"
FOLDERS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,5}", fullmatch=True)
FQNS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def sealed(body: Any) -> bytes:
    """Any JSON with a valid seal: what a bug or an adversary may write."""
    return module._sealed(json.dumps(body).encode())


def unsealed(content: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(content)
    del body["checksum"]
    return body


@st.composite
def averages(draw: st.DrawFn) -> SavedAverage:
    folder = draw(FOLDERS)
    tensors = {
        fqn: SavedTensor(
            fqn,
            tuple(draw(st.lists(st.integers(0, 400), max_size=3))),
            draw(st.sampled_from(sorted(ITEM_BYTES))),
            tuple(draw(st.lists(FQNS, max_size=2))),
        )
        for fqn in draw(st.lists(FQNS, max_size=3, unique=True))
    }
    parts = draw(st.integers(1, 3))
    files = []
    for rank, part in enumerate(divide([t.shape for t in tensors.values()], parts)):
        boxes, end = [], draw(st.integers(8, 500))
        for index, box in part:
            tensor = list(tensors.values())[index]
            nbytes = box.numel * tensor.item_bytes
            blocks = -(-nbytes // BLOCK_BYTES)
            boxes.append(SavedBox(tensor.fqn, box, end, HEX * blocks))
            end += nbytes
        name = f"{folder}/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        files.append(SavedFile(name, end, HEX * 2, tuple(boxes)))
    rule = draw(st.sampled_from([EMA(0.1), EMA(1 / 3), SWA(), EMA(half_life="3ep")]))
    num_updates = draw(st.integers(0, 2**60))
    return SavedAverage(folder, rule.record(), num_updates, None, tensors, tuple(files))


MANIFESTS = st.builds(
    Manifest,
    save_id=st.text(HEX, min_size=32, max_size=32),
    averager_id=st.text(HEX, min_size=32, max_size=32),
    committed_at=st.floats(0, 4e9),
    steps=st.integers(0, 2**60),
    epochs=st.fractions(min_value=0, max_value=10**6),
    averages=st.dictionaries(FOLDERS, averages(), max_size=2),
    extra_folder=st.none() | FOLDERS,
)


def example() -> Manifest:
    """Small, with everything in it."""
    tensors = {
        "embed.weight": SavedTensor("embed.weight", (5, 4), "float32", ("head.weight",)),
        "größe": SavedTensor("größe", (), "bfloat16", ()),
    }
    first = SavedBox("embed.weight", Box((0, 0), (3, 4)), 100, HEX)
    second = SavedBox("embed.weight", Box((3, 0), (2, 4)), 100, HEX)
    scalar = SavedBox("größe", Box((), ()), 132, HEX)
    names = [f"ema/shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    files = (
        SavedFile(names[0], 148, HEX * 2, (first,)),
        SavedFile(names[1], 134, HEX * 2, (second, scalar)),
    )
    average = SavedAverage("ema", EMA(0.9).record(), 7, 5, tensors, files)
    return Manifest("5a" * 16, "b0" * 16, 1.7e9, 12, Fraction(7, 5), {"ema": average}, "train")


# ------------------------------------------------------------------------------------ round trip


@given(MANIFESTS)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    content = manifest.to_bytes()
    found = Manifest.from_bytes(content)
    assert found == manifest
    assert found.committed_at.hex() == manifest.committed_at.hex()
    assert found.to_bytes() == content
    assert all(average.fault() is None for average in found.averages.values())


@given(st.floats(0, 1))
def test_floats_come_back_bit_for_bit(decay: float) -> None:
    average = replace(example().averages["ema"], rule=EMA(decay).record())
    content = replace(example(), averages={"ema": average}).to_bytes()
    assert Manifest.from_bytes(content).averages["ema"].rule["decay"].hex() == decay.hex()


def test_the_content_is_json_that_ends_in_its_checksum() -> None:
    content = example().to_bytes()
    assert list(json.loads(content))[-1] == "checksum"
    assert content.endswith(b'"}\n')
    assert json.loads(content)["epochs"] == [7, 5]


def test_what_a_manifest_says() -> None:
    average = example().averages["ema"]
    assert example().folders == ["ema", "train"]
    assert replace(example(), extra_folder=None).folders == ["ema"]
    assert average.nbytes == 5 * 4 * 4 + 2
    places = average.boxes()
    assert [(file.name[:15], box.box) for file, box in places["embed.weight"]] == [
        ("ema/shard-00001", Box((0, 0), (3, 4))),
        ("ema/shard-00002", Box((3, 0), (2, 4))),
    ]
    lost = replace(average, files=average.files[:1])
    assert lost.fault() == "embed.weight: 8 of 20 elements are in no box"


# -------------------------------------------------------------------------------- torn and spoiled


def message_of(content: bytes) -> str:
    with pytest.raises(CheckpointCorrupt) as caught:
        Manifest.from_bytes(content)
    return str(caught.value)


def test_truncation_at_every_byte() -> None:
    content = example().to_bytes()
    for length in range(len(content)):
        assert message_of(content[:length]) == (
            f"manifest.json is torn or spoiled: {length} bytes that do not end in their own "
            "checksum"
        )


def test_every_flipped_byte() -> None:
    content = bytearray(example().to_bytes())
    for position in range(len(content)):
        content[position] ^= 1 << position % 8
        assert "torn or spoiled" in message_of(bytes(content))
        content[position] ^= 1 << position % 8
    assert Manifest.from_bytes(bytes(content)) == example()


@given(st.binary(max_size=200))
def test_rubbish(content: bytes) -> None:
    assert "torn or spoiled" in message_of(content)
    assert "torn or spoiled" in message_of(example().to_bytes() + content[:1] + b"\n")


# --------------------------------------------------------------------------- whole, and not valid


def changed(*path: Any, to: Any) -> bytes:
    """The example with one value replaced, sealed again."""
    body = unsealed(example().to_bytes())
    place = body
    for key in path[:-1]:
        place = place[key]
    assert isinstance(place, list) or path[-1] in place
    place[path[-1]] = to
    return sealed(body)


def test_a_future_version() -> None:
    assert message_of(changed("version", to=2)) == (
        "manifest.json has format 'distavg' version 2; this release reads 'distavg' version 1"
    )
    assert "format 'other' version 1" in message_of(changed("format", to="other"))


FILE = "ema/shard-00001-model-00001-of-00001.safetensors"
AVERAGE = ("averages", "ema")
BOX = (*AVERAGE, "files", FILE, "boxes", 0)

EVIL_NAMES = ["..", "../x", "/nowhere", "a/b", ".", "", ".hidden", "a\x00b", "ema/..", "ema\n", "ä"]


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_folders_that_lead_out(name: str) -> None:
    assert message_of(changed(*AVERAGE, "folder", to=name)) == (
        f"manifest.json is not valid: {ValueError(f'text: {name!r}')!r}"
    )
    assert "not valid" in message_of(changed("extra_folder", to=name))


@pytest.mark.parametrize(
    "name",
    [
        *EVIL_NAMES,
        "/" + FILE,
        "../" + FILE,
        "ema/../" + FILE,
        "ema/x/" + FILE,
        FILE + "\n",
        FILE.replace("ema", ".."),
        FILE.replace("00001", "1"),
        FILE.replace("safetensors", "pickle"),
        FILE + "/../..",
    ],
)
def test_files_that_lead_out(name: str) -> None:
    body = unsealed(example().to_bytes())
    files = body["averages"]["ema"]["files"]
    files[name] = files.pop(FILE)
    assert message_of(sealed(body)) == (
        f"manifest.json is not valid: {ValueError(f'text: {name!r}')!r}"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("block_bytes",), 2**20),
        (("block_bytes",), None),
        (("save_id",), 5),
        (("steps",), -1),
        (("steps",), 1.0),
        (("steps",), True),
        (("epochs",), [1, 0]),
        (("epochs",), [1, 2, 3]),
        (("epochs",), [-1, 2]),
        (("epochs",), [10**400, 1]),  # would not print as a float
        (("epochs",), [1]),
        (("committed_at",), "soon"),
        (("committed_at",), 10**400),
        (("committed_at",), math.inf),
        (("committed_at",), math.nan),
        (("committed_at",), -1.0),
        (("committed_at",), 1e300),
        (("averages",), []),
        (AVERAGE, None),
        ((*AVERAGE, "rule"), "ema"),
        ((*AVERAGE, "rule"), {"kind": "\ud800"}),
        ((*AVERAGE, "num_updates"), 7.0),
        ((*AVERAGE, "tensors"), []),
        ((*AVERAGE, "tensors", "embed.weight", "dtype"), "complex64"),
        ((*AVERAGE, "tensors", "embed.weight", "dtype"), "__class__"),
        ((*AVERAGE, "tensors", "embed.weight", "shape"), [5, -4]),
        ((*AVERAGE, "tensors", "embed.weight", "shape"), [4, 4]),  # a box lies outside
        ((*AVERAGE, "tensors", "embed.weight", "shape"), [5, 4, 1]),
        ((*AVERAGE, "tensors", "embed.weight", "aliases"), [3]),
        ((*AVERAGE, "tensors", "embed.weight", "aliases"), ["\ud800"]),
        ((*AVERAGE, "files", FILE, "nbytes"), 147),  # a byte less than its box needs
        ((*AVERAGE, "files", FILE, "header"), None),
        ((*BOX, 0), "no such tensor"),
        ((*BOX, 1), [0]),
        ((*BOX, 2), [10**30, 4]),
        ((*BOX, 3), 101),
        ((*BOX, 3), 2**80),
        ((*BOX, 4), HEX[:-1]),
        ((*BOX, 4), HEX + HEX),
        (BOX, ["embed.weight"]),
    ],
)
def test_values_that_cannot_be(path: tuple[Any, ...], value: Any) -> None:
    assert message_of(changed(*path, to=value)).startswith("manifest.json is not valid: ")


@pytest.mark.parametrize("body", [[], "x", 5, None, {}, {"format": "distavg"}])
def test_other_json(body: Any) -> None:
    assert message_of(sealed(body)).startswith("manifest.json is ")


def test_nesting_without_end() -> None:
    body = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert message_of(module._sealed(body)) == "manifest.json is not valid: nested too deeply"


# Any JSON at all, sizes that no file has included.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, 10**30, -1, 0, 1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["ema", "float32", "../x", HEX, "embed.weight", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    return [each for key in keys for each in [(value, key), *places_in(value[key])]]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A manifest with a few values replaced, removed, renamed or put elsewhere."""
    body = copy.deepcopy(unsealed(example().to_bytes()))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places_in(body)))
        what = draw(st.sampled_from(["replace", "remove", "rename", "copy"]))
        if what == "replace":
            container[key] = draw(JSON)
        elif what == "remove":
            del container[key]
        elif what == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=4) | st.sampled_from(EVIL_NAMES))] = container.pop(key)
        elif what == "copy":
            other, other_key = draw(st.sampled_from(places_in(body)))
            container[key] = copy.deepcopy(other[other_key])
        if not places_in(body):
            break
    return sealed(body)


@given(mutated())
def test_a_spoiled_manifest_with_a_seal_is_only_ever_corrupt(content: bytes) -> None:
    """Read, then everything that is done with a manifest without a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "manifest.json").write_bytes(content)
        for arguments in (["inspect", "--tensors", folder], ["verify", folder]):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code in (0, 1)
            assert result.exception is None or isinstance(result.exception, SystemExit)
        try:
            manifest = read_manifest(path)
        except CheckpointCorrupt:
            return
        assert all((path / name).parent == path for name in manifest.folders)
        for average in manifest.averages.values():
            assert all((path / file.name).parent.parent == path for file in average.files)
            average.fault()
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(path)


# --------------------------------------------------------------------------------- from the disk


def test_reading_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(example().to_bytes())
    assert read_manifest(tmp_path) == example()


def test_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, text in [
        (tmp_path / "nowhere", "there is no checkpoint here"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "below", "there is no checkpoint here"),
        (tmp_path, "has no manifest.json: it is not a checkpoint, or its save was never committed"),
    ]:
        with pytest.raises(CheckpointNotFound) as caught:
            read_manifest(path)
        assert str(caught.value) == f"{path}: {text}"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json is a folder"):
        read_manifest(tmp_path)
    long = tmp_path / ("x" * 300)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: .*name too long"):
        read_manifest(long)


def test_a_spoiled_manifest_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"")
    with pytest.raises(CheckpointCorrupt) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: manifest.json is torn or spoiled: 0 bytes that do not end in their own "
        "checksum"
    )
