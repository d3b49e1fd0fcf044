"""turnover.cnn's networks and what it makes of their answers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.turnover_scores import paired_losses
from launch import validate
from launch.experiments import turnover_cnn
from launch.experiments.registry import Gate
from launch.experiments.subjects import loss
from launch.experiments.turnover_cnn import ERRORS, Kind, digits, explain, fit, gates, kinds, untrained
from tests.conftest import Caught

CONFIG = validate.experiment_config("turnover.cnn", toy=True)


@pytest.mark.parametrize(("first", "masked"), [(1, 4), (3, 2), (4, 1)])
def test_masks_lie_after_a_layer_and_all_above(first: int, masked: int) -> None:
    model, turnover = untrained(CONFIG, Kind(first, True), 0)
    assert turnover is not None
    assert turnover.after == [f"layer{number}" for number in range(first, 5)]
    turnover.use(torch.tensor([5, 6]))
    model.eval()(digits(CONFIG)["train"].batch(torch.tensor([0, 1]))["x"])
    assert list(turnover.widths.values()) == [2, 3, 4, 6][-masked:]


def test_all_kinds_of_network_start_from_the_same_weights() -> None:
    states = [untrained(CONFIG, kind, 3)[0].state_dict() for kind in kinds(CONFIG)]
    assert len(states) == 4
    assert all(torch.equal(one[name], states[0][name]) for one in states for name in one)


def test_the_loss_of_a_digit_that_a_network_is_sure_of_is_not_rounded_to_0(caught: Caught) -> None:
    model, batch = untrained(CONFIG, Kind(2, False), 0)[0].eval(), digits(CONFIG)["train"].batch(torch.arange(8))
    head = model.get_submodule("head")
    with torch.no_grad():
        head.weight.mul_(600)

    def compare() -> None:
        with torch.no_grad():
            exact = loss(lambda x: model(x).double(), batch)  # type: ignore[arg-type]
            assert exact.min() < 1e-8 < 1e-2 < exact.max()
            torch.testing.assert_close(turnover_cnn.small_loss(model, batch).double(), exact, rtol=1e-4, atol=0)

    caught(compare, turnover_cnn, "small_loss", loss)


def test_an_error_is_put_down_to_the_digits_with_the_largest_mean_influence(caught: Caught) -> None:
    parts, wrong, row = digits(CONFIG), 7, 2
    networks = [fit(CONFIG, Kind(2, False), 0.01, seed) for seed in (0, 1)]
    ids = (parts["train"].labels == wrong).nonzero().flatten()
    one = parts["test"].batch(torch.tensor([row]))

    def by_hand(example: int) -> Tensor:
        asked = type(one)(one.ids, one.tensors | {"target": torch.tensor([wrong])})
        sides = [
            [paired_losses(n.turnover, loss, asked, torch.tensor([example]), side) for side in ("flipped", "own")]
            for n in networks
            if n.turnover
        ]
        return sum(flipped - own for flipped, own in sides)[0] / 2

    def compare() -> None:
        found = explain(parts, networks, row, wrong, shown=2)
        truth = sorted(((float(by_hand(i)), i) for i in ids.tolist()), reverse=True)[:2]
        assert found["scores"] == pytest.approx([score for score, _ in truth], rel=1e-5)
        assert found["shown"] == [i for _, i in truth]
        assert found["label"] == int(parts["test"].labels[row])

    caught(compare, turnover_cnn, "average", lambda blocks: (-sum(blocks) / 2, None))


def test_points_lost_and_the_distance_of_never_trained_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"first": [1, 2], "seeds": [0], "explained": {"first": 2}}
    shares = {"own": {"positive": 0.9, "mean": 1.0}, "unseen": {"positive": 0.46, "mean": 0.0}}
    done: dict[str, dict[str, Any]] = {ERRORS: {"errors": []}}
    for kind in kinds(config):
        done[f"{kind.name}-seed-0"] = {"right": {None: "1111", 1: "1000", 2: "1101"}[kind.first]} | shares
    found: dict[str, Gate] = {gate.name: gate for gate in gates(config, done)}
    assert found["accuracy without masks, %"].value == 100
    assert found["points lost by masks from layer 1 on"].value == 75
    lost = found["points lost by masks from layer 2 on with ordinary dropout"]
    assert (lost.value, lost.paper) == (25, 0.7)
    assert found["masks-1: never-trained ids, share's distance from .5"].record()["pass"] is False
    assert found["masks-2-dropout: positive self-influence, share"].value == 0.9
