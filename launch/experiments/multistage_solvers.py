"""multistage.solvers: do solvers that need products alone rank pretraining images as whole matrices do?

The case of multistage.fixed: squared CG with the paper's dampings, CG and LiSSA, each against the exact solve with the same
filter, over all pretraining images, and against the true effects of the same hundred. A cell is one solver.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from engine.curvature import LocalOperator
from engine.multistage import Inverse
from engine.solvers import FILTERS, conjugate_gradient, finish, squared_gradient
from engine.stochastic_solvers import Lissa, batch_scale, lissa_repetition
from launch.experiments.multistage_fixed import truth_of
from launch.experiments.multistage_identity import cells as truth_cells
from launch.experiments.multistage_identity import run_or_find
from launch.experiments.multistage_plots import correlation
from launch.experiments.multistage_stages import Minimum, case_of, fixed_case, fixed_parts
from launch.experiments.registry import Experiment, Gate

STAGES = ("finetuning", "pretraining")


def cells(config: dict[str, Any]) -> list[str]:
    return [*truth_cells(config), *config["solvers"]]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the agreement of one solver with its exact filter, what it predicts of the hundred, and how well it solved."""
    if cell not in config["solvers"]:
        return run_or_find(config, cell)
    case, settings = case_of(fixed_case, config), config["solvers"][cell]
    ids = run_or_find(config, "influence")["ids"]
    minima = dict(zip(STAGES, (case.finetuning, case.pretraining), strict=True))
    residuals: dict[str, float] = {}
    solved, exact = (
        fixed_parts(case, *(make(settings, stage, minima[stage], residuals) for stage in STAGES))
        for make in (iterated, filtered)
    )
    found, truth = (-case.influence(parts) / len(case.pretraining.objective.examples) for parts in (solved, exact))
    return {
        "spearman": float(stats.spearmanr(found, truth).statistic),
        "pearson": float(stats.pearsonr(found, truth).statistic),
        "predicted": found[ids].tolist(),
        "exact": truth[ids].tolist(),
        "residual": residuals,
        "largest": {stage: float(torch.linalg.eigvalsh(minima[stage].hessian)[-1]) for stage in STAGES},
    }


def filtered(settings: dict[str, Any], stage: str, minimum: Minimum, _: dict[str, float]) -> Inverse:
    """Return the exact filter that the solver converges to."""
    kind = "squared" if settings["solver"] == "squared-cg" else "inverse"
    mu, vectors = torch.linalg.eigh(minimum.hessian)
    gain = FILTERS[kind](mu, settings["damping"][stage])[:, None]
    return lambda b: vectors @ (gain * (vectors.T @ b))


def iterated(settings: dict[str, Any], stage: str, minimum: Minimum, residuals: dict[str, float]) -> Inverse:
    """Return the solver itself on products of the Hessian."""
    operator = minimum.objective.operator(minimum.x)
    largest = float(torch.linalg.eigvalsh(minimum.hessian)[-1])
    damping = settings["damping"][stage]
    descend: dict[str, Callable] = {"cg": conjugate_gradient, "squared-cg": squared_gradient}

    def solve(b: Tensor) -> Tensor:
        if settings["solver"] == "lissa":
            return repeated(operator, b, settings, damping, largest)
        steps = settings["iterations"]
        found = finish(descend[settings["solver"]](operator, b, damping, largest, settings["tolerance"], steps))
        residuals[stage] = float(found.residual.max())
        return found.x

    return solve


def repeated(operator: LocalOperator, b: Tensor, settings: dict[str, Any], damping: float, largest: float) -> Tensor:
    """Return LiSSA's mean over its repetitions; ids are the examples' positions."""
    ids = torch.arange(settings["examples"])
    size, depth, count = settings["batch_size"], settings["depth"], settings["repetitions"]
    scale = max(batch_scale(operator, ids, size), largest + damping)
    chosen = Lissa(damping, scale, depth, size, count)
    return torch.stack([finish(lissa_repetition(operator, b, ids, chosen, r, largest)) for r in range(count)]).mean(0)


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge squared CG; report the others."""
    truth, found = truth_of(config, done), []
    for name in config["solvers"]:
        result = done[name]
        threshold = 0.95 if config["solvers"][name]["solver"] == "squared-cg" else None
        found += [
            Gate(f"spearman with the exact solve, {name}", result["spearman"], threshold=threshold),
            correlation(f"pearson with the truth, {name}", np.array(result["predicted"]), truth),
            correlation(f"pearson with the truth, {name}, exact", np.array(result["exact"]), truth),
        ]
    return found


EXPERIMENT = Experiment(
    name="multistage.solvers",
    claim="Solvers that need products alone rank pretraining images as whole matrices do (MNIST)",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
)
