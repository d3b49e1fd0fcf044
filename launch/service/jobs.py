"""Questions that take a job: new queries for scores whose method cannot answer at once.

    <run>/jobs/<id>/job.json       the scores asked, and the config of the job (launch/later.py)
    <run>/jobs/<id>/failed.json    why it failed, if it did

Asking the same again finds the same job, and takes up one that stopped. The work is done by a process of its own,
`python -m launch.service.jobs URI`, which outlives the service.
"""

import json
import re
import subprocess
import sys
import threading
from typing import Any

from launch.config import make_config
from launch.job import score
from launch.later import job_config, job_id
from launch.service.catalog import RunView
from launch.service.errors import Busy, NotFound
from storage.locations import Location

ID = re.compile(r"[0-9a-f]{16}")


class JobBoard:
    """Starts jobs, one process at a time, and reads their state from their folders."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None
        self._views: dict[str, RunView] = {}

    def submit(self, run: RunView, scores: str, records: list[str | dict[str, Any]], labels: list[Any] | None) -> str:
        """Store the queries, start the job unless it is done or at work, and return its id.

        Busy while another job of this service runs; ValueError for token ids, which a stored query set does not take.
        """
        rows = _rows(run, scores, records, labels)
        asked = "".join(json.dumps(row) + "\n" for row in rows).encode()
        job = job_id(scores, rows)
        place = run.location.child("jobs", job)
        with self._lock:
            if self._is_alive(job) or place.exists(f"index/{scores}/meta.json"):
                return job
            if self._running and self._running[1].poll() is None:
                raise Busy("a job is at work: ask again when it is done, or run launch/score.py with a query set")
            place.create("asked.jsonl", asked)
            place.create_json("job.json", {"scores": scores, "config": job_config(run.location, scores, place)})
            place.delete("failed.json")
            command = [sys.executable, "-m", "launch.service.jobs", place.uri]
            silent = subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent, start_new_session=True)
            self._running = (job, process)
        return job

    def state(self, run: RunView, job: str, k: int) -> dict[str, Any]:
        """Return state, progress and, once finished, at most k answers a side. NotFound for a job that is not there."""
        place = run.location.child("jobs", job)
        if not ID.fullmatch(job) or not place.exists("job.json"):
            raise NotFound(f"run {run.name} has no job {job!r}")
        view = self._views.setdefault(place.uri, RunView(job, place))
        found: dict[str, Any] = {"state": "waiting", "detail": None, "progress": view.progress(), "answers": None}
        if place.exists("failed.json"):
            found |= {"state": "failed", "detail": place.read_json("failed.json")["error"]}
        elif place.exists("index/" + (scores := place.read_json("job.json")["scores"]) + "/meta.json"):
            found |= {"state": "finished", "answers": answers(view, scores, k)}
        elif found["progress"]["state"] != "waiting" or not self._is_alive(job):
            found["state"] = "running" if self._is_alive(job) else found["progress"]["state"]
        return found

    def _is_alive(self, job: str) -> bool:
        return self._running is not None and self._running[0] == job and self._running[1].poll() is None


def answers(view: RunView, scores: str, k: int) -> list[dict[str, Any]]:
    """Return every query's prediction, label, proponents and opponents, as an answer at once has them."""
    found = []
    page = view.queries(scores, order="query", limit=sys.maxsize)
    for row in page.rows:
        sides: dict[str, list[dict[str, Any]]] = {"proponent": [], "opponent": []}
        for influence in view.influences(scores, row["query"], k):
            shown = ("id", "score", "source_id", "label", "snippet")
            sides[influence["side"]].append({name: influence[name] for name in shown})
        found.append(
            {
                "prediction": row["predicted"], "label": row["label"],
                "proponents": sides["proponent"], "opponents": sides["opponent"],
            }
        )  # fmt: skip
    return found


def _rows(
    run: RunView, scores: str, records: list[str | dict[str, Any]], labels: list[Any] | None
) -> list[dict[str, Any]]:
    """Return the queries as records of a query set."""
    fields = run.held.shown(scores)
    rows = []
    for number, record in enumerate(records):
        row = {fields.text: record} if isinstance(record, str) else dict(record)
        if "token_ids" in row:
            raise ValueError("token_ids are not allowed where the answer takes a job: send texts or records")
        if labels is not None and labels[number] is not None:
            row[fields.label] = labels[number]
        rows.append(row)
    return rows


def work(uri: str) -> None:
    """Do a job, and leave why it failed if it does."""
    place = Location.parse(uri)
    try:
        score(make_config(place.read_json("job.json")["config"]), lambda _: None)
    except Exception as error:
        place.replace("failed.json", json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise


if __name__ == "__main__":
    work(sys.argv[1])
