"""Averages from files of other systems, written as checkpoints of distavg. One process.

Recognised, by what the file holds: the state of PyTorch's `AveragedModel`, alone or anywhere in a
checkpoint; Composer's SWA (which holds one) and EMA; the `-EMA` checkpoint of NeMo; checkpoints of
Lightning's `WeightAveraging`. Files are read with `weights_only=True`, so nothing in them runs.
"""

import itertools
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from distavg.checkpoint.manifest import FOLDER_PATTERN, ITEM_BYTES, SavedTensor
from distavg.checkpoint.save import Contents, Save, SaveRequest
from distavg.comm import Comm
from distavg.errors import CheckpointCorrupt, CheckpointNotFound, ConfigError, UnsupportedError
from distavg.foreach import as_bytes
from distavg.layout import Box
from distavg.names import WRAPPER_LEVELS
from distavg.rules import Imported
from distavg.tensors import Shard

__all__ = [
    "ForeignAverage",
    "composers_ema_state",
    "composers_swa_state",
    "read_foreign",
    "write_foreign",
]


@dataclass(frozen=True, slots=True)
class ForeignAverage:
    """An average of another system.

    Attributes:
        source: Which system's, and what its file says of the rule.
        name: What to call the average.
        tensors: By the model's names.
        num_updates: Updates made.
        steps: Optimizer steps done; None if the file does not say.
        epochs: Epochs done; None if the file does not say.
    """

    source: str
    name: str
    tensors: dict[str, Tensor]
    num_updates: int
    steps: int | None = None
    epochs: Fraction | None = None


def read_foreign(
    path: Path, *, place: str | None = None, prefix: str | None = None
) -> ForeignAverage:
    """Find the average in a file that `torch.save` wrote.

    Args:
        path: The file.
        place: Which average of several, as the error that lists them says.
        prefix: What stands before the model's own names; None for every `module.` that stands
            before all of them.

    Raises:
        CheckpointNotFound: No file.
        CheckpointCorrupt: Not what `torch.save` wrote, or torn.
        UnsupportedError: It could only be read by running code of its own, or holds no average
            that is known here, or one without an update.
        ConfigError: It holds several, or none at the place.
    """
    content = _load(path)
    finders = (_composers, _nemos, _lightnings, _averaged_models)
    try:
        found = {key: average for find in finders for key, average in find(content, path)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointCorrupt(f"{path} lacks what its kind of file has: {error!r}") from error
    if not found:
        raise UnsupportedError(
            f"{path} holds nothing that is recognised as an average: the state of an "
            "AveragedModel, or a checkpoint of Composer's SWA or EMA, of Lightning's "
            "WeightAveraging, or of NeMo with -EMA in its name"
        )
    if place is None and len(found) == 1:
        (place,) = found
    if place not in found:
        raise ConfigError(f"{path} holds averages at {sorted(found)}: say which (--place)")
    average = found[place]
    if not average.num_updates:
        raise UnsupportedError(f"{path}: {average.source}: without an update it is no average")
    tensors = {n: t for n, t in average.tensors.items() if not n.endswith("_extra_state")}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
            raise UnsupportedError(f"{path}: {name} is no dense tensor: {tensor!r:.100}")
    return replace(average, tensors=_with_the_models_names(tensors, prefix))


def write_foreign(average: ForeignAverage, path: Path) -> None:
    """Write a checkpoint that `Averager.load` reads with whatever rule it has.

    Raises:
        ConfigError: The average's name cannot be one.
        UnsupportedError: A tensor that cannot be averaged, such as a complex one.
        CheckpointExists: There is something at the path.
        CheckpointError: It cannot be written.
    """
    if not re.fullmatch(FOLDER_PATTERN, average.name):
        raise ConfigError(f"{average.name!r}: a name is letters, digits, '_', '-' and '.'")
    unknown = tuple(what for what in ("steps", "epochs") if getattr(average, what) is None)
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in average.tensors.items():  # what shares memory is tied
        place = (tensor.data_ptr() or name, tensor.dtype, tensor.shape, tensor.stride())
        names.setdefault(place, []).append(name)
    shards, tensors, memory = [], {}, set()
    for first, *aliases in names.values():
        tensor = average.tensors[first].detach()
        if (storage := tensor.untyped_storage().data_ptr()) in memory:
            tensor = tensor.clone()  # another view of what is written already
        memory.add(storage)
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()  # what an Averager holds
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        shards.append(Shard(first, Box.whole(shape), shape, tensor))
        tensors[first] = SavedTensor(first, shape, dtype, tuple(aliases))
        if dtype not in ITEM_BYTES:
            raise UnsupportedError(f"{first}: {dtype} cannot be averaged")
    rule = Imported(source=average.source, unknown=unknown).record()
    contents = Contents(average.name, rule, average.num_updates, None, tensors, tuple(shards))
    request = SaveRequest(
        path,
        uuid.uuid4().hex,
        average.steps or 0,
        average.epochs or Fraction(0),
        overwrite=False,
        keep=None,
        also=None,
        spared=None,
    )
    Save(request, [contents], Comm()).finish()


_Found = Iterator[tuple[str, ForeignAverage]]


def _composers(content: Any, path: Path) -> _Found:
    """Of a checkpoint of Composer: `algorithms` are pairs, or in old ones a mapping."""
    state = content.get("state") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or "algorithms" not in state:
        return
    algorithms = dict(state["algorithms"])
    time = state.get("timestamp", {})
    steps, epochs = _composers_position(time.get("Timestamp", time))
    for name in ("SWA", "EMA"):  # those of distavg.integrations
        if "average" in algorithms.get(name, ()):
            ours = algorithms.pop(name)
            tensors, count = dict(ours["average"]), int(ours["num_updates"])
            source = f"the {name} of distavg in Composer"
            yield name, ForeignAverage(source, name.lower(), tensors, count, steps, epochs)
    if (swa := algorithms.get("SWA")) is not None and swa.get("swa_model") is not None:
        for _, average in _averaged_models(swa["swa_model"], path):
            source = "Composer's SWA"
            count = average.num_updates if swa.get("swa_started") else 0
            yield (
                "SWA",
                replace(average, source=source, num_updates=count, steps=steps, epochs=epochs),
            )
    if (ema := algorithms.get("EMA")) is not None:
        model = ema["ema_model"]
        if "named_parameters_dict" not in model:
            source, tensors = "Composer's EMA before 0.13", model
        elif ema["ema_weights_active"]:
            source = "Composer's EMA, in place of the model (whose weights are in its ema_model)"
            tensors = state["model"]
        else:
            parts = (model["named_parameters_dict"], model["named_buffers_dict"])
            source, tensors = "Composer's EMA", {**parts[0], **parts[1]}
        count = max(1, steps or 0) if ema["ema_started"] else 0
        yield "EMA", ForeignAverage(source, "ema", dict(tensors), count, steps, epochs)


def _composers_position(time: Mapping[str, Any]) -> tuple[int | None, Fraction | None]:
    if not {"batch", "epoch", "batch_in_epoch"} <= time.keys():
        return None, None
    steps, epoch, within = (int(time[key]) for key in ("batch", "epoch", "batch_in_epoch"))
    if not within:
        return steps, Fraction(epoch)
    if not epoch or (steps - within) % epoch:
        return steps, None  # how long an epoch is cannot be told
    return steps, epoch + Fraction(within * epoch, steps - within)


def composers_ema_state(theirs: Mapping[str, Any], model: nn.Module, steps: int) -> dict[str, Any]:
    """A state of Composer's own EMA as that of `distavg.integrations.composer.EMA`.

    Where the average was in place of the model, the training weights go back into the model.

    Args:
        theirs: The state, with whole tensors.
        model: The model as Composer has loaded it.
        steps: Batches done.
    """
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    live = {name.removeprefix("module."): tensor for name, tensor in named}
    apart = theirs["ema_model"]
    if "named_parameters_dict" in apart:  # the one of the two that is not the model
        apart = {**apart["named_parameters_dict"], **apart["named_buffers_dict"]}
    elif theirs["ema_weights_active"]:  # before 0.13
        apart = theirs["training_model"]
    apart = {name.removeprefix("module."): tensor for name, tensor in apart.items()}
    if theirs["ema_weights_active"] and theirs["ema_started"]:
        average = {name: live[name].detach().clone() for name in apart}
        with torch.no_grad():
            for name, tensor in apart.items():
                live[name].copy_(tensor)
        apart = average
    num_updates = max(1, steps) if theirs["ema_started"] else 0
    return {"average": apart, "num_updates": num_updates}


def composers_swa_state(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A state of Composer's own SWA as that of `distavg.integrations.composer.SWA`.

    Raises:
        UnsupportedError: It anneals the learning rate.
    """
    if theirs["swa_scheduler"]:
        raise UnsupportedError(
            "SWA: the learning rate schedule in this state of Composer's own cannot be taken over"
        )
    model = theirs["swa_model"]
    module = {n.removeprefix("module."): t for n, t in model.items() if n != "n_averaged"}
    return {
        "average": {name.removeprefix("module."): tensor for name, tensor in module.items()},
        "num_updates": int(model["n_averaged"]) if theirs["swa_started"] else 0,
        "is_started": theirs["swa_started"],
        "is_completed": theirs["swa_completed"],
        "counter": theirs["step_counter"],
    }


def _nemos(content: Any, path: Path) -> _Found:
    """Of NeMo's `-EMA` file: a Lightning checkpoint with the EMA in place of the model."""
    if not isinstance(content, Mapping) or "state_dict" not in content:
        return
    optimizers = content.get("optimizer_states") or []
    states = [each for each in optimizers if isinstance(each, Mapping) and "ema" in each]
    if not states and not path.stem.endswith("-EMA"):
        return
    model = {n: t for n, t in content["state_dict"].items() if isinstance(t, Tensor)}
    there = {_digest(tensor) for tensor in model.values()}
    if any(_digest(tensor) not in there for state in states for tensor in state["ema"]):
        raise UnsupportedError(
            f"{path}: the model in it is not the EMA, whose tensors are there without names: "
            "convert the file beside it whose name ends in -EMA"
        )
    if not states:
        steps = content.get("global_step")
        yield "state_dict", ForeignAverage("NeMo's EMA", "ema", model, steps or 1, steps)
        return
    steps, every = int(states[0]["current_step"]), int(states[0]["every_n_steps"])
    source = f"NeMo's EMA (decay={states[0]['decay']}, every_n_steps={every})"
    # The weights before the first step, and one update after the steps 1, 1 + every ...
    count = 1 - (-steps // every) if steps else 0
    yield "state_dict", ForeignAverage(source, "ema", model, count, steps)


def _lightnings(content: Any, path: Path) -> _Found:
    """Of Lightning's `WeightAveraging`: the average is the model, and its counter lies apart."""
    state = content.get("averaging_state") if isinstance(content, Mapping) else None
    if isinstance(state, Mapping):
        count, model = int(state["n_averaged"]), dict(content["state_dict"])
        source = "Lightning's WeightAveraging"
        yield "state_dict", ForeignAverage(source, "ema", model, count, int(content["global_step"]))


def _averaged_models(content: Any, path: Path, place: str = "", depth: int = 6) -> _Found:
    """Wherever `n_averaged` stands beside tensors under `module.`."""
    if isinstance(content, Mapping):
        for key in [key for key in content if str(key).rpartition(".")[2] == "n_averaged"]:
            before = str(key).removesuffix("n_averaged")
            inner = f"{before}module."
            tensors = {
                str(name).removeprefix(inner): value
                for name, value in content.items()
                if str(name).startswith(inner)
            }
            count = int(content[key])
            where = ".".join(filter(None, [place, before.rstrip(".")]))
            words = re.split(r"[^a-z]+", f"{path.stem} {where}".lower())
            name = "ema" if "ema" in words else "swa"
            average = ForeignAverage("PyTorch's AveragedModel", name, tensors, count)
            if tensors:
                yield where or "the whole file", average
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping) and "algorithms" not in content:  # those are Composer's
        children = content.items()
    elif isinstance(content, (list, tuple)):
        children = enumerate(content)
    for key, value in children if depth else ():
        if not isinstance(value, Tensor):
            inner_place = ".".join(filter(None, [place, str(key)]))
            yield from _averaged_models(value, path, inner_place, depth - 1)


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    content: Any = as_bytes(tensor.detach().contiguous()).numpy()
    return tensor.dtype, tuple(tensor.shape), xxhash.xxh3_128_digest(content)


def _with_the_models_names(tensors: Mapping[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    """Names without those of wrappers, as far as text can tell."""
    names = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPER_LEVELS)
        for name in tensors
    }
    if prefix is None:
        while names and all(name.startswith("module.") for name in names.values()):
            names = {old: name.removeprefix("module.") for old, name in names.items()}
    elif not any(name.startswith(prefix) for name in names.values()):
        raise ConfigError(f"no name begins with the prefix {prefix!r}: {sorted(names)[:3]} ...")
    else:
        names = {old: name.removeprefix(prefix) for old, name in names.items()}
    if len(set(names.values())) < len(names):
        raise ConfigError("two names are one without their prefix: give another one (--prefix)")
    return {names[old]: tensor for old, tensor in tensors.items()}


def _load(path: Path) -> Any:
    allowed: list[Any] = [timedelta, TorchVersion]  # plain data, in Composer's files
    with suppress(ImportError):
        import numpy as np  # states of its random generator; not a dependency of distavg

        kinds = [type(np.dtype(code)) for code in ("u1", "u4", "u8", "i8", "f4", "f8", "bool")]
        allowed += [np.ndarray, np.dtype, np.empty(0).__reduce__()[0], *kinds]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused in the next moment
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path}: there is no file here") from None
    except Exception as error:  # whatever a spoiled pickle leads to
        refused = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if refused is None:
            raise CheckpointCorrupt(
                f"{path} is not what torch.save writes, or is torn ({type(error).__name__})"
            ) from error
        raise UnsupportedError(
            f"{path} holds {refused[1]}, which could only be rebuilt by running "
            "code that the file names, and that is never done here. Where you trust it, read it "
            "with torch.load(weights_only=False) and save only its tensors and numbers: "
            "torch.save(averaged_model.state_dict(), ...)"
        ) from None
