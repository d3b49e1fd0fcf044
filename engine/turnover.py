"""Turn-over dropout: which layers of a model are masked, under whose mask the next forward pass runs, and its record.

    turnover = TurnOver(model, after=["features.11"])
    …
    turnover.use(ids)            # before each training step's forward pass: row i runs under the mask of example ids[i]

Masks stay in force in eval(), under gradient checkpointing (until the next `use`) and beside ordinary dropout. What they
do not cover leaks, and is listed by engine/leaks.py. Source: Kobayashi et al. 2020, section 3.2.
"""

import fnmatch
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.batches import Batch
from engine.bottleneck import BOTTLENECK, adapter_widths, restore_adapters
from engine.convolution import CONVOLUTIONS
from engine.masks import Masks, MaskSettings, Side, factor
from engine.models import read_state
from engine.norms import CHANNELS_SECOND

RECORD = "turnover.json"  # beside the weights of a checkpoint
IDS = "example_ids"  # an input that the model's own forward never sees
_FEATURES_LAST = (nn.Linear, Conv1D, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
Loss = Callable[[nn.Module, Batch], Tensor]


class TurnOver:
    """The masks on a model's layers, and the ids whose masks the next forward pass uses.

    `after` and `before` are globs over module names: the module's output, or its first input, is masked. One of them on
    each side of a weight matrix keeps what z taught it out of f^m̃(z). A model trained through a Trainer is given its ids
    as the input `example_ids`: they are taken before its own forward, and only used while it trains.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | MaskSettings | None = None,  # None: the paper's, p = 0.5
        after: Sequence[str] = (),
        before: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.masks = masks if isinstance(masks, Masks) else Masks(masks or MaskSettings())
        self.after, self.before = _matching(model, after), _matching(model, before)
        self.widths: dict[str, int] = {}  # masked layer -> units, known once it has run
        if not self.after and not self.before:
            raise ValueError("turn-over dropout has no layer to mask: name modules in `after` or `before`.")
        modules = dict(model.named_modules())
        self._handles = [
            model.register_forward_pre_hook(self._take_ids, with_kwargs=True),
            *(modules[name].register_forward_hook(partial(self._after, name)) for name in self.after),
            *(
                modules[name].register_forward_pre_hook(partial(self._before, f"{name}.input"), with_kwargs=True)
                for name in self.before
            ),
        ]
        self._ids: Tensor | None = None
        self._side: Side = "own"
        self._queries = 1
        self._bits: dict[str, Tensor] = {}  # of the masks in force, layer by layer
        self.masked = False  # whether a mask was applied since the last `use` or `off`

    def use(self, ids: Tensor, side: Side = "own", queries: int = 1) -> None:
        """Run the next forward passes under these examples' masks: of `queries` rows in a row for each id.

        Raises ValueError for a negative id: a query, which no mask belongs to.
        """
        if len(ids) and int(ids.min()) < 0:
            raise ValueError(f"example id {int(ids.min())} is not allowed: only stored examples, ids >= 0, have masks.")
        self._ids, self._side, self._queries, self._bits, self.masked = ids, side, queries, {}, False

    def off(self) -> None:
        """Run the next forward passes without masks: f_D, the full network."""
        self._ids, self._bits, self.masked = None, {}, False

    def remove(self) -> None:
        """Take the masks off the model."""
        for handle in self._handles:
            handle.remove()

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: with its weights it draws the same masks again."""
        return {
            "masks": asdict(self.masks.settings),
            "after": self.after,
            "before": self.before,
            "widths": self.widths,
            "adapters": adapter_widths(self.model),
            "duplicates": self.masks.duplicates.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder."""
        (folder / RECORD).write_text(json.dumps(self.record(), indent=1))

    def _take_ids(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if IDS not in kwargs:
            return None
        ids = kwargs.pop(IDS)
        self.use(ids) if self.model.training else self.off()
        return args, kwargs

    def _after(self, layer: str, module: nn.Module, _: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._multiplied(layer, module, output[0]), *output[1:])
        return self._multiplied(layer, module, output)

    def _before(self, layer: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if args:
            return (self._multiplied(layer, module, args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: self._multiplied(layer, module, kwargs[first])}

    def _multiplied(self, layer: str, module: nn.Module, x: Tensor) -> Tensor:
        """Return x times the masks in force; the full network's x while there are none."""
        if self._ids is None:
            if module.training:
                raise ValueError(f"layer {layer} trains without masks: call turnover.use(ids) before the forward pass")
            return x
        if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != len(self._ids) * self._queries:
            raise ValueError(
                f"layer {layer} holds {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__} for "
                f"{len(self._ids)} ids x {self._queries} queries: a masked layer keeps one example in each row"
            )
        dim = feature_dimension(module, x)
        self.masked = True
        mask = factor(self._drawn(layer, x.shape[dim], x.device), self._side, self.masks.settings, x.dtype)
        shape = [len(self._ids), 1, *(1 for _ in x.shape[1:])]
        shape[dim + 1] = x.shape[dim]
        return (x.unflatten(0, (len(self._ids), self._queries)) * mask.view(shape)).flatten(0, 1)

    def _drawn(self, layer: str, width: int, device: torch.device) -> Tensor:
        """Return bool [ids, width]: the masks of all layers known so far are drawn in one go."""
        if self.widths.setdefault(layer, width) != width:
            raise ValueError(
                f"layer {layer} has {width} features, had {self.widths[layer]} before: masks need a fixed number. Mask "
                f"a module whose features stand in the last dimension, or a convolution."
            )
        if layer not in self._bits:
            assert self._ids is not None
            left = {name: units for name, units in self.widths.items() if name not in self._bits}
            self._bits |= self.masks.bits(self._ids.to(device), left)
        return self._bits[layer]


def feature_dimension(module: nn.Module, x: Tensor) -> int:
    """Return the dimension that a mask runs along: channels of what convolutions and channel norms hold, else the last."""
    if isinstance(module, _FEATURES_LAST):
        return x.dim() - 1
    return 1 if isinstance(module, (*CONVOLUTIONS, *CHANNELS_SECOND)) or x.dim() > 3 else x.dim() - 1


def under_own_masks(turnover: TurnOver, loss: Loss) -> Loss:
    """Return the loss under each example's own mask: what training on a corpus minimises."""

    def masked(model: nn.Module, batch: Batch) -> Tensor:
        turnover.use(batch.ids)
        return loss(model, batch)

    return masked


@contextmanager
def evaluating(turnover: TurnOver) -> Iterator[None]:
    """Switch ordinary dropout off and begin without masks; leave without them, every module in the mode it had."""
    modes = {module: module.training for module in turnover.model.modules()}
    turnover.model.eval()
    turnover.off()
    try:
        yield
    finally:
        turnover.off()
        for module, mode in modes.items():
            module.training = mode


def restore(model: nn.Module, folder: Path) -> TurnOver:
    """Return the masks of a checkpoint, put back on the plain model that was built from its folder, adapters included.

    Raises ValueError if the folder has no record or lacks an adapter's weights.
    """
    if not (folder / RECORD).exists():
        raise ValueError(f"{folder} has no {RECORD}: it was not trained with turn-over dropout")
    record = json.loads((folder / RECORD).read_text())
    if missing := sorted(record["adapters"].keys() - adapter_widths(model).keys()):
        state = read_state(folder)
        if lacking := [name for name in missing if f"{name}{BOTTLENECK}" not in state]:
            raise ValueError(f"checkpoint {folder} lacks the adapter weights {lacking[0]}{BOTTLENECK}")
        restore_adapters(model, state, str(folder))
    masks = Masks(MaskSettings(**record["masks"]), torch.tensor(record["duplicates"], dtype=torch.int64).view(-1, 2))
    turnover = TurnOver(model, masks, record["after"], record["before"])
    turnover.widths = record["widths"]
    return turnover


def _matching(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Return the names of the modules that a glob names. Raises ValueError for one that names none."""
    names = [name for name, _ in model.named_modules() if name]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ValueError(
                f"no module of {type(model).__name__} matches {glob!r}. It has, for example, {', '.join(names[-4:])}; "
                f"globs such as '*.adapter.act' are allowed."
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
