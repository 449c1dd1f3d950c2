"""Train a byte-level GPT on the sources of Python's standard library, with an EMA and an SWA of it.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --parallel fsdp2 --save runs/gpt
    torchrun --standalone --nproc-per-node 3 examples/train_gpt.py --parallel ddp --resume runs/gpt
    python examples/train_gpt.py --resume runs/gpt --steps 400

A resume works on any number of ranks and any layout; once the steps are done, it just evaluates.
"""

import argparse
import os
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812 -- its usual name
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distavg


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (batch, heads, length, dim)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 1000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device)[:, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, width // 32, 32)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, 32)
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith("_out.weight"):
                nn.init.zeros_(weight)  # every block starts as the identity
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parallelize(model: GPT, kind: str, device: torch.device) -> nn.Module:
    if kind == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model) if kind == "ddp" else model


def read_text(*, held_out: bool) -> Tensor:
    """The standard library's top-level modules as bytes; one in 16, by its name, is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    files = [p.read_bytes() for p in paths if (zlib.crc32(p.name.encode()) % 16 == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)


def cut(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context + 1)].long()  # inputs, and targets one on


def loss_of(model: nn.Module, batch: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Tensor, rank: int, world_size: int) -> float:
    """Mean nats per byte over the whole batch, of which each rank takes its part."""
    total = loss_of(model, batch.tensor_split(world_size)[rank], "sum")
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / batch[:, 1:].numel()


def print_checksums(averager: distavg.Averager, rank: int) -> None:
    """For each average a hash over names and whole tensors: the same whatever the layout."""
    for name in averager.names:
        digest = xxhash.xxh3_128()
        for fqn, tensor in averager.iter_full_tensors(name):
            if rank == 0:
                digest.update(fqn.encode())
                digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        if rank == 0:
            print(f"checksum {name} {digest.hexdigest()}", flush=True)


def now(device: torch.device) -> float:
    """Seconds, read once the device has done what was asked of it, so that differences are real."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parse_args() -> argparse.Namespace:
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    layouts = ["none"] if is_alone else ["fsdp2", "ddp"]
    parser.add_argument("--parallel", choices=layouts, default=layouts[0])
    parser.add_argument("--save", type=Path, help="checkpoint to write at the end")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--steps", type=int, default=300, help="those before the resume included")
    sizes = {"batch": 4, "context": 128, "width": 160, "layers": 4, "lr": 2e-3, "seed": 0}
    for name, default in sizes.items():  # batch: sequences a rank; width: a multiple of 32
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.save and args.save.exists():  # known now, not after the training
        parser.error(f"--save {args.save}: there is something there already")
    return args


def main() -> None:
    args = parse_args()
    device, rank, world_size = torch.device("cpu"), 0, 1
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        rank, world_size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = GPT(args.width, args.layers).to(device)
    model_bytes = sum(p.nbytes for p in model.parameters())
    model = parallelize(model, args.parallel, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    rules = {
        "ema": distavg.EMA(half_life="10ba"),
        "swa": distavg.SWA(start="0.75dur", update_interval="2ba"),
    }
    averager = distavg.Averager(model, rules, clock=distavg.Clock(max_duration=f"{args.steps}ba"))
    if args.resume:

        def restore(folder: Path) -> None:
            weights, state = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

        averager.load(args.resume, also=restore)
        print_checksums(averager, rank)

    text = read_text(held_out=False)
    first_step = averager.step_count
    step_bytes = world_size * args.batch * args.context
    total = max(0, args.steps - first_step) * step_bytes
    progress = tqdm(total=total, unit="tok", unit_scale=True, disable=rank != 0 or total == 0)
    update_seconds, started = 0.0, now(device)
    for step in range(first_step, args.steps):
        # A batch follows from seed, step and rank alone: a resume has no loader's state to restore.
        random = torch.Generator().manual_seed(hash((args.seed, step, rank)))
        starts = torch.randint(len(text) - args.context, (args.batch,), generator=random)
        # After the warm-up the rate stays constant: averaging does what decaying it would.
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 30)
        loss = loss_of(model, cut(text, starts, args.context).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before_update = now(device)
        averager.step()  # attach(optimizer) would call it; called here, it can be timed
        update_seconds += now(device) - before_update
        progress.set_postfix(step=step + 1, loss=f"{loss.item():.3f}", refresh=False)
        progress.update(step_bytes)
    train_seconds = now(device) - started
    progress.close()

    if args.save:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        averager.save(args.save, also=lambda folder: dcp.save(state, checkpoint_id=folder))
        print_checksums(averager, rank)

    text = read_text(held_out=True)
    starts = torch.arange(256) * ((len(text) - args.context) // 256)
    batch = cut(text, starts, args.context).to(device)
    losses = {"live": held_out_loss(model, batch, rank, world_size)}
    for name in averager.names:
        with averager.applied(name):
            losses[name] = held_out_loss(model, batch, rank, world_size)
    held = [{name: averager[name].nbytes for name in averager.names}] * world_size
    if dist.is_initialized():
        dist.all_gather_object(held, held[rank])
        dist.destroy_process_group()
    if rank == 0:
        print(f"\nheld-out loss at step {averager.step_count}, in nats per byte")
        for name, value in losses.items():
            print(f"  {name:<5}{value:.4f}")
        print(f"bytes held, where the model's weights are {model_bytes:,}")
        for each_rank, averages in enumerate(held):
            sizes = (f"{n} {b:,} ({b / model_bytes:.1%})" for n, b in averages.items())
            print(f"  rank {each_rank}: {', '.join(sizes)}")
        if args.steps > first_step:
            print(f"the updates took {update_seconds / train_seconds:.2%} of the step time")


if __name__ == "__main__":
    main()
