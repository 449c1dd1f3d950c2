"""Loading: from every layout into every other, bit for bit; or an error, and nothing changed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import xxhash
from checks import (
    CASES,
    RULES,
    cloned,
    differences,
    error_of,
    feed,
    same,
    saved_files,
    storages,
    torch_average,
    trained,
)
from models import Awkward, TokenModel, Uneven, build, floating_buffers
from ranks import run_ranks
from torch import Tensor, nn

from distavg import EMA, SWA, Averager, Clock
from distavg.checkpoint.load import LoadPlan
from distavg.checkpoint.manifest import SavedRecord, read_manifest
from distavg.checkpoint.read import verify_checkpoint
from distavg.checkpoint.records import Record, shard_name
from distavg.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    ConfigError,
    StateError,
)

CLOCK = Clock(steps_per_epoch=2)
RESUMED_CLOCK = Clock(steps_per_epoch=5)


def held(averager: Averager, names: list[str], rule: str) -> dict[str, Tensor]:
    whole = averager.full_state_dict(rule)
    return {name: whole[name] for name in names if name in whole}


def trainable(cls: type[nn.Module] = Uneven) -> list[str]:
    return [name for name, p in cls().named_parameters() if p.requires_grad]


def expected(rule: str, num_steps: int = 3) -> dict[str, Tensor]:
    whole = torch_average(Uneven, rule, range(num_steps))
    return {name: whole[name] for name in trainable()}


def poison(averager: Averager) -> None:
    """Nothing of what was there before may pass for what was loaded."""
    for name in averager.names:
        for tensor in averager[name].tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else True)


def memory(averager: Averager) -> dict[str, Any]:
    """All that a load may change on this rank."""
    tensors = {
        f"{name}/{i}": tensor
        for name in averager.names
        for i, tensor in enumerate(averager[name].tensors)
    }
    return cloned(tensors)


def counters(averager: Averager) -> tuple[object, ...]:
    numbers = [(averager[name].num_updates, averager[name].rule) for name in averager.names]
    return (averager.step_count, *numbers)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


# --------------------------------------------------------------------- every layout into every one


# Without those of which another has the same kind of boxes on as many ranks.
MATRIX = sorted(
    set(CASES) - {("ddp", 4), ("fsdp1", 4), ("fsdp2-keep", 2), ("fsdp1-grad-op-flat", 2)}
)


def layouts_on(world_size: int) -> list[str]:
    return [layout for layout, size in MATRIX if size == world_size]


def save_all(root: str) -> None:
    for layout in layouts_on(dist.get_world_size()):
        _, averager = trained(layout, Uneven, clock=CLOCK)
        averager.save(f"{root}/{layout}-{dist.get_world_size()}")


def load_all(root: str) -> tuple[list[str], dict[str, int]]:
    """Load every checkpoint into every layout on these ranks, and go on from there.

    Returns:
        What is wrong, and the elements that this rank holds in each layout.
    """
    wrong: list[str] = []
    elements: dict[str, int] = {}
    oracles = {(rule, steps): expected(rule, steps) for rule in RULES for steps in (3, 6)}
    for layout in layouts_on(dist.get_world_size()):
        model, averager = trained(layout, Uneven, (), clock=RESUMED_CLOCK)
        elements[layout] = sum(tensor.numel() for tensor in averager["ema"].tensors)

        def problems(steps: int, averager: Averager = averager) -> list[str]:
            return [
                f"{rule} after {steps}: {shard.fqn}"
                for rule in RULES
                for shard in averager[rule].own_shards()
                if not same(shard.tensor, oracles[rule, steps][shard.fqn][shard.box.slices()])
            ]

        for path in sorted(Path(root).iterdir()):
            live = cloned(storages(model))
            poison(averager)
            averager.load(path)
            found = problems(3) + differences(storages(model), live)
            if counters(averager) != (3, (3, RULES["ema"]), (3, RULES["swa"])):
                found.append(f"{counters(averager)}")
            if averager._position.epochs != Fraction(3, 2):
                found.append(f"{averager._position}")
            feed(averager, model, range(3, 6))
            wrong += (f"{path.name} into {layout}: {each}" for each in found + problems(6))
    return wrong, elements


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_layout_into_every_layout(every_layout: Path, world_size: int) -> None:
    total = sum(tensor.numel() for tensor in expected("ema").values())
    results = run_ranks(load_all, world_size, str(every_layout), timeout=110)
    assert [wrong for wrong, _ in results] == [[]] * world_size
    for layout in layouts_on(world_size):
        copies = world_size if layout == "plain" else 1
        assert sum(elements[layout] for _, elements in results) == copies * total


@pytest.fixture(scope="module")
def every_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from each layout on each world size."""
    root = tmp_path_factory.mktemp("every_layout")
    for size in (4, 3, 2, 1):
        run_ranks(save_all, size, str(root))
    assert len(list(root.iterdir())) == len(MATRIX)
    for path in root.iterdir():
        assert verify_checkpoint(path)[1] == []
    return root


def save_awkward(root: str) -> None:
    _, averager = trained("ddp", Awkward, buffers="averaged")
    averager.save(f"{root}/a")


def load_awkward(root: str) -> list[str]:
    _, averager = trained("ddp", Awkward, (), buffers="averaged")
    averager.load(f"{root}/a")
    return awkward_differences(averager)


def awkward_differences(averager: Averager) -> list[str]:
    found = []
    names = [*trainable(Awkward), *(name for name, _ in floating_buffers(Awkward()))]
    for rule in RULES:
        whole = torch_average(Awkward, rule, range(3))
        # Buffers do not change in `trained`, so that their average is what they are.
        oracle = {name: whole[name] for name in names}
        mine = held(averager, names, rule)
        found += differences(mine, oracle) if mine else []
    return found


def test_awkward_tensors_and_buffers(tmp_path: Path) -> None:
    run_ranks(save_awkward, 2, str(tmp_path))
    assert run_ranks(load_awkward, 3, str(tmp_path)) == [[], [], []]
    _, averager = trained("plain", Awkward, (), buffers="averaged")
    averager.load(tmp_path / "a")
    assert awkward_differences(averager) == []


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """The averages, the counters and the place in the epoch."""
    rules = {"ema": EMA(0.9, update_interval="2ba"), "swa": SWA(update_interval="1ep")}
    model, through = trained("plain", Uneven, range(9), rules=rules, clock=CLOCK)
    _, first = trained("plain", Uneven, range(5), rules=rules, clock=CLOCK)
    first.save(tmp_path / "a")
    model, second = trained("plain", Uneven, (), rules=rules, clock=CLOCK)
    second.load(tmp_path / "a")
    feed(second, model, range(5, 9))
    assert counters(second) == counters(through)
    assert differences(memory(second), memory(through)) == []


def test_an_average_without_updates_reads_as_the_live_weights(tmp_path: Path) -> None:
    _, first = trained("plain", Uneven, ())
    first.save(tmp_path / "a")
    model, second = trained("plain", Uneven, range(3))
    second.load(tmp_path / "a")
    assert second["ema"].num_updates == 0
    whole = dict(model.named_parameters())
    assert differences(held(second, trainable(), "ema"), {n: whole[n] for n in trainable()}) == []


# ------------------------------------------------------------------------------------- options


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """EMA and SWA of Uneven after three steps, saved by one process."""
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "a")
    return tmp_path / "a"


def test_names_renames(checkpoint: Path) -> None:
    _, averager = trained("plain", Uneven, (), rules={"slow": EMA(0.9), "swa": RULES["swa"]})
    averager.load(checkpoint, names={"ema": "slow"})
    assert differences(held(averager, trainable(), "slow"), expected("ema")) == []
    assert differences(held(averager, trainable(), "swa"), expected("swa")) == []


def test_names_swaps_two(checkpoint: Path) -> None:
    rules = {"ema": RULES["swa"], "swa": RULES["ema"]}
    _, averager = trained("plain", Uneven, (), rules=rules)
    averager.load(checkpoint, names={"ema": "swa", "swa": "ema"})
    assert differences(held(averager, trainable(), "swa"), expected("ema")) == []
    assert differences(held(averager, trainable(), "ema"), expected("swa")) == []


def test_what_is_not_asked_for_is_left_alone(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, averager = trained("plain", Uneven, (), rules={"ema": RULES["ema"]})
    with caplog.at_level(logging.INFO, logger="distavg"):
        averager.load(checkpoint)
    assert caplog.messages == [
        f"{checkpoint}: the saved averages ['swa'] are not asked for and left alone"
    ]
    assert differences(held(averager, trainable(), "ema"), expected("ema")) == []


def test_missing_averages(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = {"new": EMA(0.5), **RULES}
    model, averager = trained("plain", Uneven, range(4), rules=rules)
    before, numbers = memory(averager), counters(averager)
    with pytest.raises(CheckpointMismatch) as caught:
        averager.load(checkpoint)
    assert str(caught.value) == (
        f"{checkpoint} holds the averages ['ema', 'swa'], not ['new']: rename with names=, or "
        "start them from the live weights with missing='from_model'"
    )
    assert (differences(memory(averager), before), counters(averager)) == ([], numbers)

    averager.load(checkpoint, missing="from_model")
    assert caplog.messages == [f"{checkpoint}: the averages ['new'] start from the live weights"]
    live = dict(model.named_parameters())
    assert averager["new"].num_updates == 0
    assert differences(held(averager, trainable(), "new"), {n: live[n] for n in trainable()}) == []
    assert differences(held(averager, trainable(), "ema"), expected("ema")) == []
    feed(averager, model, [4])
    live = cloned(dict(model.named_parameters()))
    assert differences(held(averager, trainable(), "new"), {n: live[n] for n in trainable()}) == []


def test_another_rule(checkpoint: Path) -> None:
    rules = {"ema": EMA(0.5, start="2ba"), "swa": RULES["swa"]}
    _, averager = trained("plain", Uneven, (), rules=rules)
    with pytest.raises(CheckpointMismatch) as caught:
        averager.load(checkpoint)
    assert str(caught.value) == (
        f"{checkpoint}: average 'ema': start='0ba' was saved and start='2ba' is asked for, "
        "decay=0.9 was saved and decay=0.5 is asked for. Go on with one of them: rules='saved' or "
        "rules='current'"
    )
    for option, rule in (("current", rules["ema"]), ("saved", RULES["ema"])):
        averager.load(checkpoint, rules=option)
        assert averager["ema"].rule == rule
        assert averager["ema"].num_updates == 3
        assert averager["ema"].weight == rule.weight(3)
        assert differences(held(averager, trainable(), "ema"), expected("ema")) == []


def test_a_saved_rule_that_this_clock_cannot_resolve(tmp_path: Path) -> None:
    _, first = trained("plain", Uneven, rules=SWA(), clock=CLOCK)
    first.save(tmp_path / "a")
    _, averager = trained("plain", Uneven, rules={"swa": SWA(update_interval="2ba")})
    before = memory(averager)
    with pytest.raises(ConfigError, match="average 'swa': '1ep' needs the number of optimizer"):
        averager.load(tmp_path / "a", rules="saved")
    assert differences(memory(averager), before) == []


def test_another_dtype(checkpoint: Path) -> None:
    _, averager = trained("plain", Uneven, dtype=torch.float64)
    before = memory(averager)
    with pytest.raises(CheckpointMismatch) as caught:
        averager.load(checkpoint)
    assert str(caught.value) == (
        "experts: the checkpoint holds float32, the average is torch.float64. Convert with "
        "cast=True, or build the Averager with dtype=torch.float32"
    )
    assert differences(memory(averager), before) == []
    averager.load(checkpoint, cast=True)
    wider = {name: tensor.double() for name, tensor in expected("ema").items()}
    with_cast = {shard.fqn: shard.tensor for shard in averager["ema"].own_shards()}
    assert differences(with_cast, wider) == []


def test_options_that_cannot_be(checkpoint: Path) -> None:
    _, averager = trained("plain", Uneven)
    for options, text in (
        ({"missing": "skip"}, "load: missing='skip' is none of ('error', 'from_model')"),
        ({"rules": "new"}, "load: rules='new' is none of ('error', 'current', 'saved')"),
        (
            {"names": {"sma": "swa"}},
            f"load: names={{'sma': 'swa'}}: {checkpoint} holds ['ema', 'swa'], this averager has "
            "['ema', 'swa']",
        ),
        (
            {"names": {"ema": "sma"}},
            f"load: names={{'ema': 'sma'}}: {checkpoint} holds ['ema', 'swa'], this averager has "
            "['ema', 'swa']",
        ),
        (
            {"names": {"ema": "swa"}},
            "load: names={'ema': 'swa'} gives two saved averages one name",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            averager.load(checkpoint, **options)  # type: ignore[arg-type]
        assert str(caught.value) == text


def test_also_gets_the_folder_back(checkpoint: Path, tmp_path: Path) -> None:
    _, averager = trained("plain", Uneven)
    averager.save(tmp_path / "b", also=lambda folder: (folder / "note").write_text("hello"))
    seen: list[str] = []
    averager.load(tmp_path / "b", also=lambda folder: seen.append((folder / "note").read_text()))
    assert seen == ["hello"]
    with pytest.raises(CheckpointMismatch) as caught:
        averager.load(checkpoint, also=lambda folder: pytest.fail("there is none"))
    assert str(caught.value) == (
        f"{checkpoint} was saved without also=, so load(also=) has no folder"
    )


def test_not_inside_applied(checkpoint: Path) -> None:
    _, averager = trained("plain", Uneven)
    with averager.applied("ema"), pytest.raises(StateError) as caught:
        averager.load(checkpoint)
    assert str(caught.value) == "load() inside applied('ema'): load after the context"


# ------------------------------------------------------------------------------ another model


class Wider(Uneven):
    vocabulary = 6


class Deeper(Uneven):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2, bias=False)
        self.reset()


@pytest.mark.parametrize(
    ("cls", "options", "text"),
    [
        (
            Wider,
            {},
            "embed.weight: the checkpoint holds shape (5, 4), the model has (6, 4). Build the "
            "model with the saved sizes, or skip the tensor with exclude=['embed.weight']",
        ),
        (
            Deeper,
            {},
            "{path}: average 'ema': more.weight is averaged here and not in the checkpoint: leave "
            "it out with exclude=['more.weight']",
        ),
        (
            Uneven,
            {"exclude": ["experts"]},
            "{path}: average 'ema': experts is in the checkpoint and not averaged here: build the "
            "model that was saved",
        ),
        (
            Uneven,
            {"buffers": "copied"},
            "{path}: average 'ema': calls is averaged here and not in the checkpoint: leave it out "
            "with exclude=['calls']",
        ),
    ],
)
def test_another_model(
    checkpoint: Path, cls: type[TokenModel], options: dict[str, Any], text: str
) -> None:
    _, averager = trained("plain", cls, range(2), **options)
    before, numbers = memory(averager), counters(averager)
    with pytest.raises(CheckpointMismatch) as caught:
        averager.load(checkpoint)
    assert str(caught.value).startswith(text.format(path=checkpoint))
    assert (differences(memory(averager), before), counters(averager)) == ([], numbers)
    averager.step()  # and it goes on


def test_an_extra_tensor_can_be_left_out_as_the_message_says(checkpoint: Path) -> None:
    _, averager = trained("plain", Deeper, (), exclude=["more.weight"])
    averager.load(checkpoint)
    assert differences(held(averager, trainable(), "ema"), expected("ema")) == []


# --------------------------------------------------------------- damage that is seen beforehand


def first_file(path: Path, average: str = "ema") -> Path:
    return path / saved_files(path, average)[0].name


def record(path: Path, average: str = "ema") -> Path:
    return path / average / "shard-00001.json"


def foreign(path: Path) -> None:
    """The same average, saved by another run, in this one's place."""
    other = path.with_name("other")
    trained("plain", Uneven)[1].save(other)
    shutil.copyfile(first_file(other), first_file(path))


DAMAGES: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (lambda path: shutil.rmtree(path), CheckpointNotFound, "{path}: there is no checkpoint here"),
    (
        lambda path: (path / "manifest.json").unlink(),
        CheckpointNotFound,
        "{path}: has no manifest.json: it is not a checkpoint, or its save was never committed",
    ),
    (
        lambda path: flip(path / "manifest.json", 200),
        CheckpointCorrupt,
        "{path}: manifest.json is torn or spoiled: ",
    ),
    (lambda path: first_file(path).unlink(), CheckpointCorrupt, "{file} is missing"),
    (
        lambda path: os.truncate(first_file(path), 500),
        CheckpointCorrupt,
        "{file} is torn: it has 500 bytes, its record says ",
    ),
    (
        lambda path: flip(first_file(path), 40),
        CheckpointCorrupt,
        "{file}: the checksum of its header is wrong",
    ),
    (foreign, CheckpointCorrupt, "{file} belongs to another save: its id is "),
    (lambda path: record(path).unlink(), CheckpointCorrupt, "{record} is missing"),
    (
        lambda path: os.truncate(record(path), 400),
        CheckpointCorrupt,
        "{record} is torn: it has 400 bytes, the manifest says ",
    ),
    (
        lambda path: flip(record(path), 40),
        CheckpointCorrupt,
        "{record}: its checksum is wrong",
    ),
    (
        lambda path: record(path).unlink() or record(path).mkdir(),
        CheckpointError,
        "{record} cannot be read: ",
    ),
    (
        lambda path: shutil.copyfile(record(path, "swa"), record(path)),
        CheckpointCorrupt,
        "{record}: its checksum is wrong",
    ),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("damage", "kind", "text"), DAMAGES)
def test_damage_that_is_seen_beforehand(
    checkpoint: Path,
    damage: Callable[[Path], object],
    kind: type[Exception],
    text: str,
    verify: bool,
) -> None:
    model, averager = trained("plain", Uneven, range(4))
    before, numbers = memory(averager), counters(averager)
    file = first_file(checkpoint)
    damage(checkpoint)
    with pytest.raises(kind) as caught:
        averager.load(checkpoint, verify=verify)
    places = {"path": checkpoint, "file": file, "record": record(checkpoint)}
    assert str(caught.value).startswith(text.format(**places))
    assert (differences(memory(averager), before), counters(averager)) == ([], numbers)
    feed(averager, model, [4])  # nothing has happened
    assert averager.step_count == 5


def reseal(path: Path, number: int, change: Callable[[Record], Record]) -> None:
    """Change a rank's record of "ema" in a checkpoint, and seal it in the manifest as if true."""
    manifest = read_manifest(path)
    average = manifest.averages["ema"]
    shard = shard_name(average.folder, number)
    file = path / f"{shard}.json"
    content = change(Record.from_bytes(file.read_bytes(), shard, average.tensors)).to_bytes()
    file.write_bytes(content)
    records = list(average.records)
    records[number] = SavedRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    averages = {**manifest.averages, "ema": replace(average, records=tuple(records))}
    (path / "manifest.json").write_bytes(replace(manifest, averages=averages).to_bytes())


def without(fqn: str) -> Callable[[Record], Record]:
    """A record that does not have a tensor's boxes."""

    def change(record: Record) -> Record:
        files = (
            replace(file, boxes=tuple(box for box in file.boxes if box.fqn != fqn))
            for file in record.files
        )
        return replace(record, files=tuple(files))

    return change


def load_uncovered(root: str, fqns: list[str]) -> list[tuple[str, list[str]]]:
    """A box of a tensor is in no record: what each rank hears, and what has changed."""
    _, averager = trained("fsdp2", Uneven)
    found = []
    for fqn in fqns:
        averager.save(f"{root}/a", overwrite=True)
        if dist.get_rank() == 0:
            reseal(Path(root, "a"), 0, without(fqn))
        dist.barrier()
        before = memory(averager)
        text = error_of(averager.load, f"{root}/a")
        found.append((text, differences(memory(averager), before)))
        averager.step()
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_not_saved_whole_is_found_by_whichever_rank(
    tmp_path: Path, world_size: int
) -> None:
    """The ranks take turns with the tensors, by name."""
    path, fqns = tmp_path / "a", trainable()
    results = run_ranks(load_uncovered, world_size, str(tmp_path), fqns)
    for rank, found in enumerate(results):
        for (text, changed), fqn in zip(found, fqns, strict=True):
            keeper = sorted(fqns).index(fqn) % world_size
            start = "" if rank == keeper else f"loading {path} failed. rank {keeper}: "
            assert text.startswith(
                f"CheckpointCorrupt: {start}{path}: average 'ema' is not whole: {fqn}: "
            )
            assert text.endswith(" elements are in no box")
            assert changed == []
    (fault,) = verify_checkpoint(path)[1]
    assert fault.startswith(f"{path}: average 'ema' is not whole: {fqns[-1]}: ")


def load_with_bugs(root: str, targets: list[str]) -> list[tuple[str, list[str]]]:
    """A step fails in an unforeseen way on rank 1: what each rank hears, and what has changed."""
    _, averager = trained("fsdp2", Uneven)
    averager.save(f"{root}/a")
    found = []
    for target in targets:
        before = memory(averager)
        if dist.get_rank() == 1:
            with mock.patch(target, side_effect=ValueError("a bug")):
                text = error_of(averager.load, f"{root}/a")
        else:
            text = error_of(averager.load, f"{root}/a")
        found.append((text, differences(memory(averager), before)))
        averager.step()
    averager.load(f"{root}/a")
    return found


def test_a_failure_in_any_step_before_the_reads(tmp_path: Path) -> None:
    steps = ("load.reading", "load.read_record", "cover.BoxIndex", "load.plan_reads")
    targets = [f"distavg.checkpoint.{step}" for step in (*steps, "load.ShardReader")]
    results = run_ranks(load_with_bugs, 3, str(tmp_path), targets)
    for rank, found in enumerate(results):
        for text, changed in found:
            message = f"loading {tmp_path}/a failed. rank 1: ValueError: a bug"
            assert text == ("ValueError: a bug" if rank == 1 else f"RankError: {message}")
            assert changed == []


def parsed_by(call: Callable[..., object], *args: object) -> list[str]:
    """The records that this rank parses meanwhile."""
    with mock.patch.object(Record, "from_bytes", wraps=Record.from_bytes) as parsed:
        call(*args)
    return [each.args[1] for each in parsed.call_args_list]


def load_and_save_counted(root: str) -> tuple[list[str], int, list[str]]:
    """What this rank parses to load, the boxes that it is told of, and what it parses to save."""
    _, averager = trained("fsdp2", Uneven, ())
    with mock.patch.object(
        LoadPlan, "located", autospec=True, side_effect=LoadPlan.located
    ) as located:
        loaded = parsed_by(averager.load, f"{root}/a")
    ((_, places), _) = located.call_args
    return loaded, sum(map(len, places.values())), parsed_by(averager.save, f"{root}/b")


def test_each_rank_reads_its_share_of_the_records(tmp_path: Path) -> None:
    run_ranks(save_fsdp2, 4, str(tmp_path))
    boxes = sum(len(file.boxes) for file in saved_files(tmp_path / "a"))
    results = run_ranks(load_and_save_counted, 2, str(tmp_path))
    for rank, (loaded, told, saved) in enumerate(results):
        numbers = range(1 + rank, 4, 2)  # the tensors are too small for the last of the four
        assert loaded == [f"{name}/shard-0000{i}" for name in RULES for i in numbers]
        assert 0 < told < 0.8 * boxes
        assert saved == [f"{name}/shard-0000{1 + rank}" for name in RULES]  # as a check of its own


def save_fsdp2(root: str) -> None:
    trained("fsdp2", Uneven)[1].save(f"{root}/a")


def load_with_other_names(root: str) -> str:
    _, averager = trained("fsdp2", Uneven)
    averager.save(f"{root}/a")
    names = {"ema": "swa", "swa": "ema"} if dist.get_rank() else {}
    return error_of(averager.load, f"{root}/a", names=names, rules="current")


def test_ranks_that_are_given_other_names(tmp_path: Path) -> None:
    text = f"loading {tmp_path}/a: names= or missing= are not the same on all ranks"
    assert run_ranks(load_with_other_names, 2, str(tmp_path)) == [f"ConfigError: {text}"] * 2


def load_damaged(root: str, damages: list[str]) -> list[tuple[str, list[str]]]:
    """Files that only rank 1 reads are damaged; what each rank hears, and what has changed."""
    _, averager = trained("fsdp2", Uneven)
    found = []
    for damage in damages:
        averager.save(f"{root}/{damage}")
        path = damaged_file(root, damage)
        if dist.get_rank() == 0:
            if damage.endswith("missing"):
                path.unlink()
            elif damage.endswith("torn"):
                os.truncate(path, 700)
            else:
                flip(path, 30)
        dist.barrier()
        before = memory(averager)
        text = error_of(averager.load, f"{root}/{damage}")
        found.append((text, differences(memory(averager), before)))
        averager.step()
    return found


def damaged_file(root: str | Path, damage: str) -> Path:
    end = ".json" if damage.startswith("record") else "-model-00001-of-00001.safetensors"
    return Path(root, damage, "ema", f"shard-00002{end}")


def test_damage_that_one_rank_sees_is_raised_on_all(tmp_path: Path) -> None:
    words = {
        "missing": " is missing",
        "torn": " is torn: it has 700 bytes",
        "header": "header",
        "record-missing": " is missing",
        "record-torn": " is torn: it has 700 bytes",
        "record-flipped": ": its checksum is wrong",
    }
    results = run_ranks(load_damaged, 2, str(tmp_path), list(words))
    for rank, found in enumerate(results):
        for (damage, word), (text, changed) in zip(words.items(), found, strict=True):
            path = damaged_file(tmp_path, damage)
            start = "" if rank == 1 else f"loading {tmp_path / damage} failed. rank 1: "
            assert text.startswith(f"CheckpointCorrupt: {start}{path}")
            assert word in text
            assert changed == []


# ---------------------------------------------------------------- damage that is found on the way


@contextmanager
def a_flipped_bit(root: str, file: str, fqn: str) -> Iterator[None]:
    """While it lasts, the first byte of a tensor in a file is wrong."""
    path = Path(root)
    saved = next(each for each in saved_files(path, "swa") if each.name == file)
    begin = next(box.begin for box in saved.boxes if box.fqn == fqn)
    dist.barrier()
    if dist.get_rank() == 0:
        flip(path / file, begin)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        flip(path / file, begin)
    dist.barrier()


def load_spoiled(root: str) -> dict[str, Any]:
    """One bit is wrong in a file that only rank 1 reads."""
    path = f"{root}/a"
    _, first = trained("fsdp2", Uneven)
    first.save(path)
    model = build("fsdp2", Uneven, seed=7)
    averager = Averager(model, RULES)
    feed(averager, model, [4])
    live = cloned(storages(model))
    file = "swa/shard-00002-model-00001-of-00001.safetensors"
    calls: dict[str, Callable[[], object]] = {
        "step": averager.step,
        "update": lambda: averager.update("ema"),
        "applied": lambda: averager.applied("ema").__enter__(),
        "save": lambda: averager.save(f"{root}/b"),
        "state_dict": averager.state_dict,
        "full_state_dict": lambda: averager.full_state_dict("ema"),
        "copy_to": lambda: averager.copy_to(name="ema"),
        "metrics": averager.metrics,
    }
    with a_flipped_bit(path, file, "experts"):
        text = error_of(averager.load, path)
        refusals = {name: error_of(call) for name, call in calls.items()}
        again = error_of(averager.load, path)
        missing = error_of(averager.load, f"{root}/nowhere")
        still = error_of(averager.step)
        unverified = error_of(averager.load, path, verify=False)
        wrong = differences(held(averager, trainable(), "swa"), expected("swa"))
        error_of(averager.load, path)  # broken again
    good = error_of(averager.load, path)
    found = held(averager, trainable(), "swa")
    usable = error_of(averager.step)
    dist.barrier()
    return {
        "text": text,
        "refusals": refusals,
        "again": again,
        "missing": missing,
        "still": still,
        "unverified": unverified,
        "wrong": wrong,
        "good": good,
        "differences": differences(found, expected("swa")) if dist.get_rank() == 0 else [],
        "usable": usable,
        "live": differences(storages(model), live),
        "saved": Path(root, "b").exists(),
    }


def test_a_load_that_fails_half_way(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(load_spoiled, 2, str(tmp_path))):
        file = "swa/shard-00002-model-00001-of-00001.safetensors"
        start = "" if rank == 1 else f"loading {tmp_path}/a failed. rank 1: "
        assert found["text"].startswith(
            f"CheckpointCorrupt: {start}{file}: experts: the checksum of block 0 is wrong (bytes "
        )
        assert found["again"] == found["text"]
        reason = (
            f"StateError: loading {tmp_path}/a failed half-way, so the averages hold a mixture of "
            "old and new values: load a good checkpoint first"
        )
        assert found["refusals"] == dict.fromkeys(found["refusals"], reason)
        assert found["missing"].startswith("CheckpointNotFound: ")
        assert found["still"] == reason
        assert found["unverified"] == "nothing"  # that is what verify=False means
        assert found["wrong"] == (["experts"] if rank == 0 else sorted(trainable()))
        assert found["good"] == found["usable"] == "nothing"
        assert found["differences"] == found["live"] == []
        assert not found["saved"]


# ---------------------------------------------------------------------------- ranks that disagree


def load_different(root: str) -> list[str]:
    """Each rank has a checkpoint of its own at its path; or one has none."""
    _, averager = trained("fsdp2", Uneven)
    for name in ("own-0", "own-1"):
        averager.save(f"{root}/{name}")
    before = memory(averager)
    texts = [
        error_of(averager.load, f"{root}/own-{dist.get_rank()}"),
        error_of(averager.load, f"{root}/own-{2 * dist.get_rank()}"),
    ]
    return [*texts, *differences(memory(averager), before)]


def test_ranks_without_a_shared_file_system(tmp_path: Path) -> None:
    for text, missing, *changed in run_ranks(load_different, 2, str(tmp_path)):
        assert text.startswith("CheckpointMismatch: ")
        assert "is not the same checkpoint on all ranks: load from a file system" in text
        assert missing.startswith("CheckpointNotFound: ")
        assert "own-2: there is no checkpoint here" in missing
        assert changed == []


def mismatched(root: str) -> list[str]:
    """Mistakes that every rank makes."""
    _, averager = trained("fsdp2", Uneven)
    averager.save(f"{root}/a")
    _, other = trained("fsdp2", Wider)
    _, rules = trained("fsdp2", Uneven, rules={"ema": EMA(0.5), "swa": RULES["swa"]})
    return [error_of(each.load, f"{root}/a") for each in (other, rules)]


def test_a_mismatch_is_raised_on_every_rank_in_the_same_words(tmp_path: Path) -> None:
    first, second = run_ranks(mismatched, 2, str(tmp_path))
    assert first == second
    assert first[0].startswith("CheckpointMismatch: embed.weight: the checkpoint holds shape")
    assert first[1].startswith(f"CheckpointMismatch: {tmp_path}/a: average 'ema': decay=0.9 was")


# --------------------------------------------------------------------------------------- verify


def test_verify_reads_every_byte(checkpoint: Path) -> None:
    seen: list[int] = []
    total = sum(average.nbytes for average in read_manifest(checkpoint).averages.values())
    assert verify_checkpoint(checkpoint, seen.append) == (total, [])
    assert sum(seen) == total


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_verify_finds_every_flipped_byte(checkpoint: Path, average: str) -> None:
    (file,) = saved_files(checkpoint, average)
    for box in file.boxes:
        for position in (box.begin, box.begin + 4 * box.box.numel - 1):
            flip(checkpoint / file.name, position)
            (fault,) = verify_checkpoint(checkpoint)[1]
            assert fault.startswith(
                f"{file.name}: {box.fqn}: the checksum of block 0 is wrong (bytes {box.begin} "
            )
            flip(checkpoint / file.name, position)
    assert verify_checkpoint(checkpoint)[1] == []
