"""fastif.correction: do a few steps on influential examples correct a model on other data? (FastIF, appendix C.3, figure 7)

MiniLM was fine-tuned on movie reviews and is asked about electronics. Ten times, some electronics reviews are drawn as
anchors and one step of SGD is taken on the movie reviews that help the anchors most (or harm them most, or random ones, or
the anchors themselves); augmentation takes the steps on electronics reviews of a pool instead. Neighbours and curvature are
those of the starting model, the anchors' and candidates' gradients those of the model as it is by then. Anchors, pool and
the reviews that are evaluated are of different products' reviews. A cell is one kind of step and one repeat.
"""

import itertools
import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine.counters import derive_key, permutation
from engine.metrics import bootstrap_interval
from engine.parameters import select_parameters
from engine.stochastic_solvers import Lissa
from launch.experiments import fastif_minilm as minilm
from launch.experiments import fastif_span as span
from launch.experiments.fastif_choice import choose
from launch.experiments.fastif_head import nearest
from launch.experiments.kept import kept
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, accuracy, loss, read_records, token_states

KINDS = {
    "helpful": "#0b6e4f", "harmful": "#c8553d", "random": "#888888", "anchors": "#3d5a98",
    "pool-helpful": "#d9932f", "pool-random": "#8a6fa8",
}  # fmt: skip


def cells(config: dict[str, Any]) -> list[str]:
    return [f"{kind}-{seed}" for kind, seed in itertools.product(KINDS, config["seeds"])]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the accuracy on electronics reviews before the first step and after each of the evaluated ones."""
    kind, _, seed = cell.rpartition("-")
    parts = electronics(config)
    rate = tuned_rate(config, parts)
    return {"rate": rate, "accuracy": correct(config, parts, kind, int(seed), rate, parts["test"])}


def tuned_rate(config: dict[str, Any], parts: dict[str, Part]) -> float:
    """Return the learning rate at which steps on anchors, with no influence in them, do the pool most good."""

    def reached(rate: float) -> float:
        return correct(config, parts, "anchors", config["tuning_seed"], rate, parts["pool"])[-1]

    names = ("minilm", "electronics", "rates", "tuning_seed", "anchors", "steps", "evaluated")
    given = {name: config[name] for name in names}
    made = kept("rate", given, lambda: {"rate": torch.tensor(max(config["rates"], key=reached), dtype=torch.float64)})
    return float(made["rate"])


def electronics(config: dict[str, Any]) -> dict[str, Part]:
    """Return anchors and pool, the dev reviews in two pieces, and the test reviews, below MiniLM's top layers."""
    settings = config["minilm"]
    made_of = config["electronics"] | {name: settings[name] for name in ("base", "top_layers", "max_tokens")}
    return _electronics(json.dumps(made_of, sort_keys=True))


@lru_cache(maxsize=1)
def _electronics(config: str) -> dict[str, Part]:
    own = json.loads(config)

    def make() -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, (file, begin, stop) in own["parts"].items():
            records = read_records(own["data"].format(part=file))[begin:stop]
            texts = tuple(record["text"] for record in records)
            states = token_states(own["base"], -own["top_layers"], texts, own["max_tokens"])
            out |= {f"{name}.states": torch.cat(states), f"{name}.lengths": torch.tensor([len(one) for one in states])}
            out |= {f"{name}.labels": torch.tensor([record["label"] for record in records])}
        return out

    found = kept("electronics", own, make)
    return {
        name: Part(list(found[f"{name}.states"].split(found[f"{name}.lengths"].tolist())), found[f"{name}.labels"])
        for name in own["parts"]
    }


def correct(
    config: dict[str, Any], parts: dict[str, Part], kind: str, seed: int, rate: float, held_out: Part
) -> list[float]:
    """Take the steps of one kind under one seed; return the accuracy on the held-out reviews before, midway and after."""
    subject = minilm.trained(config["minilm"])
    source = parts["pool"] if kind.startswith("pool") else subject.train
    model = subject.subject.build()
    model.load_state_dict(subject.model.state_dict())
    model.eval()
    reached = [accuracy(model, held_out)]
    for step in range(1, config["steps"] + 1):
        anchors = parts["anchors"].take(
            picked(len(parts["anchors"].labels), config["anchors"], seed, f"anchors {step}")
        )
        if kind == "anchors":
            points = anchors
        elif kind.endswith("random"):
            points = source.take(picked(len(source.labels), config["points"], seed, f"random {step}"))
        else:
            points = influential(config, subject, model, anchors, source, 1.0 if kind.endswith("helpful") else -1.0)
        descend(model, points, rate)
        if step in config["evaluated"]:
            reached.append(accuracy(model, held_out))
    return reached


def picked(count: int, wanted: int, seed: int, name: str) -> Tensor:
    return torch.from_numpy(permutation(derive_key(seed, name), count)[:wanted].copy())


def influential(
    config: dict[str, Any], subject: minilm.MiniLM, model: nn.Module, anchors: Part, source: Part, sign: float
) -> Part:
    """Return the examples of the source, among the nearest to the anchors' mean, with the largest sign × influence on them."""
    now = minilm.MiniLM(subject.subject, model, subject.coordinates)
    center = minilm.pooled(subject, anchors).mean(0, keepdims=True)
    near = torch.from_numpy(
        nearest(minilm.pooled(subject, source), center, min(config["neighbours"], len(source.labels)))
    )[0]
    b = minilm.query_gradients(now, anchors).mean(1, keepdim=True)
    exact, chosen = minilm.reference(config["minilm"], config["curvature_rows"]), choose(config)
    scale = span.batch_scale(exact.gram, 1, config["seed"])
    lissa = Lissa(
        chosen["damping"] * exact.largest, scale, min(500, int(chosen["depth"])), 1, int(chosen["repetitions"])
    )
    inner = span.span_of(exact, b, scale)
    x = span.expanded(exact, inner, span.repetitions(inner, lissa, exact.largest).mean(0), b)
    candidates = source.take(near)
    scores = minilm.products(model, loss, candidates, subject.coordinates.split(x))[:, 0]
    return candidates.take((sign * scores).argsort(descending=True, stable=True)[: config["points"]])


def descend(model: nn.Module, points: Part, rate: float) -> None:
    """Take one step of SGD on the points' mean loss, without dropout."""
    weights = [dict(model.named_parameters())[p.name].requires_grad_() for p in select_parameters(model, ["*"])]
    mean = loss(model, points.batch(torch.arange(len(points.labels)))).mean()
    with torch.no_grad():
        for weight, slope in zip(weights, torch.autograd.grad(mean, weights), strict=True):
            weight -= rate * slope


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge helpful > random > harmful and, for augmentation, helpful ≥ anchors: low ends of paired intervals over repeats."""
    last = {kind: np.array([done[f"{kind}-{seed}"]["accuracy"][-1] for seed in config["seeds"]]) for kind in KINDS}
    before = done[f"helpful-{config['seeds'][0]}"]["accuracy"][0]

    def above(a: str, b: str) -> Gate:
        gain = last[a] - last[b]
        return Gate(f"accuracy gained, {a} over {b}", float(gain.mean()), bootstrap_interval(gain))

    pairs = (("helpful", "random"), ("random", "harmful"), ("pool-helpful", "anchors"))
    return [
        *(Gate(f"accuracy gained, {a} over {b}, low end", bootstrap_interval(last[a] - last[b])[0], threshold=0.0)
          for a, b in pairs),
        *(above(a, b) for a, b in (*pairs, ("pool-helpful", "pool-random"))),
        Gate("accuracy before", before),
        Gate("learning rate, tuned on dev", done[f"helpful-{config['seeds'][0]}"]["rate"]),
        *(Gate(f"accuracy after, {kind}", float(own.mean()), bootstrap_interval(own)) for kind, own in last.items()),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw accuracy against steps: mean and range over the repeats."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    steps = [0, *config["evaluated"]]
    for kind, colour in KINDS.items():
        curves = np.array([done[f"{kind}-{seed}"]["accuracy"] for seed in config["seeds"]])
        axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, curves.mean(0), ".-", color=colour, label=kind.replace("pool-", "from the pool, "))
    axes.set(xlabel="steps", ylabel="accuracy on electronics reviews")
    axes.set_title(f"steps on influential examples, {len(config['seeds'])} repeats", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, folder, "correction")


EXPERIMENT = Experiment(
    name="fastif.correction",
    claim="Steps on helpful movie reviews correct a model on electronics reviews; augmentation from a pool beats anchors",
    minutes=45,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
