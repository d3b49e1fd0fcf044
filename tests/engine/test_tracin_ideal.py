"""What every step did to the queries' losses: against steps written out, and where the answer is known in closed form."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from engine import forward_mode
from engine.batches import Batch
from engine.counters import derive_key, permutation
from engine.methods.tracin import TracIn
from engine.methods.tracin_ideal import StepEffect, every_step
from engine.training import TrainSettings
from tests import oracles
from tests.conftest import ToyMlp, mlp_batch, mlp_loss, randomise, tiny_gpt2, token_batch, token_loss
from tests.engine.test_tracin import HookSource

TRAIN, QUERY = mlp_batch(7), mlp_batch(3, seed=9)
SETTINGS = TrainSettings(epochs=3, batch_size=1, learning_rate=0.1, optimizer="sgd", schedule="linear", seed=4)


def visits(settings: TrainSettings, count: int) -> list[tuple[list[int], float]]:
    """Return the rows and the learning rate of every step, in the order of training."""
    orders = [
        permutation(derive_key(settings.seed, "order", epoch), count).tolist() for epoch in range(settings.epochs)
    ]
    size = settings.batch_size
    batches = [order[begin : begin + size] for order in orders for begin in range(0, count, size)]
    falling = settings.schedule == "linear"
    return [(rows, settings.learning_rate * (1 - t / len(batches) if falling else 1)) for t, rows in enumerate(batches)]


def pick(data: Batch, rows: list[int]) -> Batch:
    return Batch(data.ids[rows], {name: tensor[rows] for name, tensor in data.tensors.items()})


def toy() -> nn.Module:
    return randomise(ToyMlp()).double()


def effects_of(
    model: nn.Module, loss: Callable, settings: TrainSettings, data: Batch, query: Batch
) -> list[StepEffect]:
    return list(every_step(model, loss, lambda rows: pick(data, rows), list(range(len(data))), query, settings))


def stacked(effects: list[StepEffect]) -> tuple[Tensor, Tensor]:
    return torch.stack([e.fall for e in effects]), torch.stack([e.first_order for e in effects])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_step_equals_the_steps_written_out(batch_size: int) -> None:
    settings = TrainSettings(epochs=2, batch_size=batch_size, learning_rate=0.1, optimizer="sgd", schedule="linear")
    falls, first = stacked(effects_of(toy(), mlp_loss, settings, TRAIN, QUERY))
    truth = list(oracles.every_step(toy(), mlp_loss, TRAIN, QUERY, visits(settings, len(TRAIN))))
    assert len(falls) == len(truth)
    assert torch.allclose(falls, torch.stack([fall for _, fall, _ in truth]), rtol=1e-9, atol=1e-13)
    assert torch.allclose(first, torch.stack([products.sum(0) for _, _, products in truth]), rtol=1e-9, atol=1e-13)


def test_trac_in_ideal_of_all_examples_adds_up_to_the_whole_fall_of_the_loss() -> None:
    """C14: Σ_z TracInIdeal(z, z′) = ℓ(w_0, z′) − ℓ(w_T, z′)."""
    model = toy()
    before = mlp_loss(model, QUERY).detach()
    ideal, _ = oracles.trac_in_ideal(model, mlp_loss, TRAIN, QUERY, visits(SETTINGS, len(TRAIN)))
    after = mlp_loss(model, QUERY).detach()
    assert (ideal.sum(0) - (before - after)).abs().max() <= 1e-12
    trained = toy()
    falls, first = stacked(effects_of(trained, mlp_loss, SETTINGS, TRAIN, QUERY))
    assert (falls.sum(0) - (before - mlp_loss(trained, QUERY).detach())).abs().max() <= 1e-12
    assert (first.sum(0) - (before - after)).abs().max() > 1e-4  # first order does not telescope


def least_squares(model: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (model(batch["x"]).squeeze(1) - batch["y"]).square()


def test_the_rest_beyond_first_order_is_exact_for_a_quadratic_loss() -> None:
    """C15: ℓ(w) − ℓ(w − ηg) = η g·g′ − ½ η² gᵀH′g, here with H′ = x′x′ᵀ."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 4), (9,)))
    data, query = (Batch(torch.arange(len(r)), {"x": x[r], "y": y[r]}) for r in (torch.arange(6), torch.arange(6, 9)))
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    w = model.weight.detach().clone()[0]
    effects = effects_of(model, least_squares, SETTINGS, data, query)
    steps = visits(SETTINGS, 6)
    assert len(effects) == len(steps)
    for effect, ([row], rate) in zip(effects, steps, strict=True):
        g = (x[row] @ w - y[row]) * x[row]
        others = (query["x"] @ w - query["y"])[:, None] * query["x"]
        second = 0.5 * rate**2 * (query["x"] @ g).square()
        assert (effect.first_order - rate * others @ g).abs().max() <= 1e-13
        assert (effect.fall - (rate * others @ g - second)).abs().max() <= 1e-13
        assert second.max() > 1e-10  # first order alone would not pass
        w = w - rate * g


def test_trac_in_over_every_steps_checkpoint_counted_where_it_was_visited_is_trac_in() -> None:
    """C16: the method's own scores at w_t, of the one example that step t visited, add up to Σ_{t: z_t = z} η g·g′."""
    _, truth = oracles.trac_in_ideal(toy(), mlp_loss, TRAIN, QUERY, visits(SETTINGS, len(TRAIN)))
    assert oracles.relative_error(sum_of_visits(TracIn()), truth) <= 1e-10


def sum_of_visits(method: TracIn) -> Tensor:
    total = torch.zeros(len(TRAIN), len(QUERY), dtype=torch.float64)
    model = toy()
    for rows, rate in visits(SETTINGS, len(TRAIN)):
        total[rows] += score_at(method, model, rate, pick(TRAIN, rows))
        oracles.sgd_step(model, mlp_loss, pick(TRAIN, rows), rate)
    return total


def score_at(method: TracIn, model: nn.Module, rate: float, rows: Batch) -> Tensor:
    source = HookSource(model, mlp_loss, rate)
    state = method.prepare([QUERY], source)
    return state.weight * method.score(source.rows(rows), state).scores


def test_of_one_example_trac_in_cp_at_every_step_is_trac_in() -> None:
    """C16 without a choice of visits: the only example is visited at every step."""
    one = pick(TRAIN, [2])
    _, truth = oracles.trac_in_ideal(toy(), mlp_loss, one, QUERY, visits(SETTINGS, 1))
    model, total = toy(), torch.zeros(1, len(QUERY), dtype=torch.float64)
    for _, rate in visits(SETTINGS, 1):
        total += score_at(TracIn(), model, rate, one)
        oracles.sgd_step(model, mlp_loss, one, rate)
    assert oracles.relative_error(total, truth) <= 1e-10


def test_wrong_rates_signs_and_steps_are_caught(caught) -> None:
    truth = list(oracles.every_step(toy(), mlp_loss, TRAIN, QUERY, visits(SETTINGS, len(TRAIN))))
    first = torch.stack([products.sum(0) for _, _, products in truth])

    def compare() -> None:
        falls, found = stacked(effects_of(toy(), mlp_loss, SETTINGS, TRAIN, QUERY))
        assert torch.allclose(falls, torch.stack([fall for _, fall, _ in truth]), rtol=1e-9, atol=1e-13)
        assert torch.allclose(found, first, rtol=1e-9, atol=1e-13)

    real = forward_mode.jvp
    rates = iter(rate for _, rate in visits(SETTINGS, len(TRAIN)))

    def scaled(by: Callable[[], float]) -> Callable:
        def mutant(function: Callable, at: tuple, along: tuple) -> tuple[Tensor, Tensor]:
            losses, products = real(function, at, along)
            return losses, by() * products

        return mutant

    def next_steps(function: Callable, at: tuple, along: tuple) -> tuple[Tensor, Tensor]:
        losses, _ = real(function, at, along)
        after = {name: at[0][name] - along[0][name] for name in at[0]}
        return losses, real(function, (after,), along)[1]

    def second_order(function: Callable, at: tuple, along: tuple) -> tuple[Tensor, Tensor]:
        losses, products = real(function, at, along)
        after = {name: at[0][name] - along[0][name] for name in at[0]}
        return losses, 2 * (losses - function(after)) - products

    caught(compare, forward_mode, "jvp", scaled(lambda: -1.0))
    caught(compare, forward_mode, "jvp", scaled(lambda: 1 / next(rates)))
    caught(compare, forward_mode, "jvp", next_steps)
    caught(compare, forward_mode, "jvp", second_order)


def test_visits_of_other_steps_and_rates_left_out_are_caught(caught) -> None:
    _, truth = oracles.trac_in_ideal(toy(), mlp_loss, TRAIN, QUERY, visits(SETTINGS, len(TRAIN)))

    def compare() -> None:
        assert oracles.relative_error(sum_of_visits(TracIn()), truth) <= 1e-10

    import tests.engine.test_tracin_ideal as here

    plain, right = here.score_at, here.visits
    caught(compare, here, "score_at", lambda method, model, rate, rows: plain(method, model, 1.0, rows))
    caught(compare, here, "score_at", lambda method, model, rate, rows: -plain(method, model, rate, rows))
    caught(compare, here, "visits", lambda settings, count: [right(settings, count)[-1], *right(settings, count)[:-1]])


class Normalising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(5), toy()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def test_statistics_that_training_moves_are_part_of_every_fall() -> None:
    settings = TrainSettings(epochs=2, batch_size=4, learning_rate=0.1, optimizer="sgd")
    torch.manual_seed(0)
    model = Normalising().double()
    start = mlp_loss(model.eval(), QUERY).detach()
    falls, _ = stacked(effects_of(model, mlp_loss, settings, pick(TRAIN, list(range(6))), QUERY))
    whole = start - mlp_loss(model.eval(), QUERY).detach()
    assert (falls.sum(0) - whole).abs().max() <= 1e-12
    assert whole.abs().max() > 1e-3


def test_gradients_are_on_between_two_steps() -> None:
    steps = every_step(toy(), mlp_loss, lambda rows: pick(TRAIN, rows), list(range(len(TRAIN))), QUERY, SETTINGS)
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_with_fused_attention_are_followed(attention: str) -> None:
    model = tiny_gpt2(attn_implementation=attention).double()
    batch = token_batch()
    start = token_loss(model.eval(), batch).detach()
    settings = TrainSettings(epochs=1, batch_size=2, learning_rate=1e-3, optimizer="sgd")
    effects = list(
        every_step(model, token_loss, lambda rows: batch.take(rows), list(range(len(batch))), batch, settings)
    )
    falls, first = stacked(effects)
    assert (falls.sum(0) - (start - token_loss(model.eval(), batch).detach())).abs().max() <= 1e-10
    assert torch.allclose(first.sum(0), falls.sum(0), rtol=0.1, atol=1e-4)
    assert first.abs().max() > 0


def test_an_operation_without_a_forward_derivative_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_mode, "sdpa_kernel", lambda _: nullcontext())  # fused attention
    model, batch = tiny_gpt2(attn_implementation="sdpa"), token_batch()
    with pytest.raises(ValueError, match="TracInIdeal cannot follow this model: torch has no forward-mode derivative"):
        list(every_step(model, token_loss, lambda rows: batch.take(rows), [0, 1], batch, SETTINGS))


def test_dropout_is_off_while_queries_are_measured() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop = toy(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.drop(x))

    torch.manual_seed(0)
    model = Noisy().double()
    start = mlp_loss(model.eval(), QUERY).detach()
    falls, _ = stacked(effects_of(model, mlp_loss, SETTINGS, TRAIN, QUERY))
    assert (falls.sum(0) - (start - mlp_loss(model.eval(), QUERY).detach())).abs().max() <= 1e-12
