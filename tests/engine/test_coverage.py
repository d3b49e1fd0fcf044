import pytest
import torch
from torch import Tensor, nn

from engine.coverage import measure_coverage, why_alone
from engine.parameters import select_parameters
from tests import oracles
from tests.conftest import ToyMlp, mlp_batch, mlp_loss, randomise, text_loss, tiny_bert, token_batch


def test_share_and_missing_equal_autograd():
    model, batch = tiny_bert().double(), token_batch()
    parameters = select_parameters(model, ["classifier", "bert.pooler"])
    report = measure_coverage(model, parameters, text_loss, [oracles.one_example(batch, i) for i in range(4)])
    squares = {n: float(g.square().sum()) for n, g in oracles.gradients(model, text_loss, batch).items()}
    whole = sum(squares.values())
    names = {p.name for p in parameters}
    assert report.share == pytest.approx(sum(squares[n] for n in names) / whole, rel=1e-10)
    others = sorted(((s / whole, n) for n, s in squares.items() if n not in names), reverse=True)[:5]
    assert [n for n, _ in report.missing] == [n for _, n in others]
    assert [s for _, s in report.missing] == pytest.approx([s for s, _ in others], rel=1e-10)
    assert report.examples == 4
    assert all(not w.requires_grad for w in model.parameters())


def test_every_parameter_covers_everything_and_moved_ones_can_be_the_measure():
    model, batch = tiny_bert().double(), token_batch()
    ones = [oracles.one_example(batch, 0)]
    assert measure_coverage(model, select_parameters(model, ["*"]), text_loss, ones).share == pytest.approx(1.0)
    head = select_parameters(model, ["classifier"])
    moved = {"classifier.weight", "classifier.bias"}
    report = measure_coverage(model, head, text_loss, ones, moved)
    assert report.share == pytest.approx(1.0)
    assert report.missing == ()


def test_an_unsupported_layer_is_missing():
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.ConvTranspose1d(1, 2, 3), nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.unsqueeze(1)).flatten(1))

    model, batch = randomise(Conv()).double(), mlp_batch()
    with pytest.warns(UserWarning, match="conv"):
        parameters = select_parameters(model, ["*"])
    report = measure_coverage(model, parameters, mlp_loss, [oracles.one_example(batch, 0)])
    assert {n for n, _ in report.missing} == {"conv.weight", "conv.bias"}
    assert 0 < report.share < 1


def test_no_gradient_at_all_counts_as_covered():
    model, batch = tiny_bert().double(), token_batch()
    report = measure_coverage(
        model, select_parameters(model, ["classifier"]), lambda m, b: 0.0 * text_loss(m, b),
        [oracles.one_example(batch, 0)],
    )  # fmt: skip
    assert report.share == 1.0
    assert report.silent == ("classifier.weight", "classifier.bias")


def test_a_parameter_whose_gradient_is_zero_on_every_sampled_example_is_silent():
    model, batch = tiny_bert().double(), token_batch()
    with torch.no_grad():
        model.classifier.weight.zero_()  # nothing flows below the head
    parameters = select_parameters(model, ["classifier", "bert.pooler"])
    ones = [oracles.one_example(batch, i) for i in range(2)]
    assert measure_coverage(model, parameters, text_loss, ones).silent == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    )


def test_examples_share_a_batch_unless_a_module_mixes_them():
    batch = mlp_batch()
    plain = randomise(ToyMlp())
    assert why_alone(plain.double(), select_parameters(plain, ["*"]), mlp_loss, batch) is None

    class Turned(ToyMlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(0)).flip(0)

    turned = randomise(Turned()).double()
    parameters = select_parameters(turned, ["*"])
    assert "module first does not keep" in str(why_alone(turned, parameters, mlp_loss, batch))
    assert why_alone(turned, parameters, mlp_loss, oracles.one_example(batch, 0)) is None


class Functional(nn.Module):
    """Uses its table a second time without calling it: no hook can see that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), self.first.weight)))


def test_a_weight_used_outside_its_module_is_refused():
    model, batch = randomise(Functional()).double(), mlp_batch()
    with pytest.raises(ValueError, match=r"the gradient of first.weight has norm .* outside its module's call"):
        measure_coverage(model, select_parameters(model, ["*"]), mlp_loss, [oracles.one_example(batch, 0)])
