"""Figures and pictures that the multi-stage experiments share: predicted against true, and how large influence is."""

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from launch.experiments.registry import Gate

COLOUR, OTHER = "#2f9470", "#c06a3a"
DRAWS = 2000
DIGITS = 9  # of a correlation


def sides(count: int) -> dict[str, slice]:
    """Return the two halves of a sample and the whole: largest |I| first, the random ones behind."""
    return {"50 of largest |I| and 50 others": slice(0, count), "the 50 others": slice(count // 2, count)}


def correlation(
    name: str, predicted: np.ndarray, truth: np.ndarray, threshold: float | None = None, at_least: bool = True,
    paper: float | None = None,
) -> Gate:  # fmt: skip
    """Return Pearson's r as a gate, its interval by resampling examples."""
    value = round(float(stats.pearsonr(predicted, truth).statistic), DIGITS)
    return Gate(name, value, interval(predicted, truth), threshold, at_least, paper)


def interval(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of Pearson's r over examples."""
    low, high = np.quantile(resampled(predicted, truth), [0.025, 0.975])
    return float(low), float(high)


def resampled(predicted: np.ndarray, truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return Pearson's r of every resampling of the examples, the same ones for one seed; 0 where nothing varies."""
    picks = np.random.default_rng(seed).integers(0, len(truth), (DRAWS, len(truth)))
    a, b = (values[picks] - values[picks].mean(1, keepdims=True) for values in (predicted, truth))
    r = (a * b).sum(1) / np.maximum(np.sqrt((a**2).sum(1) * (b**2).sum(1)), np.finfo(float).tiny)
    return np.round(r, DIGITS)


def two_figures(predicted: np.ndarray, truth: np.ndarray) -> list[Gate]:
    """Return what is reported beside r: rank correlation, r of the random half, and true change per predicted change."""
    random = sides(len(truth))["the 50 others"]
    slope = float(predicted[random] @ truth[random] / (predicted[random] @ predicted[random]))
    return [
        Gate("spearman", float(stats.spearmanr(predicted, truth).statistic)),
        correlation("pearson, random images", predicted[random], truth[random]),
        Gate("slope, random images", slope),
    ]


def scatter(axes: Axes, predicted: np.ndarray, truth: np.ndarray, title: str) -> None:
    """Draw predicted against true rises of the test loss."""
    axes.axline((0, 0), slope=1, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.scatter(predicted, truth, s=18, color=COLOUR, alpha=0.7, linewidth=0)
    axes.set(xlabel="predicted rise of the test loss when left out, −I/m", ylabel="true rise")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def histogram(axes: Axes, sets: dict[str, np.ndarray], xlabel: str) -> None:
    """Draw how influence is distributed in two settings."""
    low, high = np.quantile(np.concatenate(list(sets.values())), [0.01, 0.99]).tolist()
    bins = np.linspace(low, high, 60).tolist()
    for (name, values), colour in zip(sets.items(), (COLOUR, OTHER), strict=True):
        label = f"{name}: mean |I| {np.abs(values).mean():.3g}"
        axes.hist(values, bins=bins, color=colour, alpha=0.55, label=label)
    axes.set(xlabel=xlabel, ylabel="pretraining images")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def drop(name: str, better: np.ndarray, worse: np.ndarray, truth: np.ndarray, threshold: float, paper: float) -> Gate:
    """Return how much lower the second's Pearson r is than the first's, with its interval over examples."""
    low, high = np.quantile(resampled(better, truth) - resampled(worse, truth), [0.025, 0.975])
    value = stats.pearsonr(better, truth).statistic - stats.pearsonr(worse, truth).statistic
    return Gate(name, float(value), (float(low), float(high)), threshold, paper=paper)


def mean_ratio(
    name: str, above: np.ndarray, below: np.ndarray, threshold: float | None = None, at_least: bool = True,
    paper: float | None = None,
) -> Gate:  # fmt: skip
    """Return the ratio of two means over the same images, its interval by resampling the images."""
    picks = np.random.default_rng(0).integers(0, len(above), (DRAWS, len(above)))
    low, high = np.quantile(above[picks].mean(1) / below[picks].mean(1), [0.025, 0.975])
    return Gate(name, float(above.mean() / below.mean()), (float(low), float(high)), threshold, at_least, paper)
