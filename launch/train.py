"""Train what the config's `train` section says and leave checkpoints that score.py reads.

    python launch/train.py CONFIG [section.key=value …]

Each checkpoint is a folder `checkpoint-<step>` with weights and a trainer_state.json whose log holds the learning rate,
the form in which the Hugging Face Trainer leaves them.
"""

from launch.command import find_modules_here, run_command  # isort: split

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from actors.context import cache_folder, make_task
from actors.specs import ModelSpec
from engine.limits import InputLimits, read_limits
from engine.models import save_checkpoint
from engine.tasks.contract import Task, encode, initialise
from engine.training import Step, train
from launch.config import Config, load_config
from launch.messages import plain_errors, tell
from storage.locations import Location
from storage.readers import read_records


def train_model(config: Config, say: Callable[[str], None] = tell) -> Path:
    """Train, write the checkpoints and return their folder.

    Raises ValueError if the folder already holds checkpoints: a finished training is never written over.
    """
    given = config.train.output or config.checkpoints.path
    if not isinstance(given, str) or "://" in given:
        raise ValueError(f"train.output={given!r} is not allowed: name a local folder for the checkpoints")
    output = Path(given)
    if any(output.glob("checkpoint-*")):
        raise ValueError(f"{output} already holds checkpoints: remove it, or set train.output to another folder")
    torch.manual_seed(config.train.seed)
    base = Location.parse(config.train.base).fetch(cache_folder()) if config.train.base else None
    spec = ModelSpec(config.task.name, config.task.settings, (), "float32", config.gradients.attention)
    task = make_task(spec, base, cache_folder())
    model = initialise(task, base).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = training_rows(config, task, read_limits(base) if base else InputLimits(None, None))
    settings = config.train.settings()
    log: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=settings.epochs * -(-len(rows) // settings.batch_size))
        for step in train(model, task.loss, task.collate, rows, settings):
            log.append({"step": step.step, "epoch": step.epoch, "learning_rate": step.learning_rate, "loss": step.loss})
            progress.advance(bar)
            if step.checkpoint:
                save(model, task, output / f"checkpoint-{step.step}", log, step)
                say(f"checkpoint-{step.step}: epoch {step.epoch:.2f}, loss {recent(log):.4f}")
    return output


def training_rows(config: Config, task: Task, limits: InputLimits) -> list[dict]:
    """Return the corpus as collate reads it, ids in corpus order."""
    records = islice(read_records(config.corpus.path, split=config.corpus.split), config.corpus.limit)
    rows: list[dict] = []
    for record, where in records:
        try:
            encoded = limits.check(encode(task, record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        rows += [record | row | {"id": len(rows) + i} for i, row in enumerate(encoded)]
    if not rows:
        raise ValueError(f"corpus {config.corpus.path} is empty: there is nothing to train on")
    return rows


def recent(log: list[dict[str, Any]], steps: int = 50) -> float:
    """Return the mean loss of the last steps."""
    losses = [entry["loss"] for entry in log[-steps:]]
    return sum(losses) / len(losses)


def save(model: torch.nn.Module, task: Task, folder: Path, log: list[dict[str, Any]], step: Step) -> None:
    """Write one checkpoint folder; trainer_state.json comes last and says that it is whole."""
    save_checkpoint(model, folder)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    state = {"global_step": step.step, "epoch": step.epoch, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))


def main(
    config: Annotated[str, typer.Argument(help="YAML file; `score.py --help` lists its sections")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Train the model of a config and leave checkpoints."""
    find_modules_here()
    with plain_errors():
        folder = train_model(load_config(config, overrides))
        print(f"checkpoints are in {folder}")


if __name__ == "__main__":
    run_command(main)
