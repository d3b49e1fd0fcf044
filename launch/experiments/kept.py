"""What took an experiment long to make and several cells need: tensors in runs/cache, under a hash of what made them.

Delete runs/cache/experiments after a change of the code that makes them.
"""

import time
from collections.abc import Callable
from typing import Any

import safetensors.torch
from torch import Tensor

from actors.specs import digest
from launch.experiments.subjects import ROOT

FOLDER = ROOT / "runs" / "cache" / "experiments"
LONG = 20  # CPU seconds; what is made faster is made again, so that no toy pass or test reads what is old


def kept(name: str, settings: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what was made under this name with these settings before, or make it, and keep it if that takes long."""
    file = FOLDER / f"{name}-{digest({'settings': settings})[:12]}.safetensors"
    if file.exists():
        return safetensors.torch.load_file(file)
    began = time.process_time()
    made = {key: tensor.contiguous() for key, tensor in make().items()}
    if time.process_time() - began > LONG:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        safetensors.torch.save_file(made, part)
        part.replace(file)
    return made
