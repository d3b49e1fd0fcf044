"""turnover.cnn: what do masks from some layer of a CNN on cost, and whom does it ask? (Kobayashi et al. 2020, section 4.1)

A small CNN on MNIST, masked after layer k and every one above, with and without ordinary dropout beside the masks; the layers
below k are shared by all examples, which the paper chooses too. A kind of network (masks, dropout) has the learning rate that
is best for it on dev digits under a seed of its own. A cell is one network and seed: the test digits it gets right, and the
self-influence of the training digits beside that of ids that were never trained. A last cell explains errors as figure 5
does: for test digits that the networks of all seeds take for the same wrong digit, the training digits of that class with
the largest influence on the wrong answer, averaged over the seeds' networks.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine.batches import Batch
from engine.counters import derive_key
from engine.masks import MaskSettings, average, unseen_ids
from engine.metrics import bootstrap_interval
from engine.training import TrainSettings, train
from engine.turnover import TurnOver, under_own_masks
from engine.turnover_scores import Estimator, self_influence
from launch.experiments.kept import kept
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import ROOT, Part, accuracy, bounds, logits, logits_of, loss

LAYERS = 4
ERRORS = "errors"
COLOURS = {"plain": "#3d5a98", "masks": "#c8553d"}
_MASKS = 1 << 32


@dataclass(frozen=True)
class Kind:
    """A network: masked after this layer and those above (None: no masks), with ordinary dropout or without."""

    first: int | None
    dropout: bool

    @property
    def name(self) -> str:
        masks = "plain" if self.first is None else f"masks-{self.first}"
        return f"{masks}-dropout" if self.dropout else masks


@dataclass(frozen=True)
class Trained:
    model: nn.Module
    turnover: TurnOver | None


def kinds(config: dict[str, Any]) -> list[Kind]:
    return [Kind(first, dropout) for dropout in (False, True) for first in (None, *config["first"])]


def tuned(kind: Kind, config: dict[str, Any]) -> Kind:
    """Return the kind whose rate this one takes: one for all numbers of masked layers."""
    return kind if kind.first is None else Kind(config["tuning"]["first"], kind.dropout)


def cells(config: dict[str, Any]) -> list[str]:
    rates = dict.fromkeys(f"rate-{tuned(kind, config).name}" for kind in kinds(config))
    return [*rates, *(f"{kind.name}-seed-{seed}" for kind in kinds(config) for seed in config["seeds"]), ERRORS]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return what one network gets right and its self-influence; or what the rates reach on dev digits; or errors."""
    if cell == ERRORS:
        return {"errors": explained(config)}
    name, _, seed = cell.removeprefix("rate-").partition("-seed-")
    kind = next(one for one in kinds(config) if one.name == name)
    if not seed:
        return {"dev": {str(rate): found for rate, found in dev_accuracies(config, kind).items()}}
    parts, network = digits(config), trained(config, kind, int(seed))
    right = logits_of(network.model, parts["test"]).argmax(1) == parts["test"].labels
    found: dict[str, Any] = {"right": "".join(str(int(one)) for one in right)}
    if network.turnover:
        ids = torch.arange(len(parts["train"].labels))
        for which, masks in (("own", ids), ("unseen", unseen_ids(len(ids)))):
            values = differences(network.turnover, parts["train"], masks)
            found[which] = {"positive": float((values > 0).double().mean()), "mean": float(values.mean())}
    return found


def digits(config: dict[str, Any]) -> dict[str, Part]:
    """Return MNIST's parts in file order, [n, 1, 28, 28] in [0, 1]."""
    images, labels = _mnist(config["data"])
    return {name: Part(images[rows], labels[rows]) for name, rows in bounds(config["rows"]).items()}


@lru_cache(maxsize=1)
def _mnist(file: str) -> tuple[Tensor, Tensor]:
    with np.load(ROOT / file) as data:
        return torch.from_numpy(data["images"]).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(
            data["labels"]
        ).long()


def make_cnn(channels: list[int], width: int, dropout: float) -> nn.Module:
    """Return three convolutions and a hidden layer, layer1 to layer4, and a head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inner, outer) in enumerate(zip([1, *channels], channels, strict=False), 1):
        layers[f"layer{number}"] = nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)
        )
    flat = channels[-1] * 3 * 3  # 28 pixels, halved three times
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(flat, width), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(layers | {f"layer{LAYERS}": hidden, "head": nn.Linear(width, 10)})


def fit(config: dict[str, Any], kind: Kind, rate: float, seed: int) -> Trained:
    """Return a network that is trained now, or was before and kept."""
    model, turnover = untrained(config, kind, seed)
    part = digits(config)["train"]

    def make() -> dict[str, Tensor]:
        plan = TrainSettings(learning_rate=rate, seed=seed, checkpoints=1, **config["train"])
        masked = under_own_masks(turnover, loss) if turnover else loss
        for _ in train(model, masked, lambda rows: part.batch(torch.tensor(rows)), list(range(len(part.labels))), plan):
            pass
        return {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    shape = {key: config[key] for key in ("data", "rows", "channels", "width", "dropout", "train")}
    model.load_state_dict(kept("turnover-cnn", [shape, kind.name, rate, seed], make))
    if turnover:
        turnover.off()
    return Trained(model.eval(), turnover)


def untrained(config: dict[str, Any], kind: Kind, seed: int) -> tuple[nn.Module, TurnOver | None]:
    """Return the network that training starts from; all kinds start from the same weights under a seed."""
    torch.manual_seed(seed)
    model = make_cnn(config["channels"], config["width"], config["dropout"] if kind.dropout else 0.0)
    if kind.first is None:
        return model, None
    places = [f"layer{number}" for number in range(kind.first, LAYERS + 1)]
    return model, TurnOver(model, MaskSettings(seed=derive_key(seed, "turnover") % _MASKS), after=places)


def trained(config: dict[str, Any], kind: Kind, seed: int) -> Trained:
    """Return a network at the rate that is best for its kind."""
    reached = dev_accuracies(config, tuned(kind, config))
    return fit(config, kind, max(reached, key=lambda rate: reached[rate]), seed)


def dev_accuracies(config: dict[str, Any], kind: Kind) -> dict[float, float]:
    """Return the dev accuracy of every rate, under a seed of its own."""
    dev = digits(config)["dev"]
    return {
        rate: accuracy(fit(config, kind, rate, config["tuning"]["seed"]).model, dev)
        for rate in config["tuning"]["rates"]
    }


def differences(turnover: TurnOver, part: Part, ids: Tensor) -> Tensor:
    """Return L(f^m̃(i), z) − L(f^m(i), z) of every row z under the masks of its id i, float64 [n]."""
    found = torch.empty(len(ids), dtype=torch.float64)
    for batch in part.batches():
        found[batch.ids] = self_influence(turnover, small_loss, Batch(ids[batch.ids], batch.tensors))
    return found


def small_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy without rounding small ones to 0, as 1 + exp(−17) is rounded to 1 in float32.

    A network without ordinary dropout is so sure of a third of its digits that both masks would tie at 0.
    """
    scores, label = logits(model, batch), batch["target"][:, None]
    others = scores.scatter(1, label, -torch.inf).logsumexp(1)
    return nn.functional.softplus(others - scores.gather(1, label)[:, 0])


def explained(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, of every test digit that all networks take for the same wrong one, whom the wrong answer is put down to."""
    parts, own = digits(config), config["explained"]
    networks = [trained(config, Kind(own["first"], own["dropout"]), seed) for seed in config["seeds"]]
    said = torch.stack([logits_of(network.model, parts["test"]).argmax(1) for network in networks])
    agreed = (said == said[0]).all(0) & (said[0] != parts["test"].labels)
    return [
        explain(parts, networks, int(row), int(said[0, row]), own["shown"])
        for row in agreed.nonzero().flatten()[: own["errors"]]
    ]


def explain(parts: dict[str, Part], networks: list[Trained], row: int, wrong: int, shown: int) -> dict[str, Any]:
    """Return the training digits of the wrong class with the largest influence on the wrong answer, and how alike they are."""
    ids = (parts["train"].labels == wrong).nonzero().flatten()
    one = parts["test"].batch(torch.tensor([row]))
    query = Batch(one.ids, one.tensors | {"target": torch.tensor([wrong])})
    mean, _ = average(Estimator(n.turnover, loss, rows=512).influence(ids, query)[:, 0] for n in networks if n.turnover)
    best = mean.topk(min(shown, len(ids))).indices
    images = parts["train"].batch(ids)["x"]
    alike = nn.functional.cosine_similarity(images.flatten(1), query["x"].flatten(1))
    return {
        "row": row, "label": int(parts["test"].labels[row]), "wrong": wrong, "shown": ids[best].tolist(),
        "scores": mean[best].tolist(), "alike": float(alike[best].mean()), "alike_all": float(alike.mean()),
    }  # fmt: skip


def right_of(config: dict[str, Any], done: dict[str, dict[str, Any]], kind: Kind) -> np.ndarray:
    """Return the percentage right of every test digit over the seeds, [seeds, n], 0 or 100 each."""
    return np.array([[100 * int(one) for one in done[f"{kind.name}-seed-{s}"]["right"]] for s in config["seeds"]])


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the ids that were never trained; report the rest. Intervals over test digits, of shares over seeds."""
    found = []
    for dropout in (False, True):
        plain = right_of(config, done, Kind(None, dropout))
        beside = " with ordinary dropout" if dropout else ""
        found.append(Gate(f"accuracy without masks{beside}, %", float(plain.mean()), bootstrap_interval(plain.mean(0))))
        for first in config["first"]:
            lost = plain - right_of(config, done, Kind(first, dropout))
            paper = PAPER[dropout] if first == config["explained"]["first"] else None
            name = f"points lost by masks from layer {first} on{beside}"
            found.append(Gate(name, float(lost.mean()), bootstrap_interval(lost.mean(0)), paper=paper))
    for kind in (one for one in kinds(config) if one.first is not None):
        found += shares(config, done, kind)
    return [*found, *likeness(done[ERRORS]["errors"])]


PAPER = {False: 5.8, True: 0.7}  # points lost by VGG19 on CIFAR-10, without and with ordinary dropout


def shares(config: dict[str, Any], done: dict[str, dict[str, Any]], kind: Kind) -> list[Gate]:
    """Return the positive share of self-influence, and of the same under masks that were never trained."""
    own, unseen = (
        np.array([done[f"{kind.name}-seed-{seed}"][which]["positive"] for seed in config["seeds"]])
        for which in ("own", "unseen")
    )
    away = abs(float(unseen.mean()) - 0.5)
    return [
        Gate(f"{kind.name}: positive self-influence, share", float(own.mean()), bootstrap_interval(own)),
        Gate(f"{kind.name}: never-trained ids, share's distance from .5", away, threshold=0.03, at_least=False),
    ]


def likeness(errors: list[dict[str, Any]]) -> list[Gate]:
    """Return how much more alike an error the blamed digits are than all of their class, in pixels."""
    more = np.array([one["alike"] - one["alike_all"] for one in errors] or [0.0])
    return [
        Gate("errors that all seeds agree on", len(errors)),
        Gate("cosine to the error, blamed digits less their class", float(more.mean()), bootstrap_interval(more)),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw accuracy by first masked layer, and the grid of errors with the digits they are put down to."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for dropout, style in ((False, "-"), (True, "--")):
        beside = "with ordinary dropout" if dropout else "without"
        means = [right_of(config, done, Kind(first, dropout)).mean() for first in config["first"]]
        axes.plot(config["first"], means, style, marker="o", color=COLOURS["masks"], label=f"masks, {beside}")
        axes.axhline(right_of(config, done, Kind(None, dropout)).mean(), linestyle=style, color=COLOURS["plain"],
                     label=f"no masks, {beside}")  # fmt: skip
    axes.set_xticks(config["first"])
    axes.set(xlabel="first masked layer", ylabel="accuracy on test digits, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, folder, "accuracy")
    if done[ERRORS]["errors"]:
        save(grid(config, done[ERRORS]["errors"][: config["explained"]["drawn"]]), folder, "errors")


def grid(config: dict[str, Any], errors: list[dict[str, Any]]) -> Figure:
    """Return a row for every error: the test digit, and the training digits of the class that it is taken for."""
    parts, columns = digits(config), 1 + max(len(one["shown"]) for one in errors)
    figure = Figure(figsize=(1.1 * columns, 1.25 * len(errors)), layout="constrained")
    for line, one in zip(figure.subplots(len(errors), columns, squeeze=False), errors, strict=True):
        images = [parts["test"].inputs[one["row"]], *(parts["train"].inputs[i] for i in one["shown"])]
        titles = [f"{one['label']}, taken for {one['wrong']}", *(f"{score:+.2f}" for score in one["scores"])]
        for axes, image, title in zip(line, images, titles, strict=False):
            axes.imshow(image[0], cmap="gray_r")
            axes.set_title(title, fontsize=7)
        for axes in line:
            axes.axis("off")
    return figure


EXPERIMENT = Experiment(
    name="turnover.cnn",
    claim="Masks from a layer of a CNN on: what they cost with and without ordinary dropout, and which digits errors come from",
    minutes=40,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
