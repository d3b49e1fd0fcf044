"""Saved states: once a minute, two of them, the same bits back, and never those of another solve."""

from collections.abc import Generator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from actors.solver_states import SolverStates, Unfinished, take_turn
from engine.solvers import CgState, ExactState, PowerState
from storage.locations import Location


def cg_state(iteration: int) -> CgState:
    draw = torch.randn(4, 2, generator=torch.Generator().manual_seed(iteration)).double()
    return CgState(iteration, draw, draw, -draw, draw.square().sum(0), draw)  # tensors shared, as in the first state


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location.parse(str(tmp_path))


def same(a: object, b: object) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else type(x) is type(y) and x == y
        for x, y in zip(astuple(a), astuple(b), strict=True)  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    "state", [cg_state(3), PowerState(2, torch.rand(4, 1).double(), 1 / 3, True), ExactState(torch.zeros(4, 0))]
)
def test_every_minute_and_two_kept(run: Location, state: object) -> None:
    now = [0.0]
    states = SolverStates(run, "journal/solve-x", clock=lambda: now[0])
    see = states.saver("block-000000")
    for seconds in (0.0, 59.0, 60.0, 61.0, 120.0, 180.0, 240.0):
        now[0] = seconds
        see(state)
    assert run.list("journal/solve-x") == ["journal/solve-x/solver.2", "journal/solve-x/solver.3"]
    found = SolverStates(run, "journal/solve-x").latest("block-000000", type(state))
    assert same(found, state)
    states.clear()
    assert not run.list("journal/solve-x")


def test_another_solve_has_none_and_the_last_counts(run: Location) -> None:
    now = [0.0]
    states = SolverStates(run, "journal/solve-x", clock=lambda: now[0])
    for iteration in range(3):
        now[0] += 60
        states.saver("block-000000")(cg_state(iteration))
    assert states.latest("block-000016", CgState) is None
    assert same(states.latest("block-000000", CgState), cg_state(2))
    now[0] += 60
    states.saver("block-000016")(cg_state(7))
    assert same(states.latest("block-000016", CgState), cg_state(7))


def test_a_driver_that_lost_the_run_saves_nothing(run: Location) -> None:
    def lost() -> None:
        raise OSError("taken over")

    now = [0.0]
    states = SolverStates(run, "journal/solve-x", lost, clock=lambda: now[0])
    now[0] = 60.0
    with pytest.raises(OSError, match="taken over"):
        states.saver("block-000000")(cg_state(0))
    assert not run.list("journal/solve-x")


def test_a_damaged_state_gives_way_to_the_one_before(run: Location, tmp_path: Path) -> None:
    states = SolverStates(run, "journal/solve-x")
    for iteration in (1, 2):
        states.save("block-000000", cg_state(iteration))
    path = tmp_path / "journal/solve-x/solver.1"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert same(states.latest("block-000000", CgState), cg_state(1))


def test_a_turn_ends_with_its_state_saved_and_the_next_one_goes_on(run: Location) -> None:
    now = [0.0]

    def count(state: PowerState | None = None) -> Generator[PowerState, None, int]:
        for iteration in range(state.iteration if state else 0, 10):
            now[0] += 100.0
            yield PowerState(iteration + 1, torch.zeros(1, 1), 0.0, False)
        return 7

    results, begun = list[int | Unfinished](), list[int]()
    while not results or isinstance(results[-1], Unfinished):
        states = SolverStates(run, "unfinished/u", clock=lambda: now[0])
        state = states.latest("u", PowerState)
        begun.append(state.iteration if state else 0)
        results.append(take_turn(count(state), states, "u"))
    assert begun == [0, 3, 6, 9]
    assert [one.state.iteration for one in results[:-1] if isinstance(one, Unfinished)] == [3, 6, 9]
    assert results[-1] == 7
    states.clear()
    assert not run.list("unfinished")


def test_a_worker_that_was_given_up_and_its_replacement_do_not_disturb_each_other(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (SolverStates(run, "unfinished/u") for _ in range(2))
    new.save("u", cg_state(5))
    monkeypatch.setattr(old, "_numbers", lambda: [])  # it listed before the other one wrote
    old.save("u", cg_state(3))
    assert same(new.latest("u", CgState), cg_state(5))
    monkeypatch.setattr(new, "_numbers", lambda: [0, 7])  # listed, and deleted since
    assert same(new.latest("u", CgState), cg_state(5))
