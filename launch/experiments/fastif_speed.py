"""fastif.speed: how many times faster is fast influence, for one query? (FastIF, Guo et al. 2021, appendix B.2 and abstract)

MiniLM fine-tuned on movie reviews, its top two layers and head. Full: LiSSA with batches of 128 on one actor, then the
influence of all N examples. Fast: LiSSA with one example an iteration, its repetitions side by side on two actors, then
the influence of the k nearest alone. First as in the paper, both with the same depth, damping and scale; then each with the
cheapest depth (and repetitions) that ranks dev queries' candidates as the exact solve does, and a scale of its own. Of the
full arm's recursions some are timed, and so are those of equal quality: their number enters linearly. Features are made
once for all queries and stand apart. A law in N and k, fitted on smaller corpora, says where the paper's 80 is passed.
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import nnls
from torch import Tensor

from engine.counters import derive_key, permutation
from engine.parameters import select_parameters
from engine.stochastic_solvers import Lissa
from launch.experiments import fastif_minilm as minilm
from launch.experiments import fastif_span as span
from launch.experiments.fastif_actors import Timed, timed_run
from launch.experiments.fastif_choice import choose, trajectories
from launch.experiments.fastif_head import nearest, right_and_wrong
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, loss

PAPER = 80  # the abstract's speed-up
ASKED, ENOUGH = 20, 0.95
ARMS = ("full", "fast")


def cells(config: dict[str, Any]) -> list[str]:
    return ["quality", "full", "fast", *(f"of-{size['rows']}" for size in config["sizes"])]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    if cell.startswith("of-"):
        return time_size(config, int(cell.removeprefix("of-")))
    return {"quality": compare, "full": time_full, "fast": time_fast}[cell](config)


@dataclass(frozen=True)
class Subject:
    """What all cells ask about, and how."""

    trained: minilm.MiniLM
    exact: minilm.Reference
    query: int  # position of the test review: the first that the model gets wrong
    paper: dict[str, Lissa]  # the paper's settings of both arms

    @property
    def ids(self) -> np.ndarray:
        """Return the training examples that LiSSA draws from, in the reference's order."""
        order = permutation(derive_key(0, "curvature"), len(self.trained.train.labels))
        return order[: len(self.exact.gram)].astype(np.int64)


def subject_of(config: dict[str, Any]) -> Subject:
    subject = minilm.trained(config["minilm"])
    exact = minilm.reference(config["minilm"], config["curvature_rows"])
    wrong = torch.nonzero(~minilm.is_right(subject, subject.subject.parts["test"]))
    damping, scale = choose(config)["damping"] * exact.largest, span.batch_scale(exact.gram, 1, config["seed"])
    paper = {arm: Lissa(damping, scale, config["depth"], **config[arm], seed=config["seed"]) for arm in ARMS}
    return Subject(subject, exact, int(wrong[0]), paper)


def compare(config: dict[str, Any]) -> dict[str, Any]:
    """Return for the paper's settings and all others how each ranks the candidates, against the exact solve.

    Spearman's correlation: the mean over dev queries, by which settings are chosen, and that of the query that is timed.
    """
    own = subject_of(config)
    parts = own.trained.subject.parts
    chosen = right_and_wrong(minilm.is_right(own.trained, parts["dev"]), config["quality_queries"])
    queries = [parts["dev"].take(chosen[i : i + 1]) for i in range(len(chosen))]
    queries.append(parts["test"].take(torch.tensor([own.query])))
    asked = torch.cat([minilm.query_gradients(own.trained, query) for query in queries], 1)
    near = nearest(minilm.pooled(own.trained, own.trained.train),
                   np.concatenate([minilm.pooled(own.trained, query) for query in queries]), config["neighbours"])  # fmt: skip
    seen = [Seen.of(own, ids, asked[:, [q]]) for q, ids in enumerate(near)]
    inner = span.span_of(own.exact, asked, own.paper["fast"].scale)
    truth = scores(seen, inner, span.exact_in_span(inner, own.paper["fast"].damping))

    def ranks(block: Tensor, given: span.Span) -> dict[str, float]:
        found = [float(stats.spearmanr(a, b).statistic) for a, b in zip(scores(seen, given, block), truth, strict=True)]
        return {"dev": float(np.mean(found[:-1])), "asked": found[-1]}

    reached: dict[str, Any] = {}
    for arm in ARMS:
        paper, grid = own.paper[arm], config["grid"][arm]
        runs = span.repetitions(inner, paper, own.exact.largest)
        scale = span.batch_scale(own.exact.gram, paper.batch_size, config["seed"])
        settings = replace(paper, scale=scale, iterations=max(grid["depths"]), repetitions=max(grid["repetitions"]))
        scaled = span.span_of(own.exact, asked, scale)
        deeper = trajectories(scaled, settings, grid["depths"], own.exact.largest)
        reached[arm] = {"paper": ranks(runs.mean(0), inner), "scale": scale, "settings": [
            {"depth": j, "repetitions": t} | ranks(deeper[j][:t].mean(0), scaled)
            for j, t in itertools.product(grid["depths"], grid["repetitions"])
        ]}  # fmt: skip
    timed = {str(i): float(score) for i, score in zip(near[-1], truth[-1], strict=True)}
    return {"damping": own.paper["fast"].damping, "largest": own.exact.largest, "reached": reached, "exact": timed}


@dataclass(frozen=True)
class Seen:
    """A query's candidates as the span sees them: what their scores along any x = c b + r Aᵀβ are made of."""

    along: Tensor  # G b, [k]: G's rows are the candidates' gradients
    crossed: Tensor  # A Gᵀ, [n, k]

    @classmethod
    def of(cls, own: Subject, candidates: np.ndarray, b: Tensor) -> "Seen":
        examples = own.trained.train.take(torch.from_numpy(candidates))
        arrays = gradients_of(own, examples)
        parts = own.trained.coordinates.split(b)
        along = torch.stack([arrays[name].double() @ part[0] for name, part in parts.items()]).sum(0)
        return cls(along, minilm.products(own.exact.model, minilm.margin, own.exact.rows, arrays))


def gradients_of(own: Subject, examples: Part) -> dict[str, Tensor]:
    """Return whole gradients in the examples' order, name -> [k, O·I] in the model's dtype."""
    parameters = select_parameters(own.trained.model, ["*"])
    parts = list(minilm.whole_gradients(own.trained.model, loss, examples, parameters))
    order = torch.cat([ids for ids, _ in parts]).argsort()
    return {p.name: torch.cat([arrays.pop(p.name) for _, arrays in parts])[order] for p in parameters}


def scores(seen: list[Seen], inner: span.Span, block: Tensor) -> list[np.ndarray]:
    """Return every query's candidates' products with its column of a block in the span's numbers, [k] each."""
    c, beta = block[0], block[1:] * inner.unit
    return [(c[q] * one.along + one.crossed.T @ beta[:, q]).numpy() for q, one in enumerate(seen)]


@contextmanager
def run_of(config: dict[str, Any], own: Subject, rows: int) -> Iterator[Timed]:
    """Give a run with so many training examples."""
    with (
        tempfile.TemporaryDirectory(prefix="fastif-speed-") as folder,
        timed_run(config, own.trained, rows, own.query, Path(folder)) as run,
    ):
        yield run


def slope(run: Timed, pool: Any, lissa: Lissa, own: Subject, few: int, many: int) -> dict[str, float]:
    """Return the seconds of one recursion, and of a solve's other work, from two solves of few and many recursions."""
    run.solve(pool, "warm", replace(lissa, iterations=1), own.exact.largest, own.ids)
    seconds = [
        run.solve(pool, f"{depth}", replace(lissa, iterations=depth), own.exact.largest, own.ids)[0]
        for depth in (few, many)
    ]
    each = (seconds[1] - seconds[0]) / (many - few)
    return {"recursion": each, "besides": seconds[0] - few * each, "timed": seconds[1]}


def time_full(config: dict[str, Any]) -> dict[str, Any]:
    """Return the full arm's seconds: of a recursion and a solve's other work, and of scoring all examples, one actor."""
    own, few_many = subject_of(config), config["timed_depths"]["full"]
    rows = len(own.trained.train.labels)
    with run_of(config, own, rows) as run:
        found = slope(run, run.one, own.paper["full"], own, *few_many)
        _, x = run.solve(run.one, "scored", replace(own.paper["full"], iterations=1), own.exact.largest, own.ids)
        return found | {"scores": run.score(run.one, "all", x, None)[0], "rows": rows}


def time_fast(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fast arm's seconds on two actors, all of it done as a query needs it; what it found; the features' own."""
    own, few_many = subject_of(config), config["timed_depths"]["fast"]
    rows = len(own.trained.train.labels)
    with run_of(config, own, rows) as run:
        found = slope(run, run.two, own.paper["fast"], own, *few_many)
        run.features(run.two)
        run.search(config["neighbours"])
        searched, near = run.search(config["neighbours"])
        solved, x = run.solve(run.two, "whole", own.paper["fast"], own.exact.largest, own.ids)
        run.score(run.two, "warm", x, near)
        scored, ids, influence = run.score(run.two, "near", x, near)
        features = run.features(run.two)
    scored_by_id = {str(i): float(score) for i, score in zip(ids, influence, strict=True)}
    return found | {"search": searched, "solve": solved, "scores": scored, "features": features, "found": scored_by_id}


def time_size(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the seconds of all that depends on N or k, on a corpus of so many rows."""
    own = subject_of(config)
    [counts] = (size["neighbours"] for size in config["sizes"] if size["rows"] == rows)
    with run_of(config, own, rows) as run:
        x = minilm.query_gradients(own.trained, own.trained.subject.parts["test"].take(torch.tensor([own.query])))
        run.features(run.two)
        run.search(1)
        searched, near = run.search(max(counts))
        for pool, name in ((run.one, "warm-one"), (run.two, "warm-two")):
            run.score(pool, name, x, near)
        few = {str(k): run.score(run.two, f"near-{k}", x, near[:k])[0] for k in counts}
        return {"search": searched, "all": run.score(run.one, "all", x, None)[0], "near": few}


@dataclass(frozen=True)
class Law:
    """Seconds as they grow with N and k; a solve's do not."""

    every: np.ndarray  # of scoring all on one actor: constant, by N
    near: np.ndarray  # of scoring candidates on two: constant, by N, by k
    search: np.ndarray  # constant, by N

    def speed_up(self, full: float, fast: float, rows: float, k: float) -> float:
        """Return the speed-up of solves that take so many seconds."""
        near = self.near @ [1, rows, k] + self.search @ [1, rows]
        return float((full + self.every @ [1, rows]) / (fast + near))


def law(done: dict[str, dict[str, Any]]) -> Law:
    """Return the law by least squares over all sizes that were timed for it."""
    sized = {int(cell.removeprefix("of-")): result for cell, result in done.items() if cell.startswith("of-")}
    rows = np.array(list(sized), dtype=float)
    every, search = ([result[of] for result in sized.values()] for of in ("all", "search"))
    pairs = [(n, int(k), seconds) for n, result in sized.items() for k, seconds in result["near"].items()]
    n, k, near = np.array(pairs).T
    straight = np.stack([np.ones_like(rows), rows], 1)
    return Law(fitted(straight, every), fitted(np.stack([np.ones_like(n), n, k], 1), near), fitted(straight, search))


def fitted(by: np.ndarray, seconds: Any) -> np.ndarray:
    return nnls(by, np.asarray(seconds))[0]  # nothing takes less than no time


def cheapest(reached: dict[str, Any], timed: dict[str, Any], actors: int) -> tuple[float, dict[str, Any]]:
    """Return a solve's seconds at the cheapest setting that is good enough on dev; where none is, at the best."""
    good = [one for one in reached["settings"] if one["dev"] >= ENOUGH]
    good = good or [max(reached["settings"], key=lambda one: one["dev"])]

    def seconds(one: dict[str, Any]) -> float:
        return -(-one["repetitions"] // actors) * (timed["besides"] + one["depth"] * timed["recursion"])

    best = min(good, key=seconds)
    return seconds(best), best


def passed(found: Law, full: float, fast: float, share: float | None, k: float) -> float | None:
    """Return the N at which the speed-up is the paper's, k being a share of N or fixed; None if it never is."""
    rows = np.geomspace(100, 1e10, 20_000)
    reached = [found.speed_up(full, fast, n, k if share is None else share * n) >= PAPER for n in rows]
    return float(rows[np.argmax(reached)]) if any(reached) else None


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the speed-up at the paper's settings; report that at equal quality, both arms' parts, and the law."""
    quality, full, fast = done["quality"], done["full"], done["fast"]
    rows, k, depth = full["rows"], config["neighbours"], config["depth"]
    solved = full["besides"] + depth * full["recursion"]
    whole, quick = solved + full["scores"], fast["search"] + fast["solve"] + fast["scores"]
    equal = {arm: cheapest(quality["reached"][arm], done[arm], 1 + (arm == "fast")) for arm in ARMS}
    equal_whole = equal["full"][0] + full["scores"]
    equal_quick = fast["search"] + equal["fast"][0] + fast["scores"]
    found = law(done)
    both = sorted(quality["exact"].keys() & fast["found"].keys())
    ranks = stats.spearmanr(*([scores[i] for i in both] for scores in (fast["found"], quality["exact"]))).statistic
    return [
        Gate(f"speed-up, the paper's arms, N = {rows}, k = {k}, J = {depth}", whole / quick, threshold=ASKED, paper=PAPER),
        *(Gate(f"Spearman on candidates, {arm}, the paper's arms", quality["reached"][arm]["paper"]["asked"]) for arm in ARMS),
        Gate("Spearman on candidates, fast as timed on the actors", float(ranks)),
        *(Gate(f"seconds, full: {name}", value) for name, value in
          ((f"LiSSA, B = {config['full']['batch_size']}", solved), (f"scores of {rows}", full["scores"]))),
        *(Gate(f"seconds, fast: {name}", fast[of]) for name, of in
          (("search", "search"), (f"LiSSA, T = {config['fast']['repetitions']}", "solve"), (f"scores of {k}", "scores"))),
        Gate(f"seconds, features of {rows}, once for all queries", fast["features"]),
        Gate("speed-up at equal quality", equal_whole / equal_quick),
        *(Gate(f"Spearman on candidates, {arm} at J = {best['depth']}, T = {best['repetitions']}: {of}", best[on])
          for arm, (_, best) in equal.items() for of, on in (("dev", "dev"), ("the query", "asked"))),
        *(Gate(f"seconds, {arm} at equal quality", value) for arm, value in zip(ARMS, (equal_whole, equal_quick), strict=True)),
        *law_gates(found, solved, fast["solve"], rows, k, whole / quick),
        Gate("λ_eff / λ_max", quality["damping"] / quality["largest"]),
    ]  # fmt: skip


def law_gates(found: Law, full: float, fast: float, rows: int, k: int, measured: float) -> list[Gate]:
    """Return what the law says: of the size that it was not fitted on, and where the paper's speed-up is passed."""
    ways = {f"k = {k / rows:.0%} of N": (k / rows, k), f"k = {k}": (None, k)}
    where = {name: passed(found, full, fast, share, k) for name, (share, k) in ways.items()}
    return [
        Gate(f"the law's speed-up at N = {rows} over the measured one", found.speed_up(full, fast, rows, k) / measured),
        *(Gate(f"N where {PAPER} is passed, {name}", value) for name, value in where.items() if value is not None),
        *(Gate(f"speed-up with N without end, {name}", found.speed_up(full, fast, 1e12, k if share is None else share * 1e12))
          for name, (share, k) in ways.items()),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the law's speed-up against N, and what was measured."""
    full, fast = done["full"], done["fast"]
    solved, rows, k = full["besides"] + config["depth"] * full["recursion"], full["rows"], config["neighbours"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes, found, sizes = figure.subplots(), law(done), np.geomspace(1000, 1e8, 200)
    for name, share, colour in ((f"k = {k / rows:.0%} of N", k / rows, "#0b6e4f"), (f"k = {k}", 0.0, "#3d5a98")):
        curve = [found.speed_up(solved, fast["solve"], n, share * n or k) for n in sizes]
        axes.plot(sizes, curve, color=colour, label=name)
    measured = (solved + full["scores"]) / (fast["search"] + fast["solve"] + fast["scores"])
    axes.plot([rows], [measured], "o", color="#222222", label="measured")
    axes.axhline(PAPER, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="training examples N", ylabel="full / fast, seconds of one query")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, folder, "speed")


EXPERIMENT = Experiment(
    name="fastif.speed",
    claim="Fast influence of one query against full influence on one actor: MiniLM's top two layers, 8,000 reviews",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
