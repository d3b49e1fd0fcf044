"""The fused head against the model's own logits, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine import vocabulary
from engine.batches import Batch
from engine.gradient_batch import GradientBatch
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters
from engine.projection import Projection
from engine.projectors import Projector, Whole, make_projector
from engine.tasks.text import IGNORED
from tests.conftest import tiny_gpt2

EVERYTHING = ["transformer.*", "lm_head*"]


def batch_of(lengths: list[int], vocabulary_size: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, vocabulary_size, shape, generator=generator) * mask
    return Batch(torch.arange(len(lengths)), {"input_ids": ids, "attention_mask": mask})


def loss(model: nn.Module, batch: Batch, mean: bool = False) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = torch.roll(batch["input_ids"], -1, 1).masked_fill(torch.roll(batch["attention_mask"], -1, 1) == 0, IGNORED)
    labels[:, -1] = IGNORED
    each = vocabulary.token_losses(model, inputs, labels)
    return each.sum(1) / (labels != IGNORED).sum(1) if mean else each.sum(1)


def model_of(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return tiny_gpt2(tie_word_embeddings=tied, vocab_size=24).double().eval()


def take(
    model: nn.Module, patterns: list[str], fused: bool, norms: bool = True, projector: Projector | None = None,
    the_loss: Callable[[nn.Module, Batch], Tensor] = loss,
) -> tuple[GradientBatch, bool | None]:  # fmt: skip
    parameters = select_parameters(model, patterns)
    projector = projector or make_projector(parameters, Projection(dim=3), torch.device("cpu"), torch.float64)
    with PerExampleGradients(model, parameters, projector, norms) as hooks:
        if not fused:
            hooks._fusing = False
        return hooks(the_loss, batch_of([5, 2, 7, 3])), hooks._fusing


def check(found: GradientBatch, exact: GradientBatch) -> None:
    torch.testing.assert_close(found.losses, exact.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.arrays["rows"], exact.arrays["rows"], rtol=1e-9, atol=1e-12)
    if exact.norms is not None:
        torch.testing.assert_close(found.norms, exact.norms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("patterns", [EVERYTHING, ["lm_head*"], ["transformer.h.*"]])
@pytest.mark.parametrize("held", [1, 24 * 7 * 2, 1 << 22])
def test_equals_the_models_own_logits(patterns, held, monkeypatch):
    monkeypatch.setattr(vocabulary, "_LOGITS", held)
    model = model_of()
    found, fused = take(model, patterns, fused=True)
    assert fused
    check(found, take(model, patterns, fused=False)[0])


def test_mean_losses_weigh_every_token(monkeypatch):
    mean: Callable = lambda model, batch: loss(model, batch, mean=True)  # noqa: E731
    model = model_of()
    check(take(model, EVERYTHING, True, the_loss=mean)[0], take(model, EVERYTHING, False, the_loss=mean)[0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda losses, delta: (losses, -delta),
        lambda losses, delta: (losses, delta.softmax(-1)),
        lambda losses, delta: (losses, delta / delta.shape[1]),
    ],
)
def test_a_wrong_gradient_of_the_logits_is_seen(monkeypatch, wrong):
    right = vocabulary._loss_and_gradient
    monkeypatch.setattr(vocabulary, "_loss_and_gradient", lambda *args: wrong(*right(*args)))
    model = model_of()
    with pytest.raises(AssertionError):
        check(take(model, EVERYTHING, True)[0], take(model, EVERYTHING, False)[0])


def test_a_tied_head_is_fused_only_without_norms():
    model = model_of(tied=True)
    assert take(model, ["transformer.*"], True, norms=True)[1] is False
    # its parameter is an embedding too: rows of both uses add up
    found, _ = take(model, ["transformer.*"], True, norms=False)
    check(found, take(model, ["transformer.*"], False, norms=False)[0])


def test_whole_gradients_and_other_heads_use_the_models_logits():
    model = model_of()
    parameters = select_parameters(model, EVERYTHING)
    assert take(model, EVERYTHING, True, projector=Whole(parameters))[1] is False

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

    model.__class__ = Capped
    assert take(model, EVERYTHING, True)[1] is False
    names = ["input_ids", "attention_mask"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # however small its logits are
        for kind, same in ((Capped, False), (type(model).__base__, True)):
            small = model_of().to(dtype)
            small.__class__ = kind
            assert vocabulary._makes_the_logits(small, small.lm_head, names) is same


def test_nothing_is_fused_outside_a_pass():
    model = model_of()
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        loss(model, batch_of([4, 2]))
    assert seen


def test_modules_outside_the_loss_are_an_error_with_a_fused_head_too():
    model = model_of()
    model.idle = nn.Linear(3, 3).double()
    with pytest.raises(ValueError, match="does not depend on any of the chosen modules"):
        take(model, ["idle"], True)
