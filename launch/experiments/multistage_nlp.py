"""multistage.nlp: which sentences of a language model's pretraining move a review's rating? (Chen et al. 2020, section 4.5)

A small masked language model is pretrained on WordNet's glosses; its embedding stays, and pooler and classifier are fitted
to movie reviews. The job itself then scores every gloss for a few test reviews, Hessians on 1,000 sampled examples of either
stage as in the paper. Printed are the most and least influential glosses. Similarity: MiniLM's cosine between the review and
the 20 glosses of largest |I|, against the 20 of smallest (Mann-Whitney over all reviews).
"""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from actors.context import cache_folder
from actors.score import load_scores
from actors.specs import digest
from engine.metrics import bootstrap_interval
from launch.config import make_config
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import ROOT, token_states
from launch.job import score
from launch.run import Run
from launch.train import train_model
from storage.corpus import Corpus
from storage.journal import Journal
from storage.locations import Location

LABEL, COMPARED, SHOWN = "scores", 20, 3
PAPER_SECONDS = 0.94


def cells(config: dict[str, Any]) -> list[str]:
    return ["stages", "scores"]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Train both stages, or score and compare. What is trained lies on this machine between cells."""
    folder = work_folder(digest(config), config["kept"])
    said = [line for stage in ("pretrain", "finetune") for line in trained(config, folder, stage)]
    if cell == "scores":
        return compare(config, folder)
    model = BertForMaskedLM.from_pretrained(last_checkpoint(folder / "pretrain"))
    return {"said": said, "weights": sum(weight.numel() for weight in model.parameters())}


def trained(config: dict[str, Any], folder: Path, stage: str) -> list[str]:
    """Train a stage unless its checkpoint is there, and return what training said."""
    said: list[str] = []
    if not (folder / "base/config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(Location.parse(config["tokenizer"]).fetch(folder / "cache"))
        BertForMaskedLM(BertConfig(**config["shape"])).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    if not any(folder.glob(f"{stage}/checkpoint-*/trainer_state.json")):
        train_model(make_config(stage_config(config, folder, stage)), said.append)
    return said


def stage_config(config: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Return the job's config of one stage's training."""
    stage = config[name]
    base = folder / "base" if name == "pretrain" else last_checkpoint(folder / "pretrain")
    return {
        "run": str(folder / "run"), "task": stage["task"], "checkpoints": str(folder / name),
        "corpus": {"path": str(ROOT / stage["corpus"]), "limit": stage["rows"]},
        "train": stage["train"] | {"base": str(base), "checkpoints": 1},
    }  # fmt: skip


def job_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config of multi-stage influence over both stages."""
    first, second = config["pretrain"], config["finetune"]
    return {
        "run": str(folder / "run"), "task": second["task"], "checkpoints": str(last_checkpoint(folder / "finetune")),
        "corpus": {"path": str(ROOT / second["corpus"]), "limit": second["rows"]},
        "queries": {"name": "asked", "path": str(ROOT / config["queries"]), "limit": config["asked"]},
        "pretrain": {
            "task": first["task"], "checkpoints": str(last_checkpoint(folder / "pretrain")),
            "corpus": {"path": str(ROOT / first["corpus"]), "limit": first["rows"]},
            "shared": {"bert.embeddings.*": "bert.embeddings.*", "bert.encoder.*": "bert.encoder.*"},
        },
        "gradients": {"projection": "none", "store": False, "norms": False, "coverage": 0},
        "method": {"name": "multistage"} | config["method"],
        "cluster": {"backend": "in-process"}, "output": {"label": LABEL, "top_k": SHOWN, "dense": True},
    }  # fmt: skip


def compare(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Score all glosses for the reviews; return what they say, their similarity and the seconds of one gloss."""
    score(make_config(job_config(config, folder)), lambda _: None)
    run = Run.open(str(folder / "run"))
    keys = run.location.list(f"scores/{LABEL}/shards")
    scores = np.concatenate([load_scores(run.location, key).dense for key in keys])
    glosses, reviews = (texts(run.location, name) for name in ("pretrain", "asked"))
    figures, found = run.index().meta["solve"], []
    for query, review in enumerate(reviews):
        order = np.argsort(-np.abs(scores[:, query]), kind="stable")
        top, bottom = order[:COMPARED], order[-COMPARED:]
        near = cosines(config["encoder"], review, [glosses[i] for i in (*top, *bottom)])
        found.append({
            "review": review, "most": [glosses[i] for i in top[:SHOWN]], "least": [glosses[i] for i in bottom[-SHOWN:]],
            "scores": scores[top[:SHOWN], query].tolist(), "top": near[: len(top)], "bottom": near[len(top) :],
        })  # fmt: skip
    return {
        "found": found,
        "seconds": seconds_of(run.location, f"compute-{LABEL}") / len(scores),
        "examples": len(scores),
        "residual": {stage: max(figures[stage]["residual"]) for stage in ("finetuning", "pretraining")},
    }


def seconds_of(run: Location, stage: str) -> float:
    """Return the seconds that a stage's units took, by their done-records."""
    return sum(record["seconds"] for record in Journal(run, stage).done().values())


def texts(run: Location, name: str) -> list[str]:
    """Return the texts of a set's examples in id order: a long gloss is several."""
    corpus = Corpus.open(run, name)
    return [row["text"] for segment in corpus.segments for row in corpus.read(segment, 0, segment.rows)]


def cosines(encoder: dict[str, Any], text: str, others: list[str]) -> list[float]:
    """Return how near others are to a text by MiniLM's mean output."""
    states = token_states(encoder["base"], None, (text, *others), encoder["max_tokens"])
    vectors = torch.nn.functional.normalize(torch.stack([tokens.mean(0) for tokens in states]), dim=1)
    return (vectors[1:] @ vectors[0]).tolist()


@lru_cache(maxsize=2)
def work_folder(name: str, kept: bool) -> Path:
    """Return where a config's models and run lie: kept for later cells, or gone with the machine's temporary files."""
    if not kept:
        return Path(tempfile.mkdtemp(prefix="multistage-nlp-"))
    folder = cache_folder() / f"multistage-nlp-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    result = done["scores"]
    top, bottom = (np.array([one[end] for one in result["found"]]) for end in ("top", "bottom"))
    gaps = top.mean(1) - bottom.mean(1)
    p = float(stats.mannwhitneyu(top.ravel(), bottom.ravel(), alternative="two-sided").pvalue)
    return [
        Gate("weights of the pretrained model", done["stages"]["weights"], threshold=config["least_weights"]),
        Gate("p, cosine of the 20 largest |I| against the 20 smallest", p, threshold=0.05, at_least=False),
        Gate("cosine, largest less smallest |I|", float(gaps.mean()), bootstrap_interval(gaps)),
        Gate("seconds per pretraining sentence", result["seconds"], paper=PAPER_SECONDS),
        *(Gate(f"residual, {stage}", value) for stage, value in result["residual"].items()),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Write the sentences as a page, and draw the cosines."""
    found = done["scores"]["found"]
    lines = ["# Glosses that move a review's loss most and least", ""]
    for one in found:
        lines += [f"**{one['review']}**", ""]
        pairs = zip(one["most"], one["scores"], strict=True)
        lines += (
            [f"- {value:+.3g}: {text}" for text, value in pairs] + [f"- least: {text}" for text in one["least"]] + [""]
        )
    (Path(folder) / "sentences.md").write_text("\n".join(lines))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.boxplot([np.concatenate([one[end] for one in found]) for end in ("top", "bottom")],
                 tick_labels=["largest |I|", "smallest |I|"])  # fmt: skip
    axes.set_ylabel("cosine with the review, MiniLM")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "cosine")


EXPERIMENT = Experiment(
    name="multistage.nlp",
    claim="Glosses that moved a review's rating through a masked language model's embedding",
    minutes=45,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
