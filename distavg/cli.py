"""The command line: look at checkpoints and rules, with no process group and no GPU."""

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distavg.checkpoint.export import export_dtype, export_folder, parse_size, plan_export
from distavg.checkpoint.folders import prune as prune_folder
from distavg.checkpoint.folders import prune_uncommitted, reading
from distavg.checkpoint.manifest import Manifest, SavedAverage, read_manifest
from distavg.checkpoint.read import AverageReader, differences, verify_checkpoint
from distavg.checkpoint.records import read_records, uncovered
from distavg.errors import CheckpointCorrupt, DistavgError
from distavg.foreign import read_foreign, write_foreign
from distavg.plot import draw
from distavg.schedule import Clock

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

__all__ = ["main"]

_PATH = click.argument("path", type=click.Path(path_type=Path))


class _Failure(click.ClickException):
    """Nothing can be said of what was asked for."""

    exit_code = 2


class _Commands(click.Group):
    """A group whose commands turn distavg's errors into a message and an exit status.

    0: all is well. 1: what was looked at is corrupt, or differs. 2: it could not be looked at.
    """

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise _Failure(str(error)) from error
        except DistavgError as error:
            kind = click.ClickException if isinstance(error, CheckpointCorrupt) else _Failure
            raise kind(f"{type(error).__name__}: {error}") from error


@click.group(cls=_Commands)
@click.version_option(package_name="distavg")
def main() -> None:
    """Look at checkpoints of averaged weights, check, compare, convert and remove them.

    The exit status is 1 where something is corrupt or differs, and 2 where a command failed.
    """


@main.command()
@_PATH
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, *, tensors: bool, as_json: bool) -> None:
    """Say what the checkpoint at PATH holds, from its manifest and records, without its data."""
    with reading(path) as manifest:
        averages = {n: _summary(path, manifest, each) for n, each in manifest.averages.items()}
    committed = datetime.fromtimestamp(manifest.committed_at, timezone.utc)
    if as_json:
        content = {
            "path": str(path),
            "committed": committed.isoformat(),
            "steps": manifest.steps,
            "epochs": float(manifest.epochs),
            "also": manifest.extra_folder,
            "averages": averages,
        }
        if tensors:
            for name, each in manifest.averages.items():
                averages[name]["tensors"] = {
                    t.fqn: {"dtype": t.dtype, "shape": t.shape, "aliases": t.aliases}
                    for t in each.tensors.values()
                }
        click.echo(json.dumps(content))
        return
    click.echo(f"{path}: committed {committed:%Y-%m-%d %H:%M:%S} UTC")
    click.echo(f"step {manifest.steps}, epoch {float(manifest.epochs):g}")
    rows: list[tuple[str, ...]] = [
        ("average", "updates", "tensors", "bytes", "ranks", "coverage", "rule")
    ]
    for name, summary in averages.items():
        counts = (f"{summary[key]:,}" for key in ("num_updates", "tensors", "bytes", "ranks"))
        rows.append((name, *counts, summary["coverage"], _written(summary["rule"])))
    _echo_table(rows)
    for name, average in manifest.averages.items() if tensors else ():
        click.echo(f"{name}:")
        for tensor in average.tensors.values():
            tied = f" = {', '.join(tensor.aliases)}" if tensor.aliases else ""
            click.echo(f"  {tensor.fqn}{tied}: {tensor.dtype} {list(tensor.shape)}")
    if manifest.extra_folder is not None:
        click.echo(f"written by also=: {manifest.extra_folder}")


def _summary(path: Path, manifest: Manifest, average: SavedAverage) -> dict[str, Any]:
    try:
        fault = uncovered(average, read_records(path, manifest, average))
    except CheckpointCorrupt as error:
        fault = str(error)
    return {
        "rule": average.rule,
        "num_updates": average.num_updates,
        "tensors": len(average.tensors),
        "bytes": average.nbytes,
        "ranks": sum(record is not None for record in average.records),
        "coverage": fault or "whole",
    }


def _written(rule: Mapping[str, Any]) -> str:
    settings = ", ".join(
        f"{key}={value!r}"
        for key, value in rule.items()
        if key != "kind" and value is not None and value is not False
    )
    return f"{str(rule.get('kind')).upper()}({settings})"


def _echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need, names and words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number and cell[:1].isdigit() else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@main.command()
@_PATH
def verify(path: Path) -> None:
    """Read every byte of the averages at PATH, compare all checksums, and name every fault.

    What also= wrote is not covered: its own format has to vouch for it.
    """
    total = sum(average.nbytes for average in read_manifest(path).averages.values())
    with _progress(total, "verifying") as bar:
        verified, faults = verify_checkpoint(path, bar.update)
    for fault in faults:
        click.echo(fault)
    if faults:
        raise click.ClickException(f"{path}: {len(faults)} faults, {verified:,} bytes read")
    click.echo(f"{path}: whole and unspoiled, {verified:,} bytes verified")


@main.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--name", help="Which average, if there are several; A:B where the names differ.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each tensor.")
def diff(first: Path, second: Path, name: str | None, *, as_json: bool) -> None:
    """List the tensors in which an average differs between two checkpoints.

    The largest difference of two elements, and the Euclidean norm of the difference relative to
    that of the FIRST average. Exits with 1 if there is any.
    """
    rows: list[tuple[str, ...]] = [("tensor", "largest", "relative")]
    names = (None, None) if name is None else (name.partition(":")[0], name.rpartition(":")[2])
    with ExitStack() as stack:
        one, other = (
            stack.enter_context(AverageReader(path, stack.enter_context(reading(path)), each))
            for path, each in zip((first, second), names, strict=True)
        )
        with _progress(one.average.nbytes, "comparing") as bar:
            for each in differences(one, other, bar.update):
                if as_json:
                    sizes = {key: value for key, value in asdict(each).items() if value == value}
                    sizes = {
                        key: None if value == math.inf else value for key, value in sizes.items()
                    }
                    click.echo(json.dumps({"largest": None, "relative": None, **sizes}))
                cells = (
                    (each.what, "") if each.what else (f"{each.largest:g}", f"{each.relative:g}")
                )
                rows.append((each.fqn, *cells))
    if len(rows) > 1:
        if not as_json:
            _echo_table(rows)
        raise click.exceptions.Exit(1)
    click.echo(f"{one.name}: {len(one.average.tensors)} tensors are equal", err=as_json)


@main.command()
@_PATH
@click.option("--name", help="Which average, if the checkpoint holds several.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--dtype", help="fp32, bf16 and the like; by default what was saved.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="The largest file.")
def export(
    path: Path, name: str | None, output: Path, dtype: str | None, max_shard_size: str
) -> None:
    """Write an average as whole tensors in safetensors files, for transformers and others.

    Holds what the average holds: not the buffers, unless the average keeps them, nor frozen
    parameters. Averager.export() takes those from the model.
    """
    with ExitStack() as stack:
        manifest = stack.enter_context(reading(path))
        reader = stack.enter_context(AverageReader(path, manifest, name))
        files = plan_export(reader.average.tensors, export_dtype(dtype), parse_size(max_shard_size))
        bar = stack.enter_context(_progress(reader.average.nbytes, "exporting"))
        folder = stack.enter_context(export_folder(output))
        files.create(folder)
        with files.writing(folder) as writer:
            for fqn in files.tensors:
                for box, part in reader.pieces(fqn):
                    writer.write(fqn, box, part)
                    bar.update(part.nbytes)
    click.echo(f"wrote {output}: {len(files.tensors)} tensors in {len(files.headers)} files")


@main.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--keep", type=click.IntRange(1), help="Of each run, keep this many checkpoints.")
@click.option("--uncommitted", is_flag=True, help="Remove what saves left that died.")
def prune(root: Path, keep: int | None, *, uncommitted: bool) -> None:
    """Remove old checkpoints in the folder ROOT, or what saves left that died.

    Checkpoints that are being read, and saves that are under way, are left alone.
    """
    if keep is None and not uncommitted:
        raise click.UsageError("give --keep N, or --uncommitted, or both")
    for path in prune_folder(root, keep) if keep is not None else ():
        click.echo(f"removed {path}")
    for path in prune_uncommitted(root) if uncommitted else ():
        click.echo(f"cleaned {path}")


def _progress(nbytes: int, label: str) -> "ProgressBar[int]":
    file = sys.stderr if sys.stderr.isatty() else io.StringIO()
    return click.progressbar(length=nbytes, label=label, file=file)


@main.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--name", help="What to call the average: ema or swa, if not given.")
@click.option(
    "--steps", type=click.IntRange(0), help="Optimizer steps done, if the file is silent."
)
@click.option("--epochs", type=Fraction, help="Epochs done, if the file is silent.")
@click.option("--num-updates", type=click.IntRange(1), help="Updates made.")
@click.option("--place", help="Which average, if the file holds several.")
@click.option("--prefix", help="What stands before the model's names; by default every 'module.'.")
def import_(
    file: Path,
    output: Path,
    name: str | None,
    steps: int | None,
    epochs: Fraction | None,
    num_updates: int | None,
    place: str | None,
    prefix: str | None,
) -> None:
    """Make a checkpoint of an average in FILE of another system, for Averager.load.

    Takes the state of PyTorch's AveragedModel, alone or inside a checkpoint, checkpoints of
    Composer with SWA or EMA, and NeMo's -EMA checkpoints. Never runs code from the file.
    """
    found = read_foreign(file, place=place, prefix=prefix)
    average = replace(
        found,
        name=name or found.name,
        num_updates=num_updates or found.num_updates,
        steps=found.steps if steps is None else steps,
        epochs=found.epochs if epochs is None else max(epochs, Fraction(0)),
    )
    write_foreign(average, output)
    position = [
        f"{what} {'unknown' if value is None else f'{float(value):g}'}"
        for what, value in (("step", average.steps), ("epoch", average.epochs))
    ]
    click.echo(f"{file}: {average.source}; {', '.join(position)}")
    click.echo(
        f"wrote {output}: {average.name}, {average.num_updates} updates, "
        f"{len(average.tensors)} tensors"
    )


@main.command()
@click.option(
    "--rule",
    "rules",
    multiple=True,
    required=True,
    help="ema:half_life=1000ba, ema:0.999, power:0.05, swa:start=0.75dur and the like.",
)
@click.option("--duration", required=True, help="Length of the run: 20000ba, or 10ep.")
@click.option("--steps-per-epoch", type=int, help="Needed for times in epochs.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def plot(rules: tuple[str, ...], duration: str, steps_per_epoch: int | None, output: Path) -> None:
    """Draw how much each past step counts in averages under some rules."""
    draw(rules, Clock(steps_per_epoch=steps_per_epoch, max_duration=duration), output)
    click.echo(f"wrote {output}")
