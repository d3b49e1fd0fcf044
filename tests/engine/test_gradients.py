"""Per-example gradients by hooks against one autograd pass per example."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine import gradients, projectors
from engine.batches import Batch
from engine.factors import Factor
from engine.gradient_batch import GradientBatch, nonfinite
from engine.gradients import PerExampleGradients
from engine.parameters import Parameter, select_parameters
from engine.projection import Projection
from engine.projectors import Sums, Whole, make_projector
from tests import oracles
from tests.conftest import (
    CASES,
    ToyMlp,
    every_batch,
    every_layer,
    every_loss,
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


def whole(model: nn.Module, loss: Callable, batch: Batch, patterns: tuple[str, ...] = ("*",)) -> GradientBatch:
    parameters = select_parameters(model, patterns)
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False), norms=True) as hooks:
        return hooks(loss, batch)


def turned(model: nn.Module, name: str, truth: Tensor) -> Tensor:
    """Return autograd's gradients [B, *] as (O, I) rows: a Linear's as they are, a Conv1D's and a table's transposed."""
    weight = dict(model.named_parameters())[name]
    owners = [m for m in model.modules() if any(w is weight for w in m.parameters(recurse=False))]
    if weight.dim() == 2 and not any(isinstance(m, nn.Linear) for m in owners):
        assert isinstance(owners[0], Conv1D | nn.Embedding)
        truth = truth.transpose(1, 2)
    return truth.flatten(1)


def assert_exact(model: nn.Module, loss: Callable, batch: Batch, tolerance: float, oracle: nn.Module) -> None:
    out = whole(model, loss, batch)
    truth = oracles.gradients(oracle, loss, batch)
    assert list(out.arrays) == list(truth)
    for index, (name, found) in enumerate(out.arrays.items()):
        exact = turned(oracle, name, truth[name])
        if name.endswith("key.bias"):  # softmax takes it out: nothing is left but rounding
            assert torch.maximum(exact.norm(), found.norm()) <= 0.1 * tolerance * oracles.flat(truth).norm()
            continue
        assert oracles.relative_error(found, exact) <= tolerance, name
        assert oracles.relative_error(out.norms[:, index], exact.norm(dim=1)) <= tolerance, name
    losses = torch.stack([loss(oracle, oracles.one_example(batch, i)).sum() for i in range(len(batch))])
    assert torch.allclose(out.losses, losses.detach().double(), rtol=tolerance)


def test_rows_and_exact_norms_equal_autograd_in_float64(case):
    model, loss, batch = case
    assert_exact(model, loss, batch, 1e-10, model)


@pytest.mark.parametrize("name", list(CASES))
def test_rows_and_exact_norms_equal_autograd_in_float32(name):
    model, loss, batch = CASES[name]
    given = batch()
    narrow = Batch(given.ids, {n: t.float() if t.is_floating_point() else t for n, t in given.tensors.items()})
    oracle = model().double()

    def either(network: nn.Module, batch: Batch) -> Tensor:
        dtype = next(network.parameters()).dtype
        moved = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.tensors.items()}
        return loss(network, Batch(batch.ids, moved))

    assert_exact(model().float(), either, narrow, 1e-5, oracle)


@pytest.mark.parametrize("name", list(CASES))
def test_an_example_alone_equals_itself_in_a_padded_mixed_batch(name):
    make, loss, batch = CASES[name]
    model, given = make(), batch()
    model, given = model.float(), Batch(given.ids, {n: t.float() if n == "x" else t for n, t in given.tensors.items()})
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, make_projector(parameters, Projection(), CPU, torch.float32)) as hooks:
        together = hooks(loss, given).arrays["rows"].clone()
        for position in range(len(given)):
            alone = hooks(loss, oracles.one_example(given, position)).arrays["rows"]
            assert oracles.relative_error(together[position : position + 1], alone) <= 1e-5


def test_rows_do_not_depend_on_batch_size_or_order(case):
    model, loss, batch = case
    before = whole(model, loss, batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    for window in (order, order[:3], order[1:2]):
        some = Batch(batch.ids[window], {name: tensor[window] for name, tensor in batch.tensors.items()})
        out = whole(model, loss, some)
        assert torch.equal(out.ids, batch.ids[window])
        for name, array in out.arrays.items():
            assert torch.allclose(array, before.arrays[name][window], rtol=1e-10, atol=1e-12)
        assert torch.allclose(out.norms, before.norms[window], rtol=1e-10, atol=1e-10)


def test_a_second_pass_gives_the_same_bits(case):
    model, loss, batch = case
    first, second = whole(model, loss, batch), whole(model, loss, batch)
    assert all(torch.equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert torch.equal(first.norms, second.norms)


def test_ids_up_to_two_to_the_forty_come_back():
    assert whole(tiny_bert().double(), text_loss, token_batch()).ids.tolist() == [2**40 + i for i in range(4)]


@pytest.mark.parametrize("kind", ["two-sided", "gaussian", "rademacher", "none"])
def test_projected_rows_equal_the_projected_oracle(kind, case):
    model, loss, batch = case
    parameters = select_parameters(model, ["*"])
    projector = make_projector(parameters, Projection(kind, 4, seed=5), CPU, torch.float64)
    with PerExampleGradients(model, parameters, projector) as hooks:
        out = hooks(loss, batch)
    truth = oracles.gradients(model, loss, batch)
    sums = Sums()
    for p in parameters:
        rows = turned(model, p.name, truth[p.name])
        matrix = rows.reshape(len(batch), p.out_features, -1)
        if p.is_vector:
            projector.add_vector(sums, p, rows)
        else:
            eye = torch.eye(p.in_features, dtype=torch.float64).expand(len(batch), -1, -1)
            projector.add_matrix(sums, p, Factor(matrix.transpose(1, 2)), Factor(eye))
    for name, exact in projector.arrays(sums, out.losses).items():
        assert torch.allclose(out.arrays[name], exact, rtol=1e-10, atol=1e-12)
    assert out.norms is None


@pytest.mark.parametrize("patterns", [("classifier",), ("*.layer.1.*", "classifier.bias"), ("*.LayerNorm.bias",)])
def test_a_choice_of_modules_gives_the_same_gradients_of_them(patterns):
    model, batch = tiny_bert().double(), token_batch()
    every, some = whole(model, text_loss, batch), whole(model, text_loss, batch, patterns)
    assert 0 < len(some.arrays) < len(every.arrays)
    for name, array in some.arrays.items():
        assert torch.allclose(array, every.arrays[name], rtol=1e-10, atol=1e-12)


def test_the_graph_starts_at_the_lowest_chosen_module():
    model, batch = tiny_bert().double(), token_batch()
    seen: list[bool] = []
    model.bert.encoder.layer[0].register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    model.bert.pooler.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    whole(model, text_loss, batch, ("bert.pooler",))
    assert seen[-2:] == [False, True]  # before it, forward passes that look at where the examples are
    assert all(not w.requires_grad and w.grad is None for w in model.parameters())


class Unused(nn.Module):
    """One module called twice, the second output left out of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(x))
        self.shared(h)
        return self.head(h)


def test_a_call_that_the_loss_does_not_use_adds_nothing_to_row_or_norm():
    model = randomise(Unused()).double()
    assert_exact(model, mlp_loss, mlp_batch(), 1e-10, model)


def test_other_passes_through_a_hooked_model_leave_the_results_alone():
    model, batch = randomise(ToyMlp()).double(), mlp_batch()
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
        out = hooks(mlp_loss, batch)
        before = {name: array.clone() for name, array in out.arrays.items()}
        truth = oracles.gradients(model, mlp_loss, batch)
        with torch.inference_mode():
            model(batch["x"])
        assert oracles.flat(truth).any()
        assert all(torch.equal(out.arrays[name], before[name]) for name in before)
        again = hooks(mlp_loss, batch)
        assert all(torch.equal(again.arrays[name], before[name]) for name in before)


def test_a_failed_pass_leaves_nothing_behind():
    model, batch = randomise(ToyMlp()).double(), mlp_batch()
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        with pytest.raises(ValueError, match="shape"):
            hooks(lambda m, b: mlp_loss(m, b).mean(), batch)
        out = hooks(mlp_loss, batch)
    assert torch.equal(out.norms, whole(model, mlp_loss, batch).norms)
    assert not any(m._forward_hooks for m in model.modules())


def test_norms_pass_through_when_only_products_are_kept():
    model, batch = tiny_gpt2().double(), token_batch()
    exact = whole(model, token_loss, batch)
    parameters = select_parameters(model, ["*"])
    blocks = {name: array[:2] for name, array in exact.arrays.items()}
    with PerExampleGradients(model, parameters, projectors.Dense(blocks), norms=True) as hooks:
        out = hooks(token_loss, batch)
    truth = oracles.flat(oracles.gradients(model, token_loss, batch))
    assert oracles.relative_error(out.arrays["rows"], truth @ truth[:2].T) <= 1e-10
    assert torch.allclose(out.norms, exact.norms, rtol=1e-12)


def test_a_loss_of_the_wrong_shape_is_refused():
    for wrong in (lambda m, b: mlp_loss(m, b).mean(), lambda m, b: mlp_loss(m, b)[:, None]):
        with pytest.raises(ValueError, match=r"must return one loss per example, shape \(6,\)"):
            whole(randomise(ToyMlp()).double(), wrong, mlp_batch())


def test_a_loss_without_any_chosen_module_is_refused():
    with pytest.raises(ValueError, match="does not depend on any of the chosen modules"):
        whole(randomise(ToyMlp()).double(), lambda m, b: b["x"].sum(1), mlp_batch())


def test_a_module_without_the_examples_first_is_run_one_example_at_a_time():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.repeat(2, 1)).reshape(2, len(x), 3).sum(0)

    model = randomise(Flat()).double()
    with pytest.warns(UserWarning, match="module head does not keep one example in each row of its input"):
        assert_exact(model, mlp_loss, mlp_batch(), 1e-10, model)


def test_non_finite_values_are_named_by_position_and_parameter():
    model, batch = randomise(ToyMlp()).double(), mlp_batch()
    batch["x"][4, 0] = float("nan")
    parameters = select_parameters(model, ["*"])
    for kind in ("two-sided", "gaussian", "none"):
        projector = make_projector(parameters, Projection(kind, 4), CPU, torch.float64)
        with PerExampleGradients(model, parameters, projector) as hooks:
            assert nonfinite(hooks(mlp_loss, batch), projector.layout) == {4: "the loss"}
    rows = GradientBatch(torch.arange(2), torch.zeros(2), {"first.weight": torch.tensor([[0.0], [torch.inf]])}, None)
    assert nonfinite(rows, Whole([Parameter("first.weight", 1, 0, ())]).layout) == {1: "the gradient of first.weight"}


MUTANTS = {
    "flipped sign": (projectors, "gradient_vector", lambda a, b: -ORIGINAL["gradient_vector"](a, b)),
    "mean for sum over tokens": (
        gradients,
        "_vector_gradient",
        lambda role, module, inner, delta: (
            ORIGINAL["_vector_gradient"](role, module, inner, delta) / max(1, delta[0].numel() // delta.shape[-1])
        ),
    ),
    "no normalisation under a scale": (gradients, "normalised", lambda module, inner: inner),
    "dropped cross terms": (
        gradients,
        "squared_norm",
        lambda calls: sum(ORIGINAL["squared_norm"]([call]) for call in calls),
    ),
    "transposed square Conv1D": (
        gradients,
        "_matrix_factors",
        lambda index, use, module, held, delta: _swapped(
            ORIGINAL["_matrix_factors"](index, use, module, held, delta), use.role == "conv1d"
        ),
    ),
    "a tied table in its own orientation": (
        gradients,
        "_matrix_factors",
        lambda index, use, module, held, delta: _swapped(
            ORIGINAL["_matrix_factors"](index, use, module, held, delta), use.role == "embedding-transposed"
        ),
    ),
    "padding_idx overlooked": (
        gradients,
        "_matrix_factors",
        lambda index, use, module, held, delta: ORIGINAL["_matrix_factors"](
            index, use, nn.Embedding(6, 6) if isinstance(module, nn.Embedding) else module, held, delta
        ),
    ),
}
ORIGINAL = {
    "gradient_vector": projectors.gradient_vector,
    "_vector_gradient": gradients._vector_gradient,
    "squared_norm": gradients.squared_norm,
    "_matrix_factors": gradients._matrix_factors,
}


def _swapped(call: gradients._Call, swap: bool) -> gradients._Call:
    same_width = call.input.width == call.output.width
    return gradients._Call(call.parameter, call.input, call.output) if swap and same_width else call


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail_the_comparison_with_autograd(mutant, caught):
    model = every_layer().double()
    owner, name, replacement = MUTANTS[mutant]
    caught(lambda: assert_exact(model, every_loss, every_batch(), 1e-10, model), owner, name, replacement)


def test_a_dropped_use_of_a_tied_weight_is_caught(caught):
    model = every_layer().double()
    select = select_parameters

    def without_the_table(network: nn.Module, patterns: tuple[str, ...]) -> list[Parameter]:
        found = select(network, patterns)
        kept = [tuple(u for u in p.uses if u.role != "embedding-transposed") for p in found]
        return [Parameter(p.name, p.out_features, p.in_features, uses) for p, uses in zip(found, kept, strict=True)]

    import tests.engine.test_gradients as here

    caught(
        lambda: assert_exact(model, every_loss, every_batch(), 1e-10, model),
        here,
        "select_parameters",
        without_the_table,
    )


def test_an_in_place_activation_after_a_layer_loses_no_gradient():
    """A Linear's 3-D output with a bias is a view, and an in-place operation moves a view to another node."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x.unsqueeze(1).repeat(1, 2, 1)
            for layer in (self.first, self.second):
                h = nn.functional.relu(layer(h), inplace=True)
            return self.head(h.mean(1))

    model = randomise(InPlace()).double()
    assert_exact(model, mlp_loss, mlp_batch(), 1e-10, model)


def test_a_transformer_encoder_of_torch_is_exact_but_for_its_fused_attention():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1)
            self.into, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.into(x.unsqueeze(1).repeat(1, 3, 1))).mean(1))

    model, batch = randomise(Encoder()).double(), mlp_batch()
    with pytest.warns(UserWarning, match="no per-example gradients"):
        out = whole(model, mlp_loss, batch)
    truth = oracles.gradients(model, mlp_loss, batch)
    assert set(truth) - set(out.arrays) == {n for n in truth if "self_attn" in n}
    for name, array in out.arrays.items():
        assert torch.allclose(array, turned(model, name, truth[name]), rtol=1e-10, atol=1e-12)


class ChangesItsInput(nn.Module):
    """The residual is added in place to the very tensor that the Linear read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        h = self.first(x)
        h = h + 0
        y = self.second(h)
        h += y
        return h


def test_an_input_changed_in_place_later_is_refused() -> None:
    model = randomise(ChangesItsInput()).double()
    projector = Whole(select_parameters(model, ["second"]))
    with (
        PerExampleGradients(model, select_parameters(model, ["second"]), projector) as hooks,
        pytest.raises(ValueError, match="the input of module second was changed in place"),
    ):
        hooks(lambda m, b: m(b["x"]).square().sum(1), mlp_batch())
