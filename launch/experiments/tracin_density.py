"""tracin.density: do examples in sparse regions influence themselves more? (Pruthi et al. 2020, figure 10b: housing)

The paper shows on a map of California that homes of high self-influence lie where the data are sparse. Here: the diabetes
data of Efron et al. 2004, ten measurements of 442 patients; an MLP regresses the progression of the disease. A patient's
density is the inverse of the mean distance to the ten nearest other patients, all measurements standardised; the
self-influence is TracInCP's, Σ_i η ‖∇ℓ(w_i, z)‖² over three checkpoints, from exact norms. A cell is one seed: its own
initial weights and order. Beside it the loss, which grows with the residual alone, and the gradient norm of the output,
which knows no target: self-influence is four times the loss times its square.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

from engine.batches import Batch
from engine.checkpoint_choice import choose_checkpoints
from engine.counters import derive_key
from engine.gradients import PerExampleGradients
from engine.metrics import bootstrap_interval
from engine.models import ready_for_scoring
from engine.parameters import select_parameters
from engine.projection import Projection
from engine.projectors import make_projector
from engine.training import TrainSettings, train
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import ROOT

NEIGHBOURS, CHECKPOINTS = 10, 3
SCORES = {"self_influence": "self-influence", "loss": "training loss", "output": "gradient norm of the output"}
CPU = torch.device("cpu")
Loss = Callable[[nn.Module, Batch], Tensor]


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Train, choose three checkpoints and return every patient's scores, summed over them."""
    data, seed, rate = patients(config), int(cell.removeprefix("seed-")), config["train"]["learning_rate"]
    torch.manual_seed(derive_key(seed, "weights") % 2**31)
    model = mlp(config)
    settings = TrainSettings(**config["train"], optimizer="sgd", checkpoints=config["train"]["epochs"], seed=seed)
    states, losses = [], []
    for step in train(model, squared_error, lambda rows: pick(data, rows), list(range(len(data))), settings):
        if step.checkpoint:
            states.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
            losses.append(float(squared_error(model, data).detach().mean()))
    chosen = [i for i, verdict in enumerate(choose_checkpoints(losses, CHECKPOINTS)) if verdict.kept]
    scores = {name: np.zeros(len(data)) for name in SCORES}
    for i in chosen:
        model.load_state_dict(states[i])
        squares, here = squared_norms(model, squared_error, data)
        scores["self_influence"] += rate * squares
        scores["loss"] += here
        scores["output"] += squared_norms(model, output, data)[0]
    return {
        "epochs": [i + 1 for i in chosen],
        "explained": 1 - losses[-1] / float(data["y"].var(correction=0)),
        "scores": {name: [float(f"{x:.5g}") for x in values] for name, values in scores.items()},
    }


def patients(config: dict[str, Any]) -> Batch:
    """Return measurements [n, 10] and progression [n], each standardised over the patients."""
    table = np.loadtxt(ROOT / config["data"], delimiter=",", skiprows=1)[: config["rows"]]
    table = (table - table.mean(0)) / table.std(0)
    rows = torch.from_numpy(table).float()
    return Batch(torch.arange(len(rows)), {"x": rows[:, :-1], "y": rows[:, -1]})


def pick(data: Batch, rows: list[int]) -> Batch:
    return Batch(data.ids[rows], {name: tensor[rows] for name, tensor in data.tensors.items()})


def mlp(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(10, config["width"]), nn.ReLU(), nn.Linear(config["width"], 1))


def output(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).squeeze(1)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return (output(model, batch) - batch["y"]).square()


def squared_norms(model: nn.Module, of: Loss, data: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return ‖∇‖² over all parameters of what `of` gives for each patient, and its values, float64 [n] each."""
    frozen = ready_for_scoring(model, CPU, torch.float32)
    parameters = select_parameters(frozen, ["*"])
    projector = make_projector(parameters, Projection(), CPU, torch.float32)
    with PerExampleGradients(frozen, parameters, projector, norms=True) as gradients:
        found = gradients(of, data)
    assert found.norms is not None
    return found.norms.double().square().sum(1).numpy(), found.losses.numpy()


def density(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Return [n]: the inverse of each point's mean distance to its nearest other points."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return 1 / np.sort(distances, axis=1)[:, 1 : neighbours + 1].mean(1)  # the first is the point itself


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the upper end of the interval of self-influence; report the other scores and the share of variance explained.

    Each figure is the mean over seeds of the rank correlation with the density; intervals resample the patients.
    """
    dense = density(patients(config)["x"].double().numpy(), NEIGHBOURS)
    found = []
    for name, label in SCORES.items():
        scores = np.array([result["scores"][name] for result in done.values()])
        value, interval = mean_spearman(scores, dense)
        if name == "self_influence":
            found.append(Gate("Spearman with density, upper end", interval[1], interval, 0.0, at_least=False))
        found.append(Gate(f"Spearman with density, {label}", value, interval))
    explained = np.array([result["explained"] for result in done.values()])
    return [*found, Gate("variance explained in training", float(explained.mean()), bootstrap_interval(explained))]


def mean_spearman(scores: np.ndarray, dense: np.ndarray, draws: int = 2000) -> tuple[float, tuple[float, float]]:
    """Return the mean over rows of scores [seeds, n] of Spearman's ρ with the density, and its 95 % interval."""

    def rho(rows: np.ndarray) -> np.ndarray:  # [draws, n] -> [draws]
        ranks = [stats.zscore(stats.rankdata(values[rows], axis=1), axis=1) for values in (dense, *scores)]
        return np.mean([(ranks[0] * own).mean(1) for own in ranks[1:]], axis=0)

    n = len(dense)
    low, high = np.quantile(rho(np.random.default_rng(0).integers(0, n, (draws, n))), [0.025, 0.975])
    return float(rho(np.arange(n)[None])[0]), (float(low), float(high))


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw every patient's self-influence, mean over the seeds, against density, with the medians of ten equal groups."""
    dense = density(patients(config)["x"].double().numpy(), NEIGHBOURS)
    scores = np.array([result["scores"]["self_influence"] for result in done.values()])
    own, (rho, (low, high)) = scores.mean(0), mean_spearman(scores, dense)
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(dense, own, s=12, color="#0b6e4f", alpha=0.45, linewidths=0)
    groups = np.array_split(np.argsort(dense), 10)
    middles = [[np.median(values[rows]) for rows in groups] for values in (dense, own)]
    axes.plot(*middles, color="#c8553d", marker="o", markersize=4)
    axes.text(middles[0][-1], middles[1][-1], "  median of\n  each tenth", color="#c8553d", fontsize=9, va="center")
    axes.set_yscale("log")
    axes.set(xlabel=f"density: 1 / mean distance to the {NEIGHBOURS} nearest patients", ylabel="self-influence")
    title = f"Spearman {rho:.2f} ({low:.2f} to {high:.2f}), {len(dense)} patients, {len(done)} seeds"
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "density", dpi=150)


EXPERIMENT = Experiment(
    name="tracin.density",
    claim="Examples in sparse regions influence themselves more: 442 diabetes patients, self-influence against density",
    minutes=1,
    cells=cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
