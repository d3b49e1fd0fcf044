"""One vector per example: for nearest neighbours, and as the input of a last layer that is trained again."""

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
        return own(model, batch) if own else FEATURES[kind](task, model, batch)


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


def pooled(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    found = getattr(base_output(task, model, batch), "pooler_output", None)
    if found is None:
        raise ValueError("method.features=pooled: this model has no pooler. Use method.features=last-hidden")
    return found


def last_hidden(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return the last layer's mean over an example's tokens."""
    output = base_output(task, model, batch)
    states = output.last_hidden_state
    if states.dim() != 3:
        raise ValueError(
            f"method.features=last-hidden needs states [examples, tokens, width]; {type(model).__name__} gives "
            f"{tuple(states.shape)}. Give the task a method `features(model, batch)` of its own."
        )
    if "attention_mask" not in batch.tensors:
        return states.mean(1)
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


def head_input(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return what the last Linear layer of the forward pass is given.

    Raises ValueError where that is not one vector per example.
    """
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        task.loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or seen[-1].dim() != 2 or len(seen[-1]) != len(batch):
        found = f"given {list(seen[-1].shape)} for {len(batch)} examples" if seen else "not there"
        raise ValueError(
            f"the last Linear layer of {type(model).__name__} is {found}: give the task a method features(model, batch) "
            f"that returns its inputs, [B, H]"
        )
    return seen[-1]


def classes(task: Task, batch: Batch) -> Tensor:
    """Return the examples' classes, int64 [B], on the CPU. Raises ValueError for a task that is no classification."""
    found = batch.tensors.get("target")
    if found is None or found.shape != (len(batch),) or found.dtype != torch.int64:
        seen = "no tensor" if found is None else f"{found.dtype} {list(found.shape)}"
        raise ValueError(
            f"method representer needs classes: batches of {type(task).__name__} hold {seen} 'target', and it takes whole "
            f"numbers, int64 [B]"
        )
    return found.cpu()


FEATURES: dict[str, Callable[[Task, nn.Module, Batch], Tensor]] = {
    "pooled": pooled,
    "last-hidden": last_hidden,
    "head": head_input,
}
