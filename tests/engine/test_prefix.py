"""Replayed frozen layers: the same bits, the upper part alone, and no replay where it would be wrong."""

import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.coordinates import chosen_coordinates
from engine.curvature import PRODUCTS, Curvature, LocalOperator
from engine.prefix import recorded_bytes
from tests.conftest import mlp_batch, mlp_loss, randomise, text_loss, tiny_bert, tiny_gpt2, token_batch, token_loss
from tests.engine.test_curvature import cut


def deep() -> nn.Module:
    layers = [nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.LayerNorm(8)]
    return randomise(nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))


def sequential_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class Skipping(nn.Module):
    """The head reads an early layer's output, and one module is called below and above the chosen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.shared, self.high, self.head = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        early = torch.tanh(self.low(x))
        h = self.high(torch.tanh(self.shared(early)))
        return self.head(torch.tanh(self.shared(h)) + early)[:, :3]


CASES = {
    "sequential": (deep, sequential_loss, mlp_batch, ["5", "7"]),
    "skipping": (lambda: randomise(Skipping()), mlp_loss, mlp_batch, ["high", "head"]),
    "bert": (lambda: tiny_bert(num_hidden_layers=4), text_loss, token_batch,
             ["bert.encoder.layer.3", "bert.pooler", "classifier"]),
    "half a layer": (tiny_bert, text_loss, token_batch, ["bert.encoder.layer.1.output", "classifier"]),
    "gpt2": (lambda: tiny_gpt2(n_layer=4), token_loss, token_batch, ["transformer.h.3", "transformer.ln_f"]),
}  # fmt: skip


def operators(name: str, kind: str) -> tuple[LocalOperator, LocalOperator, nn.Module]:
    make, loss, make_batch, chosen = CASES[name]
    model, batch = make().double(), make_batch()
    pair = [
        LocalOperator(
            Curvature(model, loss, chosen_coordinates(model, chosen), kind, torch.float64), cut(batch, 2), 0.0, bytes_
        )
        for bytes_ in (0, 1 << 20)
    ]
    return pair[0], pair[1], model


class Calls:
    """Counts the forward passes of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[str] = []
        for name, module in model.named_modules():
            if not list(module.children()) and list(module.parameters()):
                module.register_forward_pre_hook(lambda _, __, name=name: self.seen.append(name))


@pytest.mark.parametrize("kind", list(PRODUCTS))
@pytest.mark.parametrize("name", list(CASES))
def test_products_from_recorded_layers_are_the_same_bits(name: str, kind: str) -> None:
    plain, cached, _ = operators(name, kind)
    for seed in range(3):
        v = torch.randn(plain.size, 2, generator=torch.Generator().manual_seed(seed)).double()
        assert torch.equal(cached.apply(v), plain.apply(v))
        assert torch.equal(cached.apply(v, cached._examples.ids[:2]), plain.apply(v, plain._examples.ids[:2]))
    assert all(r for r in cached._recordings.values())


def test_the_lower_layers_run_once() -> None:
    _, cached, model = operators("bert", "gauss-newton")
    v = torch.randn(cached.size, 1, dtype=torch.float64)
    cached.apply(v)
    calls = Calls(model)
    cached.apply(v)
    assert calls.seen
    assert not [name for name in calls.seen if "embeddings" in name or ".layer.0." in name or ".layer.2." in name]


@pytest.mark.parametrize(("name", "kept"), [("bert", ["bert.encoder.layer.2"]), ("sequential", ["4"]),
                                            ("skipping", ["low", "shared"])])  # fmt: skip
def test_only_what_the_upper_part_reads_is_kept(name: str, kept: list[str]) -> None:
    _, cached, _ = operators(name, "gauss-newton")
    cached.apply(torch.zeros(cached.size, 1, dtype=torch.float64))
    recording = cached._recordings[0, 0]
    assert recording is not None
    held = [call for (call, _), out in recording.items() if recorded_bytes({(call, 1): out}) > 8]
    assert held == kept


def test_a_model_that_a_replay_would_change_is_never_replayed() -> None:
    class Counting(nn.Module):
        """Its lower module leaves something behind that the upper part reads."""

        def __init__(self) -> None:
            super().__init__()
            self.low, self.head = Leaving(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.low.left = None
            return self.head(self.low(x) + (0.0 if self.low.left is None else self.low.left))

    class Leaving(nn.Linear):
        left: Tensor | None

        def __init__(self) -> None:
            super().__init__(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.left = super().forward(x).sum()
            return super().forward(x)

    model, batch = randomise(Counting()).double(), mlp_batch()
    chosen = chosen_coordinates(model, ["head"])
    plain, cached = (
        LocalOperator(Curvature(model, mlp_loss, chosen, dtype=torch.float64), cut(batch, 2), 0.0, size)
        for size in (0, 1 << 20)
    )
    v = torch.randn(chosen.size, 1, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(cached.apply(v), plain.apply(v))
    assert set(cached._recordings.values()) == {None}


def test_memory_has_a_limit_and_the_rest_is_computed() -> None:
    make, loss, make_batch, chosen = CASES["bert"]
    model = make().double()
    coordinates = chosen_coordinates(model, chosen)
    v = torch.randn(coordinates.size, 1, dtype=torch.float64)
    curvature = Curvature(model, loss, coordinates, dtype=torch.float64)
    one = recorded_bytes(curvature.record(cut(make_batch(), 2).blocks[0][0]) or {})
    some = LocalOperator(curvature, cut(make_batch(), 2), 0.0, one)
    assert torch.equal(some.apply(v), LocalOperator(curvature, cut(make_batch(), 2)).apply(v))
    assert [r is not None for r in some._recordings.values()] == [True]


def test_modules_are_left_as_they_were() -> None:
    _, cached, model = operators("gpt2", "hessian")
    cached.apply(torch.zeros(cached.size, 1, dtype=torch.float64))
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_wrong_recording_changes_the_products() -> None:
    plain, cached, _ = operators("bert", "gauss-newton")
    v = torch.randn(plain.size, 1, dtype=torch.float64)
    cached.apply(v)
    cached._recordings[0, 0], cached._recordings[1, 0] = cached._recordings[1, 0], cached._recordings[0, 0]
    with pytest.raises((AssertionError, RuntimeError)):
        assert torch.equal(cached.apply(v), plain.apply(v))
