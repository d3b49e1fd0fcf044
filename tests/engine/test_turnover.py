"""Masks on a model's layers: which units, which sub-network, in which modes; disjoint learning; the checkpoint's record."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import turnover as turnover_module
from engine.batches import Batch
from engine.bottleneck import PLACE, add_adapters
from engine.masks import Masks, MaskSettings
from engine.models import save_checkpoint
from engine.training import TrainSettings, train
from engine.turnover import TurnOver, restore, under_own_masks
from tests.conftest import Caught, mlp_batch, mlp_loss, random_cnn, randomise, text_loss, tiny_bert, token_batch
from tests.engine.test_masks import volatile_mask


class Net(nn.Module):
    """Masked on both sides of `middle`, with ordinary dropout between and a residual sum around."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.first = nn.Linear(5, 8), nn.ReLU(inplace=True)
        self.middle, self.second, self.drop = nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.second(self.middle(self.first(self.low(x))))))


AFTER, BEFORE = ["first"], ["head"]


def net() -> Net:
    model = Net()
    randomise(model, scale=0.8)
    return model.double()


def masked(settings: MaskSettings | None = None) -> TurnOver:
    return TurnOver(net(), settings, AFTER, BEFORE)


def by_hand(model: Net, x: Tensor, example: int, side: str, settings: MaskSettings | None = None) -> Tensor:
    """Return one row's logits under the mask of an id, every product written out."""
    settings = settings or MaskSettings()
    kept = [
        torch.tensor(volatile_mask(settings, layer, example, width))
        for layer, width in (("first", 8), ("head.input", 6))
    ]
    m = [torch.where(k if side == "own" else ~k, 1 / settings.keep, 0.0).double() for k in kept]
    h = torch.tanh(
        (torch.relu(x @ model.low.weight.T + model.low.bias) * m[0]) @ model.middle.weight.T + model.middle.bias
    )
    return (h * m[1]) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("side", ["own", "flipped"])
def test_each_row_runs_under_its_own_mask(side: Any, caught: Caught) -> None:
    batch = mlp_batch()

    def compare() -> None:
        turnover = masked(MaskSettings(keep=0.4, seed=5))
        turnover.use(batch.ids, side)
        found = turnover.model(batch["x"])
        truth = [
            by_hand(turnover.model, x, i, side, MaskSettings(keep=0.4, seed=5))
            for x, i in zip(batch["x"], batch.ids.tolist(), strict=True)
        ]
        assert torch.allclose(found, torch.stack(truth), rtol=1e-12, atol=1e-12)

    caught(compare, turnover_module, "factor", lambda bits, *rest: 1 - bits.double())
    caught(compare, turnover_module, "factor", lambda bits, *rest: bits.double())


def test_rows_of_several_queries_share_a_mask() -> None:
    turnover, batch = masked(), mlp_batch(6)
    turnover.use(torch.tensor([7, 8]), "flipped", queries=3)
    found = turnover.model(batch["x"])
    turnover.use(torch.tensor([7, 7, 7, 8, 8, 8]), "flipped")
    assert torch.equal(found, turnover.model(batch["x"]))


def test_masks_stay_in_evaluation_and_leave_when_told() -> None:
    turnover, plain, batch = masked(), net(), mlp_batch()
    assert torch.equal(turnover.model(batch["x"]), plain(batch["x"]))
    turnover.use(batch.ids)
    under = turnover.model(batch["x"])
    assert not torch.allclose(under, plain(batch["x"]))
    assert torch.equal(turnover.model.eval()(batch["x"]), under)
    turnover.off()
    assert torch.equal(turnover.model(batch["x"]), plain(batch["x"]))
    turnover.use(batch.ids)
    turnover.remove()
    assert torch.equal(turnover.model(batch["x"]), plain(batch["x"]))


def test_ordinary_dropout_draws_beside_the_masks() -> None:
    turnover, batch = masked(), mlp_batch()
    turnover.model.train()
    turnover.use(batch.ids)
    found = [turnover.model(batch["x"]) for _ in range(2)]
    assert not torch.equal(*found)
    turnover.model.eval()
    assert torch.equal(turnover.model(batch["x"]), turnover.model(batch["x"]))


def test_masks_are_the_same_when_the_forward_pass_is_repeated_for_the_backward() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_bert().double()
        add_adapters(model, 4)
        turnover = TurnOver(model, after=[PLACE])
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batch = token_batch()
        under_own_masks(turnover, text_loss)(model, batch).sum().backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if ".adapter." in name})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_compiled_model_keeps_its_masks() -> None:
    turnover, batch = masked(), mlp_batch()
    compiled = torch.compile(turnover.model, backend="eager")
    for side in ("own", "flipped"):
        turnover.use(batch.ids, side)
        assert torch.allclose(compiled(batch["x"]), turnover.model(batch["x"]), rtol=1e-12)


@pytest.mark.parametrize(
    ("place", "shape"), [("shared", [5, 4, 1, 1]), ("norm", [5, 4, 1, 1]), ("group_norm", [5, 6, 1, 1])]
)
def test_the_channels_of_a_cnn_are_masked(place: str, shape: list[int]) -> None:
    model, seen = random_cnn().double(), []
    turnover = TurnOver(model, after=[place])
    x = torch.randn(5, 1, 8, 6, dtype=torch.float64)
    model.get_submodule(place).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    model(x)
    plain = seen[0]
    seen.clear()
    turnover.use(torch.arange(5))
    model(x)
    kept = turnover.masks.bits(torch.arange(5), turnover.widths)[place].view(shape)
    assert torch.equal(seen[0], plain * kept * 2)
    for output in seen:  # `shared` is called twice, under one mask
        assert not output[~kept.expand_as(output)].any()


def used_by_flip(turnover: TurnOver, example: int) -> dict[str, Tensor]:
    """Return which numbers of Net's weights f^m̃(z) reads, from the masks alone."""
    first, last = (
        ~torch.tensor(volatile_mask(turnover.masks.settings, layer, example, width))
        for layer, width in (("first", 8), ("head.input", 6))
    )
    return {
        "low.weight": first[:, None].expand(8, 5), "low.bias": first,
        "middle.weight": last[:, None] & first, "middle.bias": last,
        "head.weight": last.expand(3, 6), "head.bias": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip


def test_training_on_z_leaves_the_flipped_sub_network_as_it_was() -> None:
    """Bit for bit, whatever the number of steps; only the unmasked bias of the head leaks."""
    turnover, batch = masked(), mlp_batch(1)
    before = copy.deepcopy(turnover.model.state_dict())
    logits = {side: logits_under(turnover, batch, side) for side in ("own", "flipped")}
    loss = under_own_masks(turnover, mlp_loss)
    settings = TrainSettings(epochs=5, batch_size=1, learning_rate=0.3, optimizer="sgd")
    list(train(turnover.model, loss, lambda rows: batch, [0], settings))
    changed = {name: before[name] != after for name, after in turnover.model.state_dict().items()}
    used = used_by_flip(turnover, int(batch.ids[0]))
    assert [name for name in used if (used[name] & changed[name]).any()] == ["head.bias"]
    assert all(bool(changed[name].any()) for name in used)
    turnover.model.head.bias.data = before["head.bias"]
    assert torch.equal(logits_under(turnover, batch, "flipped"), logits["flipped"])
    assert not torch.allclose(logits_under(turnover, batch, "own"), logits["own"])


def logits_under(turnover: TurnOver, batch: Batch, side: Any) -> Tensor:
    turnover.model.eval()
    turnover.use(batch.ids, side)
    return turnover.model(batch["x"]).detach()


@pytest.mark.parametrize(("changes", "moved"), [({"weight_decay": 0.1}, True), ({"optimizer": "adamw"}, False)])
def test_weight_decay_moves_what_the_mask_leaves_alone(changes: dict, moved: bool) -> None:
    turnover, batch = masked(), mlp_batch(1)
    before = copy.deepcopy(turnover.model.state_dict())
    settings = TrainSettings(**{"epochs": 1, "batch_size": 1, "learning_rate": 0.3, "optimizer": "sgd"} | changes)
    list(train(turnover.model, under_own_masks(turnover, mlp_loss), lambda rows: batch, [0], settings))
    used = used_by_flip(turnover, int(batch.ids[0]))
    after = turnover.model.state_dict()
    assert bool((before["middle.weight"] != after["middle.weight"])[used["middle.weight"]].any()) is moved


def test_a_two_line_use_in_a_plain_training_loop() -> None:
    model = net()
    turnover = TurnOver(model, after=["first"], before=["head"])
    optimizer, batch = torch.optim.SGD(model.parameters(), 0.1), mlp_batch()
    reference = net()
    loss = under_own_masks(TurnOver(reference, after=["first"], before=["head"]), mlp_loss)
    settings = TrainSettings(epochs=3, batch_size=6, learning_rate=0.1, optimizer="sgd")
    for module in (model, reference):
        module.drop.p = 0.0
    list(train(reference, loss, lambda rows: batch, list(range(6)), settings))
    model.train()
    for _ in range(3):
        turnover.use(batch.ids)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["y"]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_checkpoint_keeps_masks_and_adapters(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = tiny_bert()
    add_adapters(model, 4, seed=1)
    settings = MaskSettings(kind="hashed", seed=9, keep=0.4)
    turnover = TurnOver(model, Masks(settings, torch.tensor([[2**40, 5]])), after=[PLACE], before=["classifier"])
    batch = token_batch()
    turnover.use(batch.ids)
    truth = text_loss(model, batch)
    save_checkpoint(model, tmp_path)
    turnover.save(tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    again = restore(plain, tmp_path)
    again.use(batch.ids)
    assert torch.equal(text_loss(plain, batch), truth)
    assert again.record() == turnover.record()
    assert len(again.widths) == 5


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no turnover.json"):
        restore(net(), tmp_path)
    model = tiny_bert()
    save_checkpoint(model, tmp_path)
    add_adapters(model, 4)
    TurnOver(model, after=[PLACE]).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks the adapter weights bert.encoder.layer.0.attention.output.dense.adapter"
    ):
        restore(tiny_bert(), tmp_path)


@pytest.mark.parametrize("places", [{"after": ["nothing"]}, {"before": ["first", "*.adapter.act"]}])
def test_a_glob_that_names_nothing_is_refused(places: dict) -> None:
    with pytest.raises(ValueError, match=r"no module of Net matches '(nothing|\*\.adapter\.act)'"):
        TurnOver(net(), **places)


def test_misuse_is_refused() -> None:
    batch = mlp_batch()
    with pytest.raises(ValueError, match="no layer to mask"):
        TurnOver(net())
    turnover = masked()
    turnover.model.train()
    with pytest.raises(ValueError, match="first trains without masks"):
        turnover.model(batch["x"])
    turnover.use(batch.ids[:4])
    with pytest.raises(ValueError, match=r"first holds \(6, 8\) for 4 ids x 1 queries"):
        turnover.model(batch["x"])
    with pytest.raises(ValueError, match="example id -1"):
        turnover.use(torch.tensor([3, -1]))


def test_a_masked_dimension_that_changes_is_refused() -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x)

    model = Lengths().eval()
    turnover = TurnOver(model, after=["flat"])
    turnover.use(torch.arange(2))
    model(torch.ones(2, 3))
    with pytest.raises(ValueError, match="layer flat has 4 features, had 3 before"):
        model(torch.ones(2, 4))


def test_batches_without_ids_do_not_train() -> None:
    turnover, batch = masked(), mlp_batch()
    queries = Batch(torch.full((6,), -1), batch.tensors)
    with pytest.raises(ValueError, match="only stored examples"):
        under_own_masks(turnover, mlp_loss)(turnover.model, queries)
