"""torchrun --standalone --nproc-per-node 2 examples/quickstart.py  (or just python, on one)."""

import torch
import torch.distributed as dist

import distavg

torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())  # other data on each rank
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
averager = distavg.Averager(model, distavg.EMA(decay=0.95))
averager.attach(optimizer)
for _ in range(100):  # learn to add up eight numbers from noisy answers
    x = torch.randn(16, 8)
    loss = (model(x) - x.sum(1, keepdim=True) - torch.randn(16, 1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

print("error of the live weights:", (model(torch.eye(8)) - 1).abs().mean().item())
with averager.applied():
    print("error of their average:   ", (model(torch.eye(8)) - 1).abs().mean().item())
averager.save("runs/quickstart", overwrite=True)
averager.load("runs/quickstart")
if dist.is_initialized():
    dist.destroy_process_group()
