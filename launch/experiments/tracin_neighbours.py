"""tracin.neighbours: does a neighbour index find what the whole sum finds? (TracIn appendix C)

Every training example's projected gradients, times √η and side by side for all checkpoints, are one vector; so are a
query's, and their inner product is TracInCP. Asked are both ends: neighbours of q (proponents) and of −q (opponents).
The truth is the sum over checkpoints by the method itself, in float64. A flat index must find the same top-k; inverted
lists and HNSW graphs trade recall for time: their setting is chosen on queries of the dev part, the least that reaches
`aim` there, and judged on test queries. A cell is one data set.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from actors.neighbours import scaled
from engine.counters import derive_key
from engine.knn import build_neighbours, faiss_module, probe, recall, search
from engine.methods.contract import QueryState, load_method
from engine.metrics import bootstrap_interval
from engine.projection import Projection
from engine.topk import TopK, top_k
from launch.experiments.passes import chosen_states, gradient_rows, projector_of, query_state, states_of
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, make_subject

SIDES = ("proponents", "opponents")
ROUNDS = 9
GRAPH_LINKS, GRAPH_BUILD = 32, 100  # of HNSW: links a node, candidates while building
TOLERANCE = 1e-5  # of ‖g_z‖‖g_q‖: ties in float32
TICKS = [0.1, 0.2, 0.5, 1, 2, 5]
COLOURS = {"ivf": "#0b6e4f", "hnsw": "#3d5a98"}


@dataclass(frozen=True)
class Vectors:
    """What an index holds and is asked, with the truth."""

    train: np.ndarray  # float32 [n, width]
    queries: np.ndarray  # float32 [Q, width]
    scores: np.ndarray  # float64 [n, Q], the sum over checkpoints


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["sets"])


def run_set(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Build all indices over one data set's training part; return agreement, recall and time by setting."""
    settings = config["sets"][cell]
    subject, rate = make_subject(cell, settings), settings["train"]["learning_rate"]
    train = subject.parts["train"]
    states = states_of(subject, train, settings["train"], derive_key(0, "neighbours") % 2**31)
    models = [subject.load(states[i]) for i in chosen_states(subject, states, train, config["checkpoints"])]
    asked = {part: subject.parts[part].take(torch.arange(config["queries"][part])) for part in ("dev", "test")}
    both = Part(torch.cat([_inputs(p) for p in asked.values()]), torch.cat([p.labels for p in asked.values()]))
    vectors = concatenated(models, rate, train, both, Projection(dim=config["dim"]))
    cut = config["queries"]["dev"]
    dev = Vectors(vectors.train, vectors.queries[:cut], vectors.scores[:, :cut])
    test = Vectors(vectors.train, vectors.queries[cut:], vectors.scores[:, cut:])
    faiss = faiss_module()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return {"rows": len(train.labels), "width": vectors.train.shape[1]} | measure(config, dev, test)
    finally:
        faiss.omp_set_num_threads(threads)


def _inputs(part: Part) -> Tensor:
    assert isinstance(part.inputs, Tensor)
    return part.inputs


def concatenated(models: list[nn.Module], rate: float, train: Part, queries: Part, projection: Projection) -> Vectors:
    """Return the vectors of both sides, and TracIn's own sum over the checkpoints."""
    method = load_method("tracin", {})
    left, right, total = [], [], np.zeros((len(train.labels), len(queries.labels)))
    for model in models:
        projector = projector_of(model, projection)
        state = query_state(model, rate, queries, projector)
        rows, _ = gradient_rows(model, train, projector)
        left.append(scaled(method, rows.arrays, rows.norms, state))
        right.append(scaled(method, state.arrays, state.norms, state))
        total += state.weight * method.score(rows, widened(state)).scores.numpy()
    return Vectors(torch.cat(left, 1).numpy(), torch.cat(right, 1).numpy(), total)


def widened(state: QueryState) -> QueryState:
    """Return the state in float64: the method multiplies in the queries' precision."""
    return replace(state, arrays={name: array.double() for name, array in state.arrays.items()})


def measure(config: dict[str, Any], dev: Vectors, test: Vectors) -> dict[str, Any]:
    """Return what each index finds of the true top-k, and its seconds."""
    k = config["top"]
    truth = {"dev": true_top(dev, k), "test": true_top(test, k)}
    flat = flat_index(test.train)
    found, _ = search(flat, test.queries, k)
    result: dict[str, Any] = {
        "agreement": agreement(found, truth["test"], test).tolist(),
        "identical": (found == truth["test"].ids).mean((0, 2)).tolist(),
    }
    for kind, make in (("ivf", inverted_lists), ("hnsw", graph)):
        began = time.perf_counter()
        index = make(test.train)
        seconds = time.perf_counter() - began
        curve = []
        for setting in config["settings"][kind]:
            set_effort(index, kind, setting)
            shares = {name: recalls(index, v, truth[name], k) for name, v in (("dev", dev), ("test", test))}
            curve.append({"setting": setting} | shares)
        times = milliseconds(flat, index, kind, config["settings"][kind], test.queries[: config["timed"]], k)
        for one, taken in zip(curve, times[1:], strict=True):
            one["ms"] = taken
        chosen = choose(curve, config["aim"])
        result[kind] = {"build_seconds": seconds, "flat_ms": times[0], "curve": curve, "chosen": chosen}
    return result


def true_top(vectors: Vectors, k: int) -> TopK:
    return top_k(np.arange(len(vectors.train)), vectors.scores, k)


def flat_index(train: np.ndarray) -> Any:
    return _filled(faiss_module().IndexFlatIP(train.shape[1]), train)


def inverted_lists(train: np.ndarray) -> Any:
    """Return the index that `output.neighbours: ivf` builds."""
    return build_neighbours("ivf", [(np.arange(len(train)), train)], len(train), train.shape[1])


def graph(train: np.ndarray) -> Any:
    faiss = faiss_module()
    index = faiss.IndexHNSWFlat(train.shape[1], GRAPH_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = GRAPH_BUILD
    return _filled(index, train)


def _filled(index: Any, train: np.ndarray) -> Any:
    index.add(train)
    return index


def set_effort(index: Any, kind: str, setting: int) -> None:
    """Set how much of the index a query looks at: lists of "ivf", candidates of "hnsw"."""
    if kind == "ivf":
        probe(index, setting)
    else:
        index.hnsw.efSearch = setting


def choose(curve: list[dict[str, Any]], aim: float) -> int:
    """Return the position of the least effort whose recall on dev queries reaches the aim at both ends, else the last."""
    reached = [i for i, one in enumerate(curve) if min(np.mean(one["dev"][side]) for side in SIDES) >= aim]
    return reached[0] if reached else len(curve) - 1


def agreement(found: np.ndarray, truth: TopK, vectors: Vectors) -> np.ndarray:
    """Return [Q]: the share of positions at both ends where the found row's true score is the one that belongs there.

    Scores within 1e-5 ‖g_z‖‖g_q‖ of each other are ties: float32 cannot order them.
    """
    columns = np.arange(found.shape[1])[None, :, None]
    norms = np.linalg.norm(vectors.train, axis=1)[found] * np.linalg.norm(vectors.queries, axis=1)[columns]
    return (np.abs(vectors.scores[found, columns] - truth.scores) <= TOLERANCE * norms).mean((0, 2))


def recalls(index: Any, vectors: Vectors, truth: TopK, k: int) -> dict[str, list[float]]:
    """Return per side every query's share of the true top-k that is found."""
    found, _ = search(index, vectors.queries, k)
    pairs = {side: zip(found[end], truth.ids[end], strict=True) for end, side in enumerate(SIDES)}
    return {side: [round(recall(f[None], e[None]), 4) for f, e in both] for side, both in pairs.items()}


def milliseconds(
    flat: Any, index: Any, kind: str, settings: list[int], queries: np.ndarray, k: int
) -> list[list[float]]:
    """Return the time a query of both ends: of the flat index, then at every setting, each [ROUNDS], on one thread.

    A round times all of them in turn, so that a drift of the machine hits all alike.
    """
    taken: list[list[float]] = [[] for _ in range(1 + len(settings))]
    for _ in range(ROUNDS):
        for place, setting in enumerate([None, *settings]):
            if setting is not None:
                set_effort(index, kind, setting)
            began = time.perf_counter()
            search(flat if setting is None else index, queries, k)
            taken[place].append(round(1000 * (time.perf_counter() - began) / len(queries), 4))
    return taken


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge agreement of the flat index and recall of the others at the chosen setting, over test queries."""
    return [gate for name in config["sets"] for gate in gates_of(name, config["top"], done[name])]


def gates_of(name: str, k: int, result: dict[str, Any]) -> list[Gate]:
    def over_queries(label: str, values: list[float], threshold: float | None) -> Gate:
        return Gate(f"{label}, {name}", float(np.mean(values)), bootstrap_interval(np.array(values)), threshold)

    found = [
        over_queries(f"flat index: same top-{k}, ties in float32", result["agreement"], 1.0),
        over_queries("flat index: same id at every position", result["identical"], None),
    ]
    for kind in COLOURS:
        best = result[kind]["curve"][result[kind]["chosen"]]
        found += [over_queries(f"{kind} recall@{k}, {side}", best["test"][side], 0.95) for side in SIDES]
        ratios = np.array(result[kind]["flat_ms"]) / np.array(best["ms"])
        interval = bootstrap_interval(ratios, statistic=np.median)
        label = f"{kind}, effort {best['setting']}: times as fast as flat, {name}"
        found.append(Gate(label, float(np.median(ratios)), interval))
    return found


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw recall against time, a point a setting; the chosen one is filled. Times are medians of ratios within a round."""
    figure = Figure(figsize=(5.5 * len(done), 4), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(done), squeeze=False)[0], done.items(), strict=True):
        draw(axes, result)
        axes.set_title(f"{name}: {result['rows']:,} vectors of {result['width']:,}", loc="left", fontsize=10)
        axes.set_ylabel(f"recall@{config['top']}")
    save(figure, folder, "recall")


def draw(axes: Axes, result: dict[str, Any]) -> None:
    axes.axhline(0.95, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.plot(1.0, 1.0, "s", color="#333333", label="flat scan")
    for kind, colour in COLOURS.items():
        flat = np.array(result[kind]["flat_ms"])
        times = [np.median(np.array(one["ms"]) / flat) for one in result[kind]["curve"]]
        for side, style in zip(SIDES, ("-", "--"), strict=True):
            shares = [np.mean(one["test"][side]) for one in result[kind]["curve"]]
            axes.plot(times, shares, f"o{style}", color=colour, markerfacecolor="white", label=f"{kind}, {side}")
            at = result[kind]["chosen"]
            axes.plot(times[at], shares[at], "o", color=colour)
    axes.set(xscale="log", xlabel="time of a query, in flat scans")
    axes.minorticks_off()
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    name="tracin.neighbours",
    claim="A neighbour index over concatenated √η-scaled gradients finds what the sum over checkpoints finds",
    minutes=5,
    cells=cells,
    run=run_set,
    gates=gates,
    plot=plot,
)
