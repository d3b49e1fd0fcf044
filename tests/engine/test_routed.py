"""Mixtures of experts: an expert sees the tokens routed to it, of any example. Against one autograd pass per example."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from engine import gradients, routed
from engine.batches import Batch
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters, supported_parameters
from engine.projection import Projection
from engine.projectors import Sums, Whole, make_projector
from tests import oracles
from tests.conftest import mlp_batch, mlp_loss, randomise, token_batch, token_loss


class Mixture(nn.Module):
    """A user's own: every token goes to its best expert, tokens of all examples flattened and in the order of `turn`."""

    def __init__(self, experts: int = 3, turn: int = 1) -> None:
        super().__init__()
        self.table, self.gate = nn.Embedding(32, 6), nn.Linear(6, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(experts))
        self.head, self.turn = nn.Linear(6, 3), turn

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        flat = h.flatten(0, 1)
        weight, choice = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(choice == number).flatten()[:: self.turn]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(flat[rows]))
        return self.head((h + out.reshape(h.shape)).mean(1))


class Reversed(Mixture):
    """One token an example, one expert for all, its rows from last to first: as many rows as there are examples."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids[:, 0])
        return self.head(h + self.experts[0](h.flip(0)).flip(0))


def mixture_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["y"], reduction="none")


def square_batch(size: int = 4, tokens: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(7)
    tensors = {"input_ids": torch.randint(1, 32, (size, tokens), generator=draw), "y": torch.arange(size) % 3}
    return Batch(torch.arange(size), tensors)


def assert_exact(model: nn.Module, loss, batch: Batch, tolerance: float = 1e-10) -> None:
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False), norms=True) as hooks:
        out = hooks(loss, batch)
    truth = oracles.gradients(model, loss, batch)
    assert torch.equal(out.ids, batch.ids)
    for index, parameter in enumerate(parameters):
        exact = truth[parameter.name]
        if any(use.role in ("embedding", "conv1d") for use in parameter.uses):
            exact = exact.transpose(1, 2)
        exact = exact.flatten(1)
        floor = 1e-9 * oracles.flat(truth).norm()  # of gradients that are zero but for rounding
        assert (out.arrays[parameter.name] - exact).norm() <= tolerance * exact.norm() + tolerance * floor, (
            parameter.name
        )
        assert torch.allclose(out.norms[:, index], exact.norm(dim=1), rtol=tolerance, atol=float(tolerance * floor))
    assert len(parameters) == len(truth)


@pytest.mark.parametrize(("shape", "experts"), [((4, 4), 1), ((4, 4), 3), ((3, 7), 2), ((6, 2), 2), ((5, 1), 3)])
def test_experts_that_see_the_tokens_routed_to_them_are_exact(shape, experts):
    model = randomise(Mixture(experts)).double()
    with pytest.warns(UserWarning, match="every example is run alone"):
        assert_exact(model, mixture_loss, square_batch(*shape))


def trusting(modules, run, batch):
    return dict.fromkeys(modules, "row")


def test_rows_as_many_as_the_examples_but_in_another_order_are_not_taken_for_them(caught):
    model, batch = randomise(Reversed()).double(), square_batch()

    def compare() -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert_exact(model, mixture_loss, batch)
        assert any("module experts.0.0 does not keep one example" in str(w.message) for w in seen)

    caught(compare, gradients.routed, "places", trusting)


class Alternating(nn.Module):
    """All examples go to one expert or the other, by the sign of their sum: at times all of a batch to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, choice = torch.zeros_like(x), (x.sum(1) > 0).long()
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(choice == number).flatten()
            if len(rows):
                out = out.index_add(0, rows, torch.tanh(expert(x[rows])))
        return self.head(x + out)


def test_a_module_found_to_be_routed_after_a_batch_that_did_not_show_it_is_exact_from_then_on():
    model, batch = randomise(Alternating()).double(), mlp_batch(8)
    one_side = batch.take(torch.nonzero(batch["x"].sum(1) > 0).flatten().tolist())
    parameters, truth = select_parameters(model, ["*"]), oracles.gradients(model, mlp_loss, batch)
    assert 2 <= len(one_side) < 8
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
        hooks(mlp_loss, one_side)  # nothing to see yet, and right
        with pytest.warns(UserWarning, match="every example is run alone"):
            out = hooks(mlp_loss, batch)
    for name, found in out.arrays.items():
        assert torch.allclose(found, truth[name].flatten(1), rtol=1e-10, atol=1e-12)


class EveryExpert(Mixture):
    """Experts are called on no token too, and their first layer has a bias."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        choice = self.gate(h.flatten(0, 1)).argmax(-1)
        out = torch.zeros_like(h.flatten(0, 1))
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(choice == number).flatten()
            out = out.index_add(0, rows, expert(h.flatten(0, 1)[rows]))
        return self.head((h + out.reshape(h.shape)).mean(1))


def test_an_expert_called_on_no_token_gives_its_bias_a_zero_gradient() -> None:
    model, batch = randomise(EveryExpert()).double(), square_batch(4, 2)
    truth = oracles.gradients(model, mixture_loss, batch)
    assert (truth["experts.0.0.bias"].norm(dim=1) == 0).any()
    parameters = select_parameters(model, ["experts.*"])
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        for i in range(len(batch)):
            for name, found in hooks(mixture_loss, batch.take([i])).arrays.items():
                assert torch.allclose(found, truth[name][i : i + 1].flatten(1), rtol=1e-10, atol=1e-12), name


class Sorting(nn.Module):
    """Sorts its rows by length inside and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort()
        return torch.tanh(self.first(x[order]))[order.argsort()]


class Pictures(nn.Module):
    """A tower that sees the pictures of all examples, some of which have none or several."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tower = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        own = torch.repeat_interleave(torch.arange(len(x)), count)
        return torch.tanh(self.text(x)).index_add(0, own, torch.tanh(self.tower(x[own].cos())))


@pytest.mark.parametrize(
    ("model", "first", "then"),
    [(Sorting, [0, 1, 2, 3, 4, 5], [3, 1, 0, 2, 5, 4]), (Pictures, [1, 1, 1, 1, 1, 1], [2, 0, 1, 1, 2, 0])],
)
def test_a_second_batch_is_looked_at_too(model: type[nn.Module], first: list[int], then: list[int], caught) -> None:
    """Batches of as many rows as examples: only the order of the rows gives the model away, and only in the second."""
    made, x = randomise(model()).double(), mlp_batch(6)["x"]
    batches = [Batch(torch.arange(6), {"x": x, "n": torch.tensor(numbers)}) for numbers in (first, then)]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"], batch["n"]).square().sum(1)

    parameters, truths = select_parameters(made, ["*"]), [oracles.gradients(made, loss, batch) for batch in batches]

    def compare() -> None:
        with PerExampleGradients(made, parameters, Whole(parameters)) as hooks, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch, truth in zip(batches, truths, strict=True):
                for name, found in hooks(loss, batch).arrays.items():
                    assert torch.allclose(found, truth[name].flatten(1), rtol=1e-10, atol=1e-12), name

    caught(compare, gradients.routed, "places", trusting)


def test_a_module_once_seen_to_mix_its_rows_stays_so() -> None:
    made, x = randomise(Sorting()).double(), mlp_batch(6)["x"]

    def why_alone(hooks: PerExampleGradients, numbers: list[int]) -> str | None:
        batch = Batch(torch.arange(6), {"x": x, "n": torch.tensor(numbers)})
        return hooks.why_alone(lambda model, some: model(some["x"], some["n"]).square().sum(1), batch)

    parameters = select_parameters(made, ["*"])
    with PerExampleGradients(made, parameters, Whole(parameters)) as hooks:
        assert why_alone(hooks, [0, 1, 2, 3, 4, 5]) is None
        for numbers in ([3, 1, 0, 2, 5, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]):
            assert why_alone(hooks, numbers) == "module first does not keep one example in each row of its input"


class Positions(nn.Module):
    """A table of positions that is asked for [T], not [1, T]: as many rows as examples where they are as long."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.head = nn.Embedding(32, 6), nn.Embedding(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(h).mean(1))


@pytest.mark.parametrize("tokens", [4, 5])
def test_a_table_that_is_read_once_for_all_examples_is_exact_whatever_its_length(tokens):
    with pytest.warns(UserWarning, match="module places does not keep"):
        assert_exact(randomise(Positions()).double(), mixture_loss, square_batch(4, tokens))


class SharedConvolution(nn.Module):
    """An expert of convolutions that sees some of the images, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.head = nn.Conv2d(1, 4, 2), nn.Conv2d(4, 4, 2, groups=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = x[:, :4].reshape(-1, 1, 2, 2).repeat(2, 1, 2, 2)  # each example twice, in two places
        h = torch.tanh(self.grouped(torch.tanh(self.grouped(torch.tanh(self.conv(images))))))
        return self.head(h.mean((2, 3)).unflatten(0, (2, -1)).sum(0))


def test_convolutions_called_twice_on_rows_of_their_own_are_exact():
    with pytest.warns(UserWarning, match="module conv does not keep"):
        assert_exact(randomise(SharedConvolution()).double(), mlp_loss, mlp_batch())


def test_modules_of_a_plain_model_keep_their_examples_in_rows_and_positions_are_shared():
    from tests.conftest import every_batch, every_layer, every_loss

    model = every_layer().double()
    named = {n: m for n, m in model.named_modules() if n and not list(m.children())}
    found = routed.places(named, lambda batch: every_loss(model, batch), every_batch())
    assert found == {name: "shared" if name == "places" else "row" for name in named}


def test_one_row_for_an_expert_is_not_shared_by_all():
    """An expert that meets one token of a batch would look like a table of positions."""
    rows = [torch.ones(4), torch.zeros(4)]
    assert routed._place([[rows[0]]], [[[rows[0]]], [[rows[0]]]]) == "shared"
    assert routed._place([[rows[0]]], [[[rows[0]]], [[rows[1]]]]) == "mixed"
    assert routed._place([[rows[0]]], [[[rows[0]]], []]) == "mixed"


def mixtral(**changes) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager",
    } | changes  # fmt: skip
    return randomise(MixtralForCausalLM(MixtralConfig(**settings)))


def qwen_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, moe_intermediate_size=6, shared_expert_intermediate_size=10,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, experts_implementation="eager",
    )  # fmt: skip
    return randomise(Qwen2MoeForCausalLM(config))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    return randomise(GptOssForCausalLM(config))


@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_fused_experts_and_routers_of_transformers_are_exact(make):
    model = make().double()
    assert supported_parameters(model)[1] == []
    with pytest.warns(UserWarning, match="holds several experts: every example is run alone"):
        assert_exact(model, token_loss, token_batch(), 1e-6)  # routers and norms compute in float32


def test_the_experts_that_transformers_groups_in_one_product_are_the_same_in_float32():
    model, batch = mixtral(experts_implementation="grouped_mm"), token_batch()
    parameters = select_parameters(model, ["*.experts.*", "*.gate"])
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks, pytest.warns(UserWarning, match="alone"):
        out = hooks(token_loss, batch)
    truth = oracles.gradients(mixtral().double(), token_loss, batch)
    for name, found in out.arrays.items():
        assert oracles.relative_error(found, truth[name].flatten(1)) <= 1e-5, name


def test_fused_experts_are_one_matrix_of_all_and_their_biases_too():
    shapes = {p.name: (p.out_features, p.in_features) for p in supported_parameters(gpt_oss())[0] if p.is_fused}
    assert shapes == {
        "model.layers.0.mlp.router.weight": (3, 8), "model.layers.0.mlp.router.bias": (3, 0),
        "model.layers.0.mlp.experts.gate_up_proj": (24, 24), "model.layers.0.mlp.experts.gate_up_proj_bias": (3, 24),
        "model.layers.0.mlp.experts.down_proj": (36, 8), "model.layers.0.mlp.experts.down_proj_bias": (3, 8),
    }  # fmt: skip


class Fused(nn.Module):
    """A user's own fused experts: `num_experts`, and a slice of each parameter for every expert."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.weight = 3, nn.Parameter(torch.zeros(3, 4, 5))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.argmax(-1) % 3
        return torch.einsum("...i,...oi->...o", x, self.weight[chosen]) + self.bias[chosen][..., None]


def fused_loss(model: nn.Module, batch: Batch) -> Tensor:
    return torch.sin(model(batch["x"])).sum(1)


@pytest.mark.parametrize("kind", ["two-sided", "gaussian", "none"])
def test_projected_rows_of_fused_experts_equal_the_projected_gradients(kind):
    model, batch = randomise(nn.Sequential(Fused(), nn.Linear(4, 3))).double(), mlp_batch()
    parameters = select_parameters(model, ["*"])
    projector = make_projector(parameters, Projection(kind, 4), torch.device("cpu"), torch.float64)
    with PerExampleGradients(model, parameters, projector) as hooks, pytest.warns(UserWarning, match="0.weight holds"):
        out = hooks(fused_loss, batch)
    truth = oracles.gradients(model, fused_loss, batch)
    sums = Sums()
    for p in parameters:
        rows = truth[p.name]
        if p.is_vector:
            projector.add_vector(sums, p, rows)
        else:
            whole = rows.reshape(len(rows), p.out_features, p.in_features)
            projector.add_matrix(sums, p, *gradients.convolution.whole_factors(whole))
    for name, exact in projector.arrays(sums, out.losses).items():
        assert torch.allclose(out.arrays[name], exact, rtol=1e-10, atol=1e-12)
    assert all(w.grad is None and not w.requires_grad for w in model.parameters())


def test_an_example_that_passes_by_the_chosen_expert_has_no_gradient():
    model, batch = randomise(Mixture()).double(), square_batch(5, 1)
    parameters, truth = select_parameters(model, ["experts.1"]), oracles.gradients(model, mixture_loss, batch)
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
        for i in range(5):
            found = hooks(mixture_loss, batch.take([i])).arrays["experts.1.0.weight"]
            assert torch.allclose(found, truth["experts.1.0.weight"][i : i + 1].flatten(1), rtol=1e-10)
    assert (truth["experts.1.0.weight"].flatten(1).norm(dim=1) == 0).any()
