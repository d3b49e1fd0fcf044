from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.states import load_state, save_state, state_key
from engine.methods.contract import QueryState
from storage.locations import Location

FULL = QueryState(
    {"rows": torch.arange(6.0).reshape(2, 3), "a.weight": torch.ones(2, 1)}, torch.ones(2, 4),
    torch.tensor([0.1, 0.2], dtype=torch.float64), 0.05, (0, 2), torch.tensor([7, 2**40]),
)  # fmt: skip


@pytest.mark.parametrize("state", [FULL, replace(FULL, norms=None, candidates=None)], ids=["full", "least"])
def test_a_state_comes_back_as_it_was(state: QueryState, tmp_path: Path) -> None:
    run = Location(str(tmp_path))
    run.create(state_key("label", "checkpoint-1"), save_state(state))
    found = load_state(run, "label", "checkpoint-1")
    assert (found.weight, found.chosen) == (state.weight, state.chosen)
    for name in ("norms", "losses", "candidates"):
        before, after = getattr(state, name), getattr(found, name)
        assert (before is None and after is None) or torch.equal(before, after)
    assert found.arrays.keys() == state.arrays.keys()
    assert all(torch.equal(found.arrays[name], state.arrays[name]) for name in state.arrays)


def test_the_same_state_is_the_same_bytes() -> None:
    turned = replace(FULL, arrays=dict(reversed(FULL.arrays.items())))
    assert save_state(turned) == save_state(FULL)
    assert save_state(replace(FULL, arrays={k: v.T.contiguous().T for k, v in FULL.arrays.items()})) == save_state(FULL)
