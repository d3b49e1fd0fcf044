"""LoRA adapters in PEFT's format: a base model, and the small matrices A and B that training put beside its layers.

The adapter is never merged into the base: x ↦ W x + s·B(A x) keeps A and B as layers of their own, whose gradients are
those that training followed. Hu et al. 2021, arXiv:2106.09685.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # of every weight's name in an adapter's file
_BROUGHT = "brought_by_adapter"  # attribute of the model: the names of what the adapter's file filled


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def _settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def adapter_base(folder: Path, given: str | None = None) -> Path:
    """Return the folder of the model that an adapter was trained on: the one given, else what the adapter says.

    Raises ValueError if it is not a folder here; nothing is ever downloaded.
    """
    base = given or _settings(folder).get("base_model_name_or_path") or ""
    if not base or not (Path(base) / "config.json").exists():
        raise ValueError(
            f"checkpoint {folder} is a LoRA adapter of the model {base!r}, which is not a model folder on this machine. "
            f"Set task.settings.base to the folder of that model."
        )
    return Path(base)


def with_adapter(model: nn.Module, folder: Path, state: dict[str, Tensor], missing: list[str]) -> nn.Module:
    """Return the base model with the adapter beside its layers; `missing`: weights of the base that no file holds.

    Raises ValueError for another kind of adapter than LoRA, for one that does not fit the base, and for weights that
    neither of them holds.
    """
    peft = _peft()
    if (kind := _settings(folder).get("peft_type")) != "LORA":
        raise ValueError(f"checkpoint {folder} is an adapter of type {kind}: only LORA is supported.")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = model.__dict__.get("name_or_path")  # what peft compares it with
    absent = sorted(set(missing) - {name.removeprefix(_PREFIX) for name in state})
    of_base = {id(weight) for weight in model.parameters()}
    adapted = peft.get_peft_model(model, config)
    own = {name for name, weight in adapted.named_parameters() if id(weight) not in of_base}
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters() if name in state}
    try:
        found = peft.set_peft_model_state_dict(adapted, state)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"adapter {folder} does not fit its base model: {error}") from error
    absent += [name for name in found.missing_keys if name in own]
    if absent or found.unexpected_keys:
        raise ValueError(
            f"adapter {folder} does not fit its base model: {len(absent)} weights are in neither "
            f"({', '.join(absent[:3])}), {len(found.unexpected_keys)} have no place in it "
            f"({', '.join(found.unexpected_keys[:3])}). Set task.settings.base to the model it was trained on."
        )
    named = dict(adapted.named_parameters(remove_duplicate=False))
    filled = {id(weight) for name, weight in named.items() if name not in found.missing_keys}
    same = {id(named[name]) for name, weight in before.items() if torch.equal(named[name], weight)}
    setattr(adapted, _BROUGHT, [name for name, weight in adapted.named_parameters() if id(weight) in filled - same])
    return adapted


def adapter_parameters(model: nn.Module) -> list[str]:
    """Return the names of the weights that a model read by `with_adapter` has from its adapter, none for any other model.

    Everything that the adapter's file fills is one: its matrices, modules saved whole, trained tokens, and the base's own
    weights (biases) where the file holds them with other values than the base.
    """
    return getattr(model, _BROUGHT, [])


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError("this checkpoint is a LoRA adapter: pip install peft to read it") from error
    return peft
