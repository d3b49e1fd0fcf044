"""A Linear's own way back, without the tokens whose output has no gradient, against one autograd pass per example."""

import pytest
import torch
from torch import Tensor, nn

from engine import taps
from engine.batches import Batch
from engine.factors import Factor
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters
from engine.projection import Projection
from engine.projectors import Projector, Sums, Whole, make_projector
from tests import oracles
from tests.conftest import randomise

CPU, F64 = torch.device("cpu"), torch.float64
READ = torch.tensor([[0, 0, 0], [0, 3, 0], [2, 3, 2], [1, 1, 1]])  # of 5 tokens, some more than once
ORIGINAL = taps.at_tokens


class Reads(nn.Module):
    """The loss reads a few tokens' outputs of the upper layers, which a mixing in between ties to all of the lower's."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper, self.top = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.register_buffer("mix", torch.arange(25.0).sin().reshape(5, 5))

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        hidden = torch.einsum("ts,bsh->bth", self.mix, torch.tanh(self.lower(x)))
        out = self.top(torch.nn.functional.relu(self.upper(hidden), inplace=True))
        return torch.sin(out).gather(1, read.unsqueeze(2).expand(-1, -1, 3))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"], batch["read"]).square().sum((1, 2))


def subject() -> tuple[nn.Module, Batch]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(4, 5, 4, dtype=F64, generator=draw)
    return randomise(Reads()).double(), Batch(torch.arange(4), {"x": x, "read": READ})


def compare(projector: Projector | None = None) -> None:
    model, batch = subject()
    parameters = select_parameters(model, ["*"])
    projector = projector or Whole(parameters)
    with PerExampleGradients(model, parameters, projector, norms=True) as hooks:
        out = hooks(loss, batch)
    truth, sums = oracles.gradients(model, loss, batch), Sums()
    for index, p in enumerate(parameters):
        exact = truth[p.name]
        assert oracles.relative_error(out.norms[:, index], exact.flatten(1).norm(dim=1)) <= 1e-10, p.name
        if p.is_vector:
            projector.add_vector(sums, p, exact)
        else:
            eye = torch.eye(p.in_features, dtype=F64).expand(len(batch), -1, -1)
            projector.add_matrix(sums, p, Factor(exact.transpose(1, 2)), Factor(eye))
    for name, exact in projector.arrays(sums, out.losses).items():
        assert oracles.relative_error(out.arrays[name], exact) <= 1e-10, name


@pytest.mark.parametrize("kind", ["none", "two-sided", "gaussian"])
def test_gradients_and_norms_of_few_tokens_equal_autograd(kind, monkeypatch):
    taken = []
    monkeypatch.setattr(taps, "at_tokens", lambda *args: taken.append(args[1]) or ORIGINAL(*args))
    model, _ = subject()
    parameters = select_parameters(model, ["*"])
    compare(make_projector(parameters, Projection(kind, 3), CPU, F64))
    assert [tokens.shape[1] for tokens in taken] == [2, 2]  # both upper layers, not the lower one


MUTANTS = {
    "other tokens": lambda values, tokens: ORIGINAL(values, (tokens + 1) % values.shape[1]),
    "one token too few": lambda values, tokens: ORIGINAL(values, tokens[:, :1].expand_as(tokens)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_other_tokens_fail_the_comparison_with_autograd(mutant, caught):
    caught(compare, taps, "at_tokens", MUTANTS[mutant])


def test_all_tokens_with_a_gradient_are_found():
    delta = torch.zeros(3, 6, 2)
    delta[0, 1, 1], delta[1, 0, 0], delta[1, 4, 1] = 1e-40, torch.nan, -1.0
    found = taps.tokens_with_gradient(delta)
    assert found is not None
    assert found.shape == (3, 2)
    assert found[1].tolist() == [0, 4]
    assert found[0, 0] == 1
    assert taps.tokens_with_gradient(torch.zeros(3, 6, 2)).shape == (3, 1)


def test_most_of_the_tokens_are_not_cut():
    delta = torch.zeros(2, 6, 2)
    delta[0, :4] = 1.0
    assert taps.tokens_with_gradient(delta) is None
    delta = torch.zeros(2, 6, 2)
    delta[1, 5] = 1.0  # the last of them: not looked at further
    assert taps.tokens_with_gradient(delta) is None
    assert taps.tokens_with_gradient(torch.zeros(2, 1, 2)) is None


def test_a_layer_that_another_hook_changes_goes_back_through_the_hook():
    model, batch = subject()
    model.upper.register_forward_hook(lambda module, args, output: 2 * output)
    parameters = select_parameters(model, ["lower.*"])
    with PerExampleGradients(model, select_parameters(model, ["lower.*", "upper.*"]), Whole(parameters)) as hooks:
        found = hooks(loss, batch).arrays
    truth = oracles.gradients(model, loss, batch)
    assert oracles.relative_error(found["lower.weight"], truth["lower.weight"].flatten(1)) <= 1e-10
