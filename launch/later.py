"""A new query under scores that cannot answer it at once: what that will take, and the job of its own that answers it.

    <run>/jobs/<id>/asked.jsonl    the queries
    <run>/jobs/<id>/…              the job's own run, which reads corpus and store of the outer one
The id is a hash of what is asked: asking the same again finds the same job, and takes up one that stopped.
"""

import hashlib
import json
from typing import Any

from actors.progress import duration
from launch.config import make_config
from launch.job import score
from launch.messages import tell
from launch.online import Answer, Setting, with_labels
from launch.run import Run
from launch.stage_records import unit_seconds
from storage.index import SIDES
from storage.locations import Location

QUERIES = "asked"  # name of a job's query set
_STAGES = ("prepare", "compute", "score")  # of a scoring, beside its solve


def answer_later(run: Run, setting: Setting, record: dict[str, Any], labels: list[Any] | None, k: int) -> Answer:
    """Return the proponents and opponents of a new record, scored by a job as the stored queries were."""
    [record] = with_labels(setting, [record], labels)
    scores = setting.score.label
    place = run.location.child("jobs", job_id(scores, [record]))
    place.create("asked.jsonl", (json.dumps(record) + "\n").encode())
    score(make_config(job_config(run.location, scores, place)), tell)
    done = Run.open(place.uri).top(0, k=k, scores=scores).to_pylist()
    shown = ("id", "score", "source_id", "label", "snippet")
    proponents, opponents = (
        [{name: row[name] for name in shown} for row in done if row["side"] == side] for side in SIDES
    )
    return Answer(record, proponents, opponents)


def refuse_unasked(run: Run, setting: Setting) -> None:
    """Raise ValueError saying how long a job for a new query will take, and how to start it."""
    seconds = predicted_seconds(run.location, setting.score.label)
    known = "" if seconds is None else f", up to {duration(seconds)} on one worker by what the stored ones took"
    raise ValueError(
        f"scores {setting.score.label} cannot answer a new query at once: it takes a job of its own{known}. Start it with "
        f"--yes, or put more queries into a set and run score.py."
    )


def predicted_seconds(run: Location, scores: str) -> float | None:
    """Return the most that one more query takes one worker, by the units of the stored ones; None if nothing is noted.

    A solve counts with its λ_max and its first block of queries, all else as it was: a pass over the examples takes about
    as long for one query as for a few.
    """
    own = [unit_seconds(run, f"{stage}-{scores}", "") for stage in _STAGES]
    solve = [unit_seconds(run, f"solve-{scores}", unit) for unit in ("largest", "scale", "block-000000")]
    units = unit_seconds(run, f"lissa-{scores}", "block-000000-")
    total = sum([*own, *solve, units])
    return total if total > 0 else None


def job_id(scores: str, rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([scores, rows]).encode()).hexdigest()[:16]


def job_config(run: Location, scores: str, place: Location) -> dict[str, Any]:
    """Return the config that scores new queries exactly as the stored ones of these scores were."""
    record = run.read_json(f"stages/score-{scores}.json")
    home = Location.parse(record["home"]) if record["home"] else run
    model, gradients = record["model"], record["gradients"]
    checkpoints = [run.read_json(key) for key in run.list("checkpoints")]
    kept = {"shard_rows": record["shard_rows"]}
    if record["stored"]:
        settings = home.read_json("gradients/store.json")
        kept |= {"dtype": settings["dtype"], "compression": settings["compression"]}
    return {
        "run": {"uri": place.uri, "store": home.uri, "seed": gradients["projection"]["seed"]},
        "task": {"name": model["task"], "settings": model["task_settings"]},
        "checkpoints": {
            "path": [
                {"path": c["uri"], "step": c["step"]}
                | ({} if c["learning_rate"] is None else {"learning_rate": c["learning_rate"]})
                for c in sorted(checkpoints, key=lambda c: c["step"])
            ]
        },
        "corpus": home.uri,  # not read: the rows of the store's run are scored
        "queries": {"name": QUERIES, "path": f"{place.uri}/asked.jsonl"},
        "gradients": {
            "modules": gradients["parameters"], "projection": gradients["projection"]["kind"],
            "dim": gradients["projection"]["dim"], "store": record["stored"], "compute": model["compute"],
            "norms": gradients["norms"], "attention": model["attention"], "token_budget": gradients["token_budget"],
            "coverage": 0, **kept,
        },
        "method": {"name": record["method"], **record["method_settings"]},
        "cluster": {"backend": "in-process"},
        "output": {"top_k": record["top_k"], "label": scores},
    }  # fmt: skip
