"""Models: read from a local folder, made ready for scoring, fingerprinted.

Weights come from safetensors, or from torch files with weights_only=True; code that lies beside weights is never run.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import logging

from engine.adapters import adapter_base, is_adapter, with_adapter
from engine.attention import attend_in_float32
from engine.bottleneck import BOTTLENECK, restore_adapters

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def import_path(path: str) -> Any:
    """Return what `package.module:name` names. Raises ValueError saying which half was not found."""
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} is not a dotted path: write it as package.module:Name")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"{path!r}: no module {module_name!r} on the Python path. Run from its folder.") from error
    if not hasattr(module, name):
        raise ValueError(f"{path!r}: module {module_name!r} has no {name!r}")
    return getattr(module, name)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and load reports: what matters in them is checked here."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_hugging_face(
    folder: Path,
    auto_class: Any,
    attention: str,
    base: str | None = None,  # folder of the model that a LoRA adapter stands on, where the adapter does not say it
    **settings: Any,
) -> nn.Module:
    """Return a transformers model with every weight found in the folder, or in an adapter and its base.

    Raises ValueError naming the weights if some are missing or have another shape: a checkpoint of another architecture.
    """
    if is_adapter(folder):
        model, missing, mismatched = _read_hugging_face(adapter_base(folder, base), auto_class, attention, **settings)
        _refuse_other_architecture(folder, type(model).__name__, [], mismatched)
        return with_adapter(model, folder, read_state(folder), missing)
    model, missing, mismatched = _read_hugging_face(folder, auto_class, attention, **settings)
    _refuse_other_architecture(folder, type(model).__name__, missing, mismatched)
    if any(name.endswith(BOTTLENECK) for file in weight_files(folder) for name in _shapes(file)):
        restore_adapters(model, read_state(folder), str(folder))
    return model


def _read_hugging_face(
    folder: Path, auto_class: Any, attention: str, **settings: Any
) -> tuple[nn.Module, list[str], list[str]]:
    """Return the model that a folder holds, with the names of weights that are missing or have another shape."""
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} has no config.json: not a Hugging Face model folder. Set task.settings.factory for a torch module."
        )
    attend_in_float32()
    try:
        with quiet_transformers():
            model, info = auto_class.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                attn_implementation=None if attention == "auto" else attention, ignore_mismatched_sizes=True, **settings,
            )  # fmt: skip
    except OSError as error:
        raise ValueError(f"{folder} does not load as {auto_class.__name__}: {error}") from error
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    return model, sorted(info["missing_keys"]), mismatched


def start_hugging_face(folder: Path, auto_class: Any, **settings: Any) -> nn.Module:
    """Return a model to train: pretrained weights with a new head where needed, or random ones if only a config is there."""
    if weight_files(folder):
        with quiet_transformers():
            return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
    from transformers import AutoConfig

    return auto_class.from_config(AutoConfig.from_pretrained(folder, local_files_only=True, **settings))


def needed(folder: Path | None) -> Path:
    if folder is None:
        raise ValueError("train.base is missing: a transformers model starts from a folder with a config.json")
    return folder


def build_torch(factory: str) -> nn.Module:
    """Return the module that `package.module:function` builds."""
    model = import_path(factory)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{factory} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def start_torch(folder: Path | None, factory: str) -> nn.Module:
    """Return a module to train: new weights, or a folder's wherever name and shape are the same.

    Raises ValueError if none is.
    """
    model = build_torch(factory)
    if folder is None:
        return model
    same = same_weights(model, folder)
    if not same:
        raise ValueError(
            f"train.base={folder} has no weight of the name and shape of one of {type(model).__name__}: leave it out, or "
            f"name the checkpoint of a model with the same lower layers."
        )
    model.load_state_dict(same, strict=False)
    return model


def same_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return those tensors of a folder that the model has under the same name and in the same shape."""
    own = model.state_dict()
    found = {name: tensor for name, tensor in read_state(folder).items() if name in own}
    return {name: tensor for name, tensor in found.items() if tensor.shape == own[name].shape}


def load_torch(folder: Path, factory: str) -> nn.Module:
    """Return the module that `package.module:function` builds, with the state dict found in the folder."""
    model = build_torch(factory)
    state = read_state(folder)
    own = model.state_dict()
    mismatched = [name for name in own if name in state and state[name].shape != own[name].shape]
    missing = sorted(name for name in own if name not in state)
    unknown = sorted(state.keys() - own.keys())
    if unknown:
        raise ValueError(
            f"checkpoint {folder} holds {len(unknown)} weights that {type(model).__name__} has not "
            f"({', '.join(unknown[:3])}): it is of another architecture than task.settings.factory builds."
        )
    _refuse_other_architecture(folder, type(model).__name__, missing, mismatched)
    model.load_state_dict(state)
    return model


def _refuse_other_architecture(folder: Path, name: str, missing: list[str], mismatched: list[str]) -> None:
    if missing or mismatched:
        raise ValueError(
            f"checkpoint {folder} is of another architecture than {name}: {len(missing)} weights are missing "
            f"({', '.join(missing[:3])}), {len(mismatched)} have another shape ({', '.join(mismatched[:3])})."
        )


def read_state(folder: Path) -> dict[str, Tensor]:
    """Return the state dict in a folder: safetensors first, else torch files read with weights_only=True."""
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no weights: expected one of *{', *'.join(WEIGHTS)}")
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= safetensors.torch.load_file(file)
        else:
            state |= torch.load(file, map_location="cpu", weights_only=True)
    return state


def architecture_of(folder: Path) -> str:
    """Return a hash of every stored weight's name and shape: equal for all checkpoints of one model. Reads no values.

    Raises ValueError naming a file that does not read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            shapes |= _shapes(file)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"weights {file} do not read: {error}. Copy them again, or leave this one out.") from error
    lines = [f"{name} {shape}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def parameter_count(folder: Path) -> int:
    """Return how many numbers a checkpoint's weights hold. Reads no values."""
    return sum(prod(shape) for file in weight_files(folder) for shape in _shapes(file).values())


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint folder, in name order; optimizer and scheduler state left out."""
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHTS) if folder.is_dir() else []
    tensors = [f for f in files if f.suffix == ".safetensors"]
    others = ("optimizer", "scheduler", "rng_state", "scaler", "training_args")
    return tensors or [f for f in files if not f.name.startswith(others)]


def save_checkpoint(model: nn.Module, folder: Path) -> None:
    """Write a model so that its task's `build` reads it back: Hugging Face form where it has one, else safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]
        return
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")


def ready_for_scoring(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model frozen, in evaluation mode, on its device.

    Raises ValueError for a batch norm that normalises by the batch: it would tie examples' gradients together.
    """
    model.eval()
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and getattr(module, "running_mean", None) is None:
            raise ValueError(
                f"module {name} is a batch norm that uses the statistics of the batch, so an example's gradient would "
                f"depend on its batch mates. Use track_running_stats=True and eval(), or another normalisation."
            )
        if module.training:
            raise ValueError(f"module {name} stays in training mode after eval(): dropout would make scores random.")
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model.to(device=device, dtype=dtype)
