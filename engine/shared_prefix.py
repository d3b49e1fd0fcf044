"""Everything below the first masked layer, computed once for each query and spread over any number of masks.

What a module gave before the first mask was applied depends on no mask. In a replay such a call returns what it returned
when the queries were recorded, repeated for every mask, and only the upper part of the model runs: its own forward is
never rewritten. (engine/prefix.py does the like for frozen weights, in batches of one size.) Outputs that nothing above
reads are never repeated; one probe on two queries finds them. A model whose replay gives other losses is never replayed.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten  # knows transformers' outputs

Run = Callable[[int], Tensor]  # copies -> losses of the queries, repeated so often and each copy under its own mask
Recording = list[tuple[str, Any]]  # module name and output of every call below the first mask, in order


class SharedPrefix:
    """Records and replays the calls below the first mask. `masked()` says whether this forward pass has met one."""

    def __init__(self, model: nn.Module, masked: Callable[[], bool]) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._masked = masked
        self._repeated: list[list[bool]] | None = None  # per call and tensor: along queries; None before the probe
        self._unread: set[int] = set()  # calls whose output nothing above reads
        self._safe = True

    def probe(self, run: Run) -> None:
        """Learn from `run`, whose queries must be two, what to keep; later calls do nothing."""
        if self._repeated is not None:
            return
        recording = self._record(run)
        self._repeated = [[t.dim() > 0 and len(t) == 2 for t in _tensors(output)] for _, output in recording]
        truth, found = run(2), self._replayed(run, recording)
        bound = torch.finfo(truth.dtype).eps ** 0.5
        self._safe = found is not None and torch.allclose(found, truth, rtol=bound, atol=bound)
        for call in range(len(recording) if self._safe else 0):
            self._unread.add(call)
            without = self._replayed(run, recording)
            if without is None or found is None or not torch.equal(without, found):
                self._unread.discard(call)

    def record(self, run: Run) -> Recording | None:
        """Return what the calls below the first mask give for the queries of `run`; None if this model is not replayed."""
        assert self._repeated is not None
        return self._record(run) if self._safe else None

    @contextmanager
    def replay(self, recording: Recording | None, copies: int) -> Iterator[None]:
        """Let the recorded calls return what they gave, repeated for `copies` masks."""
        queues: defaultdict[str, deque[int]] = defaultdict(deque)
        for call, (name, _) in enumerate(recording or []):
            queues[name].append(call)

        def recall(name: str, forward: Callable[[], Any]) -> Any:
            assert recording is not None
            return self._spread(queues[name].popleft(), recording, copies) if queues[name] else forward()

        with self._patched(recall, list(queues)):
            yield

    def _record(self, run: Run) -> Recording:
        recording: Recording = []

        def keep(name: str, forward: Callable[[], Any]) -> Any:
            begin = len(recording)
            output = forward()
            if not self._masked():
                del recording[begin:]  # calls inside this one: a replay never makes them
                recording.append((name, _each(torch.clone, output)))  # what comes later may write into it
            return output

        with self._patched(keep, list(self._modules)):
            run(1)
        if not self._masked():
            raise ValueError("no masked layer took part in the loss: every sub-network would give the same")
        return [
            (name, _each(_nothing, output) if call in self._unread else output)
            for call, (name, output) in enumerate(recording)
        ]

    def _replayed(self, run: Run, recording: Recording) -> Tensor | None:
        """Return the losses of a replay for two masks; None where it cannot run."""
        trial = [(n, _each(_nothing, out) if call in self._unread else out) for call, (n, out) in enumerate(recording)]
        try:
            with self.replay(trial, 2):
                return run(2)
        except RuntimeError:  # shapes that do not go together, or a write into what is not there
            return None

    def _spread(self, call: int, recording: Recording, copies: int) -> Any:
        """Return a recorded output for `copies` masks, mask by mask; what is not along the queries stays as it is."""
        assert self._repeated is not None
        leaves, structure = tree_flatten(recording[call][1])
        along = iter(self._repeated[call])
        repeat = _expanded if call in self._unread else _repeated
        return tree_unflatten(
            [repeat(leaf, copies if next(along) else 1) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            structure,
        )

    @contextmanager
    def _patched(self, around: Callable[[str, Callable[[], Any]], Any], names: list[str]) -> Iterator[None]:
        """Put `around(name, forward)` in the place of these modules' forward."""

        def wrap(name: str, forward: Callable) -> Callable:
            return lambda *args, **kwargs: around(name, lambda: forward(*args, **kwargs))

        own = {name: self._modules[name].__dict__.get("forward") for name in names}
        try:
            for name in names:
                self._modules[name].__dict__["forward"] = wrap(name, self._modules[name].forward)
            yield
        finally:
            for name in names:
                self._modules[name].__dict__.pop("forward", None)
                if own[name] is not None:
                    self._modules[name].__dict__["forward"] = own[name]


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor.clone()


def _expanded(tensor: Tensor, copies: int) -> Tensor:
    return _nothing(tensor, copies) if tensor.is_floating_point() else _repeated(tensor, copies)


def _nothing(tensor: Tensor, copies: int = 1) -> Tensor:
    """Return NaN in the tensor's shape, in the memory of one number; integers stay as they are."""
    if not tensor.is_floating_point():
        return tensor
    shape = (copies * tensor.shape[0], *tensor.shape[1:]) if tensor.dim() else tensor.shape
    return torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(shape)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _each(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Return the output, whatever its structure, with every tensor replaced."""
    return tree_map_only(Tensor, function, output)
