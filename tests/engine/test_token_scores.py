"""Token scores: equal to products of every token's own gradient with the query's row, and adding up to the score."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import forward_mode, token_scores
from engine.batches import Batch
from engine.gradients import PerExampleGradients
from engine.parameters import Parameter, select_parameters
from engine.projection import Projection, row_layout, unprojected_layout
from engine.projectors import Whole, make_projector
from engine.tasks.causal_lm import CausalLM
from engine.tasks.masked_lm import MaskedLM
from engine.token_scores import back_projected, tangents, token_derivatives
from tests import oracles
from tests.conftest import Caught, every_batch, every_layer, tiny_gpt2
from tests.masked_models import tiny_masked_bert, write_mask_tokenizer

TEXTS = ["the film was good", "a very dull and never great plot", "so fine"]
KINDS = ["none", "two-sided", "gaussian", "rademacher"]
CPU = torch.device("cpu")


def every_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return [B, T], the next token's loss at every token but the last."""
    ids = batch["input_ids"]
    labels = ids[:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    each = nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), labels, reduction="none")
    return nn.functional.pad(each, (1, 0))


@pytest.fixture(scope="module")
def mask_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mask_tokenizer(tmp_path_factory.mktemp("masking"))


Case = tuple[nn.Module, Callable[[nn.Module, Batch], Tensor], Batch]


@pytest.fixture(params=["causal-lm", "masked-lm", "mean", "every-layer"])
def case(request: pytest.FixtureRequest, tokenizer_folder: Path, mask_tokenizer: Path) -> Case:
    """A float64 model, the losses of its tokens, and a batch whose last example asks."""
    if request.param == "every-layer":  # tied, with a padding row, a Conv1D, norms and a module called for all examples
        return every_layer().double(), every_token_loss, every_batch()
    if request.param == "masked-lm":
        task, model = MaskedLM(str(mask_tokenizer), mask_share=0.6), tiny_masked_bert()
    else:
        reduction = "mean" if request.param == "mean" else "sum"
        task, model = CausalLM(str(tokenizer_folder / "plain"), reduction=reduction), tiny_gpt2()
    rows = [row | {"id": 2**40 - 1 + i} for i, text in enumerate(TEXTS) for row in task.encode({"text": text})]
    return model.double(), task.token_losses, task.collate(rows)


def by_example(losses: Callable) -> Callable:
    return lambda model, batch: losses(model, batch).sum(1)


def exact_rows(case: Case, parameters: list[Parameter], projection: Projection) -> dict[str, Tensor]:
    """Return the rows that a run keeps of every example."""
    model, losses, batch = case
    stored = projection.kind != "none"
    projector = make_projector(parameters, projection, CPU, torch.float64) if stored else Whole(parameters, False)
    with PerExampleGradients(model, parameters, projector) as hooks:
        return hooks(by_example(losses), batch).arrays


def of_tokens(case: Case, parameters: list[Parameter], projection: Projection, query: dict[str, Tensor]) -> Tensor:
    """Return [B, T]: every token's own gradient, projected as the run does, times the query's row. One pass a token."""
    model, losses, batch = case
    found = torch.zeros(batch["input_ids"].shape, dtype=torch.float64)
    for token in range(found.shape[1]):
        alone = (model, lambda m, b, token=token: losses(m, b)[:, token : token + 1], batch)
        for name, array in exact_rows(alone, parameters, projection).items():
            found[:, token] += array @ query[name]
    return found


def derivatives(case: Case, parameters: list[Parameter], projection: Projection, query: dict[str, Tensor]) -> Tensor:
    model, losses, batch = case
    layout = unprojected_layout(parameters) if projection.kind == "none" else row_layout(parameters, projection)
    direction = back_projected(query, layout, parameters, projection, next(model.parameters()))
    return token_derivatives(losses, model, batch, token_scores.tangents(model, parameters, direction))


@pytest.mark.parametrize("kind", KINDS)
def test_token_scores_are_products_of_the_tokens_gradients_and_add_up(case: Case, kind: str) -> None:
    projection = Projection(kind, 3, 5)
    parameters = select_parameters(case[0], ["*"])
    rows = exact_rows(case, parameters, projection)
    query = {name: array[-1] for name, array in rows.items()}
    found = derivatives(case, parameters, projection, query)
    truth = of_tokens(case, parameters, projection, query)
    assert oracles.relative_error(found, truth) <= 1e-10
    scores = sum(array @ query[name] for name, array in rows.items())
    assert oracles.relative_error(found.sum(1), scores) <= 1e-10


def test_only_the_chosen_parameters_count(tokenizer_folder: Path) -> None:
    task, model = CausalLM(str(tokenizer_folder / "plain")), tiny_gpt2().double()
    case = (model, task.token_losses, task.collate([row for t in TEXTS for row in task.encode({"text": t})]))
    parameters = select_parameters(model, ["transformer.h.1.mlp*", "transformer.ln_f"])
    rows = exact_rows(case, parameters, Projection("none"))
    query = {name: array[0] for name, array in rows.items()}
    scores = sum(array @ query[name] for name, array in rows.items())
    assert oracles.relative_error(derivatives(case, parameters, Projection("none"), query).sum(1), scores) <= 1e-10


def test_a_direction_that_is_not_projected_back_or_turned_is_caught(tokenizer_folder: Path, caught: Caught) -> None:
    task, model = CausalLM(str(tokenizer_folder / "plain")), tiny_gpt2(8, 8).double()
    case = (model, task.token_losses, task.collate(task.encode({"input_ids": [2, 3, 4, 5, 6]})))
    parameters, projection = select_parameters(model, ["*"]), Projection("two-sided", 3, 5)
    rows = exact_rows(case, parameters, projection)
    query = {name: array[0] for name, array in rows.items()}

    def compare() -> None:
        found = derivatives(case, parameters, projection, query)
        scores = sum(array @ query[name] for name, array in rows.items())
        assert oracles.relative_error(found.sum(1), scores) <= 1e-10

    sides, roles = token_scores.side_matrix, token_scores.tangents
    caught(compare, token_scores, "side_matrix", lambda p, *rest: sides(replace(p, seed=p.seed + 1), *rest))

    def turned(model: nn.Module, parameters: list[Parameter], direction: dict[str, Tensor]) -> dict[str, Tensor]:
        square = {n: v.T if v.dim() == 2 and v.shape[0] == v.shape[1] else v for n, v in direction.items()}
        return roles(model, parameters, square)

    caught(compare, token_scores, "tangents", turned)


def test_padding_and_batch_mates_change_nothing(tokenizer_folder: Path) -> None:
    task, model = CausalLM(str(tokenizer_folder / "plain")), tiny_gpt2().double()
    rows = [row for text in TEXTS for row in task.encode({"text": text})]
    case = (model, task.token_losses, task.collate(rows))
    parameters = select_parameters(model, ["*"])
    query = {name: array[0] for name, array in exact_rows(case, parameters, Projection("none")).items()}
    together = derivatives(case, parameters, Projection("none"), query)
    for position, row in enumerate(rows):
        alone = derivatives((model, task.token_losses, task.collate([row])), parameters, Projection("none"), query)[0]
        assert oracles.relative_error(together[position, : len(alone)], alone) <= 1e-10
        assert not together[position, len(alone) :].any()


def test_an_operation_without_a_forward_derivative_is_told(tokenizer_folder: Path, tmp_path: Path, monkeypatch) -> None:
    tiny_gpt2(bos_token_id=None).save_pretrained(tmp_path)
    task = CausalLM(str(tokenizer_folder / "plain"), attention="sdpa")
    model, batch = task.build(tmp_path).eval(), task.collate(task.encode({"input_ids": [2, 3, 4, 5, 6]}))
    parameters = select_parameters(model, ["*"])
    along = tangents(model, parameters, {p.name: torch.ones(p.out_features, max(1, p.in_features)) for p in parameters})
    assert torch.isfinite(token_derivatives(task.token_losses, model, batch, along)).all()
    monkeypatch.setattr(forward_mode, "sdpa_kernel", lambda _: nullcontext())  # fused attention
    with pytest.raises(ValueError, match="no token scores: torch has no forward-mode derivative of it .*forward AD"):
        token_derivatives(task.token_losses, model, batch, along)


def test_what_the_model_itself_does_not_implement_passes_as_it_is() -> None:
    def unfinished(point: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError("rotary positions come later")

    with pytest.raises(NotImplementedError, match="rotary positions come later"):
        forward_mode.along(unfinished, {"w": torch.ones(1)}, {"w": torch.ones(1)}, "no")
