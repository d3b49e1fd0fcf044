"""The experiments and benchmarks that launch/validate.py can run, each in a file of its own.

An experiment is a list of cells (the smallest piece that is worth resuming) and a summary of the cells' results as gates.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from engine.models import import_path


@dataclass(frozen=True)
class Gate:
    """One figure with what is asked of it; `threshold` None: reported only."""

    name: str
    value: float
    ci: tuple[float, float] | None = None  # 95 %
    threshold: float | None = None
    at_least: bool = True
    paper: float | None = None
    timed: bool = False  # a timing: it fails only if its whole interval lies on the wrong side

    def record(self) -> dict[str, Any]:
        """Return the gate as `--json` prints it; `pass` is None where nothing is asked."""
        passed = None
        if self.threshold is not None:
            low, high = self.ci if self.timed and self.ci else (self.value, self.value)
            passed = high >= self.threshold if self.at_least else low <= self.threshold
        return {**asdict(self), "pass": passed}


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file exports under the name EXPERIMENT."""

    name: str
    claim: str  # one line: what it shows
    minutes: float  # about, at full size on 2 cores
    cells: Callable[[dict[str, Any]], list[str]]  # config -> names
    run: Callable[[dict[str, Any], str], dict[str, Any]]  # config, cell -> small JSON
    gates: Callable[[dict[str, Any], dict[str, dict[str, Any]]], list[Gate]]  # config, results by cell -> gates
    plot: Callable[[dict[str, Any], dict[str, dict[str, Any]], str], None] | None = None  # …, folder


EXPERIMENTS = {
    "tracin.mislabel": "launch.experiments.tracin_mislabel:EXPERIMENT",
    "tracin.first-order": "launch.experiments.tracin_first_order:EXPERIMENT",
    "tracin.checkpoints": "launch.experiments.tracin_checkpoints:EXPERIMENT",
    "tracin.density": "launch.experiments.tracin_density:EXPERIMENT",
    "tracin.proponents": "launch.experiments.tracin_proponents:EXPERIMENT",
    "tracin.neighbours": "launch.experiments.tracin_neighbours:EXPERIMENT",
    "tracin.projection": "launch.experiments.tracin_projection:EXPERIMENT",
    "influence.loo": "launch.experiments.influence_loo:EXPERIMENT",
    "influence.solvers": "launch.experiments.influence_solvers:EXPERIMENT",
    "influence.scaling": "launch.experiments.influence_scaling:EXPERIMENT",
    "influence.sketch": "launch.experiments.influence_sketch:EXPERIMENT",
    "fastif.recall": "launch.experiments.fastif_recall:EXPERIMENT",
    "fastif.correlation": "launch.experiments.fastif_correlation:EXPERIMENT",
    "multistage.ridge": "launch.experiments.multistage_ridge:EXPERIMENT",
    "multistage.fixed": "launch.experiments.multistage_fixed:EXPERIMENT",
    "fastif.speed": "launch.experiments.fastif_speed:EXPERIMENT",
    "fastif.speed-quality": "launch.experiments.fastif_quality:EXPERIMENT",
    "fastif.removal": "launch.experiments.fastif_removal:EXPERIMENT",
    "fastif.graph": "launch.experiments.fastif_graph:EXPERIMENT",
    "multistage.identity": "launch.experiments.multistage_identity:EXPERIMENT",
    "multistage.updated": "launch.experiments.multistage_updated:EXPERIMENT",
    "multistage.solvers": "launch.experiments.multistage_solvers:EXPERIMENT",
    "fastif.simulatability": "launch.experiments.fastif_simulatability:EXPERIMENT",
    "multistage.similarity": "launch.experiments.multistage_similarity:EXPERIMENT",
    "multistage.amount": "launch.experiments.multistage_amount:EXPERIMENT",
    "multistage.cleansing": "launch.experiments.multistage_cleansing:EXPERIMENT",
    "fastif.correction": "launch.experiments.fastif_correction:EXPERIMENT",
    "multistage.nlp": "launch.experiments.multistage_nlp:EXPERIMENT",
    "representer.logits": "launch.experiments.representer_logits:EXPERIMENT",
    "turnover.cnn": "launch.experiments.turnover_cnn:EXPERIMENT",
    "turnover.speed": "launch.experiments.turnover_speed:EXPERIMENT",
    "turnover.accuracy": "launch.experiments.turnover_accuracy:EXPERIMENT",
    "turnover.learning-curves": "launch.experiments.turnover_curves:EXPERIMENT",
    "turnover.self-influence": "launch.experiments.turnover_self:EXPERIMENT",
    "turnover.cleansing-noise": "launch.experiments.turnover_noise:EXPERIMENT",
    "turnover.loo": "launch.experiments.turnover_loo:EXPERIMENT",
    "turnover.cleansing": "launch.experiments.turnover_cleansing:EXPERIMENT",
    "turnover.errors": "launch.experiments.turnover_errors:EXPERIMENT",
    "turnover.many-class": "launch.experiments.turnover_classes:EXPERIMENT",
    "turnover.all-layers": "launch.experiments.turnover_layers:EXPERIMENT",
    "multistage.speed": "launch.experiments.multistage_speed:EXPERIMENT",
    "collect": "launch.experiments.collect:EXPERIMENT",
    "api-fuzz": "launch.experiments.api_fuzz:EXPERIMENT",
    "service": "launch.experiments.service:EXPERIMENT",
    "plan": "launch.experiments.plan:EXPERIMENT",
    "scale": "launch.experiments.scale:EXPERIMENT",
    "chaos": "launch.experiments.chaos:EXPERIMENT",
}


def load_experiment(name: str) -> Experiment:
    """Return the named experiment. Raises ValueError naming those there are."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is not known: one of {', '.join(EXPERIMENTS)}, or all")
    return import_path(EXPERIMENTS[name])
