"""What distavg costs on more ranks than there are here: arithmetic, with constants measured here.

    python tests/benchmarks/scale.py

Decoders of about 1 B, 70 B and 1 T parameters under FSDP2, which cuts every tensor into rows for
all ranks; bf16 weights, one average in fp32. Collectives are counted on two ranks. Manifest and
record are really made, written and read, at their full size. All times are this machine's: its
memory, its disk (each rank as if it had one of its own), gloo over its loopback. A vote is an
all-gather around a ring, one message after another from each rank to the next; a step of an
exchange is made log2(ranks) times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from checks import trained
from models import Uneven
from ranks import run_ranks

from distavg.checkpoint.manifest import (
    BLOCK_BYTES,
    Manifest,
    SavedAverage,
    SavedRecord,
    SavedTensor,
)
from distavg.checkpoint.records import HASH_DIGITS, Record, SavedBox, SavedFile, shard_name
from distavg.comm import Comm
from distavg.layout import Box
from distavg.rollcall import RollCall

RANKS = (8, 64, 1024, 16384)
LIVE_BYTES, AVERAGE_BYTES = 2, 4  # of an element


@dataclass(frozen=True)
class Decoder:
    layers: int
    width: int
    hidden: int
    vocabulary: int = 128_256

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = self.width
        yield "embedding.weight", (self.vocabulary, width)
        for layer in range(self.layers):
            for name in ("query", "key", "value", "out"):
                yield f"layers.{layer}.attention.{name}.weight", (width, width)
            yield f"layers.{layer}.mlp.gate.weight", (self.hidden, width)
            yield f"layers.{layer}.mlp.up.weight", (self.hidden, width)
            yield f"layers.{layer}.mlp.down.weight", (width, self.hidden)
            yield f"layers.{layer}.attention_norm.weight", (width,)
            yield f"layers.{layer}.mlp_norm.weight", (width,)
        yield "norm.weight", (width,)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes())


MODELS = {
    "1 B": Decoder(16, 2048, 8192),
    "70 B": Decoder(80, 8192, 28_672),
    "1 T": Decoder(128, 25_600, 68_608),
}


# ------------------------------------------------------------------------ counted on two ranks


def counted(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Of each operation under FSDP2: its votes, steps of exchanges, and flushes of files."""
    _, averager = trained("fsdp2", Uneven)
    averager.full_state_dict("ema")
    found = {}
    waiting, step = RollCall.waiting, Comm._pass_tensor

    def swap() -> None:
        with averager.applied("ema"):
            pass

    operations: dict[str, Callable[[], object]] = {
        "update": averager.step,
        "swap": swap,
        "save": lambda: averager.save(folder / "a"),
        "load": lambda: averager.load(folder / "a"),
    }
    for name, operation in operations.items():
        with (
            mock.patch.object(RollCall, "waiting", autospec=True, side_effect=waiting) as all_waits,
            mock.patch.object(Comm, "_pass_tensor", autospec=True, side_effect=step) as steps,
            mock.patch.object(os, "fsync", side_effect=os.fsync) as flushes,
        ):
            operation()
        votes = all_waits.call_count - steps.call_count
        found[name] = votes, steps.call_count, flushes.call_count
    return found


# ---------------------------------------------------------------------------- measured constants


def median_seconds(call: Callable[[], object], count: int = 9) -> float:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def message_seconds() -> tuple[float, float]:
    """A vote of two ranks, and one message on its way."""
    ranks = Comm()
    ranks.gather(None, "meeting")
    vote = median_seconds(lambda: ranks.gather(None, "vote"), 500)
    record = torch.zeros(512, dtype=torch.uint8)

    def there_and_back() -> None:
        for rank in (0, 1):
            pass_on = ranks.send if rank == ranks.rank else ranks.receive
            pass_on(record, 1 - ranks.rank, "message")

    return vote, median_seconds(there_and_back, 500) / 2


def constants(folder: Path) -> dict[str, float]:
    live, average = torch.ones(2**26, dtype=torch.bfloat16), torch.zeros(2**26)
    chunk = torch.empty(2**18)

    def update() -> None:  # by way of a temporary that stays in the cache, as foreach.Lerp
        for part, source in zip(average.split(2**18), live.split(2**18), strict=True):
            part.lerp_(chunk.copy_(source), 0.001)

    data = torch.ones(2**26, dtype=torch.uint8).numpy().tobytes()

    def write(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    vote, message = run_ranks(message_seconds, 2)[0]
    return {
        "update, bytes of average/s": average.nbytes / median_seconds(update),
        "disk, bytes/s": len(data) / median_seconds(lambda: write(folder / "data", data)),
        "small file, s": median_seconds(lambda: write(folder / "small", b"x"), 50),
        "vote of 2 ranks, s": vote,
        "message, s": message,
    }


# ------------------------------------------------------------------------------- the arithmetic


def cut(model: Decoder, ranks: int) -> tuple[list[SavedBox], int]:
    """What rank 0 writes, and how many boxes all ranks write together."""
    mine, total, begin = [], 0, 0
    for name, shape in model.shapes():
        rows = -(-shape[0] // ranks)
        total += -(-shape[0] // rows)
        sizes = (rows, *shape[1:])
        nbytes = math.prod(sizes) * AVERAGE_BYTES
        checksums = "0123456789abcdef" * -(-nbytes // BLOCK_BYTES)
        assert len(checksums) == HASH_DIGITS * -(-nbytes // BLOCK_BYTES)
        mine.append(SavedBox(name, Box((0,) * len(shape), sizes), begin, checksums))
        begin += nbytes
    return mine, total


def estimate(
    model: Decoder, ranks: int, counts: dict[str, tuple[int, int, int]], known: dict[str, float]
) -> dict[str, Any]:
    boxes, num_boxes = cut(model, ranks)
    nbytes = sum(math.prod(box.box.sizes) for box in boxes) * AVERAGE_BYTES
    tensors = {n: SavedTensor(n, shape, "float32", ()) for n, shape in model.shapes()}
    file = SavedFile(
        "ema/shard-00001-model-00001-of-00001.safetensors", nbytes, "0" * 32, tuple(boxes)
    )
    record = Record("0" * 32, (file,))
    content = record.to_bytes()
    records = (SavedRecord(len(content), "0" * 32),) * ranks
    average = SavedAverage("ema", {"kind": "ema"}, 1, None, tensors, records)
    manifest = Manifest("0" * 32, "0" * 32, 0.0, 1, Fraction(0), {"ema": average}, None)
    sealed = manifest.to_bytes()
    shard = shard_name("ema", 0)
    times = {
        "record": median_seconds(record.to_bytes, 3),
        "record, read": median_seconds(lambda: Record.from_bytes(content, shard, tensors), 3),
        "manifest": median_seconds(manifest.to_bytes, 3),
        "manifest, read": median_seconds(lambda: Manifest.from_bytes(sealed), 3),
    }
    vote = known["vote of 2 ranks, s"] + known["message, s"] * (ranks - 2)
    disk = nbytes / known["disk, bytes/s"]
    hops = math.ceil(math.log2(ranks))
    messages = {
        name: votes * vote + steps * hops * known["message, s"]
        for name, (votes, steps, _) in counts.items()
    }
    return {
        "ranks": ranks,
        "bytes of a rank": nbytes,
        "update, s": nbytes / known["update, bytes of average/s"],
        "swap, s": messages["swap"] + 2 * nbytes / known["update, bytes of average/s"],
        "save, s": messages["save"]
        + disk
        + 3 * known["small file, s"]
        + times["record"]
        + times["record, read"]
        + times["manifest"]
        + times["manifest, read"],
        "load, s": messages["load"] + disk + times["record, read"] + times["manifest, read"],
        "vote, s": vote,
        "messages of a rank in a save": counts["save"][0] * (ranks - 1) + counts["save"][1] * hops,
        "messages of a rank in a load": counts["load"][0] * (ranks - 1) + counts["load"][1] * hops,
        "files": 2 * ranks + 1,
        "flushes of a save": counts["save"][2] * ranks,
        "boxes": num_boxes,
        "record": len(content),
        "manifest": len(sealed),
        "manifest written, s": times["manifest"],
        "manifest read, s": times["manifest, read"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        counts = run_ranks(counted, 2, Path(name))[1]  # rank 0 does a little more
        known = constants(Path(name))
    print("votes, steps of exchanges and flushes of a rank of two:", counts)
    print("; ".join(f"{name}: {value:.3g}" for name, value in known.items()))
    results: dict[str, Any] = {"counted": counts, "constants": known}
    for name, model in MODELS.items():
        found = [estimate(model, ranks, counts, known) for ranks in RANKS]
        print(f"\n{name}: {model.numel:,} parameters, {len(list(model.shapes())):,} tensors")
        for what in found[0]:
            values = (row[what] for row in found)
            print(
                f"{what:30}", *(f"{v:>18,}" if isinstance(v, int) else f"{v:18.4f}" for v in values)
            )
        results[name] = found
    print("\n" + ", ".join(f"{key}: {value}" for key, value in measure.machine().items()))
    if arguments.json is not None:
        content = {"machine": measure.machine(), **results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
