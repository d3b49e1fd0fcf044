"""Convolutions of every kind as matrices, against autograd and against torch's own unfold."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import convolution
from engine.batches import Batch
from engine.factors import gradient_vector
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters, supported_parameters
from engine.projection import Projection, side_matrix
from engine.projectors import Sums, Whole, make_projector
from tests import oracles
from tests.conftest import randomise

CPU, F64 = torch.device("cpu"), torch.float64
KINDS = {
    "plain": nn.Conv2d(4, 6, 3),
    "one by one": nn.Conv2d(4, 6, 1),
    "stride": nn.Conv2d(4, 6, (3, 2), stride=(2, 3)),
    "padding": nn.Conv2d(4, 6, 3, padding=(2, 0)),
    "same": nn.Conv2d(4, 6, (3, 5), padding="same"),
    "valid": nn.Conv2d(4, 6, 2, padding="valid"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "dilation": nn.Conv2d(4, 6, (2, 3), dilation=(3, 2), padding=1, stride=2),
    "no bias": nn.Conv2d(4, 6, 3, bias=False),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding="same", dilation=2),
    "line": nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
    "space": nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 1), groups=2, padding=(0, 1, 0)),
}
SIZES = {1: (9,), 2: (7, 6), 3: (3, 5, 4)}


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return torch.sin(model(batch["x"])).flatten(1).sum(1)


def subject(kind: str) -> tuple[nn.Module, Batch]:
    """Return a convolution alone, its weights random, and a batch for it."""
    module = randomise(nn.Sequential(deepcopy(KINDS[kind]))).double()
    space = SIZES[len(KINDS[kind].kernel_size)]
    x = torch.randn(3, 4, *space, dtype=F64, generator=torch.Generator().manual_seed(1))
    return module, Batch(torch.arange(3), {"x": x})


def assert_exact(model: nn.Module, batch: Batch) -> None:
    parameters = select_parameters(model, ["*"])
    truth = oracles.gradients(model, squares, batch)
    for norms in (True, False):  # they keep the input, or its projected patches
        with PerExampleGradients(model, parameters, Whole(parameters), norms) as hooks:
            out = hooks(squares, batch)
        for index, parameter in enumerate(parameters):
            exact = truth[parameter.name].flatten(1)
            assert oracles.relative_error(out.arrays[parameter.name], exact) <= 1e-10
            assert out.norms is None or oracles.relative_error(out.norms[:, index], exact.norm(dim=1)) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_exact_norms_equal_autograd(kind):
    assert_exact(*subject(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["two-sided", "gaussian", "rademacher"])
def test_projected_rows_equal_the_projected_gradient(kind, projection):
    model, batch = subject(kind)
    parameters = select_parameters(model, ["0.weight"])
    with PerExampleGradients(
        model, parameters, make_projector(parameters, Projection(projection, 5), CPU, F64)
    ) as hooks:
        found = hooks(squares, batch).arrays["rows"]
        whole, sums = oracles.gradients(model, squares, batch)["0.weight"].flatten(2), Sums()
        hooks.projector.add_matrix(sums, parameters[0], *convolution.whole_factors(whole))
    assert torch.allclose(found, hooks.projector.arrays(sums, found)["rows"], rtol=1e-10, atol=1e-12)


def test_two_sided_is_the_kronecker_product():
    model, batch = subject("stride")
    parameters, kept = select_parameters(model, ["0.weight"]), Projection("two-sided", 5, seed=3)
    with PerExampleGradients(model, parameters, make_projector(parameters, kept, CPU, F64)) as hooks:
        found = hooks(squares, batch).arrays["rows"]
    left, right = (side_matrix(kept, "0.weight", side, n).double() for side, n in (("output", 6), ("input", 24)))
    exact = oracles.gradients(model, squares, batch)["0.weight"].flatten(1) @ torch.kron(left, right).T
    assert torch.allclose(found[:, :25], exact, rtol=1e-10, atol=1e-12)


def test_projected_dot_products_are_unbiased_over_layers_of_several_shapes():
    """Against the unprojected product, summed over the layers: a scale that depends on the shape would show."""
    model = randomise(nn.Sequential(nn.Conv2d(5, 6, 2), nn.Conv2d(6, 8, 2, groups=2), nn.Flatten(), nn.Linear(16, 7)))
    draw = torch.Generator().manual_seed(5)
    batch = Batch(torch.arange(2), {"x": torch.randn(2, 5, 4, 3, dtype=F64, generator=draw)})
    parameters, truth = select_parameters(model, ["*.weight"]), oracles.gradients(model.double(), squares, batch)
    exact = oracles.flat(truth, [p.name for p in parameters])
    found = torch.zeros(2000, dtype=F64)
    for seed in range(len(found)):
        projector = make_projector(parameters, Projection("two-sided", 4, seed), CPU, F64)
        sums = Sums()
        for p in parameters:
            projector.add_matrix(sums, p, *convolution.whole_factors(truth[p.name].flatten(2)))
        rows = projector.arrays(sums, batch["x"])["rows"]
        found[seed] = rows[0] @ rows[1]
    assert abs(found.mean() - exact[0] @ exact[1]) <= 3 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)])
def test_patches_are_those_of_unfold(kernel):
    module = nn.Conv2d(4, 6, kernel, stride=2, padding=1, dilation=2).double()
    x = torch.randn(3, 4, 9, 8, dtype=F64)
    truth = F.unfold(x, kernel, dilation=2, padding=1, stride=2).transpose(1, 2)
    assert torch.equal(convolution.patches(module, x).squeeze(2), truth)


def test_a_gradient_that_is_there_already_is_its_own_factors():
    gradient = torch.randn(2, 5, 3)
    assert torch.equal(gradient_vector(*convolution.whole_factors(gradient)), gradient.flatten(1))


def test_a_weight_is_a_matrix_of_patches_and_transposed_convolutions_are_not_supported():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2)), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3))
    found, others = supported_parameters(model)
    shapes = {p.name: (p.out_features, p.in_features) for p in found}
    assert shapes == {"0.weight": (6, 24), "0.bias": (6, 0), "1.weight": (6, 6), "1.bias": (6, 0)}
    assert others == ["2.weight", "2.bias"]


PATCHES = convolution.patches
MUTANTS = {
    "channels inside the kernel": (
        "patches",
        lambda module, x: PATCHES(module, x).unflatten(-1, (-1, torch.Size(module.kernel_size).numel()))
        .transpose(-1, -2).flatten(-2),
    ),
    "positions in another order": ("patches", lambda module, x: PATCHES(module, x).flip(1)),
    "groups in another order": ("patches", lambda module, x: PATCHES(module, x).flip(2)),
    "mean over positions": ("output_tokens", lambda module, delta: delta.flatten(2).transpose(1, 2) / delta[0, 0].numel()),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail_the_comparison_with_autograd(mutant, caught):
    model, batch = subject("groups")
    caught(lambda: assert_exact(model, batch), convolution, *MUTANTS[mutant])
