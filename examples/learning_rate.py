"""python examples/learning_rate.py PICTURE: OneCycle, then SWALR, and what SWA samples under it."""

import sys

import torch
from matplotlib.figure import Figure

import distavg

STEPS_PER_EPOCH, EPOCHS = 50, 20
RECIPES = {  # the rule, and how ThenSWALR anneals
    "per batch, over one epoch": (
        distavg.SWA(start="0.75dur"),
        {"anneal_epochs": STEPS_PER_EPOCH},
    ),
    "once per update, as in Composer": (
        distavg.SWA(start="0.75dur", update_interval="8ba"),
        {"anneal_epochs": 20, "anneal_strategy": "linear", "once_per_update": True},
    ),
}

figure = Figure(figsize=(8, 3.2), layout="constrained")
axes = figure.add_subplot(xlabel="optimizer step", ylabel="learning rate")
for label, (rule, options) in RECIPES.items():
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clock = distavg.Clock(steps_per_epoch=STEPS_PER_EPOCH, max_duration=f"{EPOCHS}ep")
    averager = distavg.Averager(model, rule, clock=clock)
    averager.attach(optimizer)
    onecycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH
    )
    scheduler = distavg.ThenSWALR(onecycle, averager, swa_lr=0.05, **options)
    rates, samples = [], []
    for step in range(STEPS_PER_EPOCH * EPOCHS):
        rates.append(scheduler.get_last_lr()[0])
        before = averager["swa"].num_updates
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if averager["swa"].num_updates > before:
            samples.append(step)
    (line,) = axes.plot(rates, label=f"{label}: {len(samples)} samples")
    axes.plot(samples, [rates[step] for step in samples], ".", color=line.get_color())
axes.legend(frameon=False)
figure.savefig(sys.argv[1], dpi=120)
