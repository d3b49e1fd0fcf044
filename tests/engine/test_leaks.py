"""What masks do not cover is found and named."""

import torch
from torch import Tensor, nn

from engine import bottleneck
from engine.bottleneck import PLACE, add_adapters, widen_head
from engine.leaks import Leak, leaks
from engine.training import freeze
from engine.turnover import TurnOver
from tests.conftest import (
    Caught,
    image_batch,
    mlp_batch,
    mlp_loss,
    random_cnn,
    randomise,
    text_loss,
    tiny_bert,
    token_batch,
)
from tests.engine.test_turnover import masked, net


def named(found: list[Leak]) -> dict[str, str]:
    return {leak.name: leak.kind for leak in found}


def test_masks_on_both_sides_leave_only_the_last_bias() -> None:
    assert leaks(masked(), mlp_loss, mlp_batch()) == [Leak("head.bias", "bias", 1.0)]


def test_a_mask_on_one_side_leaves_what_it_does_not_cover() -> None:
    found = leaks(TurnOver(net(), after=["first"]), mlp_loss, mlp_batch())
    assert named(found) == {"head.bias": "bias", "middle.bias": "bias", "head.weight": "shared layer"}
    assert all(leak.share == 1.0 for leak in found)


def test_adapters_and_head_leak_through_their_upper_biases_alone() -> None:
    model = tiny_bert().double()
    add_adapters(model, 6)
    freeze(model, ("*.adapter.*", "classifier.*"))
    found = leaks(TurnOver(model, after=[PLACE], before=["classifier"]), text_loss, token_batch())
    assert set(named(found).values()) == {"bias"}
    assert {leak.name.rpartition("adapter.")[2] for leak in found} == {"up.bias", "classifier.bias"}


def test_a_wide_head_leaks_through_the_classifiers_bias_alone(caught: Caught) -> None:
    model = tiny_bert().double()
    widen_head(model, 40)
    randomise(model)
    freeze(model, ("*.adapter.*", "classifier.*"))

    def look() -> None:
        found = leaks(TurnOver(model, after=[PLACE], before=["classifier"]), text_loss, token_batch())
        assert named(found) == {"classifier.bias": "bias"}

    caught(look, bottleneck.HiddenLayer, "forward", lambda self, x: self.up(nn.functional.gelu(self.down(x))))


def test_norms_decay_and_momentum_are_listed() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.norm, self.act, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.norm(self.low(x))))

    found = leaks(TurnOver(randomise(Normed()).double(), after=["low"]), mlp_loss, mlp_batch(), 0.1, momentum=True)
    kinds = named(found)
    assert kinds["norm.weight"] == kinds["norm.bias"] == "norm"
    assert [leak.kind for leak in found if leak.name == "all trained weights"] == ["momentum", "weight decay"]
    assert "low.weight" not in kinds


def test_a_batch_norm_that_trains_is_listed() -> None:
    model = random_cnn().double()
    turnover = TurnOver(model, after=["line"])
    frozen = named(leaks(turnover, mlp_loss, image_batch()))
    model.train()
    training = leaks(turnover, mlp_loss, image_batch())
    assert Leak("norm", "batch statistics", 1.0) in training
    assert named(training) == frozen | {"norm": "batch statistics"}
    assert all(module.training for module in model.modules())
    assert frozen["first.weight"] == "shared layer"


def test_frozen_weights_do_not_leak() -> None:
    turnover = masked()
    freeze(turnover.model, ("low.*",))
    assert leaks(turnover, mlp_loss, mlp_batch()) == []
    assert torch.is_grad_enabled()
