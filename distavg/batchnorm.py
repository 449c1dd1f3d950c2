"""BatchNorm statistics of new weights: forward passes on every rank, then one set for all.

Every BatchNorm layer normalises with the statistics of the batch before it, as in training and in
PyTorch's `update_bn`, so that later layers see what they would see in training; what is kept is the
mean and variance over all elements of all batches of all ranks, merged as (count, mean, M2) in fp64
(Chan, Golub and LeVeque 1983), where sums of squares would cancel. So the result depends on which
batches there are, and neither on their order nor on which rank has which.
"""

import itertools
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from distavg.average import Average
from distavg.comm import Comm
from distavg.errors import ConfigError, StateError
from distavg.shards import ModelShards
from distavg.swap import undisturbed
from distavg.tensors import LiveTensor
from distavg.wrappers import Model, Wrapped

__all__ = [
    "Forward",
    "Statistics",
    "batchnorm_buffers",
    "keep_statistics",
    "measure_batchnorm",
    "recalibrate_batchnorm",
    "write_statistics",
]

logger = logging.getLogger("distavg")

Forward = Callable[[Any, Any], object]
_END = object()


class Statistics(NamedTuple):
    """What a BatchNorm layer has seen.

    Attributes:
        mean: Of each channel, fp64, on the host.
        var: The same: the variance with Bessel's correction, as layers keep it.
        calls: How often the layer was called with a batch, on all ranks.
    """

    mean: Tensor
    var: Tensor
    calls: int


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    process_group: dist.ProcessGroup | None = None,
    max_batches: int | None = None,
    estimator: str = "pooled",
    frozen: bool = False,
) -> None:
    """Give a model's BatchNorm layers the statistics of these batches on all ranks. Collective.

    Every rank ends with the same bits, whichever ranks have which batches; a rank may have none.
    While the batches run, everything is in evaluation mode, and BatchNorm normalises with each
    batch's own statistics. Modes, other buffers and PyTorch's RNG states are as before afterwards,
    also if a forward raises; then no statistics change. `num_batches_tracked` becomes the number of
    the layer's calls with a batch, on all ranks, and momenta stay. Compiled models run uncompiled.

    Ranks that hold one batch together (tensor parallelism) each count it. A rank that is done waits
    for the others as long as gloo waits. One that raises within a forward that communicates leaves
    the others in it, until the timeout of that forward's process group.

    Communicates two all-reduces of some 8 bytes per channel, over gloo. Where the forward itself
    communicates (FSDP, tensor parallelism), also a record per batch, so that all ranks go through
    as many forwards: one that has no more batches joins in with another, which does not count.

    Args:
        model: Any model, wrapped or not.
        batches: This rank's batches, such as a `DataLoader`, or one in `tqdm`. A tensor is passed
            to the model, of a tuple or list the first element, and a mapping as `**batch`; after
            its tensors were moved to the model's device.
        forward: Called with the model and a moved batch instead.
        process_group: The ranks that hold or replicate the model; None for all.
        max_batches: How many batches each rank takes at most.
        estimator: `"pooled"`: mean and variance over all elements. `"per_batch"`: the mean over
            batches of the batches' means and variances, as `torch.optim.swa_utils.update_bn`
            defines them, whatever the batches' sizes.
        frozen: Whether layers of which no parameter requires a gradient get new statistics, too.

    Raises:
        ConfigError: No rank has a batch, or there is nothing to recalibrate.
        StateError: An average is applied to the model.
        DistavgError: A rank's batches or forward raised; its own exception is raised there.
    """
    found = measure_batchnorm(
        model,
        batches,
        Comm(process_group),
        applied=None,
        forward=forward,
        max_batches=max_batches,
        estimator=estimator,
        frozen=frozen,
    )
    for layer, statistics in found.items():
        write_statistics(layer, statistics)


@torch.no_grad()
def write_statistics(layer: _BatchNorm, statistics: Statistics) -> None:
    """Make these a layer's running statistics."""
    for buffer, value in (
        (layer.running_mean, statistics.mean),
        (layer.running_var, statistics.var),
        (layer.num_batches_tracked, torch.tensor(statistics.calls)),
    ):
        if buffer is not None:
            buffer.copy_(value)


_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def batchnorm_buffers(model_shards: ModelShards) -> list[LiveTensor]:
    """The buffers in which this rank's BatchNorm layers keep statistics."""
    return [
        tensor
        for tensor in model_shards.tensors
        if tensor.named.is_buffer
        and tensor.named.key in _BUFFERS
        and isinstance(tensor.named.owner, _BatchNorm)
    ]


@torch.no_grad()
def keep_statistics(
    average: Average, model_shards: ModelShards, found: Mapping[_BatchNorm, Statistics]
) -> None:
    """Make statistics an average's own. Not collective.

    Buffers that the average holds itself are written to there, and the next update changes them.
    """
    values: dict[str, Tensor] = {}
    for tensor in batchnorm_buffers(model_shards):
        if tensor.named.owner in found:
            mean, var, calls = found[cast(_BatchNorm, tensor.named.owner)]
            known = {"running_mean": mean, "running_var": var}
            values[tensor.fqn] = known.get(tensor.named.key, torch.tensor(calls)).to(tensor.dtype)
    for shard in average.own_shards():
        if shard.fqn in values:
            shard.tensor.copy_(values[shard.fqn][shard.box.slices()])
    # Layers that were not called keep what the average has of them.
    average.statistics |= {f: v for f, v in values.items() if f not in average.dtypes}
    average.statistics_at = average.num_updates
    average.is_warned_of = False


def measure_batchnorm(
    model: Model,
    batches: Iterable[Any],
    comm: Comm,
    *,
    applied: str | None,
    forward: Forward | None,
    max_batches: int | None,
    estimator: str,
    frozen: bool,
) -> dict[_BatchNorm, Statistics]:
    """The statistics that `recalibrate_batchnorm` writes, of all layers called. Collective.

    Args as there; `applied` is the average that the caller has put in place, if any.
    """
    doing = "recalibrating BatchNorm"
    with comm.together(doing) as vote:
        if estimator not in ("pooled", "per_batch"):
            raise ConfigError(f"estimator={estimator!r} is neither 'pooled' nor 'per_batch'")
        if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
            raise ConfigError(f"max_batches={max_batches!r} is not a number of batches")
        if forward is None and not isinstance(model, nn.Module):
            raise ConfigError("a mapping of modules needs forward=, which is called with it")
        wrapped = Wrapped(model)
        face = wrapped.face
        if face is not None and face.average not in (None, applied):
            raise StateError(
                f"inside applied({face.average!r}) the model's statistics are put back at the "
                "end: Averager.recalibrate_batchnorm gives them to the average"
            )
        wrapped.reshard()
        layers = _layers(wrapped, frozen=frozen)
        recorder = _Recorder(layers, is_pooled=estimator == "pooled")
        vote.answer = estimator, [layer.num_features for layer in layers], wrapped.communicates
    if len({repr(answer[:2]) for answer in vote.answers}) > 1:
        raise ConfigError(f"{doing}: estimators or BatchNorm layers are not alike on all ranks")
    devices = {_mean_of(layer).device for layer in layers}
    runner = _Runner(model, forward or _forward, _mean_of(layers[0]).device, recorder)
    taken = _take(batches, max_batches)
    try:
        with undisturbed(wrapped.modules, devices), wrapped.quiet(), recorder.recording():
            for module in wrapped.modules:
                module.training = False
            if any(communicates for _, _, communicates in vote.answers):
                runner.run_in_step(taken, comm, doing)
            else:
                with comm.together(doing):
                    for batch in taken:
                        runner.run(batch)
    finally:
        wrapped.reshard()  # FSDP2 keeps what a forward gathered
    totals = recorder.merge(comm, doing)
    if not any(each.calls for each in totals):
        raise ConfigError(f"{doing}: no rank has a batch")
    idle = [layer for layer, each in zip(layers, totals, strict=True) if not each.calls]
    if idle and comm.rank == 0:
        logger.warning("%d BatchNorm layers were not called, and keep their statistics", len(idle))
    return {layer: each for layer, each in zip(layers, totals, strict=True) if each.calls}


def _take(batches: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """The first batches; nothing happens before the first is asked for, where all ranks listen."""
    yield from itertools.islice(batches, max_batches)


def _layers(wrapped: Wrapped, *, frozen: bool) -> list[_BatchNorm]:
    found = [module for module in wrapped.modules if isinstance(module, _BatchNorm)]
    layers = [layer for layer in found if layer.running_mean is not None]
    if not layers:
        raise ConfigError("the model has no BatchNorm layer with running statistics")
    if any(is_lazy(_mean_of(layer)) for layer in layers):
        raise ConfigError("a lazy BatchNorm layer has no shape yet: run a forward first")
    trainable: dict[nn.Module, bool] = {}
    for named in wrapped.named_tensors():
        if not named.is_buffer:
            known = trainable.get(named.owner, False)
            trainable[named.owner] = known or named.tensor.requires_grad
    chosen = [layer for layer in layers if frozen or trainable.get(layer, True)]
    if not chosen:
        raise ConfigError(
            "no parameter of the model's BatchNorm layers requires a gradient: frozen=True gives "
            "them new statistics all the same"
        )
    return chosen


def _mean_of(layer: _BatchNorm) -> Tensor:
    return cast(Tensor, layer.running_mean)  # `_layers` has seen that it is there


def _forward(model: Any, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _Runner:
    """Runs batches through the model."""

    def __init__(
        self, model: Model, forward: Forward, device: torch.device, recorder: "_Recorder"
    ) -> None:
        self._model = model
        self._forward = forward
        self._device = device
        self._recorder = recorder

    @torch.no_grad()
    def run(self, batch: Any, *, is_counted: bool = True) -> None:
        """One forward."""
        moved = tree_map(
            lambda leaf: (
                leaf.to(self._device, non_blocking=True) if isinstance(leaf, Tensor) else leaf
            ),
            batch,
        )
        self._recorder.is_counting = is_counted
        self._forward(self._model, moved)
        self._recorder.take_up()

    def run_in_step(self, batches: Iterator[Any], comm: Comm, doing: str) -> None:
        """As many forwards on every rank, for models whose forward communicates. Collective.

        A rank without a batch of its own runs its last one again, or the first that another has.
        """
        spare: Any = _END
        error: Exception | None = None
        while True:
            with comm.together(doing) as vote:
                if error is not None:
                    raise error
                batch = next(batches, _END)
                vote.answer = batch is not _END, batch is not _END or spare is not _END
            giver = next((rank for rank, (has, _) in enumerate(vote.answers) if has), None)
            if giver is None:
                return
            if not all(has_some for _, has_some in vote.answers):
                content = b""
                with comm.together(doing):  # what cannot be pickled is every rank's error
                    if comm.rank == giver:
                        content = pickle.dumps(tree_map(_to_host, batch))
                given = pickle.loads(comm.broadcast(content, doing, source=giver))
                spare = given if spare is _END else spare
            is_counted = batch is not _END
            spare = batch if is_counted else spare
            try:
                self.run(spare, is_counted=is_counted)
            except Exception as caught:
                error = caught


def _to_host(leaf: object) -> object:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


class _Recorder:
    """Accumulates what layers see.

    Args:
        layers: The layers.
        is_pooled: Whether all elements weigh alike, or all batches.

    Attributes:
        is_counting: Whether forwards count at present.
    """

    def __init__(self, layers: Sequence[_BatchNorm], *, is_pooled: bool) -> None:
        self.is_counting = True
        self._layers = layers
        self._is_pooled = is_pooled
        self._dtypes = [_mean_of(layer).dtype for layer in layers]
        self._counts = [0] * len(layers)
        self._calls = [0] * len(layers)
        self._means, self._spreads = (
            [torch.zeros_like(_mean_of(layer), dtype=torch.float64) for layer in layers]
            for _ in range(2)
        )
        self._seen: dict[int, tuple[int, Tensor, Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Layers in evaluation mode normalise with each batch's own statistics, which are noted."""

        def hook_of(index: int) -> Callable[..., None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                self._look(index, args[0] if args else next(iter(kwargs.values())))

            return hook

        handles = [
            layer.register_forward_pre_hook(hook_of(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, index: int, batch: Tensor) -> None:
        if not batch.numel():
            return
        batch = batch.detach()  # `forward` may have turned gradients on
        layer, dtype = self._layers[index], self._dtypes[index]
        mean, var = _moments(batch if batch.dtype.itemsize > 2 else batch.float())
        layer._buffers["running_mean"] = mean.to(dtype)
        layer._buffers["running_var"] = var.to(dtype)
        if self.is_counting:
            if index in self._seen:  # a layer that is used twice in a forward
                self.take_up()
            self._seen[index] = batch.numel() // batch.shape[1], mean, var

    def take_up(self) -> None:
        """Merge what was noted since the last call, all layers at once, in fp64."""
        if not self._seen:
            return
        means = [self._means[index] for index in self._seen]
        spreads = [self._spreads[index] for index in self._seen]
        counts = [count for count, _, _ in self._seen.values()]
        batch_means, batch_vars = ([torch.empty_like(each) for each in means] for _ in range(2))
        torch._foreach_copy_(batch_means, [mean for _, mean, _ in self._seen.values()])
        torch._foreach_copy_(batch_vars, [var for _, _, var in self._seen.values()])
        if self._is_pooled:
            known = [self._counts[index] for index in self._seen]
            _pool(means, spreads, known, batch_means, batch_vars, counts)
        elif 1 in counts:
            raise ConfigError(
                "estimator='per_batch': a batch has one value per channel, which has no variance: "
                "estimator='pooled' counts it"
            )
        else:
            torch._foreach_mul_(batch_vars, [count / (count - 1) for count in counts])
            torch._foreach_add_(spreads, batch_vars)
            torch._foreach_add_(means, batch_means)
        for index, count in zip(self._seen, counts, strict=True):
            self._counts[index] += count
            self._calls[index] += 1
        self._seen.clear()

    def merge(self, comm: Comm, doing: str) -> list[Statistics]:
        """Each layer's statistics over all ranks; the same bits on all. Collective.

        All-reduces: the sums, and for pooled statistics then the squares around their means.
        """
        sizes = [len(mean) for mean in self._means]
        mine = torch.cat([mean.cpu() for mean in self._means])
        spread = torch.cat([each.cpu() for each in self._spreads])
        numbers = torch.tensor([self._counts, self._calls], dtype=torch.float64)
        count = _per_channel(numbers[0], sizes)
        sums = torch.cat([numbers.view(-1), mine * count if self._is_pooled else mine])
        if not self._is_pooled:
            sums = torch.cat([sums, spread])
        comm.add_up(sums, doing)
        numbers, sums = sums[: numbers.numel()].view(2, -1), sums[numbers.numel() :]
        calls = [int(each) for each in numbers[1]]
        if self._is_pooled:
            total = _per_channel(numbers[0], sizes)
            mean = sums / total.clamp(min=1)
            spread += count * (mine - mean).square()
            comm.add_up(spread, doing)
            var = spread / (total - 1).clamp(min=1)
        else:
            total = _per_channel(numbers[1], sizes).clamp(min=1)
            mean, var = (each / total for each in sums.view(2, -1))
        return [
            Statistics(*each)
            for each in zip(torch.split(mean, sizes), torch.split(var, sizes), calls, strict=True)
        ]


def _pool(
    means: list[Tensor],
    spreads: list[Tensor],
    known: list[int],
    batch_means: list[Tensor],
    batch_vars: list[Tensor],
    counts: list[int],
) -> None:
    """Merge (known, means, spreads), of each layer, with a batch's, in place; spreads are M2.

    With d the distance of the means, M2 += var * n + d^2 * N n / (N + n), mean += d * n / (N + n).
    """
    pairs = list(zip(known, counts, strict=True))
    torch._foreach_sub_(batch_means, means)
    squares = torch._foreach_mul(batch_means, batch_means)
    torch._foreach_mul_(squares, [a * b / (a + b) for a, b in pairs])
    torch._foreach_add_(spreads, squares)
    torch._foreach_mul_(batch_vars, [float(count) for count in counts])
    torch._foreach_add_(spreads, batch_vars)
    torch._foreach_mul_(batch_means, [b / (a + b) for a, b in pairs])
    torch._foreach_add_(means, batch_means)


def _per_channel(numbers: Tensor, sizes: Sequence[int]) -> Tensor:
    return numbers.repeat_interleave(torch.tensor(sizes))


def _moments(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in the dtype of the batch, without cancellation."""
    if batch.device.type in ("cpu", "cuda"):  # what BatchNorm itself computes in training
        mean, var = torch.batch_norm_update_stats(batch, None, None, 0.0)
        return mean, var
    dims = [dim for dim in range(batch.dim()) if dim != 1]
    var, mean = torch.var_mean(batch, dims, correction=0)
    return mean, var
