"""`Averager`: running averages of a model's weights, kept in shards inside distributed training."""

import logging
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distavg.average import Average
from distavg.batchnorm import Forward, keep_statistics, measure_batchnorm
from distavg.checkpoint.export import export_average, export_dtype, parse_size
from distavg.checkpoint.load import planned_load
from distavg.checkpoint.save import (
    Also,
    Contents,
    Save,
    SaveHandle,
    SaveRequest,
    check_copies,
    in_background,
)
from distavg.comm import Comm
from distavg.errors import (
    ConfigError,
    RankError,
    StateError,
    UnsupportedError,
)
from distavg.gather import copy_into, iter_whole_tensors, squared_distance
from distavg.hooks import OptimizerHooks
from distavg.rules import Rule
from distavg.schedule import Clock, Position, Schedule
from distavg.shards import ModelShards
from distavg.state import load_state, state
from distavg.swap import applied, make_permanent
from distavg.updates import Updates
from distavg.wrappers import Face, Model, Wrapped

__all__ = ["Averager"]

logger = logging.getLogger("distavg")

_CPU = torch.device("cpu")


class Averager:
    """Running averages of a model's weights; each rank keeps its shard of each.

    Building one is collective over `process_group` and takes the averages' memory. Updates never
    communicate. Methods that are collective say so; every rank must call them, in one order.

    Args:
        model: A module on its final device with its wrappers in place: plain, DDP, FSDP1,
            FSDP2, HSDP, tensor-parallel, compiled; or a mapping of prefix to such modules, which
            may be others on each rank (pipeline stages).
        rules: One rule, or a mapping of names to rules; a rule alone is named by its kind.
        clock: The length of epochs and of the run, for times in `ep` and `dur`.
        dtype: The dtype of the averages, one or a mapping by name. None: fp32 for bf16 and fp16
            parameters, otherwise the parameter's own.
        device: One or a mapping by name. None: beside the parameters. `"cpu"`: in host memory,
            pinned where there is an accelerator, and updated by a thread off the critical path,
            from copies of the live weights; takes two of those in host memory.
        process_group: The ranks that hold parts of the model; None for all.
        replicas: The ranks that hold identical plain parameters; found without help for DDP,
            FSDP1 and DTensors. Plain ones under a process group without it are averaged whole on
            every rank.
        shard_replicas: Whether replicas divide the averages among themselves. False keeps whole
            copies, so that `applied()` needs no peer to restore the live weights.
        include: Patterns (`fnmatch`) of the canonical names to average; None for all. Only
            trainable floating parameters, and buffers under `buffers`, are ever averaged.
        exclude: Patterns of canonical names to leave out.
        buffers: `"live"`: evaluation uses the live ones. `"copied"`: taken at each update, as
            PyTorch's AveragedModel does. `"averaged"`: floating ones by the rule, others copied.
            Each rank keeps its own, since buffers may differ between ranks; the first's are saved.
        timeout: How long collectives of this object may take to fail, where a rank does not come;
            of it three seconds, or half, to find out which. None for PyTorch's default.

    Raises:
        ConfigError: An argument that cannot be, a time that the clock cannot resolve, a schedule
            that never updates, nothing to average.
        UnsupportedError: Tensors that cannot be averaged, or a device that averages cannot be on.
        ReplicaMismatch: Replicas that differ.

    >>> from distavg import EMA
    >>> model = nn.Linear(2, 1)
    >>> averager = Averager(model, EMA(0.9))
    >>> averager.step()
    >>> with averager.applied():
    ...     prediction = model(torch.ones(2))
    """

    def __init__(
        self,
        model: Model,
        rules: Rule | Mapping[str, Rule],
        *,
        clock: Clock | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype | None] | None = None,
        device: torch.device | str | Mapping[str, torch.device | str | None] | None = None,
        process_group: dist.ProcessGroup | None = None,
        replicas: dist.ProcessGroup | None = None,
        shard_replicas: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        buffers: str = "live",
        timeout: timedelta | None = None,
    ) -> None:
        if isinstance(rules, Rule):
            rules = {rules.kind: rules}
        self._comm = Comm(process_group, timeout)
        self._clock = clock or Clock()
        self._position = Position()
        self._id = uuid.uuid4().hex
        self._loaded: str | None = None  # the save that this run goes on from
        self._broken: str | None = None
        self._saving: SaveHandle | None = None  # the last one in the background
        self._is_behind = False  # the model has changed, and not every average has followed
        self._hooks = OptimizerHooks(self._step_beside, lambda: self._updates.release())
        with self._comm.together("building an Averager"):
            _check_arguments(rules, clock=clock, dtype=dtype, device=device, buffers=buffers)
            schedules = [Schedule(name, rule, self._clock) for name, rule in rules.items()]
        self._shards = ModelShards(
            model,
            self._comm,
            replicas=replicas,
            shard_replicas=shard_replicas,
            include=include,
            exclude=exclude,
            hold_buffers=buffers != "live",
        )
        with self._comm.together("building an Averager"):
            if not any(tensor.is_held for tensor in self._shards.catalogue):
                raise ConfigError(
                    "Averager: the model has no trainable floating parameter to average "
                    "(frozen ones are left alone; see include and exclude)"
                )
            self._averages = {
                schedule.name: Average(
                    schedule,
                    self._shards,
                    dtype=_of(schedule.name, dtype),
                    on_host=_of(schedule.name, device) is not None,
                )
                for schedule in schedules
            }
            averages = list(self._averages.values())
            self._updates = Updates(averages, self._shards, buffers=buffers)
        self._check_built_alike()
        self._shards.check_replicas("building an Averager")
        if self._comm.size > 1 and self._comm.rank == 0 and self._shards.has_unknown_replicas:
            logger.warning(
                "the model has plain parameters outside DDP: every rank keeps their averages "
                "whole. Pass replicas= the group of ranks that hold the same ones to divide them"
            )
        self._warn_of_batchnorm(buffers)
        self._updates.run([each for each in averages if each.schedule.starts_at_once])

    @property
    def names(self) -> tuple[str, ...]:
        """The averages' names, in the order in which they were given."""
        return tuple(self._averages)

    def __getitem__(self, name: str) -> Average:
        """One average: its `rule`, `num_updates`, `nbytes` and this rank's `shards()`."""
        return self._named(name)

    @property
    def step_count(self) -> int:
        """Optimizer steps seen, those before a resume included."""
        return self._position.steps

    def attach(self, *optimizers: Optimizer) -> RemovableHandle:
        """Count every step of these optimizers that changed the weights, as `step` does.

        On an accelerator the updates run beside training, if these optimizers have all of the
        model's trainable parameters and nothing else writes to the weights between their steps.

        Steps that GradScaler skips do not count. (PyTorch's `get_state_dict` takes a step with a
        learning rate of 0 on an optimizer that has no state yet, and that one does count, except
        inside `also=`: attach afterwards.) Several optimizers, of one call or of several,
        count as one step once each of them has stepped. Wrappers with an `.optimizer`, such as
        accelerate's, are seen through.

        Returns:
            A handle whose `remove()` detaches them.

        Raises:
            ConfigError: Not an optimizer; one that is attached already, or has parameters of one
                that is (detach the old one when an optimizer is rebuilt); one of another model.
        """
        return self._hooks.attach(optimizers, self._shards.parameters())

    def step(self) -> None:
        """One optimizer step has passed: update the averages that are due. No communication.

        The update is queued on the current stream.

        Raises:
            StateError: An average is applied at the moment; or a CUDA graph is being captured.
            ModelMismatch: A tensor was removed from the model, or has another shape.
        """
        self._step(beside=False)

    def _step_beside(self) -> None:
        modules = self._shards.modules
        registered = (p for module in modules for p in module.parameters(recurse=False))
        self._step(beside=self._hooks.cover(registered))

    def _step(self, *, beside: bool) -> None:
        self._check_idle("step()")
        self._updates.refuse_capture()
        before, after = self._position, self._clock.after_step(self._position)
        due = [a for a in self._averages.values() if a.schedule.due(before, after)]
        if due:
            self._look()
            self._updates.run(due, beside=beside)
        self._position = after

    def update(self, name: str | None = None) -> None:
        """Update an average now, whatever its schedule says. No communication.

        Raises:
            StateError: An average is applied at the moment.
        """
        average = self._named(name)
        self._check_idle("update()")
        self._look()
        self._updates.run([average])

    def is_started(self, name: str | None = None) -> bool:
        """Whether weights after the last step can be a sample of an average, by its `start`.

        The moment from which `ThenSWALR` anneals. The same on every rank.
        """
        return self._named(name).schedule.is_started(self._position)

    def is_over(self, name: str | None = None) -> bool:
        """Whether an average's `end` is reached, so that no step updates it any more.

        The moment for `copy_to()`, where the average is to become the live weights while training
        goes on, as after Composer's `swa_end`. The same on every rank.
        """
        return self._named(name).schedule.is_over(self._position)

    def synchronize(self) -> None:
        """Wait for updates still under way, before weights are edited by hand.

        On an accelerator the update of an attached optimizer's step may read the weights until the
        optimizer's next one: what else writes to them in between, by hand or `load_state_dict`,
        comes after this, and so does reading shards that were taken before. On the CPU updates
        are done when the step returns, but for averages in host memory, which this waits for, too.

        Raises:
            StateError: An update in host memory has failed.
        """
        self._updates.join()
        for device in {shard.tensor.device for shard in self._shards.owned} - {_CPU}:
            torch.accelerator.synchronize(device)

    def applied(self, name: str | None = None) -> AbstractContextManager[None]:
        """A context with the average in place of the live weights. Collective at both ends.

        Afterwards the live weights, buffers, modes and RNG states are bit for bit as before,
        also when the body raises. (RNG states: PyTorch's, of the CPU and of the weights' devices.)
        Before an average's first update the live weights stay in place. BatchNorm statistics of the
        average's own, if `recalibrate_batchnorm` gave it some, come with it.

        Extra memory: the buffers, at most 64 MiB of temporaries, and a copy of the live weights
        that this rank owns where the average has another dtype.

        Raises:
            StateError: An average is applied already; or, at the end, a weight was written to.
            ReplicaMismatch: Replicas differ, so that one rank's weights could not be restored.
            RankError: A rank was lost, or another rank's body raised.
        """
        average = self._named(name)
        self._warn_of_old_statistics(average)
        return self._applied(average)

    @contextmanager
    def _applied(self, average: Average) -> Iterator[None]:
        doing = f"applied({average.name!r})"
        self._meet(doing, lambda: self._check_idle("applied()"))
        self._check_alike(average.num_updates, doing)
        if average.num_updates == 0 and not average.was_read_early:
            average.was_read_early = True
            if self._comm.rank == 0:
                logger.warning(
                    "average %r has had no update yet: applied() leaves the live weights in place",
                    average.name,
                )
        with applied(average, self._shards, self._comm):
            yield

    def _warn_of_old_statistics(self, average: Average) -> None:
        """Say once if updates were made since an average's statistics were measured."""
        if not average.statistics or average.statistics_at is None or average.is_warned_of:
            return
        if (missed := average.num_updates - average.statistics_at) and self._comm.rank == 0:
            logger.warning(
                "average %r has had %d updates since its BatchNorm statistics were measured: "
                "recalibrate_batchnorm() before applied(), or evaluating(recalibrate=...)",
                average.name,
                missed,
            )
        average.is_warned_of = bool(missed)

    def copy_to(self, module: nn.Module | None = None, name: str | None = None) -> None:
        """Copy an average into another module, or for good into the live model. Collective.

        Args:
            module: A module with the same canonical names and shapes, wrapped in any way that an
                Averager accepts; it gets the tensors that the average does not hold from the
                live model. None: the live model itself.
            name: Which average.

        Nothing is communicated where each rank holds what its part of the target needs, but for a
        vote if the average lies in host memory.

        Raises:
            ModelMismatch: Another module's names or shapes.
            StateError: The live model is the target and an average is applied.
        """
        average = self._named(name)
        if module is None:
            if self._shards.is_divided:
                self._meet("copy_to()", lambda: self._check_idle("copy_to()"))
                self._check_alike(average.num_updates, "copy_to()")
                self._shards.check_replicas("copy_to()")
            else:
                self._check_idle("copy_to()")
                self._follow()
            make_permanent(average, self._shards)
        else:
            self._check_usable()
            if not self._shards.is_unchanged:
                self._follow()
            is_shared = self._shards.is_divided or self._shards.has_stages or average.on_host
            with self._comm.together("copy_to()") if is_shared else nullcontext():
                self._updates.join()
                other = Wrapped(module)
                other.reshard()
                located = [other.locate(each, self._comm.ranks) for each in other.named_tensors()]
                target = {tensor.fqn: tensor for tensor in located}
            other.break_graphs()
            copy_into(average, self._shards, target, self._comm)
            other.face = Face(None)

    def full_state_dict(
        self, name: str | None = None, *, all_ranks: bool = False
    ) -> dict[str, Tensor]:
        """Whole tensors of an average in host memory, as `model.state_dict()`. Collective.

        Includes buffers, frozen parameters and tied names. Rank 0's dict is filled, the others'
        are empty unless `all_ranks`.
        """
        tensors = self.iter_full_tensors(name, all_ranks=all_ranks)
        return {fqn: tensor for fqn, tensor in tensors if tensor is not None}

    def iter_full_tensors(
        self, name: str | None = None, *, all_ranks: bool = False
    ) -> Iterator[tuple[str, Tensor | None]]:
        """The same one tensor at a time, so that no rank holds a whole model. Collective.

        Every rank must run the iterator to its end, all of it inside or outside `applied()`.

        Yields:
            Canonical name, and the tensor on rank 0 (with `all_ranks` on all), None elsewhere.
        """
        return self._iter_full_tensors(self._named(name), all_ranks=all_ranks)

    def _iter_full_tensors(
        self, average: Average, *, all_ranks: bool
    ) -> Iterator[tuple[str, Tensor | None]]:
        self._meet(f"gathering the average {average.name!r}", self._check_usable)
        yield from iter_whole_tensors(average, self._shards, self._comm, all_ranks=all_ranks)

    def recalibrate_batchnorm(
        self,
        batches: Iterable[Any],
        name: str | None = None,
        *,
        forward: Forward | None = None,
        max_batches: int | None = None,
        estimator: str = "pooled",
        frozen: bool = False,
    ) -> None:
        """Give an average BatchNorm statistics of its own, of all ranks' batches. Collective.

        As `distavg.recalibrate_batchnorm`, with the average in place of the live weights; all of
        which, their statistics included, are as before afterwards. From then on the statistics
        belong to the average: `applied`, `copy_to`, whole tensors and exports have them, `save`
        keeps them, and the next recalibration replaces them. Updates do not: `applied` warns if
        some were made since. Before the average's first update nothing is done.

        Args:
            batches: This rank's batches.
            name: Which average.
            forward: See `distavg.recalibrate_batchnorm`, as all the following.
            max_batches: How many batches each rank takes at most.
            estimator: `"pooled"` or `"per_batch"`.
            frozen: Whether layers without a parameter that requires a gradient are included.

        Raises:
            ConfigError: No rank has a batch, or there is nothing to recalibrate.
            DistavgError: A rank's batches or forward raised; its own exception is raised there.
        """
        average = self._named(name)
        with self._applied(average):
            if average.num_updates == 0:  # it reads as the live weights, whose statistics are live
                return
            found = measure_batchnorm(
                self._shards.model,
                batches,
                self._comm,
                applied=average.name,
                forward=forward,
                max_batches=max_batches,
                estimator=estimator,
                frozen=frozen,
            )
        keep_statistics(average, self._shards, found)

    @contextmanager
    def evaluating(
        self,
        name: str | None = None,
        *,
        recalibrate: Iterable[Any] | None = None,
        forward: Forward | None = None,
        max_batches: int | None = None,
        estimator: str = "pooled",
        frozen: bool = False,
    ) -> Iterator[None]:
        """A context with an average in place of the live weights, in evaluation mode. Collective.

        What a validation needs in one line: BatchNorm statistics of the average's own, if updates
        were made since they were measured; then `applied` and evaluation mode; and everything as
        before afterwards.

        Args:
            name: Which average.
            recalibrate: This rank's batches for `recalibrate_batchnorm`, which may be none; None on
                every rank to leave the statistics alone, as for models without BatchNorm.
            forward: See `recalibrate_batchnorm`, as all the following.
            max_batches: How many batches each rank takes at most.
            estimator: `"pooled"` or `"per_batch"`.
            frozen: Whether layers without a parameter that requires a gradient are included.

        Raises:
            ConfigError: `recalibrate` is None on some ranks only.
            DistavgError: What `recalibrate_batchnorm` or `applied` raises.
        """
        average = self._named(name)
        is_wanted = recalibrate is not None and average.statistics_at != average.num_updates
        if len(set(self._comm.gather((recalibrate is None, is_wanted), "evaluating()"))) > 1:
            raise ConfigError(
                "evaluating(): recalibrate= is None on some ranks only, or updates differ: a rank "
                "without batches passes an empty list"
            )
        if recalibrate is not None and is_wanted:
            self.recalibrate_batchnorm(
                recalibrate,
                average.name,
                forward=forward,
                max_batches=max_batches,
                estimator=estimator,
                frozen=frozen,
            )
        with self.applied(average.name):
            for module in self._shards.modules:
                module.training = False
            yield

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        block: bool = True,
        overwrite: bool = False,
        keep: int | None = None,
        also: Also | None = None,
    ) -> SaveHandle:
        """Write a checkpoint of the averages; each rank writes its own shards. Collective.

        The checkpoint becomes visible in one rename, whole, when everything of it is on the
        disk. Inside `applied()` it saves the average all the same.

        Args:
            path: A folder of its own, on a file system that all ranks share.
            block: Whether to return when it is committed. Otherwise at once after `also` and a copy
                of this rank's shards to host memory; the rest happens in a thread. One save is
                under way at a time: the next `save` or `load` waits for it, and raises what it
                failed with on every rank, unless all have heard it from `wait()`. Call `wait()`
                on the last one, before `destroy_process_group()`.
            overwrite: Replace the checkpoint at `path`; it stays whole until the new one is.
            keep: Afterwards remove all but this many newest checkpoints of this run (the same
                averager, over resumes) in the parent folder; never the one that it was loaded from.
            also: `also(folder)` is called on every rank before the commit, to write model and
                optimizer; `load(also=)` hands the folder back.

        Raises:
            CheckpointExists: There is something at `path`.
            CheckpointError: Anything failed on any rank; nothing is left behind.
            ReplicaMismatch: Averages that ranks hold whole differ.
            StateError: `also` inside `applied()`: it would take the average for the model.
        """
        self._finish_saving()
        doing = f"saving to {path}"
        self._meet(doing, lambda: self._check_save(keep=keep, also=also))
        averages = list(self._averages.values())
        self._check_alike((self._position.steps, *(a.num_updates for a in averages)), doing)
        if self._shards.is_divided and not self._applied_name():
            self._shards.check_replicas(doing)
        check_copies(averages, self._shards, self._comm, doing)
        request = SaveRequest(
            Path(path).absolute(),
            self._id,
            self._position.steps,
            self._position.epochs,
            overwrite=overwrite,
            keep=keep,
            also=None if also is None else self._hooks.paused(also),
            spared=self._loaded,
        )
        contents = [Contents.of(average, self._shards, copy=not block) for average in averages]
        if block:
            Save(request, contents, self._comm).finish()
            return SaveHandle(Path(path))
        self._saving = in_background(Path(path), request, contents, self._comm.for_a_thread())
        return self._saving

    def _finish_saving(self) -> None:
        """Wait for a save in the background. Raise what it ended with, unless every rank knows."""
        saving = self._saving
        if saving is None:
            return
        saving.join()
        self._saving = None
        if isinstance(saving.error, RankError):  # with a rank that was lost there is no vote
            raise saving.error
        with self._comm.together(f"saving to {saving.path} in the background"):
            if saving.error is not None and not saving.is_reported:
                raise saving.error

    def load(
        self,
        path: str | os.PathLike[str] | None,
        *,
        names: Mapping[str, str] | None = None,
        missing: str = "error",
        rules: str = "error",
        cast: bool = False,
        verify: bool = True,
        also: Also | None = None,
    ) -> None:
        """Read a checkpoint, saved on any world size and layout. Collective.

        Averages, their counters and the clock are read; the live weights are never touched.
        Everything that can be checked is checked before anything changes.

        Args:
            path: The checkpoint.
            names: Saved name -> name here, for averages that were renamed.
            missing: What becomes of an average here that was not saved: `"error"`, or
                `"from_model"`: it starts from the live weights.
            rules: Where the saved rule differs: `"error"`, or go on with the `"current"` or the
                `"saved"` one.
            cast: Convert from another dtype.
            verify: Compare the data's checksums while reading.
            also: `also(folder)` is called on every rank with the folder that `save(also=)` wrote,
                after all checks and before the averages are read. Attached optimizers' steps do
                not count meanwhile (PyTorch's `get_state_dict` takes one).

        Raises:
            CheckpointNotFound: There is no committed checkpoint.
            CheckpointCorrupt: A file is missing, torn, foreign or spoiled. Where that shows only
                while data is read, the averager refuses everything but another load.
            CheckpointMismatch: Other names, shapes, dtypes or rules.
            StateError: An average is applied at the moment.
        """
        self._finish_saving()
        with suppress(StateError):  # an update that failed: what it spoiled is read anew
            self._updates.join()
        averages = list(self._averages.values())
        doing = f"loading {path}"
        self._meet(doing, lambda: self._check_load(path))
        with planned_load(
            Path(str(path)),
            averages,
            self._shards,
            self._comm,
            self._clock,
            names=names,
            missing=missing,
            rules=rules,
            cast=cast,
            verify=verify,
            also=None if also is None else self._hooks.paused(also),
        ) as plan:
            self._broken = (
                f"{doing} failed half-way, so the averages hold a mixture of old and new values: "
                "load a good checkpoint first"
            )
            with self._comm.together(doing):
                plan.read(averages, verify=verify)
        plan.settle(averages)
        self._position = Position(plan.manifest.steps, plan.manifest.epochs)
        self._id, self._loaded = plan.manifest.averager_id, plan.manifest.save_id
        self._broken = None

    def export(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Write an average as whole tensors in safetensors files, with an index. Collective.

        As `transformers` reads a model, and where it is one file `safetensors.torch.load_model`; of
        tied names the first is written. What the average does not hold comes from the model:
        buffers, frozen parameters, and the configuration of a model of transformers. Each rank
        writes its part, and no rank holds a tensor whole. The folder appears when it is complete.

        Args:
            path: A folder that does not exist yet, on a file system that all ranks share.
            name: Which average.
            dtype: What floating tensors are converted to, such as `"bf16"`; None to keep theirs.
            max_shard_size: The largest file, unless one tensor is larger: `"5GB"` or bytes.

        Raises:
            CheckpointExists: There is something at `path`.
            CheckpointError: Anything failed on any rank; nothing is left behind.
            ConfigError: A dtype or a size that cannot be.
        """
        doing = f"exporting to {path}"
        with self._comm.together(doing):
            average = self._named(name)
            wanted, nbytes = export_dtype(dtype), parse_size(max_shard_size)
        arguments = (average.name, str(wanted), nbytes)
        if len(given := set(self._comm.gather(arguments, doing))) > 1:
            raise ConfigError(f"{doing}: the ranks were given other arguments: {sorted(given)}")
        self._meet(doing, self._check_usable)
        self._check_alike(average.num_updates, doing)
        check_copies([average], self._shards, self._comm, doing)
        export_average(
            average, self._shards, self._comm, Path(path), dtype=wanted, max_shard_bytes=nbytes
        )

    def state_dict(self) -> "OrderedDict[str, Any]":
        """Live references to the averages, for `torch.distributed.checkpoint`. Not collective.

        `dcp.save({"averager": averager})` and `dcp.load` of it reshard like a model's state, and
        so does `dcp.async_save` over a process group of its own. A copy made with `torch.save` can
        be loaded only by the rank that made it. PyTorch's `HuggingFaceStorageWriter` keeps one
        rectangle of a tensor for each rank: not for FSDP1, nor where replicas divide tensors of
        three dims or more; `save` writes safetensors of all of them.
        """
        self._check_usable()
        self._follow_if_needed()
        return state(list(self._averages.values()), self._shards, self._comm, self._position)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, after DCP filled it, or a copy of it.

        Raises:
            CheckpointMismatch: Something is missing, or it is a copy of another rank's.
            StateError: An average is applied at the moment.
        """
        if inside := self._applied_name():
            raise StateError(f"load_state_dict() inside applied({inside!r}): load after it")
        self._follow_if_needed()
        self._position = load_state(state_dict, list(self._averages.values()), self._shards)

    def metrics(self, *, distance: bool = False) -> dict[str, float]:
        """Counters, weights and bytes on this rank, by `<average>/<metric>`.

        `offload_waits`: how many updates in host memory found both copies of the live weights in
        use, so that training waited; if it grows, the host is slower than the update interval.

        Args:
            distance: Also the Euclidean distance between the average and the live weights, over
                all ranks, and that relative to the live weights' norm. Collective: one
                all-gather of two numbers per average.
        """
        self._check_usable()
        self._follow_if_needed()
        metrics: dict[str, float] = {"step_count": self.step_count}
        for name, average in self._averages.items():
            metrics[f"{name}/num_updates"] = average.num_updates
            metrics[f"{name}/next_weight"] = average.weight
            metrics[f"{name}/bytes"] = average.nbytes
            if average.on_host:
                metrics["offload_waits"] = self._updates.num_waits
            if distance:
                with self._comm.together("metrics(distance=True)") as vote:
                    self._check_idle("metrics(distance=True)")
                    vote.answer = squared_distance(average, self._shards)
                apart, norm = (sum(column) ** 0.5 for column in zip(*vote.answers, strict=True))
                metrics[f"{name}/distance"] = apart
                metrics[f"{name}/relative_distance"] = apart / norm if norm else 0.0
        return metrics

    def _check_save(self, *, keep: int | None, also: Also | None) -> None:
        self._check_usable()
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ConfigError(f"save: keep={keep!r} is not a number of checkpoints, at least 1")
        if also is not None and (inside := self._applied_name()):
            raise StateError(
                f"save(also=...) inside applied({inside!r}) would save the average as the model's "
                "weights: save after the context"
            )

    def _check_load(self, path: object) -> None:
        if inside := self._applied_name():
            raise StateError(f"load() inside applied({inside!r}): load after the context")
        if path is None:
            raise ConfigError("load: path is None: latest() found no checkpoint")

    def _named(self, name: str | None) -> Average:
        if name is None and len(self._averages) == 1:
            return next(iter(self._averages.values()))
        if name not in self._averages:
            what = "several averages: name one of" if name is None else f"no average {name!r}, only"
            raise ConfigError(f"there are {what} {list(self._averages)}")
        return self._averages[name]

    def _warn_of_batchnorm(self, buffers: str) -> None:
        """Say if nothing is left of the run to bring BatchNorm statistics up to an average."""
        late = [each.name for each in self._averages.values() if each.schedule.ends_in_last_epoch]
        if late and buffers == "live" and self._comm.rank == 0 and self._shards.has_batchnorm:
            logger.warning(
                "the average %r ends in the last epoch of a model with BatchNorm: if it becomes "
                "the live weights there, no training is left that would fit the running statistics "
                "to it. End it an epoch earlier, or keep statistics with buffers='averaged'",
                late[0],
            )

    def _applied_name(self) -> str | None:
        return next((a.name for a in self._averages.values() if a.is_applied), None)

    def _check_built_alike(self) -> None:
        """Find ranks whose arguments or models differ. Collective: one small all-gather."""
        doing = "building an Averager"
        mine = {
            "the rules": [(n, a.rule.record()) for n, a in self._averages.items()],
            "the clock": self._clock,
            "the dtypes": [sorted(average.dtypes.items()) for average in self._averages.values()],
        }
        digests = {
            what: xxhash.xxh3_128_hexdigest(repr(value).encode()) for what, value in mine.items()
        }
        for rank, theirs in zip(self._comm.ranks, self._comm.gather(digests, doing), strict=True):
            for what, digest in theirs.items():
                if digest != digests[what]:
                    raise ConfigError(
                        f"{doing}: {what} on rank {rank} are not those of rank "
                        f"{self._comm.ranks[self._comm.rank]}: {mine[what]!s:.200}. Build it alike "
                        "on every rank"
                    )

    def _follow(self) -> None:
        """Take up what has changed in the model, or say why that cannot be. Not collective."""
        inside = self._applied_name()
        self._is_behind |= self._shards.follow(thaw=inside is None)
        if self._is_behind:
            if inside:
                self._shards.lost = (
                    f"weights moved to other storage inside applied({inside!r}) (model.to(), or "
                    "load_state_dict(assign=True)?), so the live ones cannot be put back. Resume "
                    "from a checkpoint"
                )
                raise StateError(self._shards.lost)
            self._updates.follow(self._shards)
            self._is_behind = False

    def _look(self) -> None:
        """The same before an update, after a look that costs little. Not collective."""
        if self._is_behind or not self._shards.is_current:
            self._follow()

    def _follow_if_needed(self) -> None:
        """The same, be it inside `applied()`. Not collective."""
        if not self._applied_name():
            self._look()
        elif self._is_behind or not self._shards.has_same_storage:
            self._follow()

    def _meet(self, doing: str, check: Callable[[], object]) -> None:
        """What a collective method begins with: every rank checks and follows. Collective."""
        if self._shards.lost:  # with a rank that was lost there can be no collective
            raise StateError(self._shards.lost)
        with self._comm.together(doing) as vote:
            check()
            self._updates.join()
            self._follow()
            vote.answer = self._shards.digest
        self._shards.catalogue_everywhere(vote.answers)
        for average in self._averages.values():
            average.learn_dtypes(self._shards)

    def _check_alike(self, value: object, doing: str) -> None:
        """Find ranks that have come apart in counters. Collective: one all-gather."""
        values = self._comm.gather(value, doing)
        if differing := [
            r for r, v in zip(self._comm.ranks, values, strict=True) if v != values[0]
        ]:
            raise StateError(
                f"{doing}: ranks {differing} have made other updates or steps than rank "
                f"{self._comm.ranks[0]} ({values}): every rank must step and update alike"
            )

    def _check_usable(self) -> None:
        damages = (average.damaged for average in self._averages.values())
        if problem := next(filter(None, (self._broken, self._shards.lost, *damages)), None):
            raise StateError(problem)
        face = self._shards.face
        if self._applied_name() is None and face is not None and face.average is not None:
            raise StateError(
                f"the model's live weights are the average {face.average!r} of another Averager at "
                "present: leave its applied() first"
            )

    def _check_idle(self, call: str) -> None:
        self._check_usable()
        if inside := self._applied_name():
            raise StateError(
                f"{call} inside applied({inside!r}): the live weights are the average's there, "
                "and would be averaged, or lost, at the end of the context"
            )


def _of(name: str, given: Any) -> Any:
    """An option of one average, of one for all or of a mapping by name."""
    return given.get(name) if isinstance(given, Mapping) else given


def _check_arguments(
    rules: Mapping[str, Rule], *, clock: object, dtype: object, device: object, buffers: str
) -> None:
    if not isinstance(rules, Mapping) or not rules:
        raise ConfigError(f"Averager: {rules!r} is not a rule, nor a mapping of names to rules")
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            raise ConfigError(f"average {name!r}: {rule!r} is not a rule such as EMA() or SWA()")
        if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise ConfigError(f"average {name!r}: a name is letters, digits, '_', '-' and '.'")
    for option, given in (("dtype", dtype), ("device", device)):
        if isinstance(given, Mapping) and (unknown := set(given) - set(rules)):
            raise ConfigError(
                f"Averager: {option} names {sorted(unknown)}, the averages {list(rules)}"
            )
    for each in dtype.values() if isinstance(dtype, Mapping) else [dtype]:
        if each is not None and not isinstance(each, torch.dtype):
            raise ConfigError(f"Averager: dtype={each!r} is not a torch.dtype")
    if clock is not None and not isinstance(clock, Clock):
        raise ConfigError(f"Averager: clock={clock!r} is not a Clock")
    for each in device.values() if isinstance(device, Mapping) else [device]:
        if each is not None and str(each) != "cpu":
            raise UnsupportedError(
                f"Averager: device={each!r}: averages lie beside the parameters (None) or in host "
                "memory ('cpu')"
            )
    if buffers not in ("live", "copied", "averaged"):
        raise ConfigError(f"Averager: buffers={buffers!r} is not 'live', 'copied' or 'averaged'")
