"""Several processes that train one model, here as threads: the step of the whole batch, whatever the shares."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import training
from engine.batches import Batch
from engine.training import ALONE, Group, Step, TrainSettings, TrainState, train
from engine.turnover import under_own_masks
from tests.conftest import Caught, mlp_batch, mlp_loss, random_cnn
from tests.engine.test_turnover import masked

DATA = mlp_batch(20)
SETTINGS = TrainSettings(epochs=2, batch_size=6, learning_rate=0.1, schedule="linear", weight_decay=0.1)


def collate(rows: list[int]) -> Batch:
    assert rows, "nothing is collated for an empty share"
    return Batch(DATA.ids[rows], {name: tensor[rows] for name, tensor in DATA.tensors.items()})


def together(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Return what `work` returns in every process; an error of one ends all and is raised."""
    barrier, slots = threading.Barrier(size), [torch.zeros(0)] * size
    found: list[Any] = [None] * size
    errors: list[Exception] = []

    def run(rank: int) -> None:
        def add(tensor: Tensor) -> None:
            slots[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(sum(slots))
            barrier.wait()

        try:
            found[rank] = work(Group(rank, size, add))
        except threading.BrokenBarrierError:
            pass
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def trained(
    group: Group, settings: TrainSettings = SETTINGS, loss: Any = mlp_loss, state: Any = None, weights: Any = None
) -> tuple[nn.Module, list[Step], dict[int, Any]]:
    """Train under masks, and return what was left after every step too. Ordinary dropout is off."""
    turnover, after = masked(), {}
    model = turnover.model
    model.drop.p = 0.0
    model.load_state_dict(weights or model.state_dict())
    steps = []
    for step in train(model, under_own_masks(turnover, loss), collate, list(range(20)), settings, state, group):
        steps.append(step)
        after[step.step] = ({name: w.clone() for name, w in model.state_dict().items()}, copy.deepcopy(step.state()))
    return model, steps, after


def same(one: nn.Module, other: nn.Module) -> bool:
    truth = dict(other.named_parameters())
    return all(bool(((w - truth[n]).norm() <= 1e-10 * truth[n].norm()).all()) for n, w in one.named_parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_train_the_model_of_one(optimizer: str, size: int, caught: Caught) -> None:
    """The last batch of an epoch has two examples: with three processes, one has none."""
    settings = TrainSettings(**vars(SETTINGS) | {"optimizer": optimizer})
    alone, steps, _ = trained(ALONE, settings)

    def compare() -> None:
        found = together(size, lambda group: trained(group, settings))
        assert all(same(model, alone) for model, _, _ in found)
        for _, seen, _ in found:
            assert [step.step for step in seen] == [step.step for step in steps]
            assert [step.loss for step in seen] == pytest.approx([step.loss for step in steps], rel=1e-10)

    caught(compare, training, "_summed", mutant(lambda own, summed: own))  # each process keeps its own
    if optimizer == "sgd":  # AdamW does not see a common factor
        caught(compare, training, "_summed", mutant(lambda own, summed: summed / size))


def mutant(change: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Return a reduction that leaves other gradients: made of a process's own and of the sum."""
    right = training._summed

    def changed(losses: Tensor, weights: list[Tensor], count: int, group: Group) -> Tensor:
        own = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        whole = right(losses, weights, count, group)
        for weight, one in zip(weights, own, strict=True):
            weight.grad = change(one, weight.grad)
        return whole

    return changed


def test_all_processes_hold_the_same_bits() -> None:
    found = together(3, trained)
    for model, _, _ in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found[0][0].parameters(), strict=True))


def test_every_example_is_in_one_share_of_its_batch() -> None:
    seen: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.extend(batch.ids.tolist())
        return mlp_loss(model, batch)

    together(3, lambda group: trained(group, loss=loss))
    assert sorted(seen) == sorted(2 * DATA.ids.tolist())


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_group_goes_on_to_the_same_bits(stop: int) -> None:
    whole = together(2, trained)
    weights, state = whole[0][2][stop]
    assert state.random == []
    again = together(2, lambda group: trained(group, state=copy.deepcopy(state), weights=weights))
    for (model, steps, _), (truth, first, _) in zip(again, whole, strict=True):
        assert steps == first[stop:]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))


def test_a_weight_that_no_share_reaches_stays_as_it_is() -> None:
    """AdamW shrinks a weight whose gradient is zero, and leaves one without a gradient."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (batch["x"] @ model.used).square()

    def run(group: Group) -> nn.Module:
        model = nn.ParameterDict({"used": torch.ones(5).double(), "unused": torch.ones(3).double()})
        list(train(model, loss, collate, list(range(20)), SETTINGS, None, group))
        return model

    (one, two), truth = together(2, run), run(ALONE)
    assert torch.equal(one.unused, torch.ones(3).double())
    assert same(one, truth)
    assert same(two, truth)


def test_ordinary_dropout_is_drawn_by_seed_step_and_process() -> None:
    """No two processes share a stream, and a process that goes on draws what it would have drawn."""

    def draws(rank: int, seed: int = 0, state: TrainState | None = None) -> list[float]:
        found = []

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            found.append(float(torch.rand(())))
            return mlp_loss(model, batch)

        def add(tensor: Tensor) -> None:  # as if the others gave nothing
            if len(tensor) == 1:
                tensor.mul_(2)

        trained(Group(rank, 2, add), TrainSettings(**vars(SETTINGS) | {"seed": seed}), loss, state)
        return found

    torch.manual_seed(5)
    first, second, other = draws(0), draws(1), draws(0, seed=1)
    assert len({*first, *second, *other}) == 3 * 8
    torch.manual_seed(6)
    assert draws(1) == second
    state = trained(ALONE)[2][3][1]
    assert draws(1, state=TrainState(3, state.optimizer, [])) == second[3:]


def test_a_loss_that_is_not_finite_is_named_by_all() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return mlp_loss(model, batch) / (batch.ids != 105)

    told: list[str] = []

    def run(group: Group) -> None:
        with pytest.raises(FloatingPointError) as error:
            trained(group, loss=loss)
        told.append(str(error.value))

    together(2, run)
    assert len(told) == 2
    assert told[0] == told[1]
    assert "for examples [105]" in told[0]


def test_batchnorm_and_another_start_are_refused() -> None:
    with pytest.raises(
        ValueError, match="ToyCnn has BatchNorm, whose statistics would be those of each process's share"
    ):
        next(train(random_cnn(), mlp_loss, collate, list(range(20)), SETTINGS, None, Group(0, 2)))
    state = trained(ALONE)[2][3][1]
    with pytest.raises(OSError, match="would go on with step"):
        together(2, lambda group: trained(group, state=TrainState(3, state.optimizer, []) if group.rank else None))
