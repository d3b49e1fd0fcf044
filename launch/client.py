"""Ask a service from Python.

from launch.client import Client
service = Client("http://127.0.0.1:8000", token="…")
service.get("runs/demo/queries", misclassified=True)["rows"]
service.table("runs/demo/queries/17/influences", k=100)      # an Arrow table
service.attribute("demo", ["a new sentence"])
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx2
import pyarrow as pa

from launch.service.answers import ARROW

SHOWN = ("id", "score", "source_id", "label", "snippet")


class Client:
    """A connection to a service. Raises ValueError for what it refuses, OSError where it cannot answer."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 60.0) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx2.Client(base_url=f"{url.rstrip('/')}/v1/", headers=headers, timeout=timeout)

    def get(self, path: str, **arguments: Any) -> Any:
        """Return what a route under /v1 answers; arguments that are None are left out."""
        return self._ask("GET", path, arguments).json()

    def table(self, path: str, **arguments: Any) -> pa.Table:
        """Return the rows of a route that lists some."""
        answer = self._ask("GET", path, arguments, headers={"Accept": ARROW})
        return pa.ipc.open_stream(answer.content).read_all()

    def attribute(
        self, run: str, questions: Sequence[str | dict[str, Any]], labels: Sequence[Any] | None = None, k: int = 10,
        scores: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the answers to new texts or records, or the job that will have them (key `job`, see `get(url)`)."""
        kind = "texts" if all(isinstance(question, str) for question in questions) else "records"
        body = {kind: list(questions), "labels": None if labels is None else list(labels)}
        return self._ask("POST", f"runs/{quote(run, safe='')}/attribute", {"scores": scores, "k": k}, json=body).json()

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, arguments: dict[str, Any], **more: Any) -> httpx2.Response:
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            answer = self._http.request(method, path.removeprefix("/v1/"), params=given, **more)
        except httpx2.HTTPError as error:
            raise OSError(f"{self._http.base_url} does not answer: {error}. Is launch/serve.py running?") from error
        if answer.is_success:
            return answer
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = answer.reason_phrase
        raise (OSError if answer.status_code >= 500 else ValueError)(f"{answer.status_code}: {detail}")


def ask(
    service: Client, run: str, query: str | None, text: str | None, label: str | None, top: int, scores: str | None
) -> dict[str, Any]:
    """Return an answer in the form of `query.py --json`: a stored query by row or source:ID, or a new text.

    A stored query with a label is asked anew under that label (`predicted`: the model's own), as query.py does.
    """
    if (query is None) == (text is None):
        raise ValueError("give either --query (a stored query) or --text (a new one)")
    here = f"runs/{quote(run, safe='')}"
    stored = None if query is None else service.get(f"{here}/queries/{quote(query, safe=':')}", scores=scores)
    if stored is not None and label is None:
        found = service.get(f"{here}/queries/{stored['query']}/influences", k=top, scores=scores)
        sides = {
            f"{side}s": [_shown(r) for r in found["rows"] if r["side"] == side] for side in ("proponent", "opponent")
        }
        return {"query": stored, **_about(service, here, found), **sides}
    question: str | dict[str, Any] = str(text) if stored is None else stored
    labels = None if label in (None, "predicted") else [label]
    found = service.attribute(run, [question], labels, top, scores)
    if "job" in found:
        raise ValueError(f"scores of {run} take a job to answer: look at {found['url']}")
    answer = found["answers"][0]
    about = stored if stored is not None else {"id": None, "text": text}
    shown = about | {"label": answer["label"], "predicted": answer["prediction"]}
    return {"query": shown, **_about(service, here, found)} | {k: answer[k] for k in ("proponents", "opponents")}


def _about(service: Client, here: str, found: dict[str, Any]) -> dict[str, Any]:
    scores = next(s for s in service.get(here)["scores"] if s["label"] == found["scores"])
    return {"method": scores["method"], "score_unit": found["score_unit"], "scores": found["scores"]}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in SHOWN}
