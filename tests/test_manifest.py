"""The manifest and the records: they come back bit for bit, and nothing in them can do harm."""

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
import xxhash
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from distavg.checkpoint.manifest import (
    BLOCK_BYTES,
    ITEM_BYTES,
    Manifest,
    SavedAverage,
    SavedRecord,
    SavedTensor,
    read_manifest,
)
from distavg.checkpoint.read import AverageReader, verify_checkpoint
from distavg.checkpoint.records import (
    Record,
    SavedBox,
    SavedFile,
    read_records,
    shard_name,
    uncovered,
    write_record,
)
from distavg.checkpoint.seal import sealed as seal
from distavg.cli import main
from distavg.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from distavg.layout import Box, divide
from distavg.rules import EMA, SWA

HEX = "0123456789abcdef"
FOLDERS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,5}", fullmatch=True)
FQNS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def sealed(body: Any) -> bytes:
    """Any JSON with a valid seal: what a bug or an adversary may write."""
    return seal(json.dumps(body).encode())


def unsealed(content: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(content)
    del body["checksum"]
    return body


@st.composite
def tensors_of_models(draw: st.DrawFn) -> dict[str, SavedTensor]:
    return {
        fqn: SavedTensor(
            fqn,
            tuple(draw(st.lists(st.integers(0, 400), max_size=3))),
            draw(st.sampled_from(sorted(ITEM_BYTES))),
            tuple(draw(st.lists(FQNS, max_size=2))),
        )
        for fqn in draw(st.lists(FQNS, max_size=3, unique=True))
    }


def written(folder: str, tensors: dict[str, SavedTensor], parts: int) -> list[SavedFile]:
    """A file of each of so many ranks, which divide the tensors."""
    files = []
    for rank, part in enumerate(divide([t.shape for t in tensors.values()], parts)):
        boxes, end = [], 8 + 100 * rank
        for index, box in part:
            tensor = list(tensors.values())[index]
            nbytes = box.numel * tensor.item_bytes
            boxes.append(SavedBox(tensor.fqn, box, end, HEX * -(-nbytes // BLOCK_BYTES)))
            end += nbytes
        name = f"{shard_name(folder, rank)}-model-00001-of-00001.safetensors"
        files.append(SavedFile(name, end, HEX * 2, tuple(boxes)))
    return files


SAVED_RECORDS = st.builds(
    SavedRecord, st.integers(0, 2**40), st.text(HEX, min_size=32, max_size=32)
)
AVERAGES = st.builds(
    SavedAverage,
    folder=FOLDERS,
    rule=st.sampled_from([EMA(0.1), EMA(1 / 3), SWA(), EMA(half_life="3ep")]).map(
        lambda rule: rule.record()
    ),
    num_updates=st.integers(0, 2**60),
    statistics_at=st.none() | st.integers(0, 2**60),
    tensors=tensors_of_models(),
    records=st.lists(st.none() | SAVED_RECORDS, max_size=4).map(tuple),
)
MANIFESTS = st.builds(
    Manifest,
    save_id=st.text(HEX, min_size=32, max_size=32),
    averager_id=st.text(HEX, min_size=32, max_size=32),
    committed_at=st.floats(0, 4e9),
    steps=st.integers(0, 2**60),
    epochs=st.fractions(min_value=0, max_value=10**6),
    averages=st.dictionaries(FOLDERS, AVERAGES, max_size=2),
    extra_folder=st.none() | FOLDERS,
)


TENSORS = {
    "embed.weight": SavedTensor("embed.weight", (5, 4), "float32", ("head.weight",)),
    "größe": SavedTensor("größe", (), "bfloat16", ()),
}
SHARD = "ema/shard-00001"
FILE = "shard-00001-model-00001-of-00001.safetensors"


def example(
    records: tuple[SavedRecord | None, ...] = (SavedRecord(300, HEX * 2), None),
) -> Manifest:
    """Small, with everything in it."""
    average = SavedAverage("ema", EMA(0.9).record(), 7, 5, TENSORS, records)
    return Manifest("5a" * 16, "b0" * 16, 1.7e9, 12, Fraction(7, 5), {"ema": average}, "train")


def example_record() -> Record:
    """Of a rank that has written two files."""
    rows = SavedBox("embed.weight", Box((0, 0), (3, 4)), 100, HEX)
    scalar = SavedBox("größe", Box((), ()), 148, HEX)
    others = SavedBox("embed.weight", Box((3, 0), (2, 4)), 100, HEX)
    first = SavedFile(f"ema/{FILE}", 150, HEX * 2, (rows, scalar))
    second = SavedFile(f"ema/{FILE.replace('l-00001', 'l-00002')}", 132, HEX * 2, (others,))
    return Record("5a" * 16, (first, second))


def write_example(path: Path, record: bytes) -> None:
    """A checkpoint whose manifest seals this content of its only record; without data files."""
    (path / "ema").mkdir()
    (path / f"{SHARD}.json").write_bytes(record)
    saved = SavedRecord(len(record), xxhash.xxh3_128_hexdigest(record))
    (path / "manifest.json").write_bytes(example((saved,)).to_bytes())


# ------------------------------------------------------------------------------------ round trip


@given(MANIFESTS)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    content = manifest.to_bytes()
    found = Manifest.from_bytes(content)
    assert found == manifest
    assert found.committed_at.hex() == manifest.committed_at.hex()
    assert found.to_bytes() == content


@given(FOLDERS, tensors_of_models(), st.integers(1, 3))
def test_records_come_back(folder: str, tensors: dict[str, SavedTensor], parts: int) -> None:
    files = []
    for rank, file in enumerate(written(folder, tensors, parts)):
        record = Record("5a" * 16, (file,))
        content = record.to_bytes()
        found = Record.from_bytes(content, shard_name(folder, rank), tensors)
        assert found == record
        assert found.to_bytes() == content
        files += found.files
    assert uncovered(SavedAverage(folder, {}, 0, None, tensors, ()), files) is None


def test_records_come_back_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "ema").mkdir()
    files = written("ema", TENSORS, 3)
    saved = tuple(
        write_record(tmp_path, "ema", rank, TENSORS, [] if rank == 3 else [files[rank]], "5a" * 16)
        for rank in range(4)
    )
    assert saved[3] is None
    assert len(list((tmp_path / "ema").iterdir())) == 3
    manifest = example(saved)
    assert read_records(tmp_path, manifest, manifest.averages["ema"]) == files


@given(st.floats(0, 1))
def test_floats_come_back_bit_for_bit(decay: float) -> None:
    average = replace(example().averages["ema"], rule=EMA(decay).record())
    content = replace(example(), averages={"ema": average}).to_bytes()
    assert Manifest.from_bytes(content).averages["ema"].rule["decay"].hex() == decay.hex()


def test_the_content_is_json_that_ends_in_its_checksum() -> None:
    for content in (example().to_bytes(), example_record().to_bytes()):
        assert list(json.loads(content))[-1] == "checksum"
        assert content.endswith(b'"}\n')
    assert json.loads(example().to_bytes())["epochs"] == [7, 5]
    assert json.loads(example().to_bytes())["averages"]["ema"]["records"] == [[300, HEX * 2], None]
    assert next(iter(json.loads(example_record().to_bytes())["files"])) == FILE


def test_what_a_manifest_says() -> None:
    average = example().averages["ema"]
    assert example().folders == ["ema", "train"]
    assert replace(example(), extra_folder=None).folders == ["ema"]
    assert average.nbytes == 5 * 4 * 4 + 2
    files = example_record().files
    assert uncovered(average, files) is None
    assert uncovered(average, files[:1]) == "embed.weight: 8 of 20 elements are in no box"


# -------------------------------------------------------------------------------- torn and spoiled


def message_of(content: bytes) -> str:
    with pytest.raises(CheckpointCorrupt) as caught:
        Manifest.from_bytes(content)
    return str(caught.value)


def record_message_of(content: bytes) -> str:
    with pytest.raises(CheckpointCorrupt) as caught:
        Record.from_bytes(content, SHARD, TENSORS)
    return str(caught.value)


def test_truncation_at_every_byte() -> None:
    content = example().to_bytes()
    for length in range(len(content)):
        assert message_of(content[:length]) == (
            f"manifest.json is torn or spoiled: {length} bytes that do not end in their own "
            "checksum"
        )
    content = example_record().to_bytes()
    for length in range(len(content)):
        assert record_message_of(content[:length]) == (
            f"{SHARD}.json is torn or spoiled: {length} bytes that do not end in their own checksum"
        )


def test_every_flipped_byte() -> None:
    for whole, message in (
        (example().to_bytes(), message_of),
        (example_record().to_bytes(), record_message_of),
    ):
        content = bytearray(whole)
        for position in range(len(content)):
            content[position] ^= 1 << position % 8
            assert "torn or spoiled" in message(bytes(content))
            content[position] ^= 1 << position % 8
        assert content == whole
    assert Manifest.from_bytes(example().to_bytes()) == example()


@given(st.binary(max_size=200))
def test_rubbish(content: bytes) -> None:
    assert "torn or spoiled" in message_of(content)
    assert "torn or spoiled" in record_message_of(content)
    assert "torn or spoiled" in message_of(example().to_bytes() + content[:1] + b"\n")


# --------------------------------------------------------------------------- whole, and not valid


def changed(content: bytes, *path: Any, to: Any) -> bytes:
    """An example with one value replaced, sealed again."""
    body = unsealed(content)
    place = body
    for key in path[:-1]:
        place = place[key]
    assert isinstance(place, list) or path[-1] in place
    place[path[-1]] = to
    return sealed(body)


def test_a_future_version() -> None:
    assert message_of(changed(example().to_bytes(), "version", to=2)) == (
        "manifest.json has format 'distavg' version 2; this release reads 'distavg' version 1"
    )
    assert "format 'other' version 1" in message_of(
        changed(example().to_bytes(), "format", to="other")
    )


AVERAGE = ("averages", "ema")
BOX = ("files", FILE, "boxes", 0)

EVIL_NAMES = ["..", "../x", "/nowhere", "a/b", ".", "", ".hidden", "a\x00b", "ema/..", "ema\n", "ä"]


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_folders_that_lead_out(name: str) -> None:
    assert message_of(changed(example().to_bytes(), *AVERAGE, "folder", to=name)) == (
        f"manifest.json is not valid: {ValueError(f'text: {name!r}')!r}"
    )
    assert "not valid" in message_of(changed(example().to_bytes(), "extra_folder", to=name))


@pytest.mark.parametrize(
    "name",
    [
        *EVIL_NAMES,
        "/" + FILE,
        "../" + FILE,
        "ema/" + FILE,
        "ema/../" + FILE,
        FILE + "\n",
        FILE.replace("00001", "1"),
        FILE.replace("00001", "00002", 1),  # another rank's
        FILE.replace("00001", "\u0660" * 4 + "1", 1),  # digits of another script
        FILE.replace("model-00001", "model-" + "\u0660" * 5),
        FILE.replace("shard", "other"),
        FILE.replace("safetensors", "pickle"),
        FILE + "/../..",
    ],
)
def test_files_that_lead_out_or_are_another_ranks(name: str) -> None:
    body = unsealed(example_record().to_bytes())
    body["files"][name] = body["files"].pop(FILE)
    assert record_message_of(sealed(body)) == (
        f"{SHARD}.json is not valid: {ValueError(f'text: {name!r}')!r}"
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
        ((*AVERAGE, "tensors", "embed.weight", "aliases"), [3]),
        ((*AVERAGE, "tensors", "embed.weight", "aliases"), ["\ud800"]),
        ((*AVERAGE, "records"), None),
        ((*AVERAGE, "records"), "shards"),
        ((*AVERAGE, "records", 0), 300),
        ((*AVERAGE, "records", 0), [300]),
        ((*AVERAGE, "records", 0), [300, HEX * 2, HEX]),
        ((*AVERAGE, "records", 0, 0), -1),
        ((*AVERAGE, "records", 0, 0), 300.0),
        ((*AVERAGE, "records", 0, 1), None),
        ((*AVERAGE, "records", 0, 1), HEX),
        ((*AVERAGE, "records", 0, 1), "../" + HEX + HEX[3:]),
        ((*AVERAGE, "records", 1), False),
    ],
)
def test_values_that_cannot_be(path: tuple[Any, ...], value: Any) -> None:
    content = changed(example().to_bytes(), *path, to=value)
    assert message_of(content).startswith("manifest.json is not valid: ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("save_id",), 5),
        (("save_id",), "\ud800"),
        (("files",), []),
        (("files", FILE), None),
        (("files", FILE, "nbytes"), 149),  # a byte less than its boxes need
        (("files", FILE, "nbytes"), 150.0),
        (("files", FILE, "header"), None),
        (("files", FILE, "boxes"), 5),
        ((*BOX, 0), "no such tensor"),
        ((*BOX, 0), "größe"),
        ((*BOX, 1), [0]),
        ((*BOX, 1), [3, 0]),  # the box lies outside
        ((*BOX, 1), [-1, 0]),
        ((*BOX, 2), [3, 4.0]),
        ((*BOX, 2), [10**30, 4]),
        ((*BOX, 3), 103),
        ((*BOX, 3), 2**80),
        ((*BOX, 4), HEX[:-1]),
        ((*BOX, 4), HEX + HEX),
        ((*BOX, 4), [HEX]),
        (BOX, ["embed.weight"]),
    ],
)
def test_values_that_cannot_be_in_a_record(path: tuple[Any, ...], value: Any) -> None:
    content = changed(example_record().to_bytes(), *path, to=value)
    assert record_message_of(content).startswith(f"{SHARD}.json is not valid: ")


@pytest.mark.parametrize("body", [[], "x", 5, None, {}, {"format": "distavg"}])
def test_other_json(body: Any) -> None:
    assert message_of(sealed(body)).startswith("manifest.json is ")
    assert record_message_of(sealed(body)).startswith(f"{SHARD}.json is ")


def test_nesting_without_end() -> None:
    body = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert message_of(seal(body)) == "manifest.json is not valid: nested too deeply"
    assert record_message_of(seal(body)) == f"{SHARD}.json is not valid: nested too deeply"


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
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with a few values replaced, removed, renamed or put elsewhere."""
    body = copy.deepcopy(unsealed(content))
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


def use(path: Path) -> None:
    """Everything that is done with a checkpoint without a model."""
    for arguments in (["inspect", "--tensors", str(path)], ["verify", str(path)]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code in (0, 1)
        assert result.exception is None or isinstance(result.exception, SystemExit)
    with contextlib.suppress(CheckpointCorrupt):
        manifest = read_manifest(path)
        assert all((path / name).parent == path for name in manifest.folders)
        for name, average in manifest.averages.items():
            with contextlib.suppress(CheckpointCorrupt):
                files = read_records(path, manifest, average)
                assert all((path / file.name).parent == path / average.folder for file in files)
                uncovered(average, files)
                AverageReader(path, manifest, name)
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(path)


@given(mutated(example().to_bytes()))
def test_a_spoiled_manifest_with_a_seal_is_only_ever_corrupt(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_example(Path(folder), example_record().to_bytes())
        Path(folder, "manifest.json").write_bytes(content)
        use(Path(folder))


@given(mutated(example_record().to_bytes()))
def test_a_spoiled_record_that_is_sealed_throughout_is_only_ever_corrupt(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_example(Path(folder), content)
        use(Path(folder))


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
