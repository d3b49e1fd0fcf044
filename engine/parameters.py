"""Which parameters are looked at, and how a module uses each of them.

A parameter is a weight matrix or a vector. A matrix is always read as (O, I), whatever way round its module stores it:
Linear as stored, GPT-2's Conv1D transposed, an Embedding as (width, vocabulary), a convolution as (O, I·kh·kw), the fused
weights of E experts as (E·O, I). A parameter that two modules share (a tied head) is one parameter with two uses, in the
orientation of its Linear use.
"""

import fnmatch
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from engine.convolution import CONVOLUTIONS
from engine.norms import CHANNELS_SECOND, is_scaled_norm


@dataclass(frozen=True)
class Use:
    """One module's use of a parameter."""

    module: str  # name in model.named_modules()
    role: str  # linear | conv1d | convolution | embedding | embedding-transposed | bias | scale | experts


@dataclass(frozen=True)
class Parameter:
    """A weight matrix (O, I), or a vector (O,) with I = 0."""

    name: str  # the first of its names in model.named_parameters()
    out_features: int
    in_features: int  # 0 for a vector
    uses: tuple[Use, ...]

    @property
    def is_vector(self) -> bool:
        return self.in_features == 0

    @property
    def is_fused(self) -> bool:
        """Tell whether it holds several experts: its uses are no modules of their own, so no hook sees them."""
        return any(use.role == "experts" for use in self.uses)

    @property
    def size(self) -> int:
        return self.out_features * max(1, self.in_features)


_BASES = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm, nn.RMSNorm, _BatchNorm, nn.GroupNorm, *CONVOLUTIONS)


def _role(module: nn.Module, leaf: str, weight: torch.Tensor) -> str | None:
    """Return how this module uses its parameter, None if per-example gradients of it are not supported."""
    if any(isinstance(module, base) and type(module).forward is not base.forward for base in _BASES):
        return None  # its input or output is not the layer's own: scaled embeddings, positions with an offset
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads this weight without calling the module: no hook would fire
    if isinstance(module, nn.Linear):
        return {"weight": "linear", "bias": "bias"}.get(leaf)
    if isinstance(module, Conv1D):
        return {"weight": "conv1d", "bias": "bias"}.get(leaf)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return None
        return {"weight": "embedding"}.get(leaf)
    if isinstance(module, CONVOLUTIONS):
        return {"weight": "convolution", "bias": "bias"}.get(leaf)
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return None  # the statistics of the batch tie its examples together
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *CHANNELS_SECOND)) and weight.dim() == 1:
        return {"weight": "scale", "bias": "bias"}.get(leaf)
    if weight.dim() and getattr(module, "num_experts", None) == len(weight):
        return "experts"  # fused experts and their routers: one slice of the parameter for each expert
    return "scale" if is_scaled_norm(module) else None


def _shape(role: str, weight: torch.Tensor) -> tuple[int, int]:
    """Return (O, I) of a use; I = 0 for a vector."""
    if weight.dim() == 1:
        return weight.shape[0], 0
    if role == "convolution":
        return weight.shape[0], weight[0].numel()
    if role == "experts":
        return weight.shape[:-1].numel(), weight.shape[-1]
    rows, columns = weight.shape
    return (rows, columns) if role == "linear" else (columns, rows)


def supported_parameters(model: nn.Module) -> tuple[list[Parameter], list[str]]:
    """Return every parameter whose per-example gradient the hooks can take, and the names of the others."""
    uses: dict[int, list[tuple[Use, tuple[int, int]]]] = {}
    unsupported: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            role = _role(module, leaf, weight)
            if role is None and not _held_for_a_child(module, weight):
                unsupported.add(id(weight))
            elif role is not None:
                uses.setdefault(id(weight), []).append((Use(module_name, role), _shape(role, weight)))
    found, others = [], []
    for name, weight in model.named_parameters():
        if id(weight) in unsupported or id(weight) not in uses:
            others.append(name)
            continue
        found.append(_parameter(name, uses[id(weight)]))
    return found, others


def _held_for_a_child(module: nn.Module, weight: torch.Tensor) -> bool:
    """Tell whether the module names the bias of a Linear inside it once more, as BERT's prediction heads do."""
    return any(isinstance(child, nn.Linear) and child.bias is weight for child in module.children())


def _parameter(name: str, uses: list[tuple[Use, tuple[int, int]]]) -> Parameter:
    """Return one parameter with its uses brought to a common orientation: a Linear's if it has one.

    Raises ValueError for a weight that a Linear and a Conv1D share. Roles decide, not shapes: a square one is no exception.
    """
    roles = {use.role for use, _ in uses}
    if roles >= {"linear", "conv1d"}:
        raise ValueError(f"parameter {name} is shared by a Linear and a Conv1D, in two orientations: not supported")
    if "linear" not in roles:
        return Parameter(name, *uses[0][1], tuple(use for use, _ in uses))
    shape = next(shape for use, shape in uses if use.role == "linear")
    turned = (Use(use.module, use.role.replace("embedding", "embedding-transposed")) for use, _ in uses)
    return Parameter(name, *shape, tuple(turned))


def select_parameters(model: nn.Module, patterns: Iterable[str]) -> list[Parameter]:
    """Return the supported parameters whose own name, or the name of a module around them, matches a glob.

    `classifier`, `bert.encoder.layer.1[01]*` and `*.bias` all work. A tied parameter answers to each of its names.
    Raises ValueError for a pattern that matches nothing; warns of a match that the hooks cannot take.
    """
    found, unsupported = supported_parameters(model)
    by_name = {parameter.name: parameter for parameter in found}
    chosen = matching(model, patterns)
    if not chosen:
        raise ValueError(
            "gradients.modules is an empty list: name at least one module, or leave it out for the default"
        )
    skipped = sorted(chosen & set(unsupported))
    if skipped:
        warnings.warn(f"no per-example gradients for {', '.join(skipped[:5])} ({len(skipped)} in all)", stacklevel=2)
    selected = [by_name[name] for name in by_name if name in chosen]
    if not selected:
        raise ValueError(f"none of the chosen parameters is supported: {', '.join(skipped[:5])}")
    return selected


def matching(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Return the first names of the parameters that a glob matches. Raises ValueError for one that matches nothing."""
    first_name = {id(weight): name for name, weight in model.named_parameters()}
    names = {name: first_name[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {own for name, own in names.items() if matches(name, pattern)}
        if not matched:
            raise ValueError(
                f"gradients.modules={pattern!r} matches no parameter. The model has, for example, "
                f"{', '.join(list(names)[-4:])}; globs such as '*.attention.*' are allowed."
            )
        chosen |= matched
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Tell whether the glob matches this parameter or any module that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def changed_parameters(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Return the names whose values differ between two state dicts: what training moved."""
    return [
        name
        for name, weight in after.items()
        if name in before and weight.is_floating_point() and not torch.equal(before[name], weight)
    ]
