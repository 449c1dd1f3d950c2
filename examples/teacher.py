"""A teacher that is the EMA of its student, and runs in every step (mean teacher, BYOL, DINO).

    torchrun --standalone --nproc-per-node 2 examples/teacher.py  (or just python, on one)

Student and teacher are sharded alike, so copying the average into the teacher communicates nothing.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch import nn
from torch.distributed.fsdp import fully_shard

import distavg


def network() -> nn.Module:
    torch.manual_seed(0)  # student and teacher start alike, on every rank
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
    return fully_shard(model) if dist.is_initialized() else model


if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
student, teacher = network(), network().requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
averager = distavg.Averager(student, distavg.EMA(decay=0.99))
averager.attach(optimizer)
torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # other data on each rank
for step in range(1, 201):
    x = torch.randn(32, 16)
    with torch.no_grad():
        target = teacher(x).softmax(-1)
    loss = F.cross_entropy(student(x + 0.1 * torch.randn_like(x)), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    averager.copy_to(teacher)
    if step % 50 == 0 and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"step {step}: cross entropy with the teacher {loss.item():.4f}")
if dist.is_initialized():
    dist.destroy_process_group()
