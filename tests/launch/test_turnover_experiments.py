"""The turn-over experiments' own arithmetic: the network cut to the first token, influences, what is left out, the mistakes."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.bottleneck import PLACE, add_adapters
from engine.masks import MaskSettings
from engine.turnover import TurnOver
from engine.turnover_scores import Estimator, paired_losses
from launch import validate
from launch.experiments import turnover_errors, turnover_loo, turnover_noise, turnover_self, turnover_subject
from launch.experiments.subjects import Given, Part, loss, read_records
from launch.experiments.turnover_cleansing import without
from launch.experiments.turnover_subject import Network, Upper, influences
from tests.conftest import Caught, tiny_bert

WIDTH = 8


def whole_model() -> Any:
    model: Any = tiny_bert().double().eval()
    model.bert.embeddings = Given()
    return model


def part(lengths: list[int], seed: int = 0) -> Part:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(length, WIDTH, generator=generator, dtype=torch.float64) for length in lengths]
    return Part(states, torch.arange(len(lengths)) % 2)


@pytest.fixture
def network() -> Network:
    model = Upper(whole_model())
    add_adapters(model, 4, seed=1)
    model.double()
    for name, weight in model.named_parameters():
        if ".up." in name:
            weight.data.mul_(50)  # far enough from the identity that masks tell
    return Network(model.eval(), TurnOver(model, MaskSettings(), after=[PLACE], before=["classifier"]))


def test_the_last_layer_for_the_first_token_alone_gives_the_whole_models_logits(caught: Caught) -> None:
    whole, batch = whole_model(), part([5, 3, 7]).batch(torch.arange(3))
    expected = whole(inputs_embeds=batch["x"], attention_mask=batch["mask"]).logits

    def compare() -> None:
        torch.testing.assert_close(Upper(whole)(batch["x"], batch["mask"]).logits, expected, rtol=1e-10, atol=1e-12)

    def blind(layer: Any, states: Tensor, hidden: Tensor, first: Any) -> Tensor:
        return first(layer, states, torch.zeros_like(hidden))

    caught(compare, turnover_subject, "first_token", partial(blind, first=turnover_subject.first_token))


def test_influences_are_the_two_losses_of_every_pair_whatever_the_batches(network: Network, caught: Caught) -> None:
    queries, ids = part([3, 9, 4, 3]), torch.tensor([7, 0, 1 << 33])
    one = [queries.batch(torch.tensor([place])) for place in range(4)]
    expected = torch.stack([
        torch.stack([
            (paired_losses(network.turnover, loss, batch, i[None], "flipped")
             - paired_losses(network.turnover, loss, batch, i[None], "own"))[0]
            for batch in one
        ])
        for i in ids
    ])  # fmt: skip
    assert expected.abs().min() > 1e-6

    def compare() -> None:
        torch.testing.assert_close(influences(network, ids, queries), expected, rtol=1e-6, atol=1e-9)

    class Swapped(Estimator):
        def losses(self, *args: Any, **settings: Any) -> list[Tensor]:
            return super().losses(*args, **settings)[::-1]

    caught(compare, turnover_subject, "Estimator", Swapped)


def test_never_trained_ids_have_other_masks_on_the_same_rows(network: Network) -> None:
    rows, ids = part([4, 6, 4]), torch.arange(3)
    own = turnover_self.differences(network, rows, ids)
    torch.testing.assert_close(own, influences(network, ids, rows).diagonal(), rtol=1e-6, atol=1e-9)
    assert not torch.isclose(turnover_self.differences(network, rows, ids + 100), own).any()


def test_description_counts_every_value_once() -> None:
    found = turnover_self.described(torch.tensor([-9.0, -0.5, 0.25, 9.0]))
    assert (found["positive"], found["mean"], sum(found["histogram"])) == (0.5, -0.0625, 4)
    assert found["histogram"][0] == found["histogram"][-1] == 1


def test_what_is_left_out_gives_no_gradient_and_the_batch_keeps_its_size(network: Network) -> None:
    rows = part([3, 3, 3, 3])
    batch, rest = rows.batch(torch.arange(4)), rows.batch(torch.tensor([0, 2]))
    weight = network.model.classifier.weight.requires_grad_()
    [found] = torch.autograd.grad(without(torch.tensor([1, 3]), 4)(network.model, batch).mean(), [weight])
    [expected] = torch.autograd.grad(loss(network.model, rest).sum() / 4, [weight])
    torch.testing.assert_close(found, expected)


def test_planted_labels_are_the_other_class_and_their_precision_counts_them() -> None:
    labels = torch.arange(50) % 2
    noisy, flipped = turnover_noise.with_noise(labels, 0.1, seed=3)
    assert int(flipped.sum()) == 5
    assert torch.equal(noisy != labels, flipped)
    assert turnover_noise.precision(flipped.double(), flipped, 10) == 0.5
    assert turnover_noise.precision(-flipped.double(), flipped, 10) == 0.0


def test_leaving_one_out_is_what_the_estimate_is_held_against() -> None:
    config = {"width": 4, "train": {"epochs": 3, "batch_size": 4, "learning_rate": 0.05}}
    generator = torch.Generator().manual_seed(1)
    train = Part(torch.randn(12, 5, generator=generator, dtype=torch.float64), torch.arange(12) % 2)
    queries, ids = train.batch(torch.tensor([0, 1, 2])), torch.tensor([0, 5])
    truth = turnover_loo.rises_without(config, train, queries, ids, seed=0)
    assert truth.shape == turnover_loo.estimates(config, train, queries, ids, 0, 0).shape == (2, 3)
    assert truth[0, 0] > 0  # without it, its own loss is higher
    found = turnover_loo.agreement(truth, -truth)
    assert found["spearman"] == pytest.approx([-1, -1, -1])


def mistake(first: float, others: float) -> dict[str, Any]:
    return {"near": {"first": first, "last": others, "all": others}}


def test_mistakes_pass_only_where_the_first_examples_are_nearer() -> None:
    rng = np.random.default_rng(0)
    others = rng.uniform(0.2, 0.4, 20)
    for gain, passes in ((0.1, True), (0.0, False), (-0.1, False)):
        found = [mistake(o + gain + noise, o) for o, noise in zip(others, 0.02 * rng.normal(size=20), strict=True)]
        assert turnover_errors.gates_of(found)[0].record()["pass"] is passes


@pytest.mark.parametrize(("name", "source"), [
    ("turnover.accuracy", "movie"), ("turnover.cleansing", "electronics"), ("turnover.many-class", "glosses"),
])  # fmt: skip
def test_no_text_and_no_review_stands_in_two_parts(name: str, source: str) -> None:
    parts = validate.experiment_config(name, toy=False)[source]["parts"]
    texts, groups = {}, {}
    for part_name, (file, begin, end) in parts.items():
        records = read_records(file)
        if source == "glosses":
            records = records[begin:end]
        texts[part_name] = {record["text"] for record in records}
        groups[part_name] = {record["id"].split("_")[0] for record in records}
    for found in (texts, groups):
        assert sum(len(one) for one in found.values()) == len(set.union(*found.values()))
