"""Train what the config's `train` section says and leave checkpoints that score.py reads.

    python launch/train.py CONFIG [section.key=value …]

Each checkpoint is a folder `checkpoint-<step>` with weights and a trainer_state.json whose log holds the learning rate,
the form in which the Hugging Face Trainer leaves them. A training that was stopped goes on from its last checkpoint to the
same bits: run the same command again. With train.workers above 1 so many Ray Train workers share every batch, on the cluster
that the section `cluster` names or on this machine; the model is the one that a single process trains, to rounding.
With train.minimum the last checkpoint is a minimum of the whole objective, in float64.
"""

from launch.command import find_modules_here, run_command  # isort: split

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import nn

from actors.cluster import connect, nodes, resources, worker_plan
from actors.context import cache_folder, make_task
from actors.specs import ModelSpec, first_difference
from actors.training import train_together
from engine.limits import InputLimits, read_limits
from engine.minimum import MeanLoss, minimise
from engine.models import same_weights, save_checkpoint
from engine.tasks.contract import Task, encode, initialise
from engine.training import ALONE, Group, TrainSettings, TrainState, freeze, train
from engine.turnover import TurnOver, under_own_masks
from launch.config import Config, CorpusSection, MinimumSection, load_config
from launch.messages import plain_errors, tell
from launch.paths import refuse_unseen_folder
from launch.sources import content
from launch.turnover import REPORT, Masked, add_masks, batches, what_trains, write_whole
from storage.checkpoints import STATE
from storage.locations import Location
from storage.readers import read_records

OPTIMIZER = "optimizer.pt"  # beside the weights: the state from which a training goes on


def train_model(config: Config, say: Callable[[str], None] = tell) -> Path:
    """Train, write the checkpoints and return their folder; a training that was stopped goes on from its last one.

    Raises ValueError if the folder holds a finished training, which is never written over, or another one's.
    """
    given = config.train.output or config.checkpoints.path
    if not isinstance(given, str) or "://" in given:
        raise ValueError(f"train.output={given!r} is not allowed: name a local folder for the checkpoints")
    output = Path(given)
    seeds = config.train.turnover.seeds if config.train.turnover else 1
    folders = [output] if seeds == 1 else [output / f"seed-{number}" for number in range(seeds)]
    left = [(number, folder) for number, folder in enumerate(folders) if not finished(folder, identity(config))]
    if not left:
        raise ValueError(f"{output} already holds checkpoints: remove it, or set train.output to another folder")
    for number, folder in left:
        once = train_once if config.train.workers == 1 else train_on_workers
        once(config, folder, number, say)
    return output


def train_on_workers(config: Config, output: Path, number: int, say: Callable[[str], None]) -> None:
    """Let the workers of Ray Train train one model. ValueError if not all nodes see the folder of the checkpoints."""
    if config.cluster.backend == "in-process":
        raise ValueError(f"train.workers={config.train.workers} needs Ray: leave out cluster.backend=in-process.")
    if connect(config.cluster.address or "auto") and len(nodes()) > 1:
        refuse_unseen_folder(Location.parse(str(output)), "train.output")
    plan = worker_plan(config.train.workers, config.cluster.device, resources())
    train_together(partial(train_once, config, output, number), plan, output, say)


def train_once(config: Config, output: Path, number: int, say: Callable[[str], None], group: Group = ALONE) -> None:
    """Train one model from its beginning or from its last checkpoint; `number`: under which of the mask seeds.

    In a group the first process alone writes and speaks.
    """
    first = group.rank == 0
    torch.manual_seed(config.train.seed)
    base = Location.parse(config.train.base).fetch(cache_folder()) if config.train.base else None
    spec = ModelSpec(config.task.name, config.task.settings, (), "float32", config.gradients.attention)
    task = make_task(spec, base, cache_folder())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with precision(config):
        model = initialise(task, base).to(device)
    if config.train.minimum:
        model.double()
    if first and base and not (base / "config.json").exists():
        say(taken_over(model, base))
    limits = read_limits(base) if base else InputLimits(None, None)
    rows = training_rows(config.corpus, task, limits)
    settings = config.train.settings()
    masked = with_masks(config, model, task, rows, limits, output, number) if config.train.turnover else None
    if masked and config.train.turnover:
        settings = what_trains(model, config.train.turnover, settings, "trainable" in config.train.model_fields_set)
    loss = under_own_masks(masked.turnover, task.loss) if masked else task.loss
    per_epoch = -(-len(rows) // settings.batch_size)
    epochs_end = settings.epochs * per_epoch
    last = epochs_end + (config.train.minimum is not None)
    with precision(config):
        state, log = resumed(output, task, model, say if first else lambda _: None)
    if masked and first and not state:
        masked.look(settings)
    with Progress(console=Console(stderr=True), transient=True, disable=group.size > 1) as progress:
        bar = progress.add_task("training", total=epochs_end, completed=len(log))
        for step in train(model, loss, task.collate, rows, settings, state, group):
            log.append({"step": step.step, "epoch": step.epoch, "learning_rate": step.learning_rate, "loss": step.loss})
            progress.advance(bar)
            if masked and first and step.step % per_epoch == 0:
                masked.curves({"step": step.step, "epoch": step.epoch})
            if step.checkpoint and first:
                folder = output / f"checkpoint-{step.step}"
                save(model, task, folder, masked.turnover if masked else None)
                torch.save(vars(step.state()), folder / OPTIMIZER)
                finish(folder, log, last, identity(config))
                say(f"{folder.name}: epoch {step.epoch:.2f}, loss {recent(log):.4f}")
    if config.train.minimum:
        value, length = to_minimum(config.train.minimum, model, task, rows, settings, say)
        log.append(  # no step of SGD comes from here, so TracIn gives it no weight
            {"step": last, "epoch": settings.epochs, "learning_rate": 0.0, "loss": value, "gradient_norm": length}
        )
        folder = output / f"checkpoint-{last}"
        save(model, task, folder, None)
        finish(folder, log, last, identity(config))
        say(f"{folder.name}: a minimum, objective {value:.6f}, gradient {length:.2g} long")


def to_minimum(
    wanted: MinimumSection, model: nn.Module, task: Task, rows: list[dict], settings: TrainSettings,
    say: Callable[[str], None],
) -> tuple[float, float]:  # fmt: skip
    """Move the weights that train to a minimum over all rows; return the objective there and its gradient's length."""
    freeze(model.eval(), settings.trainable)
    device = next(model.parameters()).device
    parts = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    objective = MeanLoss(model, task.loss, [task.collate(part).to(device) for part in parts], wanted.l2, names)

    def each(length: float) -> None:
        say(f"seeking a minimum: the gradient is {length:.2g} long, asked is {wanted.gradient_norm:.2g}")

    x = minimise(objective, objective.weights, wanted.steps, wanted.rounds, wanted.gradient_norm, each)
    objective.put(x)
    value, gradient = objective.slope(x)
    return value, float(gradient.norm())


def with_masks(
    config: Config, model: nn.Module, task: Task, rows: list[dict], limits: InputLimits, output: Path, number: int
) -> Masked:
    """Put masks on the model and choose the examples of the learning curves: the queries are the test examples."""
    section = config.train.turnover
    assert section is not None
    turnover = add_masks(model, task, section, rows, config.train.seed, number)
    asked = training_rows(config.queries, task, limits) if config.queries else []
    device = next(model.parameters()).device
    looked = [batches(task, part[: section.curves], device) for part in (rows, [row | {"id": -1} for row in asked])]
    return Masked(turnover, task, looked[0], looked[1], output / REPORT)


def training_rows(section: CorpusSection, task: Task, limits: InputLimits) -> list[dict]:
    """Return a corpus as collate reads it, ids in corpus order."""
    records = islice(read_records(section.path, split=section.split), section.limit)
    rows: list[dict] = []
    for record, where in records:
        try:
            encoded = limits.check(encode(task, record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        rows += [record | row | {"id": len(rows) + i} for i, row in enumerate(encoded)]
    if not rows:
        raise ValueError(f"corpus {section.path} is empty: there is nothing to train on")
    return rows


def identity(config: Config) -> dict[str, Any]:
    """Return what a checkpoint's training must have in common with this one, for it to go on from there."""
    ours = config.train.model_dump(exclude={"output": True, "minimum": {"steps", "rounds"}})  # more may be tried
    if config.train.minimum is None:
        del ours["minimum"]  # which earlier versions did not know
    if config.train.turnover and config.train.turnover.head is None:
        del ours["turnover"]["head"]  # nor this
    return {
        "train": ours,
        "task": config.task.model_dump(),
        "corpus": config.corpus.model_dump(exclude={"path"}) | {"content": content(config.corpus.path)},
    }


def last_checkpoint(output: Path) -> Path | None:
    """Return the last whole checkpoint of a folder."""
    whole = {
        int(path.parent.name.removeprefix("checkpoint-")): path.parent for path in output.glob(f"checkpoint-*/{STATE}")
    }
    return whole[max(whole)] if whole else None


def finished(output: Path, ours: dict[str, Any]) -> bool:
    """Tell whether a folder holds a whole training. Raises ValueError if it is another one than this, or unknown."""
    last = last_checkpoint(output)
    if last is None:
        return False
    state = json.loads((last / STATE).read_text())
    theirs = state.get("training")
    if theirs is None or state["global_step"] == state["max_steps"]:
        return True
    if theirs != json.loads(json.dumps(ours)):
        where, before, now = first_difference(theirs, json.loads(json.dumps(ours)))
        raise ValueError(
            f"{output} holds a training that was stopped, with {where}={before!r}; this one has {now!r}. Restore that "
            f"value to go on, remove the folder, or set train.output to another one."
        )
    return False


def resumed(
    output: Path, task: Task, model: nn.Module, say: Callable[[str], None]
) -> tuple[TrainState | None, list[dict[str, Any]]]:
    """Return state and log of the training that was stopped here, its weights put into the model; none at a beginning."""
    last = last_checkpoint(output)
    if last is None:
        return None, []
    model.load_state_dict(task.build(last).state_dict())
    state = TrainState(**torch.load(last / OPTIMIZER, map_location="cpu", weights_only=True))
    say(f"going on from {last.name}")
    return state, json.loads((last / STATE).read_text())["log_history"]


@contextmanager
def precision(config: Config) -> Iterator[None]:
    """Let modules that are made here hold float64 where a minimum is sought, so that nothing they are given is rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.train.minimum else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def taken_over(model: nn.Module, base: Path) -> str:
    """Return which of a torch module's weights its base gave, and which are new."""
    names = list(model.state_dict())
    same = same_weights(model, base)
    new = [name for name in names if name not in same]
    shown = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
    return f"{len(same)} of {len(names)} tensors are the base's; new: {shown or 'none'}"


def recent(log: list[dict[str, Any]], steps: int = 50) -> float:
    """Return the mean loss of the last steps."""
    losses = [entry["loss"] for entry in log[-steps:]]
    return sum(losses) / len(losses)


def save(model: nn.Module, task: Task, folder: Path, turnover: TurnOver | None) -> None:
    """Write weights, tokenizer and masks."""
    save_checkpoint(model, folder)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if turnover is not None:
        turnover.save(folder)


def finish(folder: Path, log: list[dict[str, Any]], last: int, training: dict[str, Any]) -> None:
    """Write trainer_state.json, which comes last and says that the checkpoint is whole; `last`: the training's last step."""
    step, epoch = log[-1]["step"], log[-1]["epoch"]
    state = {"global_step": step, "max_steps": last, "epoch": epoch, "log_history": log, "training": training}
    write_whole(folder / STATE, json.dumps(state, indent=1))


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
