"""Bottleneck adapters of Houlsby et al. 2019 (arXiv:1902.00751): small layers beside frozen pretrained weights.

An adapter h ↦ h + up(act(down(h))) follows the output projections of attention and of the feed-forward layers, before the
residual sum. It is a child of the projection, whose weights keep their names: a checkpoint with adapters still loads into
the plain model. LoRA adapters in PEFT's format are another thing: engine/adapters.py.

A classification head takes another child of that name: a hidden layer beside its last Linear, W x + b + up(act(down(x))).
It runs once for a text and not for every token, so that it may have as many units as turn-over dropout wants masked.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.counters import derive_key, normals

PROJECTIONS = (
    "*.output.dense",  # BERT, RoBERTa, ELECTRA: attention.output.dense and output.dense
    "*.attention.out_lin", "*.ffn.lin2",  # DistilBERT
    "*.attn.c_proj", "*.mlp.c_proj",  # GPT-2
    "*.self_attn.o_proj", "*.mlp.down_proj",  # Llama, Mistral, Qwen, Gemma
    "*_attn.out_proj", "*.fc2",  # BART
    "*.attention.o_proj",  # ViT, with fc2
    "*Attention.o", "*.DenseReluDense.wo",  # T5
)  # fmt: skip
PLACE = "*.adapter.act"  # where turn-over dropout masks an adapter: its bottleneck
TRAINED = "*.adapter.*"  # the adapters' own weights
BOTTLENECK = ".adapter.down.weight"  # by the end of its name an adapter is known in a checkpoint
_OWN = ".adapter."  # in the names of an adapter's layers
_DEVIATION = 1e-2  # of the first weights, cut at twice this: Houlsby et al., section 3.6


class Adapter(nn.Module):
    """h ↦ h + up(act(down(h))), close to the identity at first."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(features, width), nn.GELU(), nn.Linear(width, features)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(self.act(self.down(h)))


class AdaptedLinear(nn.Linear):
    """A Linear whose call is its own call, hooks included, and then its adapter."""

    adapter: Adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(super().__call__(*args, **kwargs))


class AdaptedConv1D(Conv1D):
    """The same for GPT-2's transposed Linear."""

    adapter: Adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(super().__call__(*args, **kwargs))


class HiddenLayer(nn.Module):
    """x ↦ up(act(down(x))), 0 at first."""

    def __init__(self, features: int, width: int, outputs: int) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(features, width), nn.GELU(), nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))


class WideLinear(nn.Linear):
    """A head's Linear whose call is its own call, hooks included, plus what a hidden layer makes of its input."""

    adapter: HiddenLayer

    def __call__(self, input: Tensor) -> Tensor:
        return super().__call__(input) + self.adapter(input)


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AdaptedLinear, Conv1D: AdaptedConv1D}


def add_adapters(
    model: nn.Module,
    width: int,  # units of the bottleneck
    projections: Sequence[str] = PROJECTIONS,  # globs over module names
    seed: int = 0,
) -> list[str]:
    """Put an adapter behind every projection that a glob names, in place; return the projections' names.

    First weights come from counters keyed by (seed, name). Raises ValueError if nothing matches, or if a match is no
    plain Linear or Conv1D.
    """
    if width < 1:
        raise ValueError(f"adapter width {width} is not allowed: must be at least 1. The paper uses 8 to 256.")
    chosen = {name: model.get_submodule(name) for name in matching_projections(model, projections)}
    if not chosen:
        raise ValueError(
            f"no module of {type(model).__name__} matches {', '.join(projections)}: name the output projections of its "
            f"attention and feed-forward layers. It has, for example, {', '.join(linear_names(model)[-4:])}."
        )
    for name, module in chosen.items():
        if type(module) not in _ADAPTED:
            raise ValueError(f"module {name} is a {type(module).__name__}: only a Linear or Conv1D takes an adapter")
        _adapt(module, width, derive_key(seed, "adapter", name))
    return list(chosen)


def widen_head(
    model: nn.Module,
    width: int,  # units of the hidden layer
    name: str | None = None,  # of the Linear beside which it goes; None: the last of the model's head
    seed: int = 0,
) -> str:
    """Put a hidden layer beside a head's Linear, in place; return that one's name.

    The model gives what it gave until the layer is trained. Its first weights come from counters keyed by (seed, name).
    Raises ValueError for a model without a head.
    """
    if not (layers := [name] if name else head_layers(model)):
        raise ValueError(
            f"{type(model).__name__} has no head of its own beside its pretrained body: only a classifier or regressor takes a "
            f"wide head."
        )
    _widen(model.get_submodule(layers[-1]), width, derive_key(seed, "wide head", layers[-1]))
    return layers[-1]


def top_third(projections: Sequence[str]) -> list[str]:
    """Return the projections in the highest third of the layers, whose number stands in their names; rounded up."""
    numbers = {name: int(found[0]) for name in projections if (found := re.findall(r"(?<=\.)\d+(?=\.)", name))}
    layers = sorted(set(numbers.values()))
    upper = set(layers[len(layers) * 2 // 3 :])
    return [name for name in projections if numbers.get(name) in upper]


def matching_projections(model: nn.Module, projections: Sequence[str] = PROJECTIONS) -> list[str]:
    """Return the modules that one of the globs names: the output projections of attention and feed-forward layers."""
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in projections)]


def head_layers(model: nn.Module) -> list[str]:
    """Return the Linear layers of a transformer that lie outside its pretrained body: the head that is trained anew.

    A language model's output layer that is tied to its embedding is no such head.
    """
    body = getattr(model, "base_model", model)
    if body is model:
        return []
    inside = {id(weight) for weight in body.parameters()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in inside and _OWN not in name
    ]


def restore_adapters(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put the adapters of a checkpoint's weights back on the plain model, in place; none if it has none.

    Raises ValueError for an adapter that this model has no place for, or of which a weight is missing.
    """
    widths = {name.removesuffix(BOTTLENECK): len(weight) for name, weight in state.items() if name.endswith(BOTTLENECK)}
    places = dict(model.named_modules())
    for name, width in widths.items():
        if name not in places:
            raise ValueError(
                f"checkpoint {where} holds an adapter of {name}, which {type(model).__name__} does not have"
            )
        if name not in adapter_widths(model):
            widen_head(model, width, name) if name in head_layers(model) else add_adapters(model, width, [name])
    own = {name for name in model.state_dict() if any(name.startswith(f"{place}{_OWN}") for place in widths)}
    if missing := sorted(own - state.keys()):
        raise ValueError(f"checkpoint {where} lacks the adapter weights {', '.join(missing[:3])}")
    model.load_state_dict({name: state[name] for name in own}, strict=False)


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the modules that could take an adapter."""
    return [name for name, module in model.named_modules() if type(module) in _ADAPTED]


def adapter_widths(model: nn.Module) -> dict[str, int]:
    """Return the name of every projection that has an adapter and of a wide head, and the adapter's width."""
    return {
        name: module.adapter.down.out_features
        for name, module in model.named_modules()
        if isinstance(module, (AdaptedLinear, AdaptedConv1D, WideLinear))
    }


def _adapt(module: nn.Module, width: int, key: int) -> None:
    weight = next(module.parameters())
    features = module.nf if isinstance(module, Conv1D) else weight.shape[0]
    adapter = Adapter(features, width).to(weight.device, weight.dtype).train(module.training)
    drawn = torch.from_numpy(normals(key, 0, 2 * width * features)).clamp(-2, 2) * _DEVIATION
    with torch.no_grad():
        for linear, part in zip((adapter.down, adapter.up), drawn.chunk(2), strict=True):
            linear.weight.copy_(part.view(linear.weight.shape))
            linear.bias.zero_()
    module.__class__ = _ADAPTED[type(module)]
    module.adapter = adapter


def _widen(head: Any, width: int, key: int) -> None:
    outputs, features = head.weight.shape
    hidden = HiddenLayer(features, width, outputs).to(head.weight.device, head.weight.dtype).train(head.training)
    drawn = torch.from_numpy(normals(key, 0, width * features)).clamp(-2, 2) / features**0.5
    with torch.no_grad():
        hidden.down.weight.copy_(drawn.view(width, features))
        hidden.down.bias.zero_()
        hidden.up.weight.zero_()
    head.__class__ = WideLinear
    head.adapter = hidden
