"""Shard files: what other readers find in them, and that every kind of damage is named."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from checks import RULES, differences, torch_average, trained
from models import Uneven
from ranks import run_ranks
from safetensors import safe_open
from torch import Tensor

from distavg.checkpoint import files
from distavg.checkpoint.files import (
    BUFFER_BYTES,
    ShardReader,
    Target,
    group_boxes,
    write_shards,
)
from distavg.checkpoint.manifest import BLOCK_BYTES
from distavg.checkpoint.plan import plan_reads
from distavg.checkpoint.records import SavedFile
from distavg.errors import CheckpointCorrupt, CheckpointError
from distavg.layout import Box, range_boxes
from distavg.shards import Shard

SAVE_ID = "5a" * 16


def whole(fqn: str, tensor: Tensor) -> Shard:
    shape = tuple(tensor.shape)
    return Shard(fqn, Box.whole(shape), shape, tensor)


def pieces(fqn: str, tensor: Tensor, start: int, stop: int) -> list[Shard]:
    """The boxes of a flat range, as FSDP1 and replicas hold them."""
    return [
        Shard(fqn, box, tuple(tensor.shape), tensor[box.slices()])
        for box in range_boxes(tensor.shape, start, stop)
    ]


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Memory of its own for each: the safetensors library refuses tensors that overlap.
    values = torch.randn(5, 4, generator=generator)
    columns = [values.clone() for _ in range(3)]
    return {
        "fp32": values.clone(),
        "fp64": values.double() / 3,
        "bf16": values.bfloat16(),
        "fp16": values.half(),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False, True]),
        "zero-dim": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": values.clone().t(),
        "column": columns[0][:, 1],
        "one of a column": columns[1][:1, 1],
        "none of a column": columns[2][:0, 1],
        "needs grad": values.clone().requires_grad_(),
        "größe.ü": torch.tensor([float("nan"), -0.0]),
    }


def write(root: Path, shards: list[Shard], rank: int = 0) -> list[SavedFile]:
    (root / "ema").mkdir(exist_ok=True)
    return write_shards(root, "ema", rank, shards, SAVE_ID)


def read(root: Path, file: SavedFile, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Every box of a file, by name, through the reader."""
    found = {}
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    with ShardReader(root, file, SAVE_ID) as reader:
        for box in file.boxes:
            found[box.fqn] = torch.zeros(box.box.sizes, dtype=dtypes[box.fqn])
            item_bytes = dtypes[box.fqn].itemsize
            for is_flat in (False, True):
                found[box.fqn].zero_()
                for each in plan_reads(box.box, box.box, item_bytes, BUFFER_BYTES, is_flat=is_flat):
                    Target(found[box.fqn], dtypes[box.fqn]).fill(reader, box, each, buffer)
    return found


# ------------------------------------------------------------------------------ what is written


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = samples()
    (file,) = write(tmp_path, [whole(fqn, tensor) for fqn, tensor in tensors.items()])
    with safe_open(tmp_path / file.name, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
        metadata = opened.metadata()
    assert differences(found, tensors) == []
    sharding = json.loads(metadata.pop("DCP_SHARDING_INFO"))
    assert metadata == {"format": "pt", "DCP_VERSION": "1.0", "distavg.save_id": SAVE_ID}
    assert sharding["fp32"] == {"saved_offsets": [0, 0], "global_shape": [5, 4]}
    assert sharding["zero-dim"] == {"saved_offsets": [], "global_shape": []}


def test_the_reader_reads_what_is_written(tmp_path: Path) -> None:
    tensors = samples()
    (file,) = write(tmp_path, [whole(fqn, tensor) for fqn, tensor in tensors.items()])
    found = read(tmp_path, file, {fqn: tensor.dtype for fqn, tensor in tensors.items()})
    assert differences(found, tensors) == []


def test_large_tensors_of_many_blocks_and_reads(tmp_path: Path) -> None:
    big = torch.arange(BUFFER_BYTES // 4 + BLOCK_BYTES + 1, dtype=torch.int32).flip(0)
    (file,) = write(tmp_path, [whole("big", big), whole("small", torch.ones(1))])
    found = read(tmp_path, file, {"big": torch.int32, "small": torch.float32})
    assert torch.equal(found["big"], big)


def test_the_record_describes_the_file(tmp_path: Path) -> None:
    tensors = samples() | {"blocks": torch.arange(2 * BLOCK_BYTES + 5, dtype=torch.uint8)}
    (file,) = write(tmp_path, [whole(fqn, tensor) for fqn, tensor in tensors.items()])
    content = (tmp_path / file.name).read_bytes()
    assert file.name == "ema/shard-00001-model-00001-of-00001.safetensors"
    assert file.nbytes == len(content)
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    assert file.header_checksum == xxhash.xxh3_128_hexdigest(header)
    assert {box.fqn for box in file.boxes} == set(tensors)
    for box in file.boxes:
        tensor = tensors[box.fqn].detach().clone(memory_format=torch.contiguous_format)
        data = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert content[box.begin : box.begin + len(data)] == data
        blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
        assert box.checksums == "".join(map(xxhash.xxh3_64_hexdigest, blocks))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        (file,) = write(tmp_path, [whole("a", torch.ones(1))])
    finally:
        os.umask(before)
    assert (tmp_path / file.name).stat().st_mode & 0o777 == mode


def test_one_box_of_a_tensor_in_a_file(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).view(3, 5, 4)
    shards = [
        *pieces("a", tensor, 3, 58),
        whole("b", torch.ones(2)),
        *pieces("c", tensor.neg(), 5, 9),
    ]
    groups = group_boxes(shards)
    assert [[shard.fqn for shard in group] for group in groups] == [
        ["a", "b", "c"],
        ["a", "c"],
        ["a"],
        ["a"],
        ["a"],
    ]
    assert sorted(s.box for group in groups for s in group) == sorted(s.box for s in shards)
    written = write(tmp_path, shards, rank=2)
    assert [file.name for file in written] == [
        f"ema/shard-00003-model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]
    found = torch.full_like(tensor, -1)
    for file in written:
        with safe_open(tmp_path / file.name, "pt") as opened:
            sharding = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        for box in file.boxes:
            assert sharding[box.fqn]["saved_offsets"] == list(box.box.offsets)
            assert sharding[box.fqn]["global_shape"] == ([2] if box.fqn == "b" else [3, 5, 4])
        for box in file.boxes:
            if box.fqn == "a":
                part = read(tmp_path, file, dict.fromkeys("abc", torch.float32))["a"]
                found[box.box.slices()] = part
    assert found.view(-1)[3:58].tolist() == list(range(3, 58))
    assert (found.view(-1)[[0, 1, 2, 58, 59]] == -1).all()


def test_nothing_to_write(tmp_path: Path) -> None:
    assert write(tmp_path, []) == []
    assert list((tmp_path / "ema").iterdir()) == []


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [whole("a", torch.ones(1))])
    before = (tmp_path / file.name).read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File exists"):
        write(tmp_path, [whole("a", torch.zeros(1))])
    assert (tmp_path / file.name).read_bytes() == before


@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (files, "_write_all")])
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, call: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(CheckpointError, match=r"shard-00001.* cannot be written: .*No space left"):
        write(tmp_path, [whole("a", torch.ones(1))])


def test_the_disk_begins_while_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is spoken of once, in order, but for the last few; failing to is no failure."""
    advised = []

    def advise(descriptor: int, begin: int, nbytes: int, advice: int) -> None:
        advised.append((begin, begin + nbytes, advice))
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(files, "_FLOW_BYTES", 2 * BLOCK_BYTES)
    big = torch.zeros(9 * BLOCK_BYTES, dtype=torch.uint8)
    (file,) = write(tmp_path, [whole("big", big), whole("small", torch.ones(3))])
    begins, ends, advices = zip(*advised, strict=True)
    assert set(advices) == {os.POSIX_FADV_DONTNEED}
    assert begins == (0, *ends[:-1])
    assert 8 * BLOCK_BYTES <= ends[-1] <= file.nbytes
    monkeypatch.delattr(os, "posix_fadvise")  # as on systems that do not have it
    write(tmp_path, [whole("big", big)], rank=1)


def test_short_writes_are_carried_on() -> None:
    class Short(io.BytesIO):
        def write(self, view: memoryview) -> int:
            return super().write(view[:3])

    file = Short()
    files._write_all(file, memoryview(bytes(range(10))))
    assert file.getvalue() == bytes(range(10))


def test_files_are_flushed_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    (file,) = write(tmp_path, [whole("a", torch.ones(1))])
    assert flushed == [(tmp_path / file.name).stat().st_ino]


# -------------------------------------------------------------------------------------- damage


def example(root: Path) -> SavedFile:
    tensors = {
        "head.weight": torch.arange(3 * BLOCK_BYTES // 4, dtype=torch.float32),
        "head.bias": torch.ones(5),
    }
    (file,) = write(root, [whole(fqn, tensor) for fqn, tensor in tensors.items()])
    return file


def read_example(root: Path, file: SavedFile) -> None:
    read(root, file, dict.fromkeys(["head.weight", "head.bias"], torch.float32))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointCorrupt) as caught:
        call()
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    file = example(tmp_path)
    (tmp_path / file.name).unlink()
    text = message_of(lambda: read_example(tmp_path, file))
    assert text == f"{tmp_path / file.name} is missing"


def test_something_else_in_its_place(tmp_path: Path) -> None:
    file = example(tmp_path)
    (tmp_path / file.name).unlink()
    (tmp_path / file.name).mkdir()
    assert "is torn" in message_of(lambda: read_example(tmp_path, file))
    (tmp_path / "plain").touch()
    lost = replace(file, name="plain/" + file.name)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Not a directory"):
        read_example(tmp_path, lost)


@pytest.mark.parametrize("nbytes", [0, 7, 8, 100, -1, -BLOCK_BYTES])
def test_a_torn_file(tmp_path: Path, nbytes: int) -> None:
    file = example(tmp_path)
    length = nbytes if nbytes >= 0 else file.nbytes + nbytes
    os.truncate(tmp_path / file.name, length)
    assert message_of(lambda: read_example(tmp_path, file)) == (
        f"{tmp_path / file.name} is torn: it has {length} bytes, its record says {file.nbytes}"
    )


def test_a_file_that_has_grown(tmp_path: Path) -> None:
    file = example(tmp_path)
    os.truncate(tmp_path / file.name, file.nbytes + 1)
    assert f"it has {file.nbytes + 1} bytes" in message_of(lambda: read_example(tmp_path, file))


def test_a_file_that_is_torn_while_it_is_read(tmp_path: Path) -> None:
    file = example(tmp_path)
    box = file.boxes[0]
    (first, *_) = plan_reads(box.box, box.box, 4, BUFFER_BYTES)
    with ShardReader(tmp_path, file, SAVE_ID) as reader:
        os.truncate(tmp_path / file.name, box.begin + 10)
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        text = message_of(lambda: reader.read(box, first, buffer.numpy().data))
    assert text == f"{file.name} is torn: it ended while it was read"


def test_another_saves_file(tmp_path: Path) -> None:
    file = example(tmp_path)
    other = "c0" * 16
    assert message_of(
        lambda: ShardReader(tmp_path, replace(file, header_checksum="0" * 32), other)
    ) == (
        f"{tmp_path / file.name} belongs to another save: its id is {SAVE_ID}, the manifest's "
        f"{other}"
    )
    # The same tensors of another save: same size, other id in the header.
    (tmp_path / file.name).unlink()
    write_shards(tmp_path, "ema", 0, [whole("head.bias", torch.ones(5))], other)
    assert f"its id is {other}" in message_of(lambda: read_example(tmp_path, file))


def test_every_bit_of_the_header_counts(tmp_path: Path) -> None:
    file = example(tmp_path)
    path = tmp_path / file.name
    content = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    save_id_at = bytes(content).index(SAVE_ID.encode())
    for position in range(header_bytes):
        content[position] ^= 1 << position % 8
        path.write_bytes(content[:header_bytes])
        os.truncate(path, file.nbytes)
        text = message_of(lambda: ShardReader(tmp_path, file, SAVE_ID))
        if position < save_id_at or position >= save_id_at + len(SAVE_ID):
            assert text == f"{path}: the checksum of its header is wrong"
        content[position] ^= 1 << position % 8


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_flipped_bit_in_the_data(tmp_path: Path, block: int) -> None:
    file = example(tmp_path)
    box = next(box for box in file.boxes if box.fqn == "head.weight")
    position = box.begin + block * BLOCK_BYTES + 4711
    with (tmp_path / file.name).open("r+b") as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ 16]))
    assert message_of(lambda: read_example(tmp_path, file)) == (
        f"{file.name}: head.weight: the checksum of block {block} is wrong "
        f"(bytes {box.begin + block * BLOCK_BYTES} and following of the file)"
    )


# --------------------------------------------------------------------- PyTorch's own reader


def save_on_ranks(root: str) -> None:
    """Save FSDP2's and DDP's pieces."""
    for layout in ("fsdp2", "ddp"):
        _, averager = trained(layout, Uneven)
        averager.save(f"{root}/{layout}")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is meant to be here
def test_pytorchs_reader_loads_the_folder_of_an_average(tmp_path: Path) -> None:
    run_ranks(save_on_ranks, 2, str(tmp_path))
    for layout in ("fsdp2", "ddp"):
        for rule in RULES:
            expected = torch_average(Uneven, rule, range(3))
            trainable = [n for n, p in Uneven().named_parameters() if p.requires_grad]
            state = {name: torch.full_like(expected[name], -1) for name in trainable}
            reader = dcp.HuggingFaceStorageReader(str(tmp_path / layout / rule))
            dcp.load(state, storage_reader=reader, no_dist=True)
            assert differences(state, {name: expected[name] for name in state}) == []
