"""Masked language models: which tokens are hidden, what the loss counts, and gradients of a tied decoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from engine import gradients, vocabulary
from engine.coordinates import chosen_coordinates
from engine.curvature import Curvature
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.taps import at_tokens, first_tokens
from engine.tasks.contract import load_task, with_model_folder
from engine.tasks.masked_lm import MaskedLM
from engine.tasks.text import IGNORED
from tests import oracles
from tests.conftest import Caught
from tests.masked_models import MASK, tiny_masked_bert, write_mask_tokenizer

TEXTS = ["the film was good", "bad", "a very dull and never great plot so fine", "the plot is not bad and so good"]
LARGE = 2**40 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mask_tokenizer(tmp_path_factory.mktemp("masking"))


def rows_of(task: MaskedLM, texts: list[str] = TEXTS, first: int = LARGE - 1) -> list[dict]:
    encoded = [row for text in texts for row in task.encode({"text": text})]
    return [row | {"id": first + i} for i, row in enumerate(encoded)]


def test_it_is_built_in(folder: Path) -> None:
    assert isinstance(load_task("masked-lm", {"tokenizer": str(folder)}), MaskedLM)


def test_which_tokens_are_hidden_is_fixed_for_ever(folder: Path) -> None:
    """These bits may never change: a stored run was made with them."""
    golden = {
        0: [12, 14, 18, 23, 37, 44], 7: [23, 25, 26, 30, 41, 49], LARGE - 1: [2, 11, 12, 14, 31, 42],
        LARGE: [9, 17, 23, 29, 44],
    }  # fmt: skip
    task = MaskedLM(str(folder), max_tokens=64)
    row = {"input_ids": np.full(50, 9), "counted": np.ones(50, np.uint8)}
    found = {i: np.flatnonzero(task.collate([row | {"id": i}])["labels"][0] != -100).tolist() for i in golden}
    assert found == golden


def test_hidden_tokens_do_not_depend_on_batch_mates_and_differ_between_neighbouring_ids(folder: Path) -> None:
    task = MaskedLM(str(folder))
    row = {"input_ids": np.full(200, 9), "counted": np.ones(200, np.uint8)}
    rows = [row | {"id": i} for i in (2**24, 2**24 + 1, LARGE - 1, LARGE)]
    together = task.collate(rows)
    for position, one in enumerate(rows):
        alone = task.collate([one])
        for name in ("input_ids", "labels"):
            assert torch.equal(alone[name][0], together[name][position])
    assert len({tuple(labels.tolist()) for labels in together["labels"]}) == len(rows)
    assert not torch.equal(MaskedLM(str(folder), seed=1).collate(rows)["labels"], together["labels"])


def test_no_random_token_is_one_that_the_model_does_not_know(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(500)])
    tokenizer.save_pretrained(tmp_path / "grown")
    tiny_masked_bert(vocab_size=25).save_pretrained(tmp_path / "model")
    row = {"input_ids": np.full(400, 9), "counted": np.ones(400, np.uint8)}
    rows = [row | {"id": i} for i in range(20)]
    task = load_task(
        "masked-lm", with_model_folder("masked-lm", {}, tmp_path / "model") | {"tokenizer": str(tmp_path / "grown")}
    )
    assert 20 < task.collate(rows)["input_ids"].max() < 25
    plain = load_task("masked-lm", {"tokenizer": str(folder), "model": str(tmp_path / "model")})
    assert torch.equal(plain.collate(rows)["input_ids"], MaskedLM(str(folder)).collate(rows)["input_ids"])
    assert MaskedLM(str(tmp_path / "grown")).collate(rows)["input_ids"].max() > 25  # nothing known of the model


def test_shares_are_those_of_bert(folder: Path) -> None:
    task = MaskedLM(str(folder))
    row = {"input_ids": np.full(400, 9), "counted": np.ones(400, np.uint8)}
    batch = task.collate([row | {"id": i} for i in range(200)])
    chosen = batch["labels"] != -100
    assert (batch["labels"][chosen] == 9).all()
    assert (batch["input_ids"][~chosen] == 9).all()
    seen = batch["input_ids"][chosen]
    share, count = chosen.double().mean().item(), len(seen)
    masked, kept = (seen == MASK).double().mean().item(), (seen == 9).double().mean().item()
    sigma = (0.25 / count) ** 0.5
    assert abs(share - 0.15) < 5 * (0.15 * 0.85 / 80_000) ** 0.5
    assert abs(masked - (0.8 + 0.1 / 25)) < 5 * sigma  # any of 25 tokens, the mask among them
    assert abs(kept - (0.1 + 0.1 / 25)) < 5 * sigma
    plain = MaskedLM(str(folder), masking="mask").collate([row | {"id": i} for i in range(200)])
    assert torch.equal(plain["labels"], batch["labels"])  # the same tokens
    assert (plain["input_ids"][chosen] == MASK).all()


def test_every_example_hides_at_least_one_token_and_never_a_special_one(folder: Path) -> None:
    task = MaskedLM(str(folder), mask_share=1e-9)
    batch = task.collate(rows_of(task))
    assert ((batch["labels"] != -100).sum(1) == 1).all()
    everything = MaskedLM(str(folder), mask_share=1.0, masking="mask")
    for row, labels in zip(rows_of(everything), everything.collate(rows_of(everything))["labels"], strict=True):
        inner = row["input_ids"][1:-1].tolist()
        assert labels.tolist()[: len(inner) + 2] == [-100, *inner, -100]


def test_losses_are_the_transformers_own_and_do_not_depend_on_padding(folder: Path, caught: Caught) -> None:
    task, model = MaskedLM(str(folder), mask_share=0.5), tiny_masked_bert().double()
    rows = rows_of(task)

    def compare() -> None:
        together = task.loss(model, task.collate(rows)).detach()
        truth = []
        for row in rows:
            alone = task.collate([row])
            mean = model(input_ids=alone["input_ids"], labels=alone["labels"]).loss.detach()
            truth.append(mean.double() * (alone["labels"] != -100).sum())
        assert oracles.relative_error(together, torch.stack(truth)) <= 1e-6  # theirs is taken in float32

    compare()
    caught(compare, task, "reduction", "mean")


def test_alone_and_in_a_padded_batch(folder: Path) -> None:
    task, model = MaskedLM(str(folder), mask_share=0.5), tiny_masked_bert()
    parameters = select_parameters(model, ["*"])
    rows = rows_of(task)
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        together = hooks(task.loss, task.collate(rows))
        for position, row in enumerate(rows):
            alone = hooks(task.loss, task.collate([row]))
            for name, array in alone.arrays.items():
                bound = 1e-5 * float(together.norms[position].norm())
                assert (array[0] - together.arrays[name][position]).abs().max() <= bound


def test_per_example_gradients_equal_autograd_with_a_tied_decoder(folder: Path, caught: Caught) -> None:
    task, model = MaskedLM(str(folder), mask_share=0.4), tiny_masked_bert().double()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    parameters = select_parameters(model, ["*"])
    assert {p.name for p in parameters} == {name for name, _ in model.named_parameters()}  # the decoder's bias too
    batch = task.collate(rows_of(task))

    def compare() -> None:
        with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
            out = hooks(task.loss, batch)
        truth = oracles.gradients(model, task.loss, batch)
        for p in parameters:
            own = truth[p.name]
            exact = own.transpose(1, 2) if p.uses[0].role == "embedding" else own
            assert float((out.arrays[p.name] - exact.flatten(1)).norm()) <= 1e-10 * max(1.0, float(exact.norm()))

    factors = gradients._matrix_factors

    def without_the_embedding(index, use, module, held, delta):
        return factors(index, use, module, held, delta * (use.role != "embedding-transposed"))

    caught(compare, gradients, "_matrix_factors", without_the_embedding)


def test_the_decoder_sees_counted_tokens_alone_while_gradients_are_taken(folder: Path, caught: Caught) -> None:
    """Rows and exact norms are autograd's all the same."""
    task, model = MaskedLM(str(folder), mask_share=0.3), tiny_masked_bert().double()
    parameters, batch = select_parameters(model, ["*"]), task.collate(rows_of(task))
    exact = oracles.gradients(model, task.loss, batch)
    seen: list[int] = []

    def compare() -> None:
        with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
            out = hooks(task.loss, batch)
        for place, p in enumerate(parameters):
            own = exact[p.name].transpose(1, 2) if p.uses[0].role == "embedding" else exact[p.name]
            assert float((out.arrays[p.name] - own.flatten(1)).norm()) <= 1e-10 * max(1.0, float(own.norm()))
            assert torch.allclose(out.norms[:, place], exact[p.name].flatten(1).norm(dim=1), atol=1e-12)

    compare()
    model.cls.predictions.decoder.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    compare()
    assert 1 < seen[-1] == (batch["labels"] != IGNORED).sum(1).max() <= batch["labels"].shape[1] // 2
    caught(compare, vocabulary, "at_tokens", lambda values, tokens: at_tokens(values, (tokens + 1) % values.shape[1]))
    caught(compare, vocabulary, "first_tokens", lambda wanted: first_tokens(wanted)[:, :1])


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_the_decoder_sees_counted_tokens_alone_in_curvature_products(folder: Path, caught: Caught, kind: str) -> None:
    task, model = MaskedLM(str(folder), mask_share=0.3), tiny_masked_bert().double()
    space, batch = chosen_coordinates(model, ["*"]), task.collate(rows_of(task))
    block = torch.randn(space.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def product() -> torch.Tensor:
        return Curvature(model, task.loss, space, kind, torch.float64).total([(batch, None)], block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "first_tokens", lambda wanted: None)
        whole = product()

    def compare() -> None:
        torch.testing.assert_close(product(), whole, rtol=1e-10, atol=1e-12)

    model.cls.predictions.decoder.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    compare()
    assert 1 < seen[-1] == (batch["labels"] != IGNORED).sum(1).max() <= batch["labels"].shape[1] // 2
    caught(compare, vocabulary, "at_tokens", lambda values, tokens: at_tokens(values, (tokens + 1) % values.shape[1]))


class Centred(BertForMaskedLM):
    """Logits without their mean over the tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits - out.logits.mean(1, keepdim=True)
        return out


class Capped(BertForMaskedLM):
    """Logits that end at ±30."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Later(BertForMaskedLM):
    """Logits three times as large from the seventh token on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.where(torch.arange(out.logits.shape[1]) < 6, 1, 3)[:, None]
        return out


class Flat(BertForMaskedLM):
    """A decoder that sees the tokens of all examples in one row."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.cls.predictions.transform(self.bert(*args, **kwargs)[0])
        logits = self.cls.predictions.decoder(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        return MaskedLMOutput(logits=logits)


class Chunked(BertForMaskedLM):
    """A decoder that is given four tokens at a time."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.cls.predictions.transform(self.bert(*args, **kwargs)[0])
        parts = [self.cls.predictions.decoder(part) for part in hidden.split(4, 1)]
        return MaskedLMOutput(logits=torch.cat(parts, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [BertForMaskedLM, Capped, Centred, Later, Flat, Chunked])
def test_which_decoders_may_see_fewer_tokens(kind: type, dtype: torch.dtype) -> None:
    model = tiny_masked_bert().to(dtype).eval()
    model.__class__ = kind
    decoder = model.cls.predictions.decoder
    assert vocabulary.CountedTokens().suit(model, decoder, ["input_ids", "attention_mask"]) is (
        kind in (BertForMaskedLM, Capped)
    )


@pytest.mark.parametrize("kind", [Later, Flat, Chunked])
def test_decoders_that_need_all_tokens_get_them(folder: Path, kind: type) -> None:
    task, model = MaskedLM(str(folder)), tiny_masked_bert().double()
    model.__class__ = kind
    space, batch = chosen_coordinates(model, ["*"]), task.collate(rows_of(task, [TEXTS[2]] * 3))
    block = torch.ones(space.size, 1, dtype=torch.float64)
    found = Curvature(model, task.loss, space, dtype=torch.float64).total([(batch, None)], block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "first_tokens", lambda wanted: None)
        whole = Curvature(model, task.loss, space, dtype=torch.float64).total([(batch, None)], block)
    assert torch.equal(found, whole)


def test_whether_the_decoder_may_see_fewer_tokens_does_not_hang_on_the_first_batch(folder: Path) -> None:
    """Else two workers, which begin with different batches, would leave different bits."""
    many, task, model = MaskedLM(str(folder), mask_share=1.0), MaskedLM(str(folder)), tiny_masked_bert().double()
    space = chosen_coordinates(model, ["*"])
    block = torch.ones(space.size, 1, dtype=torch.float64)
    seen: list[int] = []
    model.cls.predictions.decoder.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    batches = [one.collate(rows_of(one)) for one in (many, task)]
    Curvature(model, task.loss, space, dtype=torch.float64).total([(batch, None) for batch in batches], block)
    assert seen[-1] == 1 < seen[-2] == batches[0]["labels"].shape[1]


def test_curvature_products_of_mixed_logits_take_all_tokens(folder: Path) -> None:
    task, model = MaskedLM(str(folder)), tiny_masked_bert().double()
    space, batch = chosen_coordinates(model, ["*"]), task.collate(rows_of(task, [TEXTS[2]] * 3))
    block = torch.ones(space.size, 1, dtype=torch.float64)
    plain = Curvature(model, task.loss, space, dtype=torch.float64).total([(batch, None)], block)
    model.__class__ = Centred
    found = Curvature(model, task.loss, space, dtype=torch.float64)
    mixed = found.total([(batch, None)], block)
    assert float((mixed - plain).norm()) > 1e-3 * float(plain.norm())
    found._counted._same = False
    assert torch.equal(found.total([(batch, None)], block), mixed)


def test_all_tokens_are_given_to_a_decoder_whose_logits_are_mixed_afterwards(folder: Path) -> None:
    task, model = MaskedLM(str(folder)), tiny_masked_bert().double()
    model.__class__ = Centred
    parameters, batch = select_parameters(model, ["*"]), task.collate(rows_of(task, [TEXTS[2]] * 3))  # nothing padded
    exact = oracles.gradients(model, task.loss, batch)
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
        out = hooks(task.loss, batch)
    for p in parameters:
        own = exact[p.name].transpose(1, 2) if p.uses[0].role == "embedding" else exact[p.name]
        assert float((out.arrays[p.name] - own.flatten(1)).norm()) <= 1e-10 * max(1.0, float(own.norm()))


def test_long_documents_are_chunked_and_every_token_is_in_one_chunk(folder: Path) -> None:
    task = MaskedLM(str(folder), max_tokens=5)
    tokens = list(range(5, 22))
    rows = task.encode({"input_ids": tokens, "text": "x"})
    assert [t for row in rows for t in row["input_ids"][1:-1].tolist()] == tokens
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in rows)
    assert max(len(row["input_ids"]) for row in rows) == 5
    assert rows[0]["text"] == "the a film"
    wrapped = task.encode({"input_ids": [2, *tokens, 3, 0], "attention_mask": [1] * 19 + [0]})
    assert [row["input_ids"].tolist() for row in wrapped] == [row["input_ids"].tolist() for row in rows]


def test_labels_of_minus_100_are_never_hidden(folder: Path) -> None:
    task = MaskedLM(str(folder), mask_share=1.0)
    (row,) = task.encode({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]})
    assert task.collate([row])["labels"][0].tolist() == [-100, -100, 6, -100, 8, -100]


@pytest.mark.parametrize("text", ["", "[MASK] [UNK]", "zebra"])
def test_an_example_without_a_token_to_hide_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no token that can be masked"):
        MaskedLM(str(folder)).encode({"text": text})


@pytest.mark.parametrize(
    "settings", [{"mask_share": 0.0}, {"mask_share": 1.5}, {"masking": "all"}, {"reduction": "max"}, {"max_tokens": 2}]
)
def test_settings_out_of_range_are_refused(folder: Path, settings: dict) -> None:
    with pytest.raises(ValueError, match=f"task.settings.{next(iter(settings))}="):
        MaskedLM(str(folder), **settings)


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match="has no mask token: use task causal-lm"):
        MaskedLM(str(tokenizer_folder / "wrapped"))
