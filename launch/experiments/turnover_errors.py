"""turnover.errors: which training reviews taught a mistake? (Kobayashi et al. 2020, section 4.3, figures 3 to 5)

For every misclassified test review the training reviews that have the wrong label, ranked by their influence on the wrong
prediction: L(f^m̃(z), q) − L(f^m(z), q) with the wrong label as q's, averaged over the trainings with masks of
turnover.accuracy. That the first ones share the wrong label holds by construction; the test is whether they are nearer to the
review than training reviews of that label are on average, by the cosine of MiniLM's own sentence vectors. A cell is a seed's
scores, the last one their mean.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.metrics import bootstrap_interval
from launch.experiments.kept import kept
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, logits_of
from launch.experiments.turnover_subject import influences, pretrained, read_texts, trained

SHOWN = 5  # training examples of a mistake


def cells(config: dict[str, Any]) -> list[str]:
    return [*(f"seed-{seed}" for seed in config["seeds"]), "mistakes"]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the mistakes with their first training reviews; of a seed's cell how large its scores are."""
    if cell == "mistakes":
        return {"mistakes": explained(config, config["movie"])}
    return {"spread": spread(scores_of(config, config["movie"], int(cell.removeprefix("seed-"))))}


def spread(scores: Tensor) -> float:
    return float(scores[~scores.isnan()].std())


def mistakes(config: dict[str, Any], source: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the first test examples that the networks' mean prediction gets wrong, and what it says instead.

    Only those are taken whose wrong label enough training examples have.
    """
    parts = read_texts(config["network"], source).parts
    networks = [trained(config, source, True, config["rows"], seed) for seed in config["seeds"]]
    said = torch.stack([logits_of(one.model, parts["test"]).softmax(1) for one in networks]).mean(0).argmax(1)
    many = (
        torch.bincount(parts["train"].labels[: config["rows"]], minlength=int(said.max()) + 1) >= config["candidates"]
    )
    wrong = ((said != parts["test"].labels) & many[said]).nonzero()[:, 0][: config["mistakes"]]
    return wrong, said[wrong]


def scores_of(config: dict[str, Any], source: dict[str, Any], seed: int) -> Tensor:
    """Return the influence on every mistake's wrong prediction under one seed, [n, Q]; NaN for other labels' examples."""
    parts = read_texts(config["network"], source).parts
    own = parts["train"].labels[: config["rows"]]

    def make() -> dict[str, Tensor]:
        network = trained(config, source, True, config["rows"], seed)
        wrong, said = mistakes(config, source)
        found = torch.full((len(own), len(wrong)), torch.nan, dtype=torch.float64)
        for label in said.unique():
            ids, here = (own == label).nonzero()[:, 0], (said == label).nonzero()[:, 0]
            asked = Part(parts["test"].take(wrong[here]).inputs, said[here])
            found[ids[:, None], here] = influences(network, ids, asked)
        return {"scores": found}

    given = {key: config[key] for key in ("network", "train", "rows", "seeds", "mistakes", "candidates")}
    return kept("turnover-errors", [given, source, seed], make)["scores"]


def explained(config: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every mistake with its first training examples and how near they are to it."""
    texts = read_texts(config["network"], source)
    scores = torch.stack([scores_of(config, source, seed) for seed in config["seeds"]]).mean(0)
    train = sentence_vectors(config, texts.parts["train"].take(torch.arange(config["rows"])))
    wrong, said = mistakes(config, source)
    test = sentence_vectors(config, texts.parts["test"].take(wrong))
    found = []
    for column, (place, label) in enumerate(zip(wrong.tolist(), said.tolist(), strict=True)):
        ids = (~scores[:, column].isnan()).nonzero()[:, 0]
        near = train[ids] @ test[column]
        order = scores[ids, column].argsort(descending=True, stable=True)
        record = texts.records["test"][place]
        found.append({
            "text": record["text"], "label": record["label"], "said": texts.classes[label],
            "near": {name: float(near[rows].mean()) for name, rows in
                     {"first": order[:SHOWN], "last": order[-SHOWN:], "all": order}.items()},
            "first": [[float(f"{scores[i, column]:.4g}"), texts.records["train"][i]["text"]]
                      for i in ids[order[:SHOWN]].tolist()],
        })  # fmt: skip
    return found


def sentence_vectors(config: dict[str, Any], part: Part) -> Tensor:
    """Return the pretrained encoder's output averaged over an example's tokens, of length 1, float32 [n, H]."""
    encoder: Any = pretrained(config["network"]).bert
    found = torch.empty(len(part.labels), encoder.config.hidden_size)
    with torch.inference_mode():
        for batch in part.batches():
            states = encoder(inputs_embeds=batch["x"], attention_mask=batch["mask"]).last_hidden_state
            found[batch.ids] = (states * batch["mask"][:, :, None]).sum(1)
    return F.normalize(found, dim=1)


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    return gates_of(done["mistakes"]["mistakes"])


def gates_of(found: list[dict[str, Any]]) -> list[Gate]:
    """Judge whether the first examples are nearer than their label's on average (Wilcoxon, one-sided, over mistakes)."""
    first, last, others = (np.array([one["near"][name] for one in found]) for name in ("first", "last", "all"))

    def over_mistakes(name: str, values: np.ndarray) -> Gate:
        return Gate(name, float(values.mean()), bootstrap_interval(values))

    return [
        Gate(f"first {SHOWN} nearer than their label's on average, p",
             float(stats.wilcoxon(first - others, alternative="greater").pvalue), threshold=0.05, at_least=False),
        over_mistakes(f"cosine, first {SHOWN} less their label's mean", first - others),
        over_mistakes(f"cosine, last {SHOWN} less their label's mean", last - others),
        over_mistakes("cosine, their label's mean", others),
        Gate("mistakes", len(found)),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    draw(done["mistakes"]["mistakes"], folder, lambda label: "positive" if label else "negative")


def draw(found: list[dict[str, Any]], folder: str, name: Callable[[Any], str]) -> None:
    """Draw how near the first examples are to each mistake, and write them down beside it."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    others, first = (np.array([one["near"][kind] for one in found]) for kind in ("all", "first"))
    order = np.argsort(others)
    axes.vlines(np.arange(len(found)), others[order], first[order], color="#bbbbbb", linewidth=1)
    axes.plot(first[order], "o", color="#c8553d", markersize=4, label=f"{SHOWN} with the highest influence on it")
    axes.plot(others[order], "o", color="#888888", markersize=4, label="all of the same, wrong label")
    axes.set(xlabel="mistakes", ylabel="mean cosine to the mistake")
    axes.set_title("training examples that taught a mistake", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save(figure, folder, "errors")
    lines = ["# Mistakes and the training examples of the wrong label with the highest influence on them", ""]
    for one in found:
        lines += [f"**{json.dumps(one['text'])}** is {name(one['label'])}, taken for {name(one['said'])}", ""]
        lines += [*(f"- {score:+.3f} {json.dumps(text)}" for score, text in one["first"]), ""]
    (Path(folder) / "errors.md").write_text("\n".join(lines))


EXPERIMENT = Experiment(
    name="turnover.errors",
    claim="The training reviews that taught a mistake are nearer to it than others of the same, wrong label",
    minutes=15,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
