"""The systems that the benchmarks compare, each behind the same few calls. Not run by itself.

The rule is the same for all: the first sample is the weights at the time of building, and each
update is `average = 0.999 * average + 0.001 * weights`. Beside each system are the options that
give that: no warm-up, and every update counts. Those whose first update is a copy make it when they
are built. The rule of `SWA` systems is the mean of all samples. `check` looks that this is so.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import distavg

DECAY = 0.999


def inner(model: nn.Module) -> nn.Module:
    """The module itself where it is wrapped in DDP; FSDP2 changes it in place."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank has of each, sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in (t.detach() for t in tensors)]


class System:
    """One average of a model, which is in its wrapper and on its device already.

    `update()` follows an optimizer step; `wait()` precedes the next one.
    """

    rule = "EMA"
    package = "torch"  # what has to be installed

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = inner(model)
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def update(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        """Until what an update left under way may no longer read the weights."""

    def held(self) -> Iterable[Tensor]:
        """The averaged tensors, in the order of `module.parameters()`."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """The average of what this rank has of each parameter of the module. Collective."""
        self.wait()
        return local(self.held())

    def bytes_held(self) -> int:
        """The average's memory on this rank."""
        return sum(tensor.nbytes for tensor in local(self.held()))


class Distavg(System):
    rules: Mapping[str, distavg.Rule] = {"a": distavg.EMA(DECAY, include_initial=True)}
    options: Mapping[str, Any] = {}
    kind = distavg.Averager

    def build(self) -> None:
        self.averager = self.kind(self.model, dict(self.rules), **self.options)
        self.update = self.averager.step

    def tensors(self) -> list[Tensor]:
        with self.averager.applied("a"):
            return [tensor.clone() for tensor in local(self.module.parameters())]

    def bytes_held(self) -> int:
        return sum(self.averager[name].nbytes for name in self.averager.names)


class DistavgSwa(Distavg):
    rule = "SWA"
    rules = {"a": distavg.SWA(update_interval="1ba", include_initial=True)}  # noqa: RUF012


class Averaged(System):
    """PyTorch's; its first update is a copy."""

    options: Mapping[str, Any] = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}

    def build(self) -> None:
        self.averaged = AveragedModel(self.module, **self.options)
        self.update()

    def update(self) -> None:
        self.averaged.update_parameters(self.module)

    def held(self) -> Iterable[Tensor]:
        return self.averaged.module.parameters()


class AveragedSwa(Averaged):
    rule = "SWA"
    options = {"multi_avg_fn": get_swa_multi_avg_fn()}  # noqa: RUF012


class AveragedDefault(Averaged):
    rule = "SWA"
    options: Mapping[str, Any] = {}


class Timm(System):
    """Without `step=`, `update` uses the whole decay each time; foreach is its default."""

    package = "timm"

    def build(self) -> None:
        # Its module file alone: the package wants torchvision, which wants another torch.
        places = importlib.util.find_spec("timm").submodule_search_locations
        path = Path(places[0], "utils", "model_ema.py")
        spec = importlib.util.spec_from_file_location("timm_model_ema", path)
        file = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(file)
        self.ema = file.ModelEmaV3(self.module, decay=DECAY)

    def update(self) -> None:
        self.ema.update(self.module)

    def held(self) -> Iterable[Tensor]:
        return self.ema.module.parameters()


class EmaPytorch(System):
    """Its decay is `clamp(warm-up, min_value, beta)`, so constant where these are equal."""

    package = "ema_pytorch"
    foreach = False  # its default

    def build(self) -> None:
        self.ema = importlib.import_module("ema_pytorch").EMA(
            self.module,
            beta=DECAY,
            min_value=DECAY,
            update_after_step=0,
            update_every=1,
            include_online_model=False,
            use_foreach=self.foreach,
        )
        self.update()

    def update(self) -> None:
        self.ema.update()

    def held(self) -> Iterable[Tensor]:
        return self.ema.ema_model.parameters()


class EmaPytorchForeach(EmaPytorch):
    foreach = True


class Diffusers(System):
    """Its decay is `max(min(warm-up, decay), min_decay)`; its first update is a copy."""

    package = "diffusers.training_utils"
    foreach = False  # its default

    def build(self) -> None:
        package = importlib.import_module("diffusers.training_utils")
        self.ema = package.EMAModel(
            self.module.parameters(), decay=DECAY, min_decay=DECAY, foreach=self.foreach
        )
        self.update()

    def update(self) -> None:
        self.ema.step(self.module.parameters())

    def held(self) -> Iterable[Tensor]:
        return self.ema.shadow_params


class DiffusersForeach(Diffusers):
    foreach = True


class Lightning(System):
    """The callback's own hooks, called with a trainer that only counts steps.

    Lightning wraps a LightningModule in DDP and gives the callback the module inside. The first
    update is a copy.
    """

    package = "lightning.pytorch"

    def build(self) -> None:
        lightning = importlib.import_module("lightning.pytorch")
        self.trainer = SimpleNamespace(global_step=0)
        self.holder = lightning.LightningModule()
        self.holder.model = self.module
        self.holder.to(next(self.module.parameters()).device)  # it keeps a device of its own
        self.callback = lightning.callbacks.EMAWeightAveraging(decay=DECAY)
        self.callback.setup(self.trainer, self.holder, "fit")
        self.update()

    def update(self) -> None:
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.holder, None, None, 0)

    def held(self) -> Iterable[Tensor]:
        return self.callback._average_model.module.parameters()


class Torchtitan(System):
    """As its `EMAOptimizersContainer` does: a lerp of the parameters as they are, also DTensors."""

    def build(self) -> None:
        self.average = [parameter.detach().clone() for parameter in self.module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        lives = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        torch._foreach_lerp_(self.average, lives, 1 - DECAY)

    def held(self) -> Iterable[Tensor]:
        return self.average


class EmaOptimizer(System):
    """What the wrapper of NeMo and of PyTorch's pull request 94820 does, written afresh.

    A multiplication and an addition beside the training: on a stream of its own, on the CPU in a
    thread; the host waits for it before the next step of the optimizer.
    """

    def build(self) -> None:
        self.lives = list(self.module.parameters())
        self.average = [live.detach().clone() for live in self.lives]
        device = self.lives[0].device
        self.stream = None if device.type == "cpu" else torch.Stream(device)
        self.thread: threading.Thread | None = None

    def update(self) -> None:
        if self.stream is None:
            self.thread = threading.Thread(target=self._blend)
            self.thread.start()
        else:
            self.stream.wait_stream(torch.accelerator.current_stream())
            with self.stream:
                self._blend()

    @torch.no_grad()
    def _blend(self) -> None:
        torch._foreach_mul_(self.average, DECAY)
        torch._foreach_add_(self.average, [live.detach() for live in self.lives], alpha=1 - DECAY)

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        elif self.thread is not None:
            self.thread.join()

    def held(self) -> Iterable[Tensor]:
        return self.average


SYSTEMS: dict[str, type[System]] = {
    "distavg, EMA": Distavg,
    "distavg, SWA": DistavgSwa,
    "AveragedModel, EMA": Averaged,
    "AveragedModel, SWA": AveragedSwa,
    "AveragedModel, SWA by default": AveragedDefault,
    "timm ModelEmaV3": Timm,
    "ema-pytorch": EmaPytorch,
    "ema-pytorch, foreach": EmaPytorchForeach,
    "diffusers EMAModel": Diffusers,
    "diffusers EMAModel, foreach": DiffusersForeach,
    "Lightning EMAWeightAveraging": Lightning,
    "torchtitan's way": Torchtitan,
    "EMAOptimizer's way": EmaOptimizer,
}


def installed() -> dict[str, type[System]]:
    """Those of `SYSTEMS` whose package is here."""
    packages = {each.package.partition(".")[0] for each in SYSTEMS.values()}
    here = {package for package in packages if importlib.util.find_spec(package)}
    return {name: s for name, s in SYSTEMS.items() if s.package.partition(".")[0] in here}


@torch.no_grad()
def check(model: nn.Module, systems: Mapping[str, System]) -> None:
    """Three updates of systems that were just built agree with the same by hand; or raise.

    The weights change by about their size, so that a missed update or another decay is off by far
    more than the tolerance: a few units in the last place of weights of up to 16. (ema-pytorch's
    decay is one of fp32, which is less than that.) In the end they are what they were, but for
    rounding.
    """
    lives = local(inner(model).parameters())
    expected = {"EMA": [live.clone() for live in lives], "SWA": [live.clone() for live in lives]}
    for number, factor in enumerate((-1.25, -1.6, 0.5), start=1):
        torch._foreach_mul_(lives, factor)
        for system in systems.values():
            system.update()
            system.wait()
        torch._foreach_lerp_(expected["EMA"], lives, 1 - DECAY)
        torch._foreach_lerp_(expected["SWA"], lives, 1 / (number + 1))
    for name, system in systems.items():
        for found, wanted in zip(system.tensors(), expected[system.rule], strict=True):
            torch.testing.assert_close(
                found,
                wanted,
                rtol=0,
                atol=1e-5,
                check_device=False,
                msg=lambda text, name=name: f"{name}: {text}",
            )
