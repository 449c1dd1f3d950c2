"""What several tests share: an oracle made of PyTorch's own AveragedModel, and exact comparisons.

Comparisons are of bits, not of values, so that NaN equals itself and -0.0 is not 0.0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import (
    FURTHER_SIZES,
    Awkward,
    TokenModel,
    Uneven,
    batch,
    build,
    flat_parameters,
    reshard,
    set_weights,
    unwrapped,
    weights_at,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import distavg
from distavg.checkpoint.manifest import read_manifest
from distavg.checkpoint.records import SavedFile, read_records

# Where each layout is tested, and the model that it allows.
SIZES = {
    "plain": (1, 2),
    "ddp": (1, 2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "fsdp2-keep": (2, 3),
    **FURTHER_SIZES,
}
CASES = [(layout, size) for layout, sizes in SIZES.items() for size in sizes]

# Each layout once, on two ranks where it can.
ONCE = [(layout, max(sizes, key=lambda size: (size <= 2, size))) for layout, sizes in SIZES.items()]

# One of each kind.
FEW = [
    case
    for case in ONCE
    if case[0] in ("plain", "ddp", "fsdp2", "fsdp2-keep", "fsdp1-grad-op", "fsdp1-flat", "tp-fsdp2")
]

RULES = {"ema": distavg.EMA(0.9), "swa": distavg.SWA(update_interval="1ba")}
MULTI_AVG_FNS = {"ema": get_ema_multi_avg_fn(0.9), "swa": get_swa_multi_avg_fn()}


def error_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The type and text of what a call raises; "nothing" where it returns."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def timed_error_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> tuple[str, float]:
    """The same, and the seconds that it took."""
    start = time.monotonic()
    return error_of(call, *args, **kwargs), time.monotonic() - start


def torch_average(cls: type[TokenModel], rule: str, steps: Iterable[int]) -> dict[str, Tensor]:
    """The state dict of AveragedModel on a plain model that takes the weights of these steps.

    `rule` is a key of RULES.
    """
    model = build("plain", cls)
    averaged = AveragedModel(model, multi_avg_fn=MULTI_AVG_FNS[rule])
    for step in steps:
        set_weights(model, weights_at(model, step))
        averaged.update_parameters(model)
    state: dict[str, Tensor] = averaged.module.state_dict()
    return state


def feed(averager: distavg.Averager, model: nn.Module, steps: Iterable[int]) -> None:
    """Give a model the weights of each step as an optimizer would, and tell its averager."""
    for step in steps:
        set_weights(model, weights_at(model, step))
        averager.step()


def trained(
    layout: str, cls: type[TokenModel], steps: Iterable[int] = range(3), **options: Any
) -> tuple[nn.Module, distavg.Averager]:
    """A model in a layout, and its averager with both RULES after these steps."""
    model = build(layout, cls)
    if layout == "tp":  # what is not parallel is plain, and known to be alike by the user only
        options.setdefault("replicas", dist.group.WORLD)
    averager = distavg.Averager(model, options.pop("rules", RULES), **options)
    feed(averager, model, steps)
    return model, averager


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names under which two mappings of tensors differ, in any bit, shape or dtype."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or not same(found[name], expected[name])
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # A clone, since one element is contiguous under any strides, which a view would keep.
    copies = (each.detach().clone(memory_format=torch.contiguous_format) for each in (a, b))
    first, second = (each.view(-1).view(torch.uint8) for each in copies)
    return torch.equal(first, second)


@torch.no_grad()
def storages(model: nn.Module) -> dict[str, Tensor]:
    """This rank's own storage of every parameter and buffer: what lasts when FSDP2 reshards."""
    reshard(model)
    inner = unwrapped(model)
    flats = {
        name: getattr(parameter, "_local_shard", parameter).detach()
        for name, parameter in flat_parameters(model).items()
    }
    if flats:
        return {**flats, **dict(inner.named_buffers())}
    found = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    return {n: t.to_local() if isinstance(t, DTensor) else t.detach() for n, t in found.items()}


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits in the mode that the model is in; afterwards FSDP2 holds unsharded parameters."""
    logits: Tensor = model(batch(seed)).clone()
    return logits


def outputs_with(
    cls: type[TokenModel],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
) -> Tensor:
    """The logits of another model in eval mode that holds these weights.

    A plain one, except that of tensor parallelism, which adds up in another order.
    """
    other = build(layout if layout.startswith("tp") else "plain", cls, dtype).eval()
    set_weights(
        other, {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    )
    return outputs(other)


def saved_files(path: Path, *names: str) -> list[SavedFile]:
    """The data files of a checkpoint's averages, of these or of all, as its records have them."""
    manifest = read_manifest(path)
    averages = [manifest.averages[name] for name in names or manifest.averages]
    return [file for each in averages for file in read_records(path, manifest, each)]


def communications(call: Callable[[], object]) -> int:
    """How many collectives a call makes."""
    with CommDebugMode() as seen:
        call()
    return int(seen.get_total_counts())


def model_class(layout: str) -> type[TokenModel]:
    """The most awkward model that a layout allows."""
    return Awkward if layout in ("plain", "ddp") else Uneven
