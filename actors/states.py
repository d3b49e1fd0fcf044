"""A method's query state as a file: what `prepare` saves once and every worker reads."""

import safetensors.torch
import torch

from engine.methods.contract import QueryState
from storage.damage import read_checked
from storage.locations import Location


def state_key(label: str, checkpoint: str) -> str:
    return f"states/{label}/{checkpoint}.safetensors"


def gradients_key(label: str, checkpoint: str) -> str:
    """Return where the queries' gradients lie of a method that multiplies them before they are scored."""
    return f"states/{label}/gradients/{checkpoint}.safetensors"


def save_state(state: QueryState) -> bytes:
    """Return the state as safetensors: the same bytes for the same state (no metadata, whose order is not fixed)."""
    tensors = {f"arrays/{name}": array.contiguous() for name, array in state.arrays.items()}
    tensors |= {"losses": state.losses, "weight": torch.tensor(state.weight, dtype=torch.float64)}
    tensors |= {"chosen": torch.tensor(state.chosen, dtype=torch.int64)}
    for name in ("norms", "candidates", "probes"):
        value = getattr(state, name)
        if value is not None:
            tensors[name] = value.contiguous()
    return safetensors.torch.save(tensors)


def load_state(run: Location, label: str, checkpoint: str) -> QueryState:
    """Return the saved state of one checkpoint, as scoring takes it."""
    data = read_checked(run, f"prepare-{label}", checkpoint, state_key(label, checkpoint))
    return parse_state(data)


def read_state(run: Location, key: str) -> QueryState:
    return parse_state(run.read(key))


def parse_state(data: bytes) -> QueryState:
    tensors = safetensors.torch.load(data)
    return QueryState(
        {name.removeprefix("arrays/"): array for name, array in tensors.items() if name.startswith("arrays/")},
        tensors.get("norms"),
        tensors["losses"],
        float(tensors["weight"]),
        tuple(tensors["chosen"].tolist()),
        tensors.get("candidates"),
        tensors.get("probes"),
    )
