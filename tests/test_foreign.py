"""Files of other systems, made by themselves where they can be, into checkpoints of distavg."""

from __future__ import annotations

import copy
import datetime
import importlib
import io
import pickle
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import differences, error_of
from click.testing import CliRunner
from models import Uneven, build, set_weights, weights_at
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import distavg
from distavg import EMA, SWA, Averager, CheckpointMismatch, Clock, ConfigError, Warmup
from distavg.checkpoint.manifest import read_manifest
from distavg.cli import main
from distavg.foreign import read_foreign, write_foreign


def convert(path: Path, *options: str) -> str:
    """What `distavg import` prints, the checkpoint being beside the file."""
    out = path.with_suffix("")
    result = CliRunner().invoke(main, ["import", str(path), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(path: Path, *options: str) -> str:
    out = path.with_suffix(".refused")
    result = CliRunner().invoke(main, ["import", str(path), "-o", str(out), *options])
    assert result.exit_code == (1 if "CheckpointCorrupt: " in result.output else 2)
    assert not out.exists()
    return result.output.removeprefix("Error: ").rstrip("\n")


def averaged(model: nn.Module, num_updates: int, **options: Any) -> AveragedModel:
    average = AveragedModel(model, **options)
    for step in range(num_updates):
        set_weights(model, weights_at(model, step))
        average.update_parameters(model)
    return average


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def shards_of(averager: Averager) -> dict[str, Tensor]:
    return {shard.fqn: shard.tensor for shard in averager[averager.names[0]].shards()}


# --------------------------------------------------------------------------------- AveragedModel


@pytest.mark.parametrize(
    ("rule", "multi_avg_fn"),
    [(SWA(update_interval="1ba"), get_swa_multi_avg_fn()), (EMA(0.9), get_ema_multi_avg_fn(0.9))],
    ids=["swa", "ema"],
)
def test_an_averaged_model_goes_on_with_the_same_bits(
    rule: distavg.Rule, multi_avg_fn: Any, tmp_path: Path
) -> None:
    model = Uneven()  # with tied, frozen and one-element parameters and buffers
    theirs = averaged(model, 4, multi_avg_fn=multi_avg_fn)
    torch.save(theirs.state_dict(), tmp_path / "average.pt")
    printed = convert(tmp_path / "average.pt", f"--name={rule.kind}")
    assert f"wrote {tmp_path}/average: {rule.kind}, 4 updates, " in printed
    assert "PyTorch's AveragedModel; step unknown, epoch unknown" in printed

    averager = Averager(model, rule)
    averager.load(tmp_path / "average")
    for step in range(4, 8):
        assert averager[rule.kind].num_updates == int(theirs.n_averaged) == step
        expected = {n: p.detach() for n, p in theirs.module.named_parameters()}
        found = averager.full_state_dict()
        assert differences({name: found[name] for name in expected}, expected) == []
        set_weights(model, weights_at(model, step))
        theirs.update_parameters(model)
        averager.step()


@pytest.mark.parametrize("buffers", ["live", "copied", "averaged"])
def test_buffers_come_along_where_they_are_held(buffers: str, tmp_path: Path) -> None:
    model = small()
    theirs = AveragedModel(model, use_buffers=True)
    for _ in range(2):
        model(torch.randn(5, 3))
        theirs.update_parameters(model)
    torch.save(theirs.state_dict(), tmp_path / "average.pt")
    convert(tmp_path / "average.pt")
    averager = Averager(model, SWA(update_interval="1ba"), buffers=buffers)
    averager.load(tmp_path / "average")
    mean = dict(theirs.module.named_buffers())["1.running_mean"]
    held = shards_of(averager).get("1.running_mean")
    assert (held is None) == (buffers == "live")
    assert held is None or torch.equal(held, mean)


def again(model: nn.Module) -> AveragedModel:
    """An average of a wrapped model as it is."""
    average = AveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
    return average


class Nested(nn.Module):
    """A model with the average as a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.teacher = averaged(self.net, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda average: {"model": small().state_dict(), "swa_model": average.state_dict()},
        lambda average: {"states": [{"epoch": 3}, (0, {"ema_model": average.state_dict()})]},
        lambda average: Nested().state_dict(),
        lambda average: again(nn.DataParallel(average.module)).state_dict(),
        lambda average: again(torch.compile(average.module, backend="eager")).state_dict(),
    ],
    ids=["beside the model", "deep down", "a submodule", "DataParallel", "compiled"],
)
def test_wherever_it_is(wrap: Callable[[AveragedModel], Any], tmp_path: Path) -> None:
    expected = averaged(small(), 2)
    path = tmp_path / "training.pt"
    torch.save(wrap(expected), path)
    found = read_foreign(path)
    assert found.num_updates == 2
    assert differences(found.tensors, expected.module.state_dict()) == []


def test_of_several_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    states = {"fast": averaged(small(), 2).state_dict(), "slow": averaged(small(), 3).state_dict()}
    torch.save(states, path)
    assert refusal(path) == (
        f"ConfigError: {path} holds averages at ['fast', 'slow']: say which (--place)"
    )
    assert "3 updates" in convert(path, "--place=slow")


def test_a_child_that_is_called_module_keeps_its_name_if_one_says_so(tmp_path: Path) -> None:
    model = nn.Module()
    model.module = small()
    torch.save(averaged(model, 2).state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", "--prefix=")
    Averager(model, SWA(update_interval="1ba")).load(tmp_path / "a")


def test_a_prefix_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"n_averaged": torch.tensor(2), "module.net.x": torch.ones(1)}, path)
    assert set(read_foreign(path, prefix="net.").tensors) == {"x"}
    assert "no name begins with the prefix 'nett.'" in refusal(path, "--prefix=nett.")
    both = {"module.net.x": torch.ones(1), "module.x": torch.ones(1)}
    torch.save({"n_averaged": torch.tensor(2), **both}, path)
    assert "two names are one without their prefix" in refusal(path, "--prefix=net.")


def test_extra_state_is_left_out(tmp_path: Path) -> None:
    state = {**averaged(small(), 2).state_dict(), "module.0._extra_state": {"scale": 3}}
    torch.save(state, tmp_path / "a.pt")
    assert (
        differences(
            read_foreign(tmp_path / "a.pt").tensors, averaged(small(), 2).module.state_dict()
        )
        == []
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my_ema.pt", "ema"), ("semantic.pt", "swa"), ("a.EMA.pt", "ema"), ("a.pt", "swa")],
)
def test_the_name_where_the_file_has_one(name: str, expected: str, tmp_path: Path) -> None:
    torch.save(averaged(small(), 2).state_dict(), tmp_path / name)
    assert read_foreign(tmp_path / name).name == expected


def test_a_name_that_cannot_be(tmp_path: Path) -> None:
    torch.save(averaged(small(), 2).state_dict(), tmp_path / "a.pt")
    for name in ("../evil", "my ema"):
        message = refusal(tmp_path / "a.pt", f"--name={name}")
        assert message.startswith(f"ConfigError: {name!r}: a name is letters")
    assert {each.name for each in tmp_path.iterdir()} == {"a.pt"}


def test_what_shares_memory_is_tied_and_nothing_else(tmp_path: Path) -> None:
    whole = torch.ones(4, 3)
    state = {"module.a": whole, "module.b": whole[:2], "module.c": whole, "module.d": whole.t()}
    torch.save({"n_averaged": torch.tensor(1), **state}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt")
    tensors = read_manifest(tmp_path / "a").averages["swa"].tensors
    assert {name: (t.shape, t.aliases) for name, t in tensors.items()} == {
        "a": ((4, 3), ("c",)),
        "b": ((2, 3), ()),
        "d": ((3, 4), ()),
    }


def test_half_precision_becomes_what_an_averager_holds(tmp_path: Path) -> None:
    model = small().bfloat16()
    torch.save(averaged(model, 2).state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt")
    averager = Averager(model, SWA(update_interval="1ba"))
    averager.load(tmp_path / "a")
    assert {tensor.dtype for tensor in shards_of(averager).values()} == {torch.float32}


def test_a_frozen_parameter_is_left_alone_under_any_of_its_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Module()
    model.a, model.b, model.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    model.b.weight = model.a.weight.requires_grad_(False)
    state = dict(reversed(averaged(model, 2).state_dict().items()))
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        Averager(model, SWA(update_interval="1ba")).load(tmp_path / "a")
    assert "['b.weight'] are not averaged here, and left alone" in caplog.text


def test_a_step_given_by_hand_is_the_clocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    torch.save(averaged(model, 2).state_dict(), tmp_path / "a.pt")
    torch.save(averaged(model, 2).state_dict(), tmp_path / "b.pt")
    convert(tmp_path / "a.pt")
    convert(tmp_path / "b.pt", "--steps=163", "--epochs=40.75", "--num-updates=7")
    clock = Clock(steps_per_epoch=4)
    averager = Averager(model, SWA(start="30ep"), clock=clock)
    averager.load(tmp_path / "a")
    assert "does not say how many steps and epochs had been done" in caplog.text
    caplog.clear()
    averager.load(tmp_path / "b")
    assert caplog.text == ""
    assert averager.step_count == 163
    assert averager["swa"].num_updates == 7
    averager.step()  # the epoch ends
    assert averager["swa"].num_updates == 8


def test_a_warm_up_is_not_begun_anew(tmp_path: Path) -> None:
    model = small()
    torch.save(averaged(model, 5).state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", "--name=ema")
    averager = Averager(model, EMA(warmup=Warmup()))
    averager.load(tmp_path / "a")
    assert averager.metrics()["ema/next_weight"] == pytest.approx(1 / 6)


def on_ranks(path: Path) -> list[str]:
    """What an imported average lacks on each layout."""
    offences = []
    for layout in ("fsdp2", "ddp", "fsdp1"):
        averager = Averager(build(layout), {"swa": SWA(update_interval="1ba")})
        averager.load(path)
        expected = {n: p.detach() for n, p in averaged(Uneven(), 3).module.named_parameters()}
        found = averager.full_state_dict(all_ranks=True)
        offences += differences({name: found[name] for name in expected}, expected)
    return offences


def test_it_loads_on_ranks(tmp_path: Path) -> None:
    torch.save(averaged(Uneven(), 3).state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt")
    assert run_ranks(on_ranks, 2, tmp_path / "a") == [[], []]


# -------------------------------------------------------------------------------------- Composer


def composers(algorithms: Any, model: Mapping[str, Any], **time: int) -> dict[str, Any]:
    """A checkpoint as Composer 0.32 writes it, with what else is in one."""
    timestamp = {"batch": 14, "epoch": 2, "batch_in_epoch": 2, **time}
    return {
        "state": {
            "model": model,
            "algorithms": algorithms,
            "timestamp": {"Timestamp": {**timestamp, "total_wct": datetime.timedelta(seconds=3)}},
            "metadata": {"torch_version": torch.__version__},
        },
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state()}],
    }


def weights(value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in small().state_dict().items()}


def parts(value: float, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    names = {name for name, _ in small().named_parameters()}
    all_of = weights(value).items()
    return {
        "named_parameters_dict": {prefix + n: t for n, t in all_of if n in names},
        "named_buffers_dict": {prefix + n: t for n, t in all_of if n not in names},
    }


LIVE, AVERAGE = 1.0, 2.0
EMA_STATES: dict[str, tuple[dict[str, Any], float]] = {
    "present": ({"ema_model": parts(AVERAGE), "ema_weights_active": False}, LIVE),
    "present, under DDP": (
        {"ema_model": parts(AVERAGE, "module."), "ema_weights_active": False},
        LIVE,
    ),
    "the average is the model": ({"ema_model": parts(LIVE), "ema_weights_active": True}, AVERAGE),
    "before 0.13": (
        {
            "ema_model": weights(AVERAGE),
            "training_model": weights(LIVE),
            "ema_weights_active": False,
        },
        LIVE,
    ),
    "before 0.13, the average is the model": (
        {
            "ema_model": weights(AVERAGE),
            "training_model": weights(LIVE),
            "ema_weights_active": True,
        },
        AVERAGE,
    ),
}


@pytest.mark.parametrize("is_mapping", [False, True])
@pytest.mark.parametrize("kind", EMA_STATES)
def test_composers_ema(kind: str, tmp_path: Path, *, is_mapping: bool) -> None:
    state, model = EMA_STATES[kind]
    algorithms = {"EMA": {**state, "ema_started": True}}
    path = tmp_path / "ep2-ba14-rank0.pt"
    torch.save(composers(algorithms if is_mapping else [*algorithms.items()], weights(model)), path)
    printed = convert(path)
    assert "Composer's EMA" in printed
    assert ("0.13" in printed) == ("0.13" in kind)
    assert "step 14, epoch 2.33" in printed
    averager = Averager(small(), EMA(0.9), clock=Clock(steps_per_epoch=6), buffers="averaged")
    averager.load(path.with_suffix(""))
    assert all((tensor == AVERAGE).all() for tensor in shards_of(averager).values())
    assert averager["ema"].num_updates == averager.step_count == 14


def test_composers_swa(tmp_path: Path) -> None:
    average = averaged(small(), 3)
    state = {"swa_model": average.state_dict(), "swa_started": True, "step_counter": 3}
    path = tmp_path / "latest.pt"
    torch.save(composers([("SWA", state)], weights(LIVE), batch=12, batch_in_epoch=0), path)
    assert "Composer's SWA; step 12, epoch 2\n" in convert(path)
    averager = Averager(small(), SWA(), clock=Clock(steps_per_epoch=6))
    averager.load(path.with_suffix(""))
    found = shards_of(averager)
    assert differences(found, {name: average.module.state_dict()[name] for name in found}) == []
    assert averager["swa"].num_updates == 3


def test_both_of_composers(tmp_path: Path) -> None:
    swa = {"swa_model": averaged(small(), 3).state_dict(), "swa_started": True}
    ema = {**EMA_STATES["present"][0], "ema_started": True}
    path = tmp_path / "both.pt"
    torch.save(composers([("SWA", swa), ("EMA", ema)], weights(LIVE)), path)
    assert "['EMA', 'SWA']: say which (--place)" in refusal(path)
    assert "Composer's SWA" in convert(path, "--place=SWA")


@pytest.mark.parametrize(
    ("time", "epochs"),
    [
        ({"batch": 14, "epoch": 2, "batch_in_epoch": 2}, Fraction(7, 3)),
        ({"batch": 12, "epoch": 1, "batch_in_epoch": 6}, Fraction(2)),
        ({"batch": 5, "epoch": 0, "batch_in_epoch": 5}, None),
        ({"batch": 0, "epoch": 0, "batch_in_epoch": 0}, Fraction(0)),
        ({"batch": 15, "epoch": 2, "batch_in_epoch": 2}, None),  # epochs of unequal length
    ],
)
def test_the_epoch_of_a_checkpoint_within_one(
    time: dict[str, int], epochs: Fraction | None, tmp_path: Path
) -> None:
    ema = {**EMA_STATES["present"][0], "ema_started": True}
    torch.save(composers([("EMA", ema)], weights(LIVE), **time), tmp_path / "a.pt")
    assert read_foreign(tmp_path / "a.pt").epochs == epochs


def test_the_clock_may_be_overridden_and_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    ema = {**EMA_STATES["present"][0], "ema_started": True}
    content = composers([("EMA", ema)], weights(LIVE))
    torch.save(content, path)
    assert "step 0, epoch 0\n" in convert(path, "--steps=0", "--epochs=0")
    content["state"]["timestamp"] = content["state"]["timestamp"]["Timestamp"]
    torch.save(content, path)
    assert read_foreign(path).steps == 14
    del content["state"]["timestamp"]
    torch.save(content, path)
    assert read_foreign(path).steps is None


def test_at_the_beginning_nothing_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema = {**EMA_STATES["present"][0], "ema_started": True}
    time = {"batch": 0, "epoch": 0, "batch_in_epoch": 0}
    torch.save(composers([("EMA", ema)], weights(LIVE), **time), tmp_path / "a.pt")
    convert(tmp_path / "a.pt")
    Averager(small(), EMA(0.9)).load(tmp_path / "a")
    assert "does not say" not in caplog.text


def test_swa_that_has_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    swa = {"swa_model": averaged(small(), 3).state_dict(), "swa_started": False}
    torch.save(composers([("SWA", swa)], weights(LIVE)), path)
    assert "Composer's SWA: without an update it is no average" in refusal(path)
    torch.save(composers([("SWA", {"swa_started": False})], weights(LIVE)), path)
    assert "holds nothing that is recognised" in refusal(path)


def test_distavgs_own_in_composer(tmp_path: Path) -> None:
    state = {"average": weights(AVERAGE), "num_updates": 7, "is_started": True}
    torch.save(composers([("EMA", state)], weights(LIVE)), tmp_path / "a.pt")
    assert "the EMA of distavg in Composer; step 14" in (printed := convert(tmp_path / "a.pt"))
    assert "ema, 7 updates" in printed


# ------------------------------------------------------------------------------------------ NeMo


def nemos(model: Mapping[str, Tensor], ema: list[Tensor], steps: int = 9) -> dict[str, Any]:
    optimizer = {"opt": {}, "ema": ema, "current_step": steps, "decay": 0.99, "every_n_steps": 4}
    return {"state_dict": model, "optimizer_states": [optimizer], "global_step": steps, "epoch": 1}


def test_nemos_ema(tmp_path: Path) -> None:
    model = small().state_dict()
    ema = [tensor.clone() for name, tensor in model.items() if name.endswith(("weight", "bias"))]
    path = tmp_path / "step=9-EMA.ckpt"
    torch.save(nemos(model, ema), path)
    printed = convert(path)
    assert "NeMo's EMA (decay=0.99, every_n_steps=4); step 9, epoch unknown" in printed
    assert "ema, 4 updates" in printed  # of the first weights, and after the steps 1, 5 and 9
    averager = Averager(small(), EMA(0.99))
    averager.load(path.with_suffix(""))
    assert averager.step_count == 9
    assert differences(shards_of(averager), {n: model[n] for n in shards_of(averager)}) == []


def test_nemos_file_beside_it_is_refused(tmp_path: Path) -> None:
    model = small().state_dict()
    ema = [tensor + 1 for name, tensor in model.items() if name.endswith(("weight", "bias"))]
    torch.save(nemos(model, ema), tmp_path / "step=9.ckpt")
    assert "convert the file beside it whose name ends in -EMA" in refusal(tmp_path / "step=9.ckpt")


def test_nemos_weights_alone(tmp_path: Path) -> None:
    path = tmp_path / "last-EMA.ckpt"
    torch.save({"state_dict": small().state_dict(), "global_step": 5}, path)
    assert "NeMo's EMA; step 5" in convert(path)
    path = tmp_path / "end-EMA.ckpt"
    torch.save({"state_dict": small().state_dict()}, path)
    assert "NeMo's EMA; step unknown" in (printed := convert(path))
    assert "ema, 1 updates" in printed
    path = tmp_path / "begin-EMA.ckpt"
    model = small().state_dict()
    torch.save(nemos(model, [model["0.weight"]], steps=0), path)
    assert "without an update it is no average" in refusal(path)


# ------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore")
def test_lightnings_own_checkpoint(tmp_path: Path) -> None:
    lightning = importlib.import_module("lightning")
    callbacks = importlib.import_module("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def training_step(self, batch: Any) -> Tensor:
            return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, average = Module(), callbacks.EMAWeightAveraging(decay=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(24, 3))
    trainer = lightning.Trainer(
        max_steps=5,
        accelerator="cpu",
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    saved: list[AveragedModel] = []

    class Save(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 5 and not saved:
                trainer.save_checkpoint(tmp_path / "step=5.ckpt")
                saved.append(copy.deepcopy(average._average_model))

    trainer.callbacks.append(Save())
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert "Lightning's WeightAveraging; step 5" in convert(tmp_path / "step=5.ckpt")
    averager = Averager(module, EMA(0.9))
    averager.load(tmp_path / "step=5")
    assert averager["ema"].num_updates == int(saved[0].n_averaged)
    expected = dict(saved[0].module.named_parameters())
    assert differences(shards_of(averager), {n: p.detach() for n, p in expected.items()}) == []


# ---------------------------------------------------------------------------------- what is refused


class Payload:
    """What would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return print, ("the file has run code",)


def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "average.pt"
    torch.save({"swa": averaged(small(), 2).state_dict(), "more": Payload()}, path)
    message = refusal(path)
    assert message.startswith(f"UnsupportedError: {path} holds print, which could only be")
    assert "torch.save(averaged_model.state_dict(), ...)" in message
    torch.save(averaged(small(), 2), path)  # the module itself
    assert "torch.optim.swa_utils.AveragedModel" in refusal(path)
    torch.save(Payload(), path, _use_new_zipfile_serialization=False)
    assert "holds print, which could only be" in refusal(path)
    assert "has run code" not in capsys.readouterr().out


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert refusal(path) == f"CheckpointNotFound: {path}: there is no file here"
    content = io.BytesIO()
    torch.save(averaged(small(), 2).state_dict(), content)
    for broken in (b"", b"no pickle", pickle.dumps({1: 2})[:-3], content.getvalue()[:-100]):
        path.write_bytes(broken)
        assert refusal(path).startswith(f"CheckpointCorrupt: {path} "), broken
    assert refusal(tmp_path).startswith(f"CheckpointCorrupt: {tmp_path} ")


def test_spoiled_bits_end_in_distavgs_own_errors(tmp_path: Path) -> None:
    content = io.BytesIO()
    ema = {**EMA_STATES["present"][0], "ema_started": True}
    torch.save(composers([("EMA", ema)], weights(LIVE)), content)
    whole, generator = content.getvalue(), random.Random(0)
    refused = 0
    for _ in range(300):
        spoiled = bytearray(whole)
        for _ in range(generator.randint(1, 8)):
            spoiled[generator.randrange(len(spoiled))] ^= 1 << generator.randrange(8)
        (tmp_path / "a.pt").write_bytes(spoiled)
        try:
            read_foreign(tmp_path / "a.pt")
        except distavg.DistavgError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"not_n_averaged": torch.tensor(1), "not_module.x": torch.ones(1)},
            "holds nothing that is recognised as an average",
        ),
        ([[[[[[[[averaged(small(), 1).state_dict()]]]]]]]], "holds nothing that is recognised"),
        (
            {"n_averaged": torch.tensor(1), "module.x": torch.ones(2).to_sparse()},
            "x is no dense tensor",
        ),
        (
            {"n_averaged": torch.tensor(1), "module.x": torch.ones(2) * 1j},
            "x: complex64 cannot be averaged",
        ),
        ([1, 2], "holds nothing that is recognised as an average"),
        (small().state_dict(), "holds nothing that is recognised as an average"),
        (averaged(small(), 0).state_dict(), "without an update it is no average"),
        ({"n_averaged": torch.tensor(1), "module.x": 3}, "x is no dense tensor: 3"),
        ({"n_averaged": torch.tensor(1)}, "holds nothing that is recognised as an average"),
        ({"averaging_state": {}, "state_dict": {}}, "lacks what its kind of file has"),
        (
            composers([("EMA", {**EMA_STATES["present"][0], "ema_started": False})], weights(1)),
            "Composer's EMA: without an update it is no average",
        ),
        (composers([("EMA", {"ema_started": True})], {}), "lacks what its kind of file has"),
        (composers(7, {}), "lacks what its kind of file has"),
        ({"state_dict": {}, "optimizer_states": [{"ema": []}]}, "lacks what its kind of file has"),
    ],
)
def test_what_is_no_average(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert message in refusal(tmp_path / "a.pt")


def test_what_a_load_refuses_of_it(tmp_path: Path) -> None:
    average = averaged(small(), 2)
    torch.save(average.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt")
    other = nn.Sequential(nn.Linear(3, 4))
    assert "1.bias is in the checkpoint and not averaged here" in error_of(
        Averager(other, SWA(update_interval="1ba")).load, tmp_path / "a"
    )
    averager = Averager(small(), SWA(update_interval="1ba"))
    with pytest.raises(ConfigError, match="AveragedModel came without its rule: give one"):
        averager.load(tmp_path / "a", rules="saved")
    deeper = nn.Sequential(*copy.deepcopy(list(small())), nn.Linear(1, 1))
    with pytest.raises(CheckpointMismatch, match=r"3\.bias is averaged here and not in the"):
        Averager(deeper, SWA(update_interval="1ba")).load(tmp_path / "a")


def test_a_place_that_is_taken_is_not_touched(tmp_path: Path) -> None:
    torch.save(averaged(small(), 2).state_dict(), tmp_path / "a.pt")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").touch()
    found = read_foreign(tmp_path / "a.pt")
    with pytest.raises(distavg.CheckpointExists):
        write_foreign(found, tmp_path / "a")
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["notes"]


def test_the_command_says_what_it_holds(tmp_path: Path) -> None:
    torch.save(averaged(small(), 2).state_dict(), tmp_path / "ema.pt")
    convert(tmp_path / "ema.pt", "--steps=12", "--epochs=3")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "ema")])
    assert "step 12, epoch 3\n" in result.output
    assert 'IMPORTED(source="PyTorch\'s AveragedModel"' in result.output
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "ema")]).exit_code == 0
