from types import SimpleNamespace

import pytest
import torch

from engine import memory
from engine.batches import Batch
from engine.gradients import PerExampleGradients
from engine.parameters import supported_parameters
from engine.projectors import Whole
from tests.conftest import ToyMlp, mlp_batch, mlp_loss, randomise


@pytest.mark.parametrize(
    ("fixed", "each", "free", "budget"),
    [(0, 1000, 2**30, 1 << 19), (10**9, 10**6, 40 * 10**9, 16384), (0, 10**9, 10**9, 1), (5 * 10**9, 1000, 10**9, 1)],
)
def test_the_largest_power_of_two_within_the_share(fixed, each, free, budget, monkeypatch):
    monkeypatch.setattr(memory, "_MOST", 1 << 30)
    assert memory.largest_budget(lambda tokens: fixed + each * tokens, free) == budget
    used = fixed + each * 2 * budget
    assert used > memory._SHARE * free  # twice as many would not fit


def test_a_batch_is_never_larger_than_the_most():
    assert memory.largest_budget(lambda tokens: 0, 2**60) == memory._MOST


def test_a_cpu_takes_what_stays_in_its_cache():
    def budget(numbers: int) -> int:
        return memory.token_budget(torch.device("cpu"), lambda budget: pytest.fail("nothing to try"), numbers)

    assert budget(36_000) == memory.CPU_TOKENS  # a token of MiniLM
    assert budget(262_144) == 512  # an image of 32 x 32 through four layers of 64 channels
    assert budget(1 << 40) == 1


def test_the_numbers_of_every_layer_are_counted():
    model, batch = ToyMlp(), mlp_batch()
    batch = Batch(batch.ids, {name: t.float() if t.is_floating_point() else t for name, t in batch.tensors.items()})
    put_out = memory.numbers_put_out(model, lambda: mlp_loss(model, batch))
    layers = (6, 6, 6, 6, 6, 6, 6, 6, 3)  # first, act, norm, shared, act, shared, act, rms, head
    assert put_out == sum(layers) * len(batch)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.gpu
def test_a_gpu_is_tried_with_two_sizes(monkeypatch):
    tried: list[int] = []
    if torch.cuda.is_available():
        device = torch.device("cuda")
        held = torch.zeros(1 << 20, device=device)  # what is there already is no part of a batch
        found = memory.token_budget(
            device, lambda tokens: (tried.append(tokens), held.new_zeros(tokens, 4096).sum()), 1
        )
        assert 1024 <= found <= memory._MOST
    else:  # a card of 16 GB with 2 GB of weights, 100 kB a token
        fake = SimpleNamespace(
            mem_get_info=lambda _: (14 * 10**9, 16 * 10**9), memory_reserved=lambda _: 2 * 10**9,
            memory_allocated=lambda _: 2 * 10**9, reset_peak_memory_stats=lambda _: None,
            max_memory_allocated=lambda _: 2 * 10**9 + 100_000 * tried[-1],
        )  # fmt: skip
        monkeypatch.setattr(torch, "cuda", fake)
        assert memory.token_budget(torch.device("cuda"), tried.append, 1) == 65536  # 84,000 fit in .6 · 14 GB
    assert tried == [1024, 1024, 2048]


class FullAbove:
    """A device that holds batches of two examples."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, list[int]()

    def __call__(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return mlp_loss(model, batch)  # a look at where the examples are holds no graph
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mlp_loss(model, batch)


def hooked(most: int):
    model = randomise(ToyMlp()).double()
    parameters = supported_parameters(model)[0]
    loss = FullAbove(most)
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        return hooks(loss, mlp_batch()), loss


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    (whole, _), (halved, loss) = hooked(100), hooked(2)
    assert max(size for size in loss.sizes if size <= 2) == 2
    assert halved.ids.tolist() == whole.ids.tolist()
    torch.testing.assert_close(halved.losses, whole.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(halved.norms, whole.norms, rtol=1e-12, atol=1e-12)
    for name, array in whole.arrays.items():
        torch.testing.assert_close(halved.arrays[name], array, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_an_example_that_does_not_fit_alone_is_named():
    with pytest.raises(
        ValueError, match=r"example \d+ alone does not fit in the device's memory: cut examples shorter"
    ):
        hooked(0)
