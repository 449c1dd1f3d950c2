"""Train a byte-level GPT on the sources of Python's standard library, with an EMA and an SWA of it.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --checkpoints gpt
    torchrun --standalone --nproc-per-node 3 examples/train_gpt.py --checkpoints gpt --parallel ddp
    python examples/train_gpt.py --checkpoints gpt --steps 400

It goes on from the newest of its checkpoints, on any number of ranks and any layout; once the
steps are done, it just evaluates. Told to leave (SIGTERM, SIGUSR1), it saves and ends.
"""

import argparse
import os
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 -- its usual name
import xxhash
from job import Job
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distavg

LAYERS, WIDTH, HEAD = 3, 192, 32
CONTEXT, BATCH, HELD_OUT = 128, 4, 128  # bytes of a sequence; sequences of a step, of a test


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (batch, heads, length, HEAD)."""
    rates = 1000.0 ** -torch.linspace(0, 1, HEAD // 2)
    angles = torch.outer(torch.arange(x.shape[-2]), rates).to(x.device)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = nn.RMSNorm(WIDTH)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, 3, HEAD))
        q, k, v = heads.permute(3, 0, 2, 1, 4)  # each (batch, heads, length, HEAD)
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # every block starts as the identity
                nn.init.normal_(weight, std=0.0 if name.endswith("_out.weight") else WIDTH**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parallelize(model: GPT, kind: str, device: torch.device) -> tuple[nn.Module, int]:
    """The wrapped model, and over how many ranks each batch is spread by tensor parallelism."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "ddp":
        return DistributedDataParallel(model), 1
    if kind == "fsdp1":
        options = {"use_orig_params": True, "device_id": device}
        units = ModuleWrapPolicy({Block})
        return FullyShardedDataParallel(model, auto_wrap_policy=units, **options), 1
    if kind == "none":
        return model, 1
    outer = {"hsdp": 2, "tp-fsdp2": 2, "tp": 1, "fsdp2": size}[kind]
    mesh = init_device_mesh(device.type, (outer, size // outer), mesh_dim_names=("data", "inner"))
    if "tp" in kind:
        into, out_of = ColwiseParallel(), RowwiseParallel()
        plan = {"qkv": into, "attention_out": out_of, "mlp_in": into, "mlp_out": out_of}
        for block in model.blocks:
            parallelize_module(block, mesh["inner"], plan)
    if kind != "tp":
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh if kind == "hsdp" else mesh["data"])
    return model, size // outer if "tp" in kind else 1


def read_text(*, held_out: bool) -> Tensor:
    """The standard library's top-level modules as bytes; one in 16, by its name, is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    files = [p.read_bytes() for p in paths if (zlib.crc32(p.name.encode()) % 16 == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)


def loss_of(model: nn.Module, text: Tensor, starts: Tensor, device: torch.device) -> Tensor:
    """Nats per byte, predicting each byte of the sequences at `starts` from those before it."""
    batch = text[starts[:, None] + torch.arange(CONTEXT + 1)].long().to(device)
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def checksum(averager: distavg.Averager, name: str) -> str:
    """A hash over an average's names and whole tensors: the same whatever the layout."""
    digest = xxhash.xxh3_128()
    for fqn, tensor in averager.iter_full_tensors(name, all_ranks=True):
        digest.update(fqn.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def seconds() -> float:
    """The time once the device has done what was asked of it, so that differences are real."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(
    job: Job, options: argparse.Namespace, data_rank: int, data_size: int, device: torch.device
) -> None:
    """Train up to the last step, or until told to leave, on this rank's share of every batch."""
    model, optimizer, averager = job.model, job.optimizer, job.averager
    text = read_text(held_out=False)
    todo, step_bytes = range(averager.step_count, options.steps), data_size * BATCH * CONTEXT
    total = len(todo) * step_bytes
    progress = tqdm(total=total, unit="tok", unit_scale=True, disable=not (job.is_first and total))
    update_seconds = step_seconds = 0.0
    for step in todo:
        started = seconds()
        # A batch follows from step and rank alone: a resume has no loader's state to restore.
        random = torch.Generator().manual_seed(hash((step, data_rank)))
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=random)
        # After the warm-up the rate stays constant: averaging does what decaying it would.
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30)
        loss = loss_of(model, text, starts, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before_update = seconds()
        averager.step()  # attach(optimizer) would call it; called here, it can be timed
        update_seconds += seconds() - before_update
        step_seconds += seconds() - started
        progress.set_postfix(step=step + 1, loss=f"{loss.item():.3f}", refresh=False)
        progress.update(step_bytes)
        is_last = job.must_leave() or step == todo[-1]
        if is_last or (step + 1) % options.save_every == 0:
            job.save()
        if is_last:
            break
    progress.close()
    job.finish()
    if job.is_first and todo:
        print(f"the updates took {update_seconds / step_seconds:.2%} of the step time")


def evaluate(
    model: nn.Module,
    averager: distavg.Averager,
    data_rank: int,
    data_size: int,
    device: torch.device,
) -> list[str]:
    """The held-out loss of the live weights and of every average."""
    text = read_text(held_out=True)
    starts = torch.linspace(0, len(text) - CONTEXT - 1, HELD_OUT).long()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @torch.no_grad()
    def loss() -> float:
        mine = starts[data_rank::data_size]
        loss = loss_of(model, text, mine, device) * len(mine) / HELD_OUT * data_size / ranks
        if dist.is_initialized():
            dist.all_reduce(loss)
        return loss.item()

    report = [f"live {loss():.4f} nats per held-out byte"]
    for name in averager.names:
        with averager.applied(name):
            found = loss()
        held = [averager[name].nbytes] * ranks
        if dist.is_initialized():
            dist.all_gather_object(held, held[rank])
        sizes = " + ".join(f"{nbytes:,}" for nbytes in held)
        report += [f"{name}  {found:.4f} checksum {checksum(averager, name)}; {sizes} bytes"]
    return report


def main() -> int:
    layouts = ["fsdp2", "ddp", "fsdp1", "hsdp", "tp", "tp-fsdp2"]  # hsdp, tp-fsdp2: 2 x N ranks
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parallel", choices=layouts, default="fsdp2", help="on several ranks")
    parser.add_argument("--checkpoints", type=Path, help="folder to go on from, and to save to")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--steps", type=int, default=300, help="4 or more, those before a resume")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")

    torch.manual_seed(0)  # the same initial weights on every rank
    model = GPT().to(device)
    model_bytes = sum(p.nbytes for p in model.parameters())
    kind = options.parallel if ranks > 1 else "none"
    model, tensor_parallel = parallelize(model, kind, device)
    data = rank // tensor_parallel, ranks // tensor_parallel, device
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    ema = distavg.EMA(half_life="10ba")
    swa = distavg.SWA(start="0.75dur", update_interval="2ba")
    clock = distavg.Clock(max_duration=f"{options.steps}ba")
    # Beside tensor-parallel layers plain ones are alike on all ranks, which only we can know.
    alike = dist.group.WORLD if kind == "tp" else None
    averager = distavg.Averager(model, {"ema": ema, "swa": swa}, clock=clock, replicas=alike)
    job = Job(options.checkpoints, averager, model, optimizer)
    job.resume()
    train(job, options, *data)
    if averager.step_count >= options.steps:
        report = evaluate(model, averager, *data)
        report[0] += f"; {model_bytes:,} bytes of weights"
    else:
        report = [f"told to leave, so left after step {averager.step_count}"]
    if rank == 0:
        print(*report, sep="\n", flush=True)
    if ranks > 1:
        dist.destroy_process_group()
    return job.status


if __name__ == "__main__":
    sys.exit(main())
