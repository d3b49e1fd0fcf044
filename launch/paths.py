"""Which paths a job may use: inside a Ray job none that are relative, on several nodes none that a worker cannot see."""

import os
import secrets
from pathlib import Path

from actors.cluster import nodes_that_cannot_read
from actors.specs import FOLDERS, ModelSpec
from launch.config import Config
from storage.locations import Location

# Ray sets this for the entrypoint of a submitted job
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def refuse_relative_paths(config: Config) -> None:
    """Inside a Ray job, raise ValueError for a relative path: the job's folder is temporary and its own."""
    if IN_RAY_JOB not in os.environ:
        return
    checkpoints = config.checkpoints.path
    listed: list[str | None] = (
        [c if isinstance(c, str) else str(c.get("path", "")) for c in checkpoints]
        if isinstance(checkpoints, list)
        else [checkpoints]
    )
    paths: dict[str, list[str | None]] = {
        "run.uri": [config.run.uri],
        "run.store": [config.run.store],
        "checkpoints.path": listed,
    }
    paths |= {f"task.settings.{key}": [config.task.settings.get(key)] for key in FOLDERS}
    paths |= {"corpus.path": [config.corpus.path], "queries.path": [config.queries.path if config.queries else None]}
    for key, values in paths.items():
        for path in values:
            if path and ":" not in path and not Path(path).is_absolute():
                raise ValueError(
                    f"{key}={path!r} is relative, which is not allowed inside a Ray job: its folder is temporary. "
                    f"Use an absolute path that every node sees, s3:// or package:NAME/path."
                )


def refuse_unseen_paths(run: Location, model: ModelSpec, store: str | None = None) -> None:
    """On a cluster, raise ValueError if a node does not see the folder of the run, of `run.store` or of a checkpoint.

    Cost: a task per node and folder.
    """
    if not run.is_remote:
        token = f".token-{secrets.token_hex(8)}"
        run.create(token, b"seen")
        try:
            _refuse(nodes_that_cannot_read([f"{run.uri}/{token}"]), f"run.uri={run.uri}")
        finally:
            run.delete(token)
    if store and not Location.parse(store).is_remote:
        _refuse(nodes_that_cannot_read([f"{Location.parse(store).uri}/manifest.json"]), f"run.store={store}")
    for checkpoint in model.checkpoints:
        if not Location.parse(checkpoint.uri).is_remote:
            _refuse(nodes_that_cannot_read([checkpoint.uri]), f"checkpoint {checkpoint.uri}")


def _refuse(nodes: list[str], what: str) -> None:
    if nodes:
        raise ValueError(
            f"{what} is not there on {', '.join(nodes)}: with several nodes a local path must be on storage that all of "
            f"them mount. Use s3:// or a shared folder."
        )
