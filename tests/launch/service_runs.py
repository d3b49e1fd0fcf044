"""A client of the service over runs, and copies of a run as it stood in the middle of its job."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from launch.service.app import Settings, create_app


@contextmanager
def asking(*runs: str | Path, **settings: Any) -> Iterator[TestClient]:
    """Give a client of an application over these runs; an error of ours is answered, not raised."""
    given = {"hosts": ("localhost",)} | settings
    app = create_app(Settings([str(run) for run in runs], **given))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


def half_done(run: Path, target: Path, label: str = "first", shards: int = 1) -> Path:
    """Copy a run as it stood when so many shards of a label were scored, and nothing of another label was."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "index")
    for stage in (target / "stages").glob("score-*.json"):
        if stage.name != f"score-{label}.json":
            stage.unlink()
    units = sorted((target / "journal" / f"score-{label}").iterdir())
    for unit in units[shards:]:
        shutil.rmtree(unit)
    return target
