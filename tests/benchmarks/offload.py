"""Training with an average in host memory, against one beside the weights and AveragedModel's.

    python tests/benchmarks/offload.py

An iteration is forward, backward, a step of SGD and the average's, if it is due: every 1, 10 or 100
iterations. A turn is 100 iterations and ends when the last update is made; the ratio is to turns
without an average. On a GPU the weights are copied out beside training and averaged by a thread;
AveragedModel(device="cpu") does both within the step. Without one the same pipeline runs with
ordinary memory, where its thread and the training share the cores: there is nothing to gain there.
"""

from collections.abc import Callable
from typing import Any

import measure
import torch
from systems import DECAY, Averaged, Distavg, check
from torch import nn
from torch.optim import SGD

import distavg

ITERATIONS = 100  # in a turn
WIDTH = 4096 if torch.accelerator.is_available() else 768
LAYERS, ROWS = 8, 32
AGAINST = "no average"


class Offloaded(Distavg):
    options = {"device": "cpu"}  # noqa: RUF012


class AveragedOnHost(Averaged):
    options = {**Averaged.options, "device": "cpu"}  # noqa: RUF012


PLACES = {
    "distavg": Distavg,
    'distavg, device="cpu"': Offloaded,
    'AveragedModel, device="cpu"': AveragedOnHost,
}


def turn(model: nn.Module, interval: int, system: Any) -> Callable[[], None]:
    optimizer = SGD(model.parameters(), lr=1e-6)
    batch = torch.randn(ROWS, WIDTH, device=measure.device())
    if isinstance(system, Distavg):
        system.averager.attach(optimizer)

    def iterate() -> None:
        for number in range(1, ITERATIONS + 1):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(system, Averaged) and number % interval == 0:
                system.update()
        if isinstance(system, Distavg):
            system.averager.synchronize()

    return iterate


def compare(name: str, count: int) -> list[dict[str, Any]]:
    interval = int(name.split()[1])
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(measure.device())
    check(model, {what: kind(model) for what, kind in PLACES.items()})
    rule = distavg.EMA(DECAY, include_initial=True, update_interval=f"{interval}ba")
    systems = {
        what: type(kind.__name__, (kind,), {"rules": {"a": rule}})(model)
        for what, kind in PLACES.items()
    }
    contestants = {AGAINST: turn(model, interval, None)} | {
        what: turn(model, interval, system) for what, system in systems.items()
    }
    seconds = measure.rounds(contestants, count)
    table = measure.rows(
        {what: [each / ITERATIONS for each in turns] for what, turns in seconds.items()}, AGAINST
    )
    waits = systems['distavg, device="cpu"'].averager.metrics()["offload_waits"]
    updates = (count + 2) * ITERATIONS // interval
    measure.report(f"{name}: ms per iteration", table, AGAINST)
    print(f"training waited for {waits} of {updates} updates in host memory")
    return [*table, {"what": "offload_waits", "waits": waits, "updates": updates}]


if __name__ == "__main__":
    names = [f"every {interval} iterations" for interval in (1, 10, 100)]
    measure.main(__doc__, names, compare, default_rounds=5)
