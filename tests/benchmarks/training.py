"""Whole training iterations with each average, against those with none.

    OMP_NUM_THREADS=1 python tests/benchmarks/training.py

An iteration is forward, loss, backward, a step of SGD with momentum, the average's update, and
`zero_grad`. On a GPU the models are those of published.csv, from torchvision, with random weights,
on images of 224 x 224; what PyTorch's pull request 94820 published of them is printed beside, from
another GPU and perhaps another batch size, so that only its ratio can be compared. On a CPU
they are a few of transformers, on inputs small enough for a round to take less than a minute.

Contestants take turns on one model: weights, gradients and activations lie at the same places for
all, and one model with all averages fits where as many models would not. Each has its own average
and its own optimizer with its momentum, because distavg and EMAOptimizer act around its step. A
turn is several iterations, since what EMAOptimizer leaves under way may overlap the next forward.

Every average is an EMA of constant decay 0.999 without warm-up, updated after every step; before
anything is timed, all are compared (`systems.check`). Buffers are treated as each system does by
default: AveragedModel copies them, timm, ema-pytorch and Lightning average them, others leave them.
"""

import csv
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import systems
import torch
from torch import Tensor, nn
from torch.optim import SGD

AGAINST = "no average"
DEVICE = measure.device()
ON_GPU = DEVICE.type != "cpu"
ITERATIONS = 5 if ON_GPU else 2  # in a turn
IMAGES = 32 if ON_GPU else 4
Workload = tuple[nn.Module, Callable[[], Tensor]]  # a model, and its loss on one batch


def published() -> dict[str, dict[str, str]]:
    lines = Path(__file__).with_name("published.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {row["model"]: row for row in rows}


def of_torchvision(name: str) -> Workload:
    import torchvision

    model = torchvision.models.get_model(name, weights=None).to(DEVICE)
    images = torch.randn(IMAGES, 3, 224, 224, device=DEVICE)
    labels = torch.randint(1000, (IMAGES,), device=DEVICE)
    return model, lambda: nn.functional.cross_entropy(model(images), labels)


def of_transformers(name: str) -> Workload:
    import transformers as hf

    if name == "GPT-2, 4 layers":
        # Not tied: timm's update goes over the state dict, and so over tied weights twice.
        config = hf.GPT2Config(
            n_layer=4, vocab_size=8192, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False
        )
        model = hf.GPT2LMHeadModel(config).train()
        tokens = torch.randint(8192, (2, 64))
        return model, lambda: model(input_ids=tokens, labels=tokens).loss
    kinds = {
        "ResNet-50": (hf.ResNetForImageClassification, hf.ResNetConfig()),
        "RegNet": (hf.RegNetForImageClassification, hf.RegNetConfig()),
        "ViT-B/16": (hf.ViTForImageClassification, hf.ViTConfig(image_size=64)),
        "Swin-T": (hf.SwinForImageClassification, hf.SwinConfig(image_size=64, window_size=2)),
    }
    kind, config = kinds[name]
    config.num_labels = 1000
    model = kind(config).train()
    images, labels = torch.randn(IMAGES, 3, 64, 64), torch.randint(1000, (IMAGES,))
    return model, lambda: model(pixel_values=images, labels=labels).loss


PUBLISHED = published()
SMALL = ["ResNet-50", "RegNet", "ViT-B/16", "Swin-T", "GPT-2, 4 layers"]
NAMES = [*PUBLISHED] if ON_GPU else SMALL


def turn(
    optimizer: SGD, loss: Callable[[], Tensor], system: systems.System | None
) -> Callable[[], None]:
    """What a contestant does in a round. distavg updates itself: it is attached."""
    attached = system is None or isinstance(system, systems.Distavg)
    if isinstance(system, systems.Distavg):
        system.averager.attach(optimizer)

    def iterate() -> None:
        for _ in range(ITERATIONS):
            loss().backward()
            if not attached:
                system.wait()
            optimizer.step()
            if not attached:
                system.update()
            optimizer.zero_grad()
        if not attached:
            system.wait()  # before others change the weights

    return iterate


def compare(name: str, count: int) -> list[dict[str, Any]]:
    gc.collect()  # the last model's averages: only then is their memory free
    torch.manual_seed(0)
    model, loss = of_torchvision(name) if ON_GPU else of_transformers(name)
    averages = {
        each: system(model) for each, system in systems.installed().items() if system.rule == "EMA"
    }
    systems.check(model, averages)
    contestants = {
        each: turn(SGD(model.parameters(), lr=1e-3, momentum=0.9), loss, system)
        for each, system in {AGAINST: None, **averages}.items()
    }
    seconds = measure.rounds(contestants, count)
    table = measure.rows(
        {each: [s / ITERATIONS for s in turns] for each, turns in seconds.items()}, AGAINST
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    tensors = len(list(model.parameters()))
    measure.report(f"{name}: {size:,} parameters, {tensors} tensors", table, AGAINST)
    if name in PUBLISHED:
        beside(table, PUBLISHED[name])
    return table


def beside(table: list[dict[str, Any]], row: dict[str, str]) -> None:
    """Print a published row with what was measured here, and keep it in the table."""
    found = {each["what"]: each for each in table}
    pairs = {"EMAOptimizer's way": "ema_optimizer_ms", "AveragedModel, EMA": "averaged_model_ms"}
    for what, column in pairs.items():
        found[what]["published_ms"] = float(row[column])
    ema, averaged = (found[what] for what in pairs)
    for where, key in (("published", "published_ms"), ("here", "median_ms")):
        print(f"{where:>10}: {averaged[key]:.2f} ms with AveragedModel / ", end="")
        print(f"{ema[key]:.2f} ms with EMAOptimizer = {averaged[key] / ema[key]:.2f}")


if __name__ == "__main__":
    measure.main(__doc__, NAMES, compare, default_rounds=9)
