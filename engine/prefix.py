"""Frozen lower layers computed once: what the modules below the chosen weights gave is kept and handed back.

A module call is frozen if its output depends on no chosen weight. In a replay such a module returns what it returned when
the batch was recorded, so only the upper part of the model runs: the model's own forward is never rewritten. Outputs that
nothing above reads (all layers but the last frozen one) are replaced by NaN and not kept; one probe on the first batch
finds them. A model whose replay is not bitwise the same is never replayed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only  # knows transformers' outputs

Call = tuple[str, int]  # module name, and which of its calls in one forward pass
Recording = dict[Call, Any]  # the output of every frozen call


class Prefix:
    """The modules of a model that hold none of the chosen weights, and whether replaying them is safe."""

    def __init__(self, model: nn.Module, chosen: Iterable[str]) -> None:
        named = dict(model.named_parameters())
        weights = {id(named[name]) for name in chosen}
        self._modules = dict(_without(model, "", weights))
        self._unread: set[Call] | None = None  # frozen calls that nothing above reads; None before the probe
        self._safe = True

    def record(self, run: Callable[[], Tensor]) -> Recording | None:
        """Return the frozen calls' outputs in `run`, which must put chosen weights that require grad into the model.

        None if there are none, or if this model cannot be replayed.
        """
        if not self._safe:
            return None
        recording: Recording = {}

        def keep(call: Call, forward: Callable[[], Any]) -> Any:
            output = forward()
            found = _tensors(output)
            if found and not any(t.requires_grad for t in found):
                recording[call] = _each(torch.clone, output)
            return output

        with self._patched(keep):
            truth = run().detach()
        if self._unread is None:
            self._probe(recording, run, truth)
        if not self._safe or not recording:
            return None
        assert self._unread is not None
        return {call: _each(_nothing, output) if call in self._unread else output for call, output in recording.items()}

    @contextmanager
    def replay(self, recording: Recording | None) -> Iterator[None]:
        """Let the frozen calls return what was recorded."""
        if recording is None:
            yield
            return

        def recall(call: Call, forward: Callable[[], Any]) -> Any:
            return _each(torch.clone, recording[call]) if call in recording else forward()

        with self._patched(recall):
            yield

    def _probe(self, recording: Recording, run: Callable[[], Tensor], truth: Tensor) -> None:
        """Find the outputs that may be NaN without a change of one bit in the losses."""

        def same(changed: Recording) -> bool:
            with self.replay(changed):
                return torch.equal(run().detach(), truth)

        self._safe, self._unread = same(recording), set()
        if not self._safe:
            return
        for call in recording:
            tried = self._unread | {call}
            if same({c: _each(_nothing, out) if c in tried else out for c, out in recording.items()}):
                self._unread = tried

    @contextmanager
    def _patched(self, around: Callable[[Call, Callable[[], Any]], Any]) -> Iterator[None]:
        """Put `around(call, forward)` in the place of every such module's forward."""
        counts = dict.fromkeys(self._modules, 0)

        def wrap(name: str, forward: Callable) -> Callable:
            def patched(*args: Any, **kwargs: Any) -> Any:
                counts[name] += 1
                return around((name, counts[name]), lambda: forward(*args, **kwargs))

            return patched

        own = {name: module.__dict__.get("forward") for name, module in self._modules.items()}
        try:
            for name, module in self._modules.items():
                module.__dict__["forward"] = wrap(name, module.forward)
            yield
        finally:
            for name, module in self._modules.items():
                module.__dict__.pop("forward")
                if own[name] is not None:
                    module.__dict__["forward"] = own[name]


def recorded_bytes(recording: Recording) -> int:
    """Return the memory that a recording holds."""
    return sum(t.untyped_storage().nbytes() for output in recording.values() for t in _tensors(output))


def _without(module: nn.Module, name: str, weights: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that hold none of the weights."""
    for leaf, child in module.named_children():
        path = f"{name}.{leaf}" if name else leaf
        if any(id(weight) in weights for weight in child.parameters()):
            yield from _without(child, path, weights)
        else:
            yield path, child


def _nothing(tensor: Tensor) -> Tensor:
    """Return NaN in the tensor's shape, in the memory of one number; integers stay as they are."""
    return torch.full((), torch.nan, dtype=tensor.dtype).expand(tensor.shape) if tensor.is_floating_point() else tensor


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _each(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Return the output, whatever its structure, with every tensor replaced."""
    return tree_map_only(Tensor, function, output)
