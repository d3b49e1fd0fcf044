import io

import pytest
import torch
from torch import Tensor, nn

from engine import training
from engine.batches import Batch
from engine.counters import derive_key, permutation
from engine.training import Step, TrainSettings, TrainState, freeze, train
from engine.turnover import under_own_masks
from tests.conftest import Caught, ToyMlp, mlp_batch, mlp_loss, randomise
from tests.engine.test_turnover import masked

DATA = mlp_batch(20)


def collate(rows: list[int]) -> Batch:
    return Batch(DATA.ids[rows], {name: tensor[rows] for name, tensor in DATA.tensors.items()})


def run(settings: TrainSettings, model: nn.Module | None = None) -> tuple[nn.Module, list[Step]]:
    model = model or randomise(ToyMlp()).double()
    return model, list(train(model, mlp_loss, collate, list(range(20)), settings))


def by_hand(settings: TrainSettings) -> nn.Module:
    """Return the model after SGD written out: mean loss of the batch, w ← w − η g."""
    model = randomise(ToyMlp()).double()
    total = settings.epochs * -(-20 // settings.batch_size)
    step = 0
    for epoch in range(settings.epochs):
        order = permutation(derive_key(settings.seed, "order", epoch), 20)
        for begin in range(0, 20, settings.batch_size):
            rate = settings.learning_rate * (1 - step / total if settings.schedule == "linear" else 1)
            loss = mlp_loss(model, collate(order[begin : begin + settings.batch_size].tolist())).mean()
            weights = list(model.parameters())
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight -= rate * gradient
            step += 1
    return model


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_sgd_equals_the_steps_written_out(schedule):
    settings = TrainSettings(epochs=2, batch_size=6, learning_rate=0.1, optimizer="sgd", schedule=schedule, seed=3)
    found, truth = run(settings)[0].state_dict(), by_hand(settings).state_dict()
    assert all(torch.allclose(found[name], truth[name], rtol=1e-10, atol=1e-12) for name in truth)


def test_sum_for_mean_and_a_frozen_rate_are_caught(caught):
    settings = TrainSettings(epochs=1, batch_size=6, learning_rate=0.1, optimizer="sgd", schedule="linear")

    def compare() -> None:
        found, truth = run(settings)[0].state_dict(), by_hand(settings).state_dict()
        assert all(torch.allclose(found[name], truth[name], rtol=1e-10, atol=1e-12) for name in truth)

    right = training._backward
    caught(
        compare, training, "_backward",
        lambda model, loss, batch, *rest: right(model, lambda m, b: len(b) * loss(m, b), batch, *rest),
    )  # fmt: skip
    caught(compare, training, "_SCHEDULES", {"linear": lambda _: 1.0})


def test_a_run_repeats_bit_for_bit_and_another_seed_does_not():
    settings = TrainSettings(epochs=2, batch_size=6)
    (first, steps), (second, again) = run(settings), run(settings)
    assert steps == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert run(TrainSettings(epochs=2, batch_size=6, seed=1))[1] != steps


def test_every_example_is_seen_once_an_epoch():
    seen: list[int] = []

    def remember(rows: list[int]) -> Batch:
        seen.extend(rows)
        return collate(rows)

    list(
        train(randomise(ToyMlp()).double(), mlp_loss, remember, list(range(20)), TrainSettings(epochs=2, batch_size=6))
    )
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]


@pytest.mark.parametrize(
    ("count", "kept"), [(0, []), (1, [8]), (3, [3, 5, 8]), (8, list(range(1, 9))), (20, list(range(1, 9)))]
)
def test_checkpoints_are_spread_and_the_last_is_at_the_end(count, kept):
    steps = run(TrainSettings(epochs=2, batch_size=6, checkpoints=count))[1]
    assert [s.step for s in steps if s.checkpoint] == kept
    assert [s.step for s in steps] == list(range(1, 9))
    assert steps[-1].epoch == 2.0


def test_only_the_chosen_parameters_move():
    model = randomise(ToyMlp()).double()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    run(TrainSettings(epochs=1, trainable=("head.*",)), model)
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_freeze_counts_numbers_and_refuses_a_glob_without_a_match():
    assert freeze(ToyMlp(), ("head.bias",)) == 3
    with pytest.raises(ValueError, match="matches no parameter of ToyMlp"):
        freeze(ToyMlp(), ("nothing.*",))


def test_dropout_is_on_in_every_step_even_if_the_caller_evaluates_between():
    model, modes = randomise(ToyMlp()).double(), []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        modes.append(model.training)
        return mlp_loss(model, batch)

    for _ in train(model, loss, collate, list(range(20)), TrainSettings(epochs=1, batch_size=6)):
        model.eval()
    assert modes == [True] * 4


def test_a_loss_that_is_not_finite_stops_and_names_step_and_examples():
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return mlp_loss(model, batch) / (batch.ids != 105)

    with pytest.raises(FloatingPointError, match=r"not finite at step \d for examples \[105\]"):
        list(train(randomise(ToyMlp()).double(), loss, collate, list(range(20)), TrainSettings(epochs=1, batch_size=6)))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(optimizer: str, stop: int, caught: Caught) -> None:
    """In the middle and at the end of an epoch, with ordinary dropout beside the masks, through a file."""
    settings = TrainSettings(epochs=2, batch_size=6, optimizer=optimizer, schedule="linear", learning_rate=0.1)

    def started(state: TrainState | None = None, weights: dict | None = None) -> tuple[nn.Module, list[Step], bytes]:
        turnover, steps, saved = masked(), [], b""
        turnover.model.load_state_dict(weights or turnover.model.state_dict())
        loss = under_own_masks(turnover, mlp_loss)
        for step in train(turnover.model, loss, collate, list(range(20)), settings, state):
            steps.append(step)
            if step.step == stop:
                file = io.BytesIO()
                torch.save({"weights": turnover.model.state_dict(), "state": vars(step.state())}, file)
                saved = file.getvalue()
        return turnover.model, steps, saved

    torch.manual_seed(3)
    whole, steps, saved = started()

    def compare() -> None:
        found = torch.load(io.BytesIO(saved), weights_only=True)
        torch.manual_seed(99)
        again, rest, _ = started(TrainState(**found["state"]), found["weights"])
        assert rest == steps[stop:]
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))

    caught(compare, torch, "set_rng_state", lambda state: None)
    if optimizer == "adamw":
        caught(compare, torch.optim.AdamW, "load_state_dict", lambda self, state: None)
