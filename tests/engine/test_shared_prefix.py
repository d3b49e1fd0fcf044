"""What lies below the first mask runs once for each query; the losses are those of plain forward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import shared_prefix as prefix_module
from engine.batches import Batch
from engine.bottleneck import PLACE, add_adapters
from engine.turnover import TurnOver
from engine.turnover_scores import Estimator, repeated
from tests.conftest import (
    Caught,
    image_batch,
    mlp_batch,
    mlp_loss,
    random_cnn,
    randomise,
    text_loss,
    tiny_bert,
    tiny_gpt2,
    token_batch,
    token_loss,
)  # fmt: skip
from tests.engine.test_turnover import net


def adapted(make: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    model = make(**changes)
    add_adapters(model, 4)
    return randomise(model)


class Skipping(nn.Module):
    """The head reads an early layer's output, and one module is called below the mask, inside another, and above."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.pair = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.pair.again = self.pair[0]

    def forward(self, x: Tensor) -> Tensor:
        early = nn.functional.relu(self.pair(self.low(x)), inplace=True)
        h = self.high(self.pair[0](early))
        return self.head(self.pair[0](torch.tanh(h)) + early)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable, Callable[[], Batch], dict[str, list[str]]]] = {
    "net": (net, mlp_loss, mlp_batch, {"after": ["first"], "before": ["head"]}),
    "one place high up": (net, mlp_loss, mlp_batch, {"before": ["head"]}),
    "skipping": (lambda: randomise(Skipping()), mlp_loss, mlp_batch, {"after": ["high"]}),
    "cnn": (random_cnn, mlp_loss, image_batch, {"after": ["line"]}),
    "low in a cnn": (random_cnn, mlp_loss, image_batch, {"after": ["norm", "group_norm"]}),
    "bert": (lambda: adapted(tiny_bert), text_loss, token_batch, {"after": [PLACE], "before": ["classifier"]}),
    "head of bert": (tiny_bert, text_loss, token_batch, {"before": ["classifier"]}),
    "gpt2": (lambda: adapted(tiny_gpt2), token_loss, token_batch, {"after": [PLACE]}),
}  # fmt: skip


def counted(model: nn.Module) -> list[str]:
    """Return a list that fills with the names of the modules that compute something."""
    seen: list[str] = []

    def wrap(name: str, forward: Callable) -> Callable:
        def counting(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return forward(*args, **kwargs)

        return counting

    for name, module in model.named_modules():
        if name:
            module.forward = wrap(name, module.forward)
    return seen


def estimator(name: str) -> tuple[Estimator, Batch]:
    make, loss, make_batch, places = CASES[name]
    return Estimator(TurnOver(make().double(), **places), loss, rows=10), make_batch()


def plain(turnover: TurnOver, loss: Callable, ids: Tensor, queries: Batch, side: Any) -> Tensor:
    """Return every pair's loss, one query and one mask at a time."""
    rows = []
    for example in ids:
        turnover.use(example.view(1), side)
        rows.append(torch.cat([loss(turnover.model, queries.take([q])).detach() for q in range(len(queries))]))
    turnover.off()
    return torch.stack(rows)


@pytest.mark.parametrize("count", [None, 1])  # queries: all of the batch, one alone
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_those_of_one_pair_at_a_time(name: str, count: int | None) -> None:
    own, queries = estimator(name)
    queries, ids = queries.take(list(range(count or len(queries)))), torch.arange(5) + 2**40
    found = own.losses(ids, queries, ("own", "flipped"))
    for side, losses in zip(("own", "flipped"), found, strict=True):
        truth = plain(own.turnover, own.loss, ids, queries, side)
        assert torch.allclose(losses, truth, rtol=1e-12, atol=1e-13)
        assert float(truth.std(0).min()) > 0
    assert own._prefix._safe


def test_a_spread_in_the_other_order_is_caught(caught: Caught) -> None:
    def compare() -> None:
        test_losses_equal_those_of_one_pair_at_a_time("one place high up", None)

    caught(compare, prefix_module, "_repeated", lambda t, copies: t.repeat_interleave(copies, 0))


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("net", ["low"]),
        ("one place high up", ["low", "middle"]),
        ("cnn", ["first", "norm", "shared", "grouped", "depthwise", "group_norm", "line"]),
        ("head of bert", None),
        ("bert", ["bert.embeddings.word_embeddings", "bert.encoder.layer.0.attention.self.query",
                  "bert.encoder.layer.0.attention.output.dense",
                  "bert.encoder.layer.0.attention.output.dense.adapter.down"]),
    ],
)  # fmt: skip
def test_what_lies_below_the_first_mask_runs_once_a_query(name: str, below: list[str] | None) -> None:
    own, queries = estimator(name)
    ids = torch.arange(40)
    own.losses(ids[:1], queries, ("own",))  # the probe
    seen = counted(own.turnover.model)
    own.influence(ids, queries)
    forwards = seen.count("classifier" if "bert" in name else "head")
    assert forwards == 1 + 2 * -(-40 // max(1, 10 // len(queries)))
    once = below or [module for module in set(seen) if module != "classifier"]
    assert {module: seen.count(module) for module in once} == {m: 2 if m == "shared" else 1 for m in once}


def test_only_what_the_upper_part_reads_is_kept() -> None:
    own, queries = estimator("one place high up")
    own.losses(torch.arange(2), queries, ("own",))
    recording = own._prefix.record(own._runner(queries, torch.arange(1), "own"))
    assert recording is not None
    held = [call for call, output in recording if output.untyped_storage().nbytes() > 8]
    assert held == ["drop"]
    assert [call for call, _ in recording] == ["low", "first", "middle", "second", "drop"]


def test_a_model_that_a_replay_would_change_is_never_replayed() -> None:
    class Leaving(nn.Linear):
        left: Tensor | float = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.left = super().forward(x)
            return self.left.tanh()

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.act, self.head = Leaving(5, 6), nn.Tanh(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.low.left = 0.0
            return self.head(self.act(self.low(x)) + self.low.left)

    own = Estimator(TurnOver(randomise(Reading()).double(), after=["act"]), mlp_loss, rows=12)
    queries, ids = mlp_batch(), torch.arange(5)
    (found,) = own.losses(ids, queries, ("own",))
    assert not own._prefix._safe
    assert torch.allclose(found, plain(own.turnover, mlp_loss, ids, queries, "own"), rtol=1e-12)


def test_modules_are_left_as_they_were() -> None:
    own, queries = estimator("bert")

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        text_loss(model, batch)
        raise KeyError("stop")

    own.influence(torch.arange(3), queries)
    own.loss = failing
    with pytest.raises(KeyError):
        own.influence(torch.arange(3), queries)
    assert not [name for name, module in own.turnover.model.named_modules() if "forward" in module.__dict__]


def test_a_loss_that_meets_no_mask_is_refused() -> None:
    model = net()
    turnover = TurnOver(model, after=["first"])
    own = Estimator(turnover, lambda model, batch: model.low(batch["x"]).sum(1))
    with pytest.raises(ValueError, match="no masked layer took part"):
        own.influence(torch.arange(3), mlp_batch())


def test_queries_are_repeated_batch_after_batch() -> None:
    batch = repeated(mlp_batch(2), 2)
    assert torch.equal(batch["x"][:2], batch["x"][2:])
    assert batch.ids.tolist() == [100, 101, 100, 101]
