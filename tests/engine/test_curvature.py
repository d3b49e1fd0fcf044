"""Curvature products against whole matrices made entry by entry, and scores along them against autograd's gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import curvature
from engine.batches import Batch
from engine.coordinates import Coordinates, chosen_coordinates, top_layers
from engine.curvature import Curvature, Examples, LocalOperator, all_finite, directional_derivatives, tree_sum
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters
from engine.projectors import Dense
from engine.tasks.causal_lm import CausalLM
from engine.tasks.text_classification import TextClassification
from tests import oracles
from tests.conftest import (
    CASES,
    mlp_batch,
    mlp_loss,
    randomise,
    text_loss,
    tiny_bert,
    tiny_gpt2,
    token_batch,
    token_loss,
)

Outputs = Callable[[nn.Module, Batch], Tensor]
CHOSEN = {"mlp": ["shared", "head", "rms"], "bert": ["bert.encoder.layer.1.output*", "classifier"],
          "gpt2": ["transformer.h.1.mlp", "transformer.ln_f"], "every-layer": ["conv", "back", "norm"],
          "gpt2-square-tied": ["transformer.h.1.attn.c_proj", "lm_head"]}  # fmt: skip


class SmoothMlp(nn.Module):
    """tanh, so that the Hessian is not the Gauss-Newton matrix almost everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def squared_loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"])[:, 0] - batch["y"]).square()


def order(coordinates: Coordinates) -> Tensor:
    """Return where each entry of our vector stands when every weight is flattened in its own shape."""
    places = torch.arange(coordinates.size, dtype=torch.float64).split([w.size for w in coordinates.weights])
    return coordinates.flat([p.view(w.shape) for p, w in zip(places, coordinates.weights, strict=True)]).long()


def operator(
    model: nn.Module,
    loss: Callable,
    batch: Batch,
    coordinates: Coordinates,
    kind: str,
    blocks: int = 3,
    **settings: Any,
) -> LocalOperator:
    """Return the operator of one batch cut into three reduction blocks."""
    return LocalOperator(Curvature(model, loss, coordinates, kind, torch.float64), cut(batch, blocks), **settings)


def rows(batch: Batch, positions: Tensor) -> Batch:
    return Batch(batch.ids[positions], {name: t[positions] for name, t in batch.tensors.items()})


def cut(batch: Batch, blocks: int) -> Examples:
    def gather(ids: Tensor) -> list[Batch]:
        return [rows(batch, torch.tensor([int((batch.ids == i).nonzero()) for i in ids]))]

    parts = torch.arange(len(batch)).tensor_split(blocks)
    return Examples(batch.ids, [[rows(batch, part)] for part in parts], gather)


def whole(op: LocalOperator) -> Tensor:
    return op.apply(torch.eye(op.size, dtype=torch.float64))


@pytest.mark.parametrize("name", list(CHOSEN))
def test_hessian_products_equal_the_hessian(name: str) -> None:
    make, loss, make_batch = CASES[name]
    model, batch = make().double(), make_batch()
    chosen = chosen_coordinates(model, CHOSEN[name])
    vectors = torch.randn(chosen.size, 3, dtype=torch.float64)
    found = operator(model, loss, batch, chosen, "hessian").apply(vectors)
    truth = oracles.hessian(model, loss, batch, [w.name for w in chosen.weights])
    places = order(chosen)
    assert oracles.relative_error(found, truth[places][:, places] @ vectors / len(batch)) < 1e-10


SPLITS: dict[str, tuple[Callable, Callable, Outputs, Callable, Callable]] = {
    "cross-entropy": (lambda: randomise(SmoothMlp()), mlp_loss, lambda m, b: m(b["x"]),
                      lambda out, _: oracles.softmax_hessian(out), mlp_batch),
    "squared-error": (lambda: randomise(SmoothMlp()), squared_loss, lambda m, b: m(b["x"]),
                      lambda out, _: torch.diag(torch.tensor([2.0, 0, 0], dtype=out.dtype)), mlp_batch),
    "bert": (tiny_bert, text_loss, lambda m, b: m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits,
             lambda out, _: oracles.softmax_hessian(out), token_batch),
    "every token an output": (
        lambda: tiny_gpt2(8, 4), token_loss, lambda m, b: m(input_ids=b["input_ids"]).logits[:, :-1],
        lambda out, b: torch.block_diag(*[oracles.softmax_hessian(t) for t in out.view(-1, 8)]),
        lambda: token_batch((3, 5), vocabulary=8)),
}  # fmt: skip
TOP = {"bert": ["bert.encoder.layer.1.output", "classifier"], "every token an output": ["transformer.h.1.mlp"]}


@pytest.mark.parametrize("name", list(SPLITS))
def test_gauss_newton_products_equal_jtaj(name: str, caught: Callable) -> None:
    make, loss, outputs, output_hessian, make_batch = SPLITS[name]
    model, batch = make().double(), make_batch()
    chosen = chosen_coordinates(model, TOP.get(name, ["*"]))
    vectors = torch.randn(chosen.size, 2, dtype=torch.float64)
    truth = oracles.gauss_newton(model, outputs, output_hessian, batch, [w.name for w in chosen.weights])
    places = order(chosen)

    def compare() -> None:
        found = operator(model, loss, batch, chosen, "gauss-newton", blocks=2).apply(vectors)
        assert oracles.relative_error(found, truth[places][:, places] @ vectors / len(batch)) < 1e-10

    caught(compare, curvature, "tree_sum", lambda partials: next(iter(partials)))  # the first block for all
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setitem(curvature.PRODUCTS, "gauss-newton", curvature.PRODUCTS["hessian"])
        compare()


@pytest.mark.parametrize("kind", list(curvature.PRODUCTS))
def test_symmetric_and_linear(kind: str) -> None:
    model, batch = tiny_bert().double(), token_batch()
    op = operator(model, text_loss, batch, chosen_coordinates(model, ["bert.encoder.layer.1", "classifier"]), kind)
    u, v = torch.randn(2, op.size, 1, dtype=torch.float64)
    hu, hv = op.apply(u), op.apply(v)
    assert abs(float(u.T @ hv - v.T @ hu)) < 1e-10 * float(hv.norm() * u.norm())
    assert oracles.relative_error(op.apply(2 * u - 3 * v), 2 * hu - 3 * hv) < 1e-10
    assert torch.equal(op.apply(torch.cat([u, v], 1)), torch.cat([hu, hv], 1))


def test_hessian_product_is_the_change_of_the_gradient() -> None:
    model, batch = randomise(SmoothMlp()).double(), mlp_batch()
    chosen = chosen_coordinates(model, ["*"])
    v = torch.randn(chosen.size, 1, dtype=torch.float64)
    product = operator(model, mlp_loss, batch, chosen, "hessian").apply(v)
    steps = chosen.tensors(v[:, 0])
    named = dict(model.named_parameters())
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, step in zip(chosen.weights, steps, strict=True):
                named[w.name] += sign * 1e-5 * step
        gradient = oracles.gradients(model, mlp_loss, batch)
        sides.append(chosen.flat([gradient[w.name].mean(0) for w in chosen.weights]))
        with torch.no_grad():
            for w, step in zip(chosen.weights, steps, strict=True):
                named[w.name] -= sign * 1e-5 * step
    assert oracles.relative_error(product[:, 0], (sides[0] - sides[1]) / 2e-5) < 1e-7


@pytest.mark.parametrize("size", [1, 2, 6])
def test_gauss_newton_is_positive_semi_definite_at_every_batch_size_and_the_hessian_is_not(size: int) -> None:
    model, batch = randomise(SmoothMlp(), scale=1.0).double(), mlp_batch(size)
    chosen = chosen_coordinates(model, ["*"])
    lowest = {
        kind: float(torch.linalg.eigvalsh(whole(operator(model, mlp_loss, batch, chosen, kind, blocks=1))).min())
        for kind in curvature.PRODUCTS
    }
    assert lowest["gauss-newton"] > -1e-12
    assert lowest["hessian"] < -1e-3


def test_l2_is_part_of_the_curvature_and_of_no_gradient() -> None:
    model, batch = randomise(SmoothMlp()).double(), mlp_batch()
    chosen = chosen_coordinates(model, ["head"])
    v = torch.randn(chosen.size, 2, dtype=torch.float64)
    plain, with_l2 = (operator(model, mlp_loss, batch, chosen, "hessian", l2=l2) for l2 in (0.0, 0.3))
    assert torch.allclose(with_l2.apply(v), plain.apply(v) + 0.3 * v, atol=1e-14)
    ids = batch.ids[:2]
    assert torch.allclose(with_l2.apply(v, ids), plain.apply(v, ids) + 0.3 * v, atol=1e-14)


def test_a_choice_of_ids_is_the_mean_over_them() -> None:
    model, batch = tiny_bert().double(), token_batch()
    chosen = chosen_coordinates(model, ["classifier"])
    v = torch.randn(chosen.size, 2, dtype=torch.float64)
    ids = batch.ids[[3, 1, 3]]
    found = operator(model, text_loss, batch, chosen, "gauss-newton").apply(v, ids)
    alone = [operator(model, text_loss, rows(batch, torch.tensor([i])), chosen, "gauss-newton", blocks=1).apply(v)
             for i in (3, 1, 3)]  # fmt: skip
    assert oracles.relative_error(found, sum(alone) / 3) < 1e-10


def test_the_block_cut_changes_nothing_but_rounding_and_the_same_cut_nothing() -> None:
    model, batch = tiny_bert().double(), token_batch((3, 7, 2, 5, 4, 6, 2))
    chosen = chosen_coordinates(model, ["bert.encoder.layer.1", "classifier"])
    v = torch.randn(chosen.size, 1, dtype=torch.float64)
    found = [operator(model, text_loss, batch, chosen, "gauss-newton", blocks=n).apply(v) for n in (1, 3, 3, 7)]
    assert torch.equal(found[1], found[2])
    assert all(oracles.relative_error(f, found[0]) < 1e-12 for f in found)


def test_fused_attention_gives_the_products_of_eager_attention() -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model, batch = tiny_bert(attn_implementation=attention).double(), token_batch()
        assert model.config._attn_implementation == attention
        chosen = chosen_coordinates(model, ["bert.encoder.layer", "classifier"])
        v = torch.randn(chosen.size, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found += [operator(model, text_loss, batch, chosen, kind).apply(v) for kind in curvature.PRODUCTS]
        found.append(directional_derivatives(model, text_loss, chosen, batch, v[:, 0])[1])
    for fused, eager in zip(found[:3], found[3:], strict=True):
        assert oracles.relative_error(fused, eager) < 1e-10


@pytest.mark.parametrize("scale", [1e-40, 1e4, 1e30])
def test_a_product_in_float32_is_linear_in_the_scale_of_the_vector(scale: float) -> None:
    model, batch = randomise(SmoothMlp()), mlp_batch(dtype=torch.float32)
    chosen = chosen_coordinates(model, ["*"])
    op = LocalOperator(Curvature(model, mlp_loss, chosen), cut(batch, 2))
    v = torch.randn(chosen.size, 1, dtype=torch.float64)
    assert op.apply(v).dtype == torch.float64
    assert oracles.relative_error(op.apply(scale * v) / scale, op.apply(v)) < 1e-6


def test_dtype_is_an_argument_and_the_model_stays_as_it_is() -> None:
    model, batch = randomise(SmoothMlp()), mlp_batch(dtype=torch.float32)
    chosen = chosen_coordinates(model, ["*"])
    wide = Batch(batch.ids, {"x": batch["x"].double(), "y": batch["y"]})
    v = torch.randn(chosen.size, 1, dtype=torch.float64)
    narrow = LocalOperator(Curvature(model, mlp_loss, chosen, "hessian"), cut(batch, 2)).apply(v)
    exact = LocalOperator(Curvature(model, mlp_loss, chosen, "hessian", torch.float64), cut(wide, 2)).apply(v)
    assert 0 < oracles.relative_error(narrow, exact) < 1e-5
    assert next(model.parameters()).dtype == torch.float32


def test_scores_along_a_direction_equal_the_gradients_products(case: tuple, caught: Callable) -> None:
    model, loss, batch = case
    chosen = chosen_coordinates(model, ["*"])
    direction = torch.randn(chosen.size, 2, dtype=torch.float64)
    truth = oracles.gradients(model, loss, batch)
    own = torch.stack([chosen.flat([truth[w.name][i] for w in chosen.weights]) for i in range(len(batch))])

    def compare() -> None:
        for j in range(2):
            along = directional_derivatives(model, loss, chosen, batch, direction[:, j])[1]
            assert oracles.relative_error(along, own @ direction[:, j]) < 1e-10

    caught(compare, Coordinates, "tensors", lambda self, v: [t.view(w.shape) for t, w in zip(
        v.flip(0).split([w.size for w in self.weights]), self.weights, strict=True)])  # fmt: skip


def test_a_block_of_queries_by_gradients_in_flight(case: tuple) -> None:
    model, loss, batch = case
    parameters = select_parameters(model, ["*"])
    chosen = chosen_coordinates(model, ["*"])
    block = torch.randn(chosen.size, 3, dtype=torch.float64)
    with PerExampleGradients(model, parameters, Dense(chosen.split(block))) as hooks:
        found = hooks(loss, batch).arrays["rows"]
    along = torch.stack([directional_derivatives(model, loss, chosen, batch, v)[1] for v in block.T], 1)
    assert oracles.relative_error(found, along) < 1e-10


def test_tree_sum_adds_neighbours_first() -> None:
    parts = [torch.tensor([x], dtype=torch.float64) for x in (1e16, 1.0, -1e16, 1.0, 3.0)]
    a, b, c, d, e = parts
    assert torch.equal(tree_sum(iter(parts)), ((a + b) + (c + d)) + e)
    assert not torch.equal(tree_sum(iter(parts)), (((a + b) + c) + d) + e)


def test_refusals() -> None:
    model, batch = randomise(SmoothMlp()).double(), mlp_batch()
    chosen = chosen_coordinates(model, ["head"])
    with pytest.raises(ValueError, match="use one of gauss-newton, hessian"):
        Curvature(model, mlp_loss, chosen, "fisher")
    op = operator(model, mlp_loss, batch, chosen, "gauss-newton")
    with pytest.raises(ValueError, match=r"needs \(15, k\) torch.float64"):
        op.apply(torch.zeros(15, 1))
    with pytest.raises(ValueError, match="matches no parameter"):
        chosen_coordinates(model, ["nothing"])

    def own_way(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model.head(torch.tanh(model.first(batch["x"]))), batch["y"], reduction="none")

    with pytest.raises(ValueError, match="Call the model itself"):
        operator(model, own_way, batch, chosen, "gauss-newton").apply(torch.ones(15, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not depend"):
        operator(model, lambda m, b: b["x"].sum(1), batch, chosen, "hessian").apply(torch.ones(15, 1).double())
    batch["x"][4, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite for examples \[104, 105\]"):
        operator(model, mlp_loss, batch, chosen, "gauss-newton").apply(torch.ones(15, 1, dtype=torch.float64))


def test_the_cut_at_the_models_output_serves_the_built_in_tasks(tokenizer_folder: Path) -> None:
    words = {"counted": torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.uint8)}
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    batch = Batch(
        torch.arange(2),
        {"input_ids": ids, "attention_mask": (ids > 0).long(), "target": torch.tensor([0, 2])} | words,
    )

    def kept(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        return (each * batch["counted"][:, 1:]).sum(1)

    def labelled(model: nn.Module, batch: Batch) -> Tensor:
        return text_loss(model, Batch(batch.ids, batch.tensors | {"y": batch["target"]}))

    folder = str(tokenizer_folder / "plain")
    for task, model, loss in (
        (CausalLM(folder), tiny_gpt2(), kept),
        (TextClassification(folder), tiny_bert().double(), labelled),
    ):
        chosen = chosen_coordinates(model, top_layers(model, 1))
        v = torch.randn(chosen.size, 1, dtype=torch.float64)
        found, truth = (
            operator(model, each, batch, chosen, "gauss-newton", blocks=1).apply(v) for each in (task.loss, loss)
        )
        assert oracles.relative_error(found, truth) < 1e-10


def test_all_finite_is_asked_of_every_entry_only_where_the_sum_is_not() -> None:
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.tensor([largest, largest]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(torch.tensor([1.0, bad]))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))
