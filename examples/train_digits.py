"""Handwritten digits with a residual BatchNorm network: SWA, and whose statistics it needs.

    python examples/train_digits.py --picture digits.png --checkpoints runs/digits
    torchrun --standalone --nproc-per-node 2 examples/train_digits.py --parallel fsdp2 --mixup

For each seed: a baseline under OneCycle; runs that leave OneCycle for SWALR and average the last 5
and 10 epochs, evaluated with stale BatchNorm statistics, with those of one rank's data (an eighth),
and with distavg's, of all ranks'; and the baseline fine-tuned for as many epochs with SWA. Told to
leave (SIGTERM, SIGUSR1), it saves, and goes on there when it is started again.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 -- its usual name
from job import Job
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distavg

TRAIN, VALID = 500, 300  # images; the other 997 are held out
BATCH, MAX_LR, SWA_LR = 50, 0.3, 0.1
Data = dict[str, tuple[Tensor, Tensor]]


class Left(Exception):
    """The job was told to leave, and has saved: the status that it ends with."""


class Progress:
    """What a training goes on with besides weights, optimizer and scheduler."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "random": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curve = state["curve"]
        torch.set_rng_state(state["random"])


class Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.shortcut(x) + self.second_norm(self.second(hidden)))


def network(parallel: str) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16),
        Residual(16, 32, stride=2),
        Residual(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    if parallel == "fsdp2":
        return fully_shard(model)
    return DistributedDataParallel(model) if parallel == "ddp" else model


def digits(seed: int) -> Data:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)[order]
    ends = {"train": (0, TRAIN), "valid": (TRAIN, TRAIN + VALID), "test": (TRAIN + VALID, None)}
    return {name: (x[begin:end], y[begin:end]) for name, (begin, end) in ends.items()}


def batches(x: Tensor, y: Tensor, shuffle: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every batch, as a DistributedSampler gives it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    # Alike on all ranks (with --mixup, if their number divides BATCH).
    order = torch.randperm(len(y)) if shuffle else torch.arange(len(y))
    for indices in order.split(BATCH):
        mine = indices[rank::size]
        yield x[mine], y[mine]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Percent of the images; every rank looks at all of them, so that FSDP runs alike."""
    was_training = model.training
    model.eval()
    found = model(data[0]).argmax(1)
    model.train(was_training)
    return 100 * (found == data[1]).double().mean().item()


def loss_of(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> Tensor:
    target = F.one_hot(y, 10).float()
    if options.mixup:
        share = torch.distributions.Beta(0.2, 0.2).sample().item()
        other = torch.randperm(len(x))
        x, target = share * x + (1 - share) * x[other], share * target + (1 - share) * target[other]
    return F.cross_entropy(model(x), target, label_smoothing=options.label_smoothing)


def train(
    name: str,
    data: Data,
    options: argparse.Namespace,
    epochs: int,
    swa_epochs: int = 0,
    start: dict[str, Tensor] | None = None,
) -> tuple[nn.Module, distavg.Averager, list[float]]:
    """A trained model, its averager, and the validation accuracy after each epoch.

    The last epochs are averaged, at SWALR's constant rate. From a trained state, all of them.
    Raises `Left` when told to leave.
    """
    model = network(options.parallel)
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=SWA_LR, momentum=0.9, weight_decay=1e-4)
    steps = -(-TRAIN // BATCH)
    rule = distavg.SWA(start=f"{epochs - swa_epochs}ep" if swa_epochs else "0ba")
    clock = distavg.Clock(steps_per_epoch=steps, max_duration=f"{epochs}ep")
    averager = distavg.Averager(model, rule, clock=clock)
    averager.attach(optimizer)
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    if start is None:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, MAX_LR, epochs=epochs, steps_per_epoch=steps
        )
        if swa_epochs:
            scheduler = distavg.ThenSWALR(scheduler, averager, SWA_LR, anneal_epochs=steps)
    progress = Progress()
    folder = options.checkpoints and options.checkpoints / name
    job = Job(folder, averager, model, optimizer, scheduler=scheduler, progress=progress)
    job.resume()
    while len(progress.curve) < epochs:
        model.train()
        for x, y in batches(*data["train"]):
            loss_of(model, x, y, options).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        progress.curve.append(accuracy(model, data["valid"]))
        must_leave = job.must_leave()
        if must_leave or len(progress.curve) == epochs:
            job.save()
            job.finish()
        if must_leave:
            raise Left(job.status)
    return model, averager, progress.curve


def evaluate(model: nn.Module, averager: distavg.Averager, data: Data) -> dict[str, float]:
    """Held-out accuracy of an average, by whose statistics its BatchNorm layers have."""
    x, y = data["train"]
    found = {}
    with averager.applied():
        found["stale"] = accuracy(model, data["test"])
    eighth = x[: TRAIN // 8], y[: TRAIN // 8]
    averager.recalibrate_batchnorm(batches(*eighth, shuffle=False))
    with averager.applied():
        found["one rank's"] = accuracy(model, data["test"])
    averager.recalibrate_batchnorm(batches(x, y))
    with averager.evaluating():
        found["all ranks'"] = accuracy(model, data["test"])
    return found


def run(seed: int, options: argparse.Namespace) -> tuple[dict[str, float], list[float]]:
    data = digits(seed)
    results: dict[str, float] = {}

    def seeded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)
        return call(*args, **kwargs)

    model, _, curve = seeded(train, f"{seed}-baseline", data, options, options.epochs)
    results["baseline"] = accuracy(model, data["test"])
    for swa_epochs in options.swa_epochs:
        name = f"{seed}-swa-{swa_epochs}"
        swa, averager, _ = seeded(train, name, data, options, options.epochs, swa_epochs)
        for whose, value in evaluate(swa, averager, data).items():
            results[f"SWA over {swa_epochs} epochs, {whose} statistics"] = value
    epochs = options.swa_epochs[0]
    name, state = f"{seed}-tuned", model.state_dict()
    tuned, averager, _ = seeded(train, name, data, options, epochs, epochs, start=state)
    results[f"fine-tuned for {epochs} epochs, live"] = accuracy(tuned, data["test"])
    for whose, value in evaluate(tuned, averager, data).items():
        results[f"fine-tuned for {epochs} epochs, SWA, {whose} statistics"] = value
    return results, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--swa-epochs", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--mixup", action="store_true")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--checkpoints", type=Path, help="folder to go on from, and to save to")
    parser.add_argument("--picture", help="a file for the validation curves")
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29503")
    dist.init_process_group(
        "gloo", rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1))
    )
    is_first = dist.get_rank() == 0
    try:
        runs = [run(seed, options) for seed in tqdm(range(options.seeds), disable=not is_first)]
    except Left as left:
        print("told to leave", flush=True)
        sys.exit(left.args[0])
    if is_first:
        print(f"held-out accuracy in percent, mean and standard error over {options.seeds} seeds")
        for what in runs[0][0]:
            values = [results[what] for results, _ in runs]
            spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            print(f"{what:55} {statistics.mean(values):6.2f} +- {spread:.2f}")
        means = [statistics.mean(each) for each in zip(*(curve for _, curve in runs), strict=True)]
        print("validation of the baseline by epoch:", *(f"{each:.1f}" for each in means))
        if options.picture:
            figure = Figure(figsize=(8, 3.2), layout="constrained")
            axes = figure.add_subplot(xlabel="epoch", ylabel="validation accuracy, %")
            for _, curve in runs:
                axes.plot(range(1, options.epochs + 1), curve, color="0.8")
            axes.plot(range(1, options.epochs + 1), means, label="baseline, mean over seeds")
            for index, swa_epochs in enumerate(options.swa_epochs, start=1):
                start = options.epochs - swa_epochs
                label = f"start of SWA over {swa_epochs} epochs"
                axes.axvline(start, color=f"C{index}", ls=":", label=label)
            axes.set_ylim(min(means[2:]) - 3, 100.5)
            axes.legend(frameon=False)
            figure.savefig(options.picture, dpi=120)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
