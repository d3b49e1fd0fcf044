"""Correct a model's mistakes by a few gradient steps on the training examples that would help most.

    python launch/correct.py CONFIG [section.key=value …]             error correction: examples of the corpus
    python launch/correct.py CONFIG correct.pool=NEW.jsonl            augmentation: examples that it was not trained on

CONFIG is that of a job with method fastif (or influence), with a section `correct`; configs/correct.yaml is one. Each round
draws correct.batch anchors from the validation set correct.anchors, scores the corpus for them as launch/score.py does (the
run reads its corpus once and keeps every round's scores), and takes one step of SGD, of correct.learning_rate, on the mean
loss of the correct.points examples with the largest positive influence on all anchors together (FastIF, Guo et al. 2021,
appendix C.3). Only the weights that were scored are changed, and there is no dropout. Loss and accuracy on correct.held_out,
of which nothing is learned, are said before and after; a learning rate is best chosen on another set than that.

Each round leaves a checkpoint in correct.output, with the step, its loss and its examples in trainer_state.json; a
correction that was stopped goes on from the last one. With correct.pool the examples are new ones, scored in a run of their
own (<run>-augment) by the curvature of the pool. Scoring uses the job's workers; steps and evaluation run in this process, on
a GPU if there is one here and cluster.device allows it.
"""

from launch.command import find_modules_here, run_command  # isort: split

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from actors.context import cache_folder, make_task
from actors.prepare import misclassified
from actors.specs import digest
from engine.counters import derive_key, permutation
from engine.limits import read_limits
from engine.methods.contract import inverse_of, load_method
from engine.models import save_checkpoint
from engine.tasks.contract import Task, predict
from launch.config import Config, CorrectSection, load_config
from launch.job import score
from launch.messages import plain_errors, tell
from launch.online import Setting, read_setting
from launch.run import Run
from launch.sources import model_spec
from launch.train import training_rows
from storage.checkpoints import STATE
from storage.readers import read_records

RECORD = "correction.json"  # in correct.output: what its checkpoints were made with
_ROWS = 32  # of a batch that is evaluated

Say = Callable[[str], None]


@dataclass(frozen=True)
class Correction:
    """Loss and accuracy (None without labels) on the held-out set before and after, and the last checkpoint."""

    before: dict[str, float | None]
    after: dict[str, float | None]
    checkpoint: Path


def correct(config: Config, say: Say = tell) -> Correction:
    """Run all rounds that are missing, and evaluate.

    Raises ValueError for a config that cannot be corrected so, naming what to change, and what the job raises.
    """
    asked = checked(config)
    model, folders = model_spec(config, lambda _: None)
    started, folder, output = model.checkpoints[-1], folders[-1], Path(asked.output)
    made = {"correct": asked.model_dump(), "model": started.fingerprint, "method": config.method.model_dump()}
    anchors = read_anchors(asked)
    task = make_task(model, folder, cache_folder())
    held_out, device = training_rows(asked.held_out, task, read_limits(folder)), own_device(config)
    name = claim(output, made)
    before = evaluate(task, task.build(folder).to(device), held_out)
    say(f"before: {described(before)}")
    for number in range(1, asked.rounds + 1):
        target = output / f"corrected-{name}-{number}"  # one name in the run
        if not (target / STATE).exists():
            order = permutation(derive_key(asked.seed, "anchors", number), len(anchors))
            file = write_anchors(output / f"anchors-{number}.jsonl", [anchors[i] for i in order[: asked.batch]])
            job = round_config(config, asked, folder, file, f"{name}-{number}")
            say(f"round {number} of {asked.rounds}: {learn(job, asked, folder, target, started.step + number)}")
        folder = target
    after = evaluate(task, task.build(folder).to(device), held_out)
    say(f"after: {described(after)}")
    return Correction(before, after, folder)


def own_device(config: Config) -> torch.device:
    """Return where this process computes."""
    return torch.device("cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu")


def checked(config: Config) -> CorrectSection:
    """Return the config's section. Raises ValueError if there is none, or for a method whose scores are no influence."""
    if config.correct is None:
        raise ValueError(
            "correct is missing: say which anchors, which held-out set and which folder, for example "
            "correct: {anchors: dev.jsonl, held_out: test.jsonl, output: corrected}"
        )
    if inverse_of(load_method(config.method.name, config.method.settings())) is None:
        raise ValueError(
            f"method.name={config.method.name!r} is not allowed: correct.py goes by influence. Use fastif."
        )
    if "://" in config.correct.output:
        raise ValueError(f"correct.output={config.correct.output!r} is not allowed: name a local folder")
    return config.correct


def read_anchors(asked: CorrectSection) -> list[dict[str, Any]]:
    """Return the validation set that anchors are drawn from. Raises ValueError if it has too few for one round."""
    found = [record for record, _ in read_records(asked.anchors.path, split=asked.anchors.split)][: asked.anchors.limit]
    if len(found) < asked.batch:
        raise ValueError(f"correct.batch={asked.batch} is not allowed: {asked.anchors.path} has {len(found)} records.")
    for name, value in ((name, value) for record in found for name, value in record.items()):
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"field {name!r} of {asked.anchors.path} is a {type(value).__name__}: anchors are written down as JSON. "
                f"Leave the field out, or write it as text or a number."
            ) from error
    return found


def claim(output: Path, made: dict[str, Any]) -> str:
    """Write what the folder's checkpoints are made with, and return its hash.

    Raises ValueError if the folder holds the checkpoints of another correction, or of a training.
    """
    name = digest(made)[:6]
    there = json.loads((output / RECORD).read_text())["hash"] if (output / RECORD).exists() else None
    if there != name and (there or any(output.glob(f"*/{STATE}"))):
        raise ValueError(
            f"correct.output={str(output)!r} already holds other checkpoints: remove them, or name another."
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).write_text(json.dumps(made | {"hash": name}, indent=1))
    return name


def write_anchors(file: Path, anchors: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in anchors))
    return file


def round_config(config: Config, asked: CorrectSection, folder: Path, anchors: Path, name: str) -> Config:
    """Return the job of one round: this model, these anchors as queries, one list of candidates for all of them."""
    data = config.model_dump(exclude_unset=True)
    data["checkpoints"] = {"path": [str(folder)]}
    data["queries"] = {"name": f"anchors-{name}", "path": str(anchors)}
    data["output"] = data.get("output", {}) | {"label": f"correct-{name}"}
    if config.method.name == "fastif":
        data["method"]["anchors"] = True
    if asked.pool is not None:
        data["corpus"] = asked.pool.model_dump()
        data["run"] = data["run"] | {"uri": f"{config.run.uri}-augment"}  # a run has one corpus
    return Config.model_validate(data)


def learn(job: Config, asked: CorrectSection, folder: Path, target: Path, step: int) -> str:
    """Score, take one step on the most helpful examples, leave the checkpoint; return what was learned from."""
    label = score(job, lambda _: None)
    run = Run.open(job.run.uri)
    index = run.index(label)
    columns = (batch.to_pydict() for batch in index.table("by_example", ["id", "total"]))
    totals = [(total, example) for part in columns for example, total in zip(part["id"], part["total"], strict=True)]
    helpful = sorted(((t, i) for t, i in totals if t is not None and t > 0), key=lambda one: (-one[0], one[1]))
    if not helpful:
        raise ValueError(f"no example of {job.corpus.path} would help these anchors: take a larger method.neighbours")
    chosen = sorted(example for _, example in helpful[: asked.points])
    setting, device = read_setting(run.location, index), own_device(job)
    loss = descend(setting, folder, target, chosen, asked.learning_rate, step, device)
    return f"a step on {len(chosen)} examples of mean loss {loss:.4f}, {', '.join(map(str, chosen[:8]))}"


def descend(
    setting: Setting, folder: Path, target: Path, examples: list[int], rate: float, step: int, device: torch.device
) -> float:
    """Take one step of SGD on these examples along the weights that were scored; return their mean loss before it."""
    task, score_ = setting.task, setting.score
    model = task.build(folder).to(device).eval()  # no dropout: the step is the one that was scored
    named = dict(model.named_parameters())
    weights = [named[name].requires_grad_() for name in setting.gradients.parameters]
    rows = setting.context.rows_of(score_.home, score_.corpus, torch.tensor(examples).numpy())
    loss = task.loss(model, task.collate(rows).to(device)).mean()
    with torch.no_grad():
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
            weight -= rate * slope
    mean = loss.item()
    save_checkpoint(model, target)
    if (tokenizer := getattr(task, "tokenizer", None)) is not None:
        tokenizer.save_pretrained(target)
    log = [{"step": step, "learning_rate": rate, "loss": mean, "examples": examples}]
    (target / STATE).write_text(json.dumps({"global_step": step, "log_history": log}, indent=1))  # last: it is whole
    return mean


def evaluate(task: Task, model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean loss of these rows, and the share of them that the model gets right if the task has labels."""
    model.eval()
    device = next(model.parameters()).device
    losses: list[float] = []
    wrong: list[bool] = []
    with torch.inference_mode():
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS]
            batch = task.collate(part).to(device)
            losses += task.loss(model, batch).tolist()
            answers = predict(task, model, batch) or [None] * len(part)
            judged = (misclassified(task, row, answer) for row, answer in zip(part, answers, strict=True))
            wrong += [one for one in judged if one is not None]
    return {"loss": sum(losses) / len(losses), "accuracy": 1 - sum(wrong) / len(wrong) if wrong else None}


def described(found: dict[str, float | None]) -> str:
    accuracy = "" if found["accuracy"] is None else f", accuracy {found['accuracy']:.4f}"
    return f"held-out loss {found['loss']:.4f}{accuracy}"


def main(
    config: Annotated[str, typer.Argument(help="YAML file; `score.py --help` lists its sections")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Correct the model of a config."""
    find_modules_here()
    with plain_errors():
        print(f"the corrected model is in {correct(load_config(config, overrides)).checkpoint}")


if __name__ == "__main__":
    run_command(main)
