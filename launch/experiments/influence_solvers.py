"""influence.solvers: do the solvers rank training examples as the exact solve does?

Each is held against its own filter of the whole matrix's eigenvalues μ, at the λ that it used: 1/(μ + λ) for CG and LiSSA,
μ/(μ² + λ) for squared CG. Per query the Spearman correlation over all training examples. A cell is a model: the logistic
head, and a perceptron whose Hessian, which squared CG takes, is indefinite. λ is what the method takes by default, next to
which stands how much it changes: the correlation of the exact scores with those of the plain gradient.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.curvature import LocalOperator
from engine.methods.influence import Influence
from engine.methods.inverse import InverseCurvature, start
from engine.metrics import bootstrap_interval
from engine.solvers import FILTERS, Solution, finish, largest_eigenvalue
from engine.stochastic_solvers import batch_scale, lissa_repetition, lissa_solution
from launch.experiments.heads import Head, gradients, logistic, operator, perceptron, whole_matrix
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

HEADS = {"head": logistic, "mlp": perceptron}
NAMES = {"cg": "CG", "squared-cg": "squared CG", "lissa": "LiSSA"}
ASKED = {"cg": 0.99, "squared-cg": 0.99, "lissa": 0.95}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
COLOURS = {"cg": "#0b6e4f", "squared-cg": "#3d5a98", "lissa": "#c8553d"}


def cells(config: dict[str, Any]) -> list[str]:
    return list(HEADS)


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return, per solver, every query's correlation with its exact filter and what the solve says of itself."""
    head = HEADS[cell](config)
    asked = gradients(head, head.queries.take(torch.arange(config["queries"])))
    rows = gradients(head, head.train)
    matrices = {kind: torch.linalg.eigh(whole_matrix(operator(head, kind))) for kind in ("gauss-newton", "hessian")}
    found = {}
    for solver in config["solvers"]:
        inverse = Influence(solver=solver, **config["solvers"][solver]).inverse
        found[solver] = compare(head, inverse, rows, asked, *matrices[inverse.kind])
    return {"parameters": asked.shape[1], "examples": len(rows), "solvers": found}


def compare(
    head: Head, inverse: InverseCurvature, rows: Tensor, asked: Tensor, mu: Tensor, vectors: Tensor
) -> dict[str, Any]:
    """Return one solver's agreement with its filter of the eigenvalues μ, and its figures."""
    solved = solve(operator(head, inverse.kind, DTYPES[inverse.dtype]), head, inverse, asked.T.contiguous())
    filtered = FILTERS["squared" if inverse.solver == "squared-cg" else "inverse"](mu, solved.damping)
    truth = vectors @ (filtered[:, None] * (vectors.T @ asked.T))
    exact, own, plain = ((rows @ x).numpy() for x in (truth, solved.x, asked.T))
    error = solved.standard_error
    return {
        "spearman": correlations(own, exact),
        "with_plain": correlations(exact, plain),
        "residual": float(solved.residual.median()),
        "error": float(((solved.x - truth).norm(dim=0) / truth.norm(dim=0)).median()),
        "standard_error": None if error is None else float((error.norm(dim=0) / solved.x.norm(dim=0)).median()),
        "iterations": solved.iterations,
        "damping": solved.damping,
        "largest": solved.largest,
        "lowest": float(mu.min()),
    }


def solve(curvature: LocalOperator, head: Head, inverse: InverseCurvature, b: Tensor) -> Solution:
    """Return the solution of all queries together, λ and LiSSA's scale found as a job finds them."""
    largest = finish(largest_eigenvalue(curvature))
    if inverse.solver != "lissa":
        return finish(start(inverse, curvature, b, largest))
    ids = torch.arange(len(head.train.labels))
    scale = max(batch_scale(curvature, ids, inverse.batch), largest + inverse.absolute(largest))
    lissa = inverse.lissa(largest, scale, seed=0)
    runs = [finish(lissa_repetition(curvature, b, ids, lissa, t, largest)) for t in range(lissa.repetitions)]
    return lissa_solution(curvature, b, lissa, runs, largest)


def correlations(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Return every query's Spearman correlation over the examples."""
    return [float(stats.spearmanr(x, y).statistic) for x, y in zip(a.T, b.T, strict=True)]


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge every solver's mean correlation, interval over the queries; report what it took and what λ is worth."""
    found = []
    for cell, result in done.items():
        for solver, own in result["solvers"].items():
            values, label = np.array(own["spearman"]), f"{NAMES[solver]}, {cell}"
            found += [
                Gate(f"Spearman with exact, {label}", float(values.mean()), bootstrap_interval(values), ASKED[solver]),
                Gate(f"exact with plain gradient, {label}", float(np.mean(own["with_plain"]))),
                Gate(f"relative error, {label}", own["error"]),
                Gate(f"iterations, {label}", own["iterations"]),
                Gate(f"{'√λ' if solver == 'squared-cg' else 'λ'}/λ_max, {label}", relative(solver, own)),
            ]
        found.append(Gate(f"least eigenvalue of the Hessian/λ_max, {cell}", lowest(result)))
    return found


def relative(solver: str, own: dict[str, Any]) -> float:
    return own["damping"] ** (0.5 if solver == "squared-cg" else 1) / own["largest"]


def lowest(result: dict[str, Any]) -> float:
    own = result["solvers"]["squared-cg"]
    return own["lowest"] / own["largest"]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw every query's correlation with the exact scores, by model and solver."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (cell, result) in zip(figure.subplots(1, len(done), sharey=True), done.items(), strict=True):
        for place, (solver, own) in enumerate(result["solvers"].items()):
            values = np.sort(own["spearman"])
            axes.plot(place + np.linspace(-0.3, 0.3, len(values)), values, ".", color=COLOURS[solver], markersize=3)
            axes.plot([place - 0.35, place + 0.35], [ASKED[solver]] * 2, color="#888888", linewidth=0.8)
        axes.set_xticks(range(len(result["solvers"])), [NAMES[solver] for solver in result["solvers"]])
        title = f"{cell}: {result['parameters']:,} weights, {result['examples']:,} examples"
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 0 or cell == next(iter(done)):
            axes.set_ylabel("Spearman with the exact solve, a point per query")
    save(figure, folder, "solvers")


EXPERIMENT = Experiment(
    name="influence.solvers",
    claim="CG, squared CG and LiSSA rank training examples as the exact solve does, on a logistic head and a perceptron",
    minutes=10,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
