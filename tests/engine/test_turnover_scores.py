"""The estimate against equation 2 written out, its symmetries, and what it must and must not show on a trained model."""

import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.masks import Masks, MaskSettings, unseen_ids
from engine.training import TrainSettings, train
from engine.turnover import TurnOver, under_own_masks
from engine.turnover_scores import Estimator, curves, full_losses, paired_losses, self_influence
from tests.conftest import Caught, mlp_batch, mlp_loss, randomise
from tests.engine.test_turnover import Net, by_hand, masked, net

IDS = torch.tensor([3, 2**40, 17, 2**33])


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    return -torch.log_softmax(logits, 0)[target]


def by_definition(model: Net, queries: Batch, settings: MaskSettings | None = None, full: bool = False) -> Tensor:
    """Return equation 2 pair by pair, every product of the masked networks written out; `full`: footnote 4."""
    scores = torch.zeros(len(IDS), len(queries), dtype=torch.float64)
    for i, example in enumerate(IDS.tolist()):
        for j, (x, y) in enumerate(zip(queries["x"], queries["y"].tolist(), strict=True)):
            flipped = by_hand(model, x, example, "flipped", settings)
            own = model(x) if full else by_hand(model, x, example, "own", settings)
            scores[i, j] = (cross_entropy(flipped, y) - cross_entropy(own, y)).detach()
    return scores


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("full", [False, True])
def test_scores_equal_equation_2(rows: int, full: bool, caught: Caught) -> None:
    def compare() -> None:
        settings = MaskSettings(keep=0.4, seed=2)
        own = Estimator(masked(settings), mlp_loss, rows)
        found = (own.influence_on_full if full else own.influence)(IDS, mlp_batch())
        assert found.dtype == torch.float64
        assert torch.allclose(found, by_definition(net(), mlp_batch(), settings, full), rtol=1e-10, atol=1e-12)

    plain = Estimator.losses
    caught(compare, Estimator, "losses", lambda self, ids, q, sides: plain(self, ids, q, sides)[::-1] if not full
           else plain(self, ids, q, ("own",)))  # fmt: skip


def test_scores_do_not_depend_on_how_they_are_cut_nor_on_mates() -> None:
    whole = Estimator(masked(), mlp_loss, 256).influence(IDS, mlp_batch())
    small = Estimator(masked(), mlp_loss, 3)
    assert torch.allclose(small.influence(IDS, mlp_batch()), whole, rtol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(small.influence(IDS[order], mlp_batch())[order.argsort()], whole, rtol=1e-12)
    columns = [small.influence(IDS, mlp_batch().take([q])) for q in range(6)]
    assert torch.allclose(torch.cat(columns, 1), whole, rtol=1e-12)
    parts = [small.influence(IDS[i : i + 1], mlp_batch()) for i in range(4)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12)
    assert small.influence(IDS[:0], mlp_batch()).shape == (0, 6)


def test_swapping_mask_and_flip_negates_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Estimator(masked(), mlp_loss)
    truth = own.influence(IDS, mlp_batch())
    drawn = Masks.bits
    monkeypatch.setattr(Masks, "bits", lambda *a: {layer: ~bits for layer, bits in drawn(*a).items()})
    assert torch.equal(own.influence(IDS, mlp_batch()), -truth)


def test_any_measurement_and_another_label_are_targets() -> None:
    own, queries = Estimator(masked(), mlp_loss), mlp_batch()
    other = Batch(queries.ids, {"x": queries["x"], "y": (queries["y"] + 1) % 3})
    assert torch.allclose(own.influence(IDS, other), by_definition(net(), other), rtol=1e-10)
    margin = Estimator(masked(), lambda model, batch: model(batch["x"]) @ torch.tensor([1.0, -1.0, 0.0]).double())
    truth = [[margin_of(x, i, "flipped") - margin_of(x, i, "own") for x in queries["x"]] for i in IDS.tolist()]
    assert torch.allclose(margin.influence(IDS, queries), torch.tensor(truth, dtype=torch.float64), rtol=1e-10)


def margin_of(x: Tensor, example: int, side: str) -> float:
    logits = by_hand(net(), x, example, side).detach()
    return float(logits[0] - logits[1])


def test_pairs_are_the_diagonal_and_modes_are_put_back() -> None:
    turnover, batch = masked(), mlp_batch()
    turnover.model.train()
    turnover.model.middle.eval()
    whole = Estimator(turnover, mlp_loss).influence(batch.ids, batch)
    found = self_influence(turnover, mlp_loss, batch)
    assert torch.allclose(found, whole.diagonal(), rtol=1e-12)
    assert torch.equal(full_losses(turnover, mlp_loss, batch), mlp_loss(net(), batch).double())
    modes = {name for name, module in turnover.model.named_modules() if not module.training}
    assert modes == {"middle"}
    assert not turnover.masked


@pytest.mark.parametrize("rows", [0, -3])
def test_a_forward_pass_without_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows={rows} is not allowed"):
        Estimator(masked(), mlp_loss, rows)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.first, self.middle = nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64)
        self.second, self.head = nn.ReLU(), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(self.low(x)))))


@pytest.fixture(scope="module")
def overfitted() -> tuple[TurnOver, Batch, Batch]:
    """A network that learned 60 random labels by heart, each under its own mask; and test examples."""
    torch.set_num_threads(1)
    data = mlp_batch(120, dtype=torch.float32)
    turnover = TurnOver(randomise(Wide(), scale=0.2), MaskSettings(seed=1), after=["first"], before=["head"])
    settings = TrainSettings(epochs=60, batch_size=10, learning_rate=1e-2)
    loss = under_own_masks(turnover, mlp_loss)
    list(train(turnover.model, loss, lambda rows: data.take(list(rows)), list(range(60)), settings))
    return turnover, data.take(list(range(60))), data.take(list(range(60, 120)))


def test_most_examples_help_themselves_and_unseen_ids_do_nothing(overfitted: tuple[TurnOver, Batch, Batch]) -> None:
    turnover, trained, _ = overfitted
    own = self_influence(turnover, mlp_loss, trained)
    assert float((own > 0).double().mean()) > 0.9
    null = Estimator(turnover, mlp_loss).influence(unseen_ids(400), trained).mean(1)
    assert abs(float(null.mean())) < 3 * float(null.std()) / 20
    assert abs(float((null > 0).double().mean()) - 0.5) < 3 * 0.5 / 20
    shuffled = Batch(trained.ids.roll(7), trained.tensors)
    others = self_influence(turnover, mlp_loss, shuffled)
    assert float(others.mean()) < 0.2 * float(own.mean())


def test_the_curves_of_figure_2(overfitted: tuple[TurnOver, Batch, Batch]) -> None:
    turnover, trained, test = overfitted
    found = curves(turnover, mlp_loss, [trained.take(list(range(20))), trained.take(list(range(20, 60)))], [test])
    assert found.own == pytest.approx(float(paired_losses(turnover, mlp_loss, trained, trained.ids, "own").mean()))
    assert found.test == pytest.approx(float(mlp_loss(turnover.model.eval(), test).detach().mean()))
    assert found.own < 0.3 * found.flipped  # random labels: the flipped network never saw them
    assert found.flipped == pytest.approx(found.random, rel=0.35)
