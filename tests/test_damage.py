"""Every way of spoiling a checkpoint's files: refused in distavg's own words, and nothing changed.

A load must refuse what spoils the average that it reads, and `verify` what spoils any.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checks import RULES, cloned, differences, saved_files, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Uneven, build
from ranks import run_ranks

from distavg import Averager, CheckpointCorrupt, CheckpointError, CheckpointNotFound, StateError
from distavg.checkpoint.read import verify_checkpoint
from distavg.checkpoint.records import SavedFile


def save_twice(root: str) -> None:
    _, averager = trained("fsdp2", Uneven, range(3))
    averager.save(f"{root}/a")
    averager.save(f"{root}/b")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of three ranks with the same values."""
    root = tmp_path_factory.mktemp("saved")
    run_ranks(save_twice, 3, str(root))
    return root


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A copy of the first of them."""
    shutil.copytree(saved / "a", tmp_path / "a")
    return tmp_path / "a"


class Target:
    """An averager to load into, and what its memory holds before."""

    def __init__(self) -> None:
        self.averager = Averager(build("plain", Uneven, seed=9), RULES)
        self.averager.step()
        self.before = cloned(self.memory())

    def memory(self) -> dict[str, torch.Tensor]:
        return {
            f"{name} {shard.fqn}": shard.tensor
            for name in self.averager.names
            for shard in self.averager[name].own_shards()
        }

    def refuses(self, path: Path) -> str:
        """What a load of a spoiled checkpoint says; it changes nothing, or says that it did."""
        with pytest.raises(CheckpointError) as caught:
            self.averager.load(path)
        if differences(self.memory(), self.before):
            with pytest.raises(StateError, match="load a good checkpoint first"):
                self.averager.step()
            with torch.no_grad():
                for name, tensor in self.memory().items():
                    tensor.copy_(self.before[name])
        return f"{type(caught.value).__name__}: {caught.value}"


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


def boundaries(path: Path, file: SavedFile) -> Iterator[int]:
    """Lengths at which a torn file might end: around the header, and around each tensor."""
    with (path / file.name).open("rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    edges = {0, 8, 8 + header, file.nbytes}
    for box in file.boxes:
        edges.add(box.begin)
    for edge in edges:
        yield from {max(0, edge - 1), edge, edge + 1} - {file.nbytes}


def test_every_file_torn_wherever_it_matters(path: Path, target: Target) -> None:
    count = 0
    for file in saved_files(path):
        content = (path / file.name).read_bytes()
        for length in boundaries(path, file):
            (path / file.name).write_bytes((content + b"\0")[:length])
            message = target.refuses(path)
            assert message == (
                f"CheckpointCorrupt: {path / file.name} is torn: it has {length} bytes, its "
                f"record says {file.nbytes}"
            )
            assert len(verify_checkpoint(path)[1]) == 1
            count += 1
        (path / file.name).write_bytes(content)
    assert count > 100
    assert verify_checkpoint(path)[1] == []


def records_of(path: Path) -> list[str]:
    return [str(each.relative_to(path)) for each in sorted(path.glob("*/shard-?????.json"))]


def test_every_file_lost(path: Path, target: Target) -> None:
    names = [file.name for file in saved_files(path)] + records_of(path)
    assert len(names) == 12
    for name in names:
        (path / name).rename(path / "elsewhere")
        assert target.refuses(path) == f"CheckpointCorrupt: {path / name} is missing"
        assert verify_checkpoint(path)[1] == [f"{path / name} is missing"]
        (path / "elsewhere").rename(path / name)
    (path / "manifest.json").unlink()
    assert target.refuses(path).startswith(f"CheckpointNotFound: {path}: has no manifest.json")
    with pytest.raises(CheckpointNotFound):
        verify_checkpoint(path)


def test_files_of_another_save(path: Path, saved: Path, target: Target) -> None:
    """The same values, names and sizes: only the id tells."""
    for name in [file.name for file in saved_files(path)] + records_of(path):
        content = (path / name).read_bytes()
        shutil.copy(saved / "b" / name, path / name)
        assert re.fullmatch(
            rf"CheckpointCorrupt: {path / name} belongs to another save: its id is \w+, the "
            r"manifest's \w+",
            target.refuses(path),
        )
        (fault,) = verify_checkpoint(path)[1]
        assert "belongs to another save" in fault
        (path / name).write_bytes(content)


def test_every_byte_of_a_record_torn_off_or_flipped(path: Path, target: Target) -> None:
    name = min(records_of(path), key=lambda each: (path / each).stat().st_size)
    whole = (path / name).read_bytes()
    for position in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1 << position % 8
        torn = f"is torn: it has {position} bytes, the manifest says {len(whole)}"
        for content, what in (
            (bytes(spoiled), ": its checksum is wrong"),
            (whole[:position], f" {torn}"),
        ):
            (path / name).write_bytes(content)
            assert target.refuses(path) == f"CheckpointCorrupt: {path / name}{what}"
            assert verify_checkpoint(path)[1] == [f"{path / name}{what}"]
    (path / name).write_bytes(whole)
    assert verify_checkpoint(path)[1] == []


def test_files_exchanged_within_a_checkpoint(path: Path, target: Target) -> None:
    first, second, *_ = (path / file.name for file in saved_files(path))
    first.rename(path / "aside")
    second.rename(first)
    (path / "aside").rename(second)
    assert re.search(r"is torn|checksum of its header is wrong", target.refuses(path))
    assert len(verify_checkpoint(path)[1]) == 2


# The last where the bit was in the id of the save.
KINDS = (
    "checksum of its header",
    "checksum of block",
    "manifest.json is torn",
    "its checksum is wrong",
    "another save",
)


# For each seed; DISTAVG_FLIPS=2000 makes thousands of it.
FLIPS = int(os.environ.get("DISTAVG_FLIPS", "200"))


@pytest.mark.parametrize("seed", range(4))
def test_random_bits(seed: int, path: Path, target: Target) -> None:
    """In headers, data, records and the manifest: whatever is flipped is found and named."""
    rng = random.Random(seed)
    names = [file.name for file in saved_files(path)] + records_of(path) + ["manifest.json"]
    kinds: dict[str, int] = {}
    for _ in range(FLIPS):
        name = rng.choice(names)
        content = bytearray((path / name).read_bytes())
        whole = bytes(content)
        position = rng.randrange(len(content))
        content[position] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(content)
        message = target.refuses(path)
        assert message.startswith("CheckpointCorrupt: ")
        assert name in message
        kind = next(kind for kind in KINDS if kind in message)
        kinds[kind] = kinds.get(kind, 0) + 1
        if name == "manifest.json":
            with pytest.raises(CheckpointCorrupt):
                verify_checkpoint(path)
        else:
            (fault,) = verify_checkpoint(path)[1]
            assert name in fault
        (path / name).write_bytes(whole)
    assert set(kinds) >= set(KINDS[:4])
    target.averager.load(path)
    target.averager.step()
    target.before = cloned(target.memory())


def with_header(change: Callable[[int], int]) -> Callable[[bytes], bytes]:
    """The file with another length of its header."""

    def spoil(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        return struct.pack("<Q", change(length)) + content[8:]

    return spoil


@pytest.mark.parametrize(
    "change", [lambda n: 2**63, lambda n: 2**40, lambda n: n + 1, lambda n: 0, lambda n: n - 8]
)
def test_headers_of_an_absurd_length(
    change: Callable[[int], int], path: Path, target: Target
) -> None:
    file = saved_files(path)[0]
    content = (path / file.name).read_bytes()
    (path / file.name).write_bytes(with_header(change)(content))
    assert target.refuses(path) == (
        f"CheckpointCorrupt: {path / file.name}: the checksum of its header is wrong"
    )


@given(st.binary(max_size=200), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_place_of_a_file(
    saved: Path, target: Target, content: bytes, has_length: bool
) -> None:
    """Behind a true length of a header, or as they come."""
    path = saved / "b"
    file = saved_files(path)[0]
    whole = (path / file.name).read_bytes()
    spoiled = (struct.pack("<Q", len(content)) if has_length else b"") + content
    try:
        for filled in (spoiled, spoiled.ljust(len(whole), b" ")):
            (path / file.name).write_bytes(filled)
            assert file.name in target.refuses(path)
            assert len(verify_checkpoint(path)[1]) == 1
    finally:
        (path / file.name).write_bytes(whole)
