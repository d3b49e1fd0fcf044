"""What every scoring declares before its stages: which scores these are, and under which label they stand."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from actors.specs import GradientSpec, ScoreSpec, declare_stage, digest
from engine.methods.contract import load_method
from launch.sources import TRAIN
from storage.corpus import Corpus

if TYPE_CHECKING:
    from launch.job import Job


def declare_scores(job: Job, gradients: GradientSpec, corpus: Corpus, rows: int, stored: bool) -> ScoreSpec:
    """Write the record of the scores that the config asks for, or compare it with the one that is there.

    `rows`: of a shard; `stored`: whether scoring reads what an earlier stage keeps in the run.
    """
    config = job.config
    assert config.queries is not None
    method = load_method(config.method.name, config.method.settings())
    what: dict[str, Any] = {
        "method": config.method.name, "method_settings": config.method.settings(),
        "checkpoints": tuple(job.model.checkpoints[i].name for i in method.checkpoints(len(job.model.checkpoints))),
        "queries": config.queries.name, "corpus": TRAIN, "home": config.run.store, "stored": stored,
        "top_k": config.output.top_k, "dense": config.output.dense,
    }  # fmt: skip
    record = what | {
        "gradients": asdict(gradients), "model": job.model.record(), "shard_rows": rows,
        "home_fingerprint": corpus.fingerprint if config.run.store else None,
    }  # fmt: skip
    if sum(segment.ends for segment in corpus.segments) > 1:  # it has grown: these scores are others than those before
        record["examples"] = corpus.rows
    label = config.output.label or f"{config.method.name}-{config.queries.name}-{digest(record)[:6]}"
    declare_stage(job.run, f"score-{label}", record, "another output.label")
    return ScoreSpec(label=label, **what)
