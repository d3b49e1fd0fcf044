"""One vector per example, for nearest neighbours: a task's own features, or a transformers model's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.tasks.contract import Task


def features(task: Task, model: nn.Module, batch: Batch, kind: str) -> Tensor:
    """Return [B, H]: what the task's own `features` gives, else the kind asked for.

    Raises ValueError for a model that has no such output.
    """
    own = getattr(task, "features", None)
    with torch.inference_mode():
        return own(model, batch) if own else FEATURES[kind](base_output(task, model, batch), batch)


def base_output(task: Task, model: nn.Module, batch: Batch) -> Any:
    """Return what the transformers model below the head gives for the batch."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        raise ValueError(
            f"{type(model).__name__} has no features known to us: give the task a method features(model, batch), [B, H]"
        )
    seen: list[Any] = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        task.loss(model, batch)
    finally:
        handle.remove()
    return seen[-1]


def pooled(output: Any, batch: Batch) -> Tensor:
    found = getattr(output, "pooler_output", None)
    if found is None:
        raise ValueError("method.features=pooled: this model has no pooler. Use method.features=last-hidden")
    return found


def last_hidden(output: Any, batch: Batch) -> Tensor:
    """Return the last layer's mean over an example's tokens."""
    mask = batch["attention_mask"].unsqueeze(-1).to(output.last_hidden_state.dtype)
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


FEATURES: dict[str, Callable[[Any, Batch], Tensor]] = {"pooled": pooled, "last-hidden": last_hidden}
