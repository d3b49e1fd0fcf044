"""TracInCP over two checkpoints against its definition: one product per (checkpoint, example, query)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.gradient_batch import GradientBatch
from engine.gradients import PerExampleGradients
from engine.methods import tracin
from engine.methods.contract import Method, QueryState, Rows, join_batches
from engine.methods.tracin import GradientCosine, GradientDot, TracIn
from engine.parameters import select_parameters
from engine.projection import Projection
from engine.projectors import Dense, Projector, Whole, make_projector
from tests import oracles
from tests.conftest import (
    ToyMlp,
    mlp_batch,
    mlp_loss,
    randomise,
    text_loss,
    tiny_bert,
    tiny_gpt2,
    token_batch,
    token_loss,
)

CPU = torch.device("cpu")
RATES = (0.3, 0.05)
Model = tuple[list[nn.Module], Callable, Batch, Batch]


class HookSource:
    """A checkpoint as `prepare` sees it, without workers or stores."""

    def __init__(
        self, model: nn.Module, loss: Callable, rate: float | None, projector: Callable[[list], Projector] | None = None
    ) -> None:
        self._model, self._loss, self.learning_rate = model, loss, rate
        self._parameters = select_parameters(model, ["*"])
        self._projector = (projector or Whole)(self._parameters)
        self.layout, self.parameters = self._projector.layout, tuple(p.name for p in self._parameters)

    def model(self) -> nn.Module:
        return self._model

    def gradients(self, batch: Batch) -> GradientBatch:
        with PerExampleGradients(self._model, self._parameters, self._projector, norms=True) as hooks:
            return hooks(self._loss, batch)

    def rows(self, batch: Batch) -> Rows:
        out = self.gradients(batch)
        return Rows(out.ids, out.arrays, out.norms, self.parameters)

    def products(self, batch: Batch, state: QueryState) -> Rows:
        """Return rows whose gradients were dropped after their products with the queries."""
        with PerExampleGradients(self._model, self._parameters, Dense(state.arrays), norms=True) as hooks:
            out = hooks(self._loss, batch)
        return Rows(out.ids, {}, out.norms, self.parameters, out.arrays["rows"])


def mlp_run() -> Model:
    models = [randomise(ToyMlp(), seed).double() for seed in (0, 1)]
    train = mlp_batch(6)
    train["x"][5], train["y"][5] = train["x"][1], train["y"][1]  # a duplicate
    return models, mlp_loss, train, mlp_batch(3, seed=9)


def text_run() -> Model:
    models = [randomise(tiny_bert(), seed).double() for seed in (0, 1)]
    return models, text_loss, token_batch((3, 7, 2, 5)), token_batch((4, 6), seed=8)


def language_run() -> Model:
    models = [randomise(tiny_gpt2(), seed).double() for seed in (0, 1)]
    return models, token_loss, token_batch((3, 7, 2, 5)), token_batch((4, 6), seed=8)


RUNS = {"mlp": mlp_run, "bert": text_run, "gpt2": language_run}


def add_up(
    method: Method, run: Model, stored: bool = True, projector: Callable[[list], Projector] | None = None
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · block and Σ weight · self-influence over the method's checkpoints."""
    models, loss, train, query = run
    scores, own = 0.0, 0.0
    for i in method.checkpoints(len(models)):
        source = HookSource(models[i], loss, RATES[i], projector)
        state = method.prepare([query], source)
        block = method.score(source.rows(train) if stored else source.products(train, state), state)
        scores, own = scores + state.weight * block.scores, own + state.weight * block.self_influence
    return scores, own


def truth_of(run: Model) -> tuple[Tensor, Tensor]:
    models, loss, train, query = run
    return oracles.trac_in_cp(list(zip(models, RATES, strict=True)), loss, train, query)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_scores_over_two_checkpoints_equal_the_definition(name, stored):
    run = RUNS[name]()
    (scores, own), (exact, exact_own) = add_up(TracIn(), run, stored), truth_of(run)
    assert oracles.relative_error(scores, exact) <= 1e-10
    assert oracles.relative_error(own, exact_own) <= 1e-10


def test_a_step_of_sgd_on_a_proponent_lowers_the_loss_of_the_query_by_its_score():
    models, loss, train, query = mlp_run()
    scores, _ = add_up(GradientDot(checkpoint=0), (models[:1], loss, train, query))
    rate = 1e-7
    before = loss(models[0], query)
    for i in range(len(train)):
        moved = randomise(ToyMlp()).double()
        gradient = oracles.gradients(moved, loss, oracles.one_example(train, i))
        with torch.no_grad():
            for name, weight in moved.named_parameters():
                weight -= rate * gradient[name][0]
        fall = (before - loss(moved, query)).detach() / rate
        assert torch.allclose(fall, scores[i], rtol=1e-4, atol=1e-5)


def test_self_influence_is_the_score_with_itself_and_never_negative():
    models, loss, train, _ = mlp_run()
    scores, own = add_up(TracIn(), (models, loss, train, train))
    assert oracles.relative_error(own, scores.diagonal()) <= 1e-12
    assert (own >= 0).all()


def test_self_influence_stays_exact_under_a_projection():
    run = mlp_run()
    project = lambda parameters: make_projector(parameters, Projection("two-sided", 2), CPU, torch.float64)  # noqa: E731
    scores, own = add_up(TracIn(), run, projector=project)
    exact, exact_own = truth_of(run)
    assert oracles.relative_error(own, exact_own) <= 1e-12
    assert oracles.relative_error(scores, exact) > 0.01


def test_duplicates_have_equal_scores_and_copies_of_a_query_equal_columns():
    models, loss, train, query = mlp_run()
    twice = Batch(query.ids[[0, 0]], {name: tensor[[0, 0]] for name, tensor in query.tensors.items()})
    scores, own = add_up(TracIn(), (models, loss, train, twice))
    assert torch.allclose(scores[1], scores[5], rtol=1e-12)
    assert torch.allclose(own[1], own[5], rtol=1e-12)
    assert torch.allclose(scores[:, 0], scores[:, 1], rtol=1e-12)


def test_queries_in_several_batches_keep_their_order():
    models, loss, _, _ = mlp_run()
    source, queries = HookSource(models[0], loss, 0.1), mlp_batch(5, seed=4)
    together = TracIn().prepare([queries], source)
    apart = TracIn().prepare([oracles.one_example(queries, i) for i in range(5)], source)
    for name, array in together.arrays.items():
        assert torch.allclose(array, apart.arrays[name], rtol=1e-10, atol=1e-12)
    assert torch.allclose(together.norms, apart.norms, rtol=1e-10)
    assert torch.allclose(together.losses, apart.losses, rtol=1e-12)
    assert together.weight == 0.1


@pytest.mark.parametrize("stored", [True, False])
def test_a_choice_of_modules_counts_only_theirs_in_scores_and_self_influence(stored):
    run = text_run()
    scores, own = add_up(TracIn(("classifier", "*.LayerNorm.*")), run, stored)
    models, loss, train, query = run
    exact = exact_own = 0.0
    for model, rate in zip(models, RATES, strict=True):
        names = [n for n, _ in model.named_parameters() if n.startswith("classifier") or "LayerNorm" in n]
        a, b = (oracles.flat(oracles.gradients(model, loss, batch), names) for batch in (train, query))
        exact, exact_own = exact + rate * a @ b.T, exact_own + rate * a.square().sum(1)
    assert oracles.relative_error(scores, exact) <= 1e-10
    assert oracles.relative_error(own, exact_own) <= 1e-10


def test_a_choice_of_modules_holds_in_projected_rows_too():
    models, loss, train, query = mlp_run()
    project = lambda parameters: make_projector(parameters, Projection("two-sided", 8), CPU, torch.float64)  # noqa: E731
    small = add_up(TracIn(("head",)), (models, loss, train, query), projector=project)[0]  # 8 keeps all of its sides
    assert oracles.relative_error(small, add_up(TracIn(("head",)), (models, loss, train, query))[0]) <= 1e-12


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_a_choice_of_modules_in_a_dense_projection_is_refused(kind):
    project = lambda parameters: make_projector(parameters, Projection(kind, 8), CPU, torch.float64)  # noqa: E731
    with pytest.raises(ValueError, match="cannot choose within a dense projection"):
        add_up(TracIn(("head",)), mlp_run(), projector=project)


def test_a_checkpoint_without_a_learning_rate_is_refused_where_it_weighs():
    models, loss, _, query = mlp_run()
    source = HookSource(models[0], loss, None)
    with pytest.raises(ValueError, match=r"set checkpoints.learning_rate"):
        TracIn().prepare([query], source)
    for method in (GradientDot(), GradientCosine()):
        assert method.prepare([query], source).weight == 1.0


def test_a_choice_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"matches none of the stored parameters, such as head.bias"):
        add_up(TracIn(("haed",)), mlp_run())


@pytest.mark.parametrize("checkpoint", [0, 1, -1])
def test_dot_and_cosine_at_one_checkpoint_equal_the_definition(checkpoint):
    models, loss, train, query = run = text_run()
    a, b = (oracles.flat(oracles.gradients(models[checkpoint], loss, batch)) for batch in (train, query))
    dots, own = add_up(GradientDot(checkpoint=checkpoint), run)
    assert oracles.relative_error(dots, a @ b.T) <= 1e-10
    assert oracles.relative_error(own, a.square().sum(1)) <= 1e-10
    cosines, _ = add_up(GradientCosine(checkpoint=checkpoint), run)
    truth = a @ b.T / torch.outer(a.norm(dim=1), b.norm(dim=1))
    assert oracles.relative_error(cosines, truth) <= 1e-10
    assert cosines.abs().max() <= 1 + 1e-12


def test_cosine_does_not_change_with_the_scale_of_a_loss_and_is_one_with_itself():
    models, loss, train, _ = mlp_run()
    cosines, _ = add_up(GradientCosine(), (models, loss, train, train))
    assert torch.allclose(cosines.diagonal(), torch.ones(6, dtype=torch.float64), rtol=1e-12)
    scaled, _ = add_up(GradientCosine(), (models, lambda m, b: 100 * loss(m, b), train, train))
    assert torch.allclose(cosines, scaled, rtol=1e-10, atol=1e-12)


def test_cosine_with_a_zero_gradient_is_zero():
    state = QueryState({"w": torch.ones(1, 2)}, torch.ones(1, 1), torch.zeros(1).double(), 1.0, (0,))
    rows = Rows(torch.arange(2), {"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}, torch.tensor([[0.0], [5.0]]), ("w",))
    assert GradientCosine().score(rows, state).scores.tolist() == [[0.0], [pytest.approx(1.4)]]


def test_a_checkpoint_that_is_not_there_is_refused():
    for position in (2, -3):
        with pytest.raises(ValueError, match=f"method.checkpoint={position} is not there: 2 checkpoints"):
            GradientDot(checkpoint=position).checkpoints(2)


def _first_rate(self: TracIn, queries: list[Batch], source: HookSource) -> QueryState:
    return tracin.query_gradients(queries, source, self.modules, RATES[0])


def _other_rate(self: TracIn, queries: list[Batch], source: HookSource) -> QueryState:
    return tracin.query_gradients(queries, source, self.modules, sum(RATES) - source.learning_rate)


def _mean_norm(norms: Tensor | None, state: QueryState) -> Tensor | None:
    return None if norms is None else norms[:, list(state.chosen)].double().square().mean(1)


def _no_rate(self: TracIn, queries: list[Batch], source: HookSource) -> QueryState:
    return tracin.query_gradients(queries, source, self.modules, 1.0)


def _flipped(self: Rows, arrays: dict[str, Tensor]) -> Tensor:
    return -sum(self.arrays[name] @ arrays[name].T for name in arrays)


def _one_array(self: Rows, arrays: dict[str, Tensor]) -> Tensor:
    name = next(iter(arrays))
    return self.arrays[name] @ arrays[name].T


MUTANTS = {
    "no learning rate": (TracIn, "prepare", _no_rate),
    "the first rate for all": (TracIn, "prepare", _first_rate),
    "the other checkpoint's rate": (TracIn, "prepare", _other_rate),
    "only the last checkpoint": (TracIn, "checkpoints", lambda self, count: [count - 1]),
    "flipped sign": (Rows, "dot", _flipped),
    "only the first array": (Rows, "dot", _one_array),
    "mean for sum over parameters": (tracin, "squared_norms", _mean_norm),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail_the_comparison_with_the_definition(mutant, caught):
    run = mlp_run()
    exact, exact_own = truth_of(run)

    def compare() -> None:
        scores, own = add_up(TracIn(), run)
        assert oracles.relative_error(scores, exact) <= 1e-10
        assert oracles.relative_error(own, exact_own) <= 1e-10

    caught(compare, *MUTANTS[mutant])


def test_checkpoints_summed_before_the_product_are_caught(caught):
    import tests.engine.test_tracin as here

    run = mlp_run()
    exact, _ = truth_of(run)

    def summed_first(method: Method, run: Model) -> tuple[Tensor, Tensor]:
        models, loss, train, query = run
        sums = [
            sum(rate**0.5 * oracles.flat(oracles.gradients(m, loss, b)) for m, rate in zip(models, RATES, strict=True))
            for b in (train, query)
        ]
        return sums[0] @ sums[1].T, sums[0].square().sum(1)

    def compare() -> None:
        assert oracles.relative_error(here.add_up(TracIn(), run)[0], exact) <= 1e-10

    caught(compare, here, "add_up", summed_first)


def test_batches_are_joined_in_order():
    parts = [
        GradientBatch(torch.tensor([i]), torch.tensor([float(i)]), {"w": torch.full((1, 2), float(i))}, None)
        for i in (3, 1)
    ]
    arrays, norms, losses = join_batches(parts)
    assert arrays["w"].tolist() == [[3, 3], [1, 1]]
    assert losses.tolist() == [3, 1]
    assert norms is None
