"""Loading and verifying: every rank reads what it owns, from any world size and layout.

All that can be known before data is read is checked first, before anything in memory changes: the
manifest, the names, shapes, dtypes and rules by every rank; the records by each rank its share; the
cover of every tensor by one rank, which then tells the others where the boxes lie that they want;
and every needed file's presence, size and header. Then the data goes straight into the averages'
memory, verified block by block on the way.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distavg.average import Average
from distavg.checkpoint.cover import Key, find_boxes
from distavg.checkpoint.files import BUFFER_BYTES, ShardReader, Target
from distavg.checkpoint.folders import reading
from distavg.checkpoint.manifest import Manifest, SavedAverage
from distavg.checkpoint.plan import Read, plan_reads
from distavg.checkpoint.records import Place, SavedBox, SavedFile, read_record
from distavg.checkpoint.save import Also, call_also
from distavg.comm import Comm
from distavg.errors import CheckpointCorrupt, CheckpointMismatch, ConfigError
from distavg.foreach import as_bytes
from distavg.layout import Box
from distavg.rules import Imported, Rule, rule_from_record
from distavg.schedule import Clock, Schedule
from distavg.shards import ModelShards
from distavg.tensors import Shard

__all__ = ["LoadPlan", "plan_load", "planned_load"]

logger = logging.getLogger("distavg")


# What is read of each file, into what.
_ByFile = list[tuple[SavedFile, list[tuple[SavedBox, Target, list[Read]]]]]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything that a load will do on this rank, checked.

    Attributes:
        path: The checkpoint.
        manifest: Its manifest.
        sources: What is saved of each average that will be read, by the name it has here.
        schedules: The schedule that each of them goes on with.
        names: For each of them the names under which each tensor was saved. Several, if it is
            tied here and was not then.
        statistics: For each of them its BatchNorm statistics, which `read` fills.
        wanted: For each of them the shards that `read` fills, and the saved tensor of each.
        places: The saved boxes that have an element of those; from `located` on.
        reads: For each of them what is read from which file, into what; from `located` on.
    """

    path: Path
    manifest: Manifest
    sources: dict[str, SavedAverage]
    schedules: dict[str, Schedule]
    names: dict[str, dict[str, list[str]]]
    statistics: dict[str, dict[str, Tensor]]
    wanted: dict[str, list[tuple[str, Shard]]]
    places: Mapping[Key, Sequence[Place]] = field(default_factory=dict)
    reads: dict[str, _ByFile] = field(default_factory=dict)

    @property
    def has_ties(self) -> bool:
        """Whether tensors are tied here that were not when they were saved."""
        return any(len(each) > 1 for names in self.names.values() for each in names.values())

    @property
    def boxes(self) -> list[tuple[Key, Box]]:
        """Of which saved tensor which box is wanted."""
        return [
            ((name, saved), shard.box)
            for name, shards in self.wanted.items()
            for saved, shard in shards
        ]

    def read_share(self, rank: int, size: int) -> dict[str, list[SavedFile]]:
        """The data files in a rank's share of each average's records: every `size`-th of them.

        Raises:
            CheckpointError: What `read_record` raises.
        """
        return {
            name: [
                file
                for number in range(rank, len(source.records), size)
                for file in read_record(self.path, self.manifest, source, number)
            ]
            for name, source in self.sources.items()
        }

    def located(self, places: Mapping[Key, Sequence[Place]]) -> "LoadPlan":
        """The plan with what is read from which file; each is there, and the one that was saved.

        Raises:
            CheckpointCorrupt: A file is missing, torn, another save's, or has a spoiled header.
        """
        plan = replace(self, places=places)
        reads = {name: plan._by_file(name, shards) for name, shards in self.wanted.items()}
        for file, _ in itertools.chain(*reads.values()):
            with ShardReader(self.path, file, self.manifest.save_id):
                pass
        return replace(plan, reads=reads)

    def check_ties(self, averages: Sequence[Average], *, verify: bool) -> None:
        """Compare what was saved of tensors that are tied here and were not when they were saved.

        Raises:
            CheckpointMismatch: They differ.
        """
        for average in averages:
            names = self.names.get(average.name, {})
            tied = [shard for shard in average.own_shards() if len(names.get(shard.fqn, ())) > 1]
            for shard in tied:
                dtype = getattr(
                    torch, self.sources[average.name].tensors[names[shard.fqn][0]].dtype
                )
                values = []
                for name in names[shard.fqn]:
                    value = torch.empty(shard.box.sizes, dtype=dtype, device="cpu")
                    wanted = [(name, replace(shard, tensor=value))]
                    self._fill(self._by_file(average.name, wanted), verify=verify)
                    values.append(as_bytes(value))
                for name, value in zip(names[shard.fqn], values, strict=True):
                    if not torch.equal(value, values[0]):
                        raise CheckpointMismatch(
                            f"{self.path}: average {average.name!r}: {names[shard.fqn][0]} and "
                            f"{name} are one tensor here, and differ in the checkpoint: untie them "
                            "in the model before the Averager is built"
                        )

    def read(self, averages: Sequence[Average], *, verify: bool) -> None:
        """Fill the memory of the averages that were saved; others are left as they are.

        Raises:
            CheckpointCorrupt: A file was torn or spoiled after all; memory is half filled.
        """
        for average in averages:
            if average.name in self.sources:
                again = {name for names in self.names[average.name].values() for name in names[1:]}
                once = [
                    (file, [each for each in boxes if each[0].fqn not in again])
                    for file, boxes in self.reads[average.name]
                ]
                self._fill(once, verify=verify)

    def settle(self, averages: Sequence[Average]) -> None:
        """Make counters, schedules and statistics those that were saved, after `read`."""
        for average in averages:
            source = self.sources.get(average.name)
            average.num_updates = source.num_updates if source is not None else 0
            average.statistics = self.statistics.get(average.name, {})
            average.statistics_at = source.statistics_at if source is not None else None
            average.is_warned_of = False
            average.schedule = self.schedules.get(average.name, average.schedule)
            average.damaged = None

    def _by_file(self, average: str, shards: Sequence[tuple[str, Shard]]) -> _ByFile:
        """The reads that fill these shards, each from a saved tensor, file by file."""
        found: dict[str, tuple[SavedFile, list[tuple[SavedBox, Target, list[Read]]]]] = {}
        for name, shard in shards:
            saved = self.sources[average].tensors[name]
            target = Target(shard.tensor, getattr(torch, saved.dtype))
            for file, box in self.places.get((average, name), ()):
                reads = plan_reads(
                    box.box, shard.box, saved.item_bytes, BUFFER_BYTES, is_flat=target.is_flat
                )
                if reads:
                    found.setdefault(file.name, (file, []))[1].append((box, target, reads))
        return list(found.values())

    def _fill(self, by_file: _ByFile, *, verify: bool) -> None:
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu")
        for file, boxes in by_file:
            with ShardReader(self.path, file, self.manifest.save_id) as reader:
                for box, target, reads in boxes:
                    for read in reads:
                        target.fill(reader, box, read, buffer, verify=verify)


@contextmanager
def planned_load(
    path: Path,
    averages: Sequence[Average],
    model_shards: ModelShards,
    comm: Comm,
    clock: Clock,
    *,
    verify: bool,
    also: Also | None,
    **options: Any,
) -> Iterator[LoadPlan]:
    """A load, checked by all ranks, to be read within the context. Collective.

    Three votes and two exchanges: a vote when each rank has read its share of the records, in the
    order of the ranks that wrote them, whatever their number; what and where is saved and wanted
    goes to those who keep each tensor (`find_boxes`); a vote when everything is in its place.
    Another vote if tensors are tied here that were not; and another after `also`. As long as the
    context lasts, the checkpoint is not removed.

    Raises:
        DistavgError: What `plan_load` raised on any rank, or `also`.
        CheckpointCorrupt: A file is missing, torn, foreign or spoiled, or a tensor is not whole.
        CheckpointMismatch: Ranks see different checkpoints, or tied tensors differ.
        ConfigError: Ranks were given other options.
    """
    doing = f"loading {path}"
    with ExitStack() as stack:
        with comm.together(doing) as vote:
            manifest = stack.enter_context(reading(path))
            need_extra = also is not None
            plan = plan_load(
                path, manifest, averages, model_shards, clock, need_extra=need_extra, **options
            )
            known = plan.read_share(comm.rank, comm.size)
            folders = {name: source.folder for name, source in plan.sources.items()}
            vote.answer = manifest.save_id, folders, plan.has_ties
        if len({save_id for save_id, _, _ in vote.answers}) > 1:
            raise CheckpointMismatch(
                f"{path} is not the same checkpoint on all ranks: load from a file system that "
                "they share"
            )
        if any(each != folders for _, each, _ in vote.answers):
            raise ConfigError(f"{doing}: names= or missing= are not the same on all ranks")
        tensors = {name: source.tensors for name, source in plan.sources.items()}
        places = find_boxes(
            tensors,
            known,
            plan.boxes,
            comm,
            doing,
            lambda name, fault: CheckpointCorrupt(
                f"{path}: average {name!r} is not whole: {fault}"
            ),
        )
        with comm.together(doing):
            plan = plan.located(places)
        if any(has_ties for _, _, has_ties in vote.answers):
            with comm.together(doing):
                plan.check_ties(averages, verify=verify)
        if also is not None:
            with comm.together(doing):
                call_also(also, path / str(manifest.extra_folder))
        yield plan


def plan_load(
    path: Path,
    manifest: Manifest,
    averages: Sequence[Average],
    model_shards: ModelShards,
    clock: Clock,
    *,
    names: Mapping[str, str] | None,
    missing: str,
    rules: str,
    cast: bool,
    need_extra: bool,
) -> LoadPlan:
    """Check everything that the manifest can tell. Not collective.

    Args:
        path: The checkpoint.
        manifest: Its manifest.
        averages: The averages of the averager.
        model_shards: The live tensors.
        clock: What schedules are resolved by.
        names: Saved name -> name here, for averages that were renamed.
        missing: `"error"` or `"from_model"`: what becomes of an average that was not saved.
        rules: `"error"`, `"current"` or `"saved"`: which rule goes on where they differ.
        cast: Whether another dtype is converted.
        need_extra: Whether what `save(also=)` wrote is wanted, too.

    Raises:
        CheckpointMismatch: It is not of these averages or of this model.
        ConfigError: A name or an option that cannot be.
    """
    for option, value, allowed in (
        ("missing", missing, ("error", "from_model")),
        ("rules", rules, ("error", "current", "saved")),
    ):
        if value not in allowed:
            raise ConfigError(f"load: {option}={value!r} is none of {allowed}")
    if need_extra and manifest.extra_folder is None:
        raise CheckpointMismatch(f"{path} was saved without also=, so load(also=) has no folder")
    sources = _sources(path, manifest, [a.name for a in averages], names or {}, missing)
    schedules: dict[str, Schedule] = {}
    saved_names: dict[str, dict[str, list[str]]] = {}
    wanted: dict[str, list[tuple[str, Shard]]] = {}
    statistics: dict[str, dict[str, Tensor]] = {}
    for average in averages:
        if average.name in sources:
            source = sources[average.name]
            rule = _choose_rule(path, average, source, rules)
            schedules[average.name] = Schedule(average.name, rule, clock)
            matched = _match(path, average, source, model_shards)
            _check_tensors(average, source, model_shards, matched, cast=cast)
            memories = _statistics(source, average, model_shards)
            statistics[average.name] = {fqn: memory for (_, fqn), memory in memories.items()}
            shards = [(name, s) for s in average.own_shards() for name in matched[s.fqn]]
            for (saved_name, fqn), memory in memories.items():
                shape = tuple(memory.shape)
                shards.append((saved_name, Shard(fqn, Box.whole(shape), shape, memory)))
            wanted[average.name] = shards
            saved_names[average.name] = matched
    return LoadPlan(path, manifest, sources, schedules, saved_names, statistics, wanted)


def _sources(
    path: Path, manifest: Manifest, here: Sequence[str], names: Mapping[str, str], missing: str
) -> dict[str, SavedAverage]:
    for saved, name in names.items():
        if saved not in manifest.averages or name not in here:
            raise ConfigError(
                f"load: names={{{saved!r}: {name!r}}}: {path} holds {sorted(manifest.averages)}, "
                f"this averager has {list(here)}"
            )
    sources = {names.get(saved, saved): each for saved, each in manifest.averages.items()}
    if len(sources) < len(manifest.averages):
        raise ConfigError(f"load: names={dict(names)} gives two saved averages one name")
    if ignored := sorted(set(sources) - set(here)):
        logger.info("%s: the saved averages %s are not asked for and left alone", path, ignored)
    if absent := [name for name in here if name not in sources]:
        if missing == "error":
            raise CheckpointMismatch(
                f"{path} holds the averages {sorted(manifest.averages)}, not {absent}: rename with "
                "names=, or start them from the live weights with missing='from_model'"
            )
        logger.warning("%s: the averages %s start from the live weights", path, absent)
    return {name: source for name, source in sources.items() if name in here}


def _choose_rule(path: Path, average: Average, source: SavedAverage, rules: str) -> Rule:
    current, saved = average.rule.record(), source.rule
    is_imported = saved.get("kind") == Imported.kind
    if is_imported and rules != "saved" and saved.get("unknown"):
        logger.warning(
            "%s: the file that it was made from does not say how many %s had been done, so that "
            "times of the schedule count from now: distavg import takes --steps and --epochs",
            path,
            " and ".join(saved["unknown"]),
        )
    if current == saved or rules == "current" or (is_imported and rules == "error"):
        return average.rule
    if rules == "saved":
        return rule_from_record(saved)
    differing = ", ".join(
        f"{key}={saved.get(key)!r} was saved and {key}={current.get(key)!r} is asked for"
        for key in {**saved, **current}
        if saved.get(key) != current.get(key)
    )
    raise CheckpointMismatch(
        f"{path}: average {average.name!r}: {differing}. Go on with one of them: rules='saved' or "
        "rules='current'"
    )


def _match(
    path: Path, average: Average, source: SavedAverage, model_shards: ModelShards
) -> dict[str, list[str]]:
    """The names under which each tensor was saved: its own, or one that it was or is tied to."""
    saved = {name: t.fqn for t in source.tensors.values() for name in (*t.aliases, t.fqn)}
    aliases = {tensor.fqn: tensor.aliases for tensor in model_shards.catalogue}
    matched = {
        fqn: list(dict.fromkeys(saved[name] for name in (fqn, *aliases[fqn]) if name in saved))
        for fqn in average.dtypes
    }
    for fqn, names in sorted(matched.items()):
        if not names:
            raise CheckpointMismatch(
                f"{path}: average {average.name!r}: {fqn} is averaged here and not in the "
                f"checkpoint: leave it out with exclude=[{fqn!r}]"
            )
    known = {name for names in matched.values() for name in names}
    known |= _statistic_names(source, average, model_shards).keys()
    if source.rule.get("kind") == Imported.kind:  # what is averaged is not told from other tensors
        left = {*aliases, *itertools.chain(*aliases.values())} & (source.tensors.keys() - known)
        if left:
            logger.info("%s: %s are not averaged here, and left alone", path, sorted(left))
        known |= left
    for name in sorted(source.tensors.keys() - known):
        raise CheckpointMismatch(
            f"{path}: average {average.name!r}: {name} is in the checkpoint and not averaged "
            "here: build the model that was saved"
        )
    return matched


def _statistic_names(
    source: SavedAverage, average: Average, model_shards: ModelShards
) -> dict[str, set[str]]:
    """Saved BatchNorm statistics of buffers that are live here, and their names here."""
    if source.statistics_at is None:
        return {}
    here = {
        name: tensor.fqn
        for tensor in model_shards.catalogue
        if tensor.is_buffer and tensor.fqn not in average.dtypes
        for name in (tensor.fqn, *tensor.aliases)
    }
    shapes = {tensor.fqn: tensor.shape for tensor in model_shards.catalogue}
    names: dict[str, set[str]] = {}
    for fqn, saved in source.tensors.items():
        for name in (fqn, *saved.aliases):
            if name in here and shapes[here[name]] == saved.shape:
                names.setdefault(fqn, set()).add(here[name])
    return names


def _statistics(
    source: SavedAverage, average: Average, model_shards: ModelShards
) -> dict[tuple[str, str], Tensor]:
    """Memory for such statistics on every rank, by their saved names and those here."""
    return {
        (saved_name, fqn): torch.empty(
            source.tensors[saved_name].shape,
            dtype=getattr(torch, source.tensors[saved_name].dtype),
            device="cpu",
        )
        for saved_name, names in _statistic_names(source, average, model_shards).items()
        for fqn in sorted(names)
        if fqn in model_shards.by_name
    }


def _check_tensors(
    average: Average,
    source: SavedAverage,
    model_shards: ModelShards,
    matched: Mapping[str, Sequence[str]],
    *,
    cast: bool,
) -> None:
    shapes = {tensor.fqn: tensor.shape for tensor in model_shards.catalogue}
    pairs = [(fqn, source.tensors[name]) for fqn, names in matched.items() for name in names]
    for fqn, saved in pairs:
        shape, dtype = shapes[fqn], average.dtypes[fqn]
        if saved.shape != shape:
            raise CheckpointMismatch(
                f"{fqn}: the checkpoint holds shape {saved.shape}, the model has {shape}. Build "
                f"the model with the saved sizes, or skip the tensor with exclude=[{fqn!r}]"
            )
        if saved.dtype != str(dtype).removeprefix("torch.") and not cast:
            raise CheckpointMismatch(
                f"{fqn}: the checkpoint holds {saved.dtype}, the average is {dtype}. Convert with "
                f"cast=True, or build the Averager with dtype=torch.{saved.dtype}"
            )
