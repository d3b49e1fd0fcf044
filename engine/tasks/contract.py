"""What a task is: how records become batches and per-example losses.

A user's own class needs `build`, `collate` and `loss`; the rest has defaults here, or is done without: `token_losses`,
[B, T], which add up to the loss, let an answer say what each token contributed. One convention holds everywhere:
losses are [B], summed over an example's tokens, never over the batch.

A model may keep each example in its own row of every module's input, b-th example in row b, as most do; or its examples
are run one at a time. Which of the two is seen by holding three examples of a few batches (the first, second, fourth,
eighth …) against the same examples alone. So a model that keeps this order only in some batches (it sorts its rows by
length, or has an image tower that gets as many pictures as there are texts) has to be given to us in a form that never
does, or that does so in those batches too: what a batch looks like may not decide it. Batches of one are always exact.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from engine.adapters import adapter_base, is_adapter
from engine.batches import Batch
from engine.models import import_path
from engine.tasks.text import holds_tokenizer


class Task(Protocol):
    """The part of the contract that every task has."""

    def build(self, folder: Path) -> nn.Module: ...
    def collate(self, rows: list[dict]) -> Batch: ...
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...


BUILT_IN = {
    "text-classification": "engine.tasks.text_classification:TextClassification",
    "causal-lm": "engine.tasks.causal_lm:CausalLM",
    "masked-lm": "engine.tasks.masked_lm:MaskedLM",
    "image-classification": "engine.tasks.image_classification:ImageClassification",
    "regression": "engine.tasks.regression:Regression",
}


def with_model_folder(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a built-in task's settings with tokenizer and class names taken from the model's own folder unless given."""
    if name not in BUILT_IN or settings.get("factory"):
        return settings
    base = adapter_base(folder, settings.get("base")) if is_adapter(folder) else folder
    defaults = {"model": str(base)} | ({"base": str(base)} if base != folder else {})
    if name != "image-classification":
        defaults["tokenizer"] = str(folder if holds_tokenizer(folder) else base)
    return defaults | settings


def load_task(name: str, settings: dict[str, Any]) -> Task:
    """Return a built-in task, or the user's own class by dotted path, made with these settings.

    Raises ValueError for an unknown name, for settings the class does not take, and for a class without the contract.
    """
    if name not in BUILT_IN and ":" not in name:
        raise ValueError(f"task.name={name!r} is not known: use one of {', '.join(BUILT_IN)}, or package.module:Class")
    made = import_path(BUILT_IN.get(name, name))
    try:
        task = made(**settings)
    except TypeError as error:
        raise ValueError(f"task {name} does not take these settings {sorted(settings)}: {error}") from error
    for method in ("build", "collate", "loss"):
        if not callable(getattr(task, method, None)):
            raise ValueError(f"task {name} has no method {method!r}: build, collate and loss are required")
    return task


def encode(task: Task, record: dict) -> list[dict]:
    """Return what the task adds to a record at ingest, one dict per example; nothing by default."""
    own = getattr(task, "encode", None)
    return own(record) if own else [{}]


def measurement(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return what a query asks about, [B]: the loss unless the task says otherwise."""
    own = getattr(task, "measurement", None)
    return own(model, batch) if own else task.loss(model, batch)


def initialise(task: Task, folder: Path | None) -> nn.Module:
    """Return the model that training starts from: the task's own choice, or what `build` reads from the folder."""
    own = getattr(task, "initialise", None)
    if own:
        return own(folder)
    if folder is None:
        raise ValueError("train.base is missing: this task's `build` needs a folder to start from")
    return task.build(folder)


def predict(task: Task, model: nn.Module, batch: Batch) -> list[Any] | None:
    """Return the model's own answers, one per example; None if the task has no notion of one."""
    own = getattr(task, "predict", None)
    return own(model, batch) if own else None
