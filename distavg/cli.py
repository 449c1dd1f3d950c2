"""The command line: look at checkpoints and rules, with no process group and no GPU."""

from dataclasses import replace
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path

import click

from distavg.checkpoint.manifest import read_manifest
from distavg.checkpoint.read import verify_checkpoint
from distavg.errors import DistavgError
from distavg.foreign import read_foreign, write_foreign
from distavg.plot import draw
from distavg.schedule import Clock

__all__ = ["main"]

_PATH = click.argument("path", type=click.Path(path_type=Path))


class _Commands(click.Group):
    """A group whose commands turn distavg's errors into a message and exit status 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except DistavgError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error


@click.group(cls=_Commands)
@click.version_option(package_name="distavg")
def main() -> None:
    """Look at checkpoints of averaged weights, check them, and compare rules."""


@main.command()
@_PATH
@click.option("--tensors", is_flag=True, help="List every tensor.")
def inspect(path: Path, *, tensors: bool) -> None:
    """Say what the checkpoint at PATH holds, from its manifest alone."""
    manifest = read_manifest(path)
    committed = datetime.fromtimestamp(manifest.committed_at, timezone.utc)
    click.echo(f"{path}: committed {committed:%Y-%m-%d %H:%M:%S} UTC")
    click.echo(f"step {manifest.steps}, epoch {float(manifest.epochs):g}")
    for name, average in manifest.averages.items():
        settings = ", ".join(
            f"{key}={value!r}"
            for key, value in average.rule.items()
            if key != "kind" and value is not None and value is not False
        )
        click.echo(f"{name}: {str(average.rule.get('kind')).upper()}({settings})")
        click.echo(
            f"  {average.num_updates} updates, {len(average.tensors)} tensors, "
            f"{average.nbytes:,} bytes in {len(average.files)} files"
        )
        for tensor in average.tensors.values() if tensors else ():
            tied = f" = {', '.join(tensor.aliases)}" if tensor.aliases else ""
            click.echo(f"  {tensor.fqn}{tied}: {tensor.dtype} {list(tensor.shape)}")
    if manifest.extra_folder is not None:
        click.echo(f"written by also=: {manifest.extra_folder}")


@main.command()
@_PATH
def verify(path: Path) -> None:
    """Read every byte of the averages at PATH and compare all checksums.

    What also= wrote is not covered: its own format has to vouch for it.
    """
    total = sum(average.nbytes for average in read_manifest(path).averages.values())
    with click.progressbar(length=total, label="verifying") as bar:
        verified, faults = verify_checkpoint(path, bar.update)
    for fault in faults:
        click.echo(fault)
    if faults:
        raise click.ClickException(f"{path}: {len(faults)} faults, {verified:,} bytes read")
    click.echo(f"{path}: whole and unspoiled, {verified:,} bytes verified")


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
