"""fastif.removal: what does training again without the influential examples do? (FastIF, Guo et al. 2021, appendix B.3)

For every query its m most helpful and most harmful training examples are left out, as the exact influence names them
(full) and as nearest neighbours and LiSSA do (fast), or m random ones of either label; then the model is trained again and
the query's loss compared. On the convex head training again has one result. On MiniLM it is one epoch from the trained
weights, under several seeds, and the comparison is with leaving out random examples, which all queries of a seed share.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.batches import Batch
from engine.counters import derive_key, permutation
from engine.metrics import bootstrap_interval
from engine.stochastic_solvers import Lissa
from engine.training import TrainSettings, train
from launch.experiments import fastif_head, fastif_minilm, fastif_span
from launch.experiments.fastif_choice import choose
from launch.experiments.fastif_head import nearest, right_and_wrong
from launch.experiments.kept import kept
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import loss

SIDES = {"helpful": 1.0, "harmful": -1.0}
COLOURS = {"full": "#3d5a98", "fast": "#0b6e4f", "random": "#888888"}


def cells(config: dict[str, Any]) -> list[str]:
    """Return one cell for every m on the head, and on MiniLM one for every seed and what is left out."""
    arms = ["random", *(f"{side}-{query}" for query in range(config["minilm_queries"]) for side in SIDES)]
    return [*(f"head-{m}" for m in config["removed"]),
            *(f"minilm-{seed}-{arm}" for seed in config["seeds"] for arm in arms)]  # fmt: skip


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    subject, _, rest = cell.partition("-")
    if subject == "head":
        return without_on_head(config, int(rest))
    seed, _, arm = rest.partition("-")
    return {"losses": without_on_minilm(config, int(seed), arm)}


def without_on_head(config: dict[str, Any], m: int) -> dict[str, Any]:
    """Return how much every query's loss rises without m examples, by system and side."""
    subject = fastif_head.convex(config["head"])
    test = subject.head.queries
    right = fastif_head.is_right(subject, test)
    chosen = right_and_wrong(right, config["queries"])
    queries = test.take(chosen)
    asked, damping = fastif_head.asked_gradients(subject, queries), subject.head.l2
    full = subject.influence(subject.solve(asked, damping)).T
    fast = subject.influence(fastif_head.fast_solution(subject, asked, damping, config["lissa"], config["seed"])).T
    near = nearest(fastif_head.embeddings(subject.head.train), fastif_head.embeddings(queries), config["neighbours"])
    on_candidates = torch.full_like(fast, torch.nan).scatter(1, torch.from_numpy(near), 0.0) + fast
    labels = subject.head.train.labels
    removed = {
        f"{system} {side}": [strongest(sign * row, m) for row in scores]
        for system, scores in (("full", full), ("fast", on_candidates))
        for side, sign in SIDES.items()
    } | {
        f"random label {label}": [
            fastif_head.random_of_label(labels, label, m, config["seed"], int(query)) for query in chosen
        ]
        for label in (0, 1)
    }
    return {
        "right": right[chosen].tolist(),
        "rises": {name: fastif_head.rises_without(subject, queries, ids).tolist() for name, ids in removed.items()},
    }


def strongest(scores: Tensor, m: int) -> Tensor:
    """Return the positions of the m highest scores above 0, fewer if there are fewer; NaN: no candidate."""
    order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:m]
    return order[scores[order] > 0]


def without_on_minilm(config: dict[str, Any], seed: int, arm: str) -> list[float]:
    """Return every query's loss after one more epoch, under this seed, without what the arm leaves out."""
    subject = fastif_minilm.trained(config["minilm"])
    named = {name: value for name, value in config.items() if name not in ("removed", "seeds", "head", "queries")}
    found = kept("removal", named, lambda: minilm_removals(config))
    count = len(subject.train.labels)
    if arm == "random":
        out = torch.from_numpy(permutation(derive_key(seed, "random"), count)[: config["minilm_removed"]].copy())
    else:
        side, _, query = arm.partition("-")
        out = found[side][int(query)]
    left = torch.ones(count, dtype=torch.bool)
    left[out[out >= 0]] = False
    torch.manual_seed(seed)
    model = subject.subject.build()
    model.load_state_dict(subject.model.state_dict())

    def collate(rows: list[int]) -> Batch:
        return subject.train.batch(torch.tensor(rows))

    settings = TrainSettings(**config["minilm"]["train"] | {"epochs": 1}, seed=seed)
    for _ in train(model, loss, collate, torch.nonzero(left).flatten().tolist(), settings):
        pass
    queries = subject.subject.parts["test"].take(found["queries"])
    with torch.no_grad():
        return loss(model.eval(), queries.batch(torch.arange(len(found["queries"])))).tolist()


def minilm_removals(config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the queries, and by side what is left out for each of them, int64 [Q, m], −1 where there are fewer."""
    subject = fastif_minilm.trained(config["minilm"])
    exact = fastif_minilm.reference(config["minilm"], config["curvature_rows"])
    test = subject.subject.parts["test"]
    chosen = right_and_wrong(fastif_minilm.is_right(subject, test), config["minilm_queries"])
    queries = test.take(chosen)
    asked = fastif_minilm.query_gradients(subject, queries)
    settings = choose(config)
    scale = fastif_span.batch_scale(exact.gram, 1, config["seed"])
    lissa = Lissa(settings["damping"] * exact.largest, scale, int(settings["depth"]), 1, int(settings["repetitions"]),
                  config["seed"])  # fmt: skip
    span = fastif_span.span_of(exact, asked, scale)
    solved = fastif_span.expanded(exact, span, fastif_span.repetitions(span, lissa, exact.largest).mean(0), asked)
    features = [fastif_minilm.pooled(subject, part) for part in (subject.train, queries)]
    near = torch.from_numpy(nearest(features[0], features[1], config["neighbours"]))
    m, out = config["minilm_removed"], {"queries": chosen}
    scores = fastif_minilm.influence_on(subject, solved).T
    for side, sign in SIDES.items():
        picked = [row[strongest(sign * own[row], m)] for row, own in zip(near, scores, strict=True)]
        out[side] = torch.stack([torch.nn.functional.pad(ids, (0, m - len(ids)), value=-1) for ids in picked])
    return out


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the largest m on the head: both signs, as much as the exact scores' and more than chance; report the others."""
    most = max(config["removed"])
    rises = {
        m: {name: np.array(values) for name, values in done[f"head-{m}"]["rises"].items()} for m in config["removed"]
    }

    def mean(name: str, m: int) -> Gate:
        return Gate(
            f"head, m = {m}: rise without {name}", float(rises[m][name].mean()), bootstrap_interval(rises[m][name])
        )

    at = rises[most]
    judged = []
    for side, sign in SIDES.items():
        fast, full = sign * at[f"fast {side}"], sign * at[f"full {side}"]
        random = sign * (at["random label 0"] + at["random label 1"]) / 2
        name = f"head, m = {most}, {side}"
        judged += [
            Gate(f"{name}: effect in the right direction, low end", bootstrap_interval(fast)[0], threshold=0.0),
            Gate(f"{name}: effect of fast over that of full", float(fast.mean() / full.mean()), threshold=0.8),
            Gate(f"{name}: effect beyond random, low end", bootstrap_interval(fast - random)[0], threshold=0.0),
        ]
    return [*judged, *(mean(name, m) for m in config["removed"] for name in at), *minilm_gates(config, done)]


def minilm_gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Report what leaving out changes beyond the shared random arm, over queries and seeds, resampling queries."""
    found = []
    for side in SIDES:
        change = np.array([
            np.mean([done[f"minilm-{seed}-{side}-{query}"]["losses"][query] - done[f"minilm-{seed}-random"]["losses"][query]
                     for seed in config["seeds"]])
            for query in range(config["minilm_queries"])
        ])  # fmt: skip
        name = f"MiniLM, m = {config['minilm_removed']}: rise without fast {side}, beyond random"
        found.append(Gate(name, float(change.mean()), bootstrap_interval(change)))
    return found


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the head's mean change against m, right and wrong predictions apart, as the paper's figure 10."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    right = np.array(next(iter(done.values()))["right"])
    for axes, rows, title in zip(figure.subplots(1, 2), (right, ~right), ("right", "wrong"), strict=True):
        axes.axhline(0, color="#dddddd", linewidth=0.8)
        for name in next(iter(done.values()))["rises"]:
            system, _, side = name.partition(" ")
            curve = [np.mean(np.array(done[f"head-{m}"]["rises"][name])[rows]) for m in config["removed"]]
            style = {"harmful": "--", "label 1": ":", "label 0": "-."}.get(side, "-")
            axes.plot(config["removed"], curve, style, color=COLOURS[system], marker=".", label=f"without {name}")
        axes.set(xscale="log", xlabel="examples left out", ylabel="change of the query's loss")
        axes.set_xticks(config["removed"], [str(m) for m in config["removed"]])
        axes.minorticks_off()
        axes.set_title(f"{int(rows.sum())} queries whose prediction is {title}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, folder, "removal")


EXPERIMENT = Experiment(
    name="fastif.removal",
    claim="Training again without helpful examples raises the query's loss, without harmful ones lowers it; fast as full",
    minutes=45,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
