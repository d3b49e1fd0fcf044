"""Which paths a job may use: inside a Ray job none that are relative, on several nodes none that a worker cannot see."""

import os
import secrets
from pathlib import Path

from actors.cluster import nodes_that_cannot_read
from actors.specs import FOLDERS, ModelSpec
from launch.config import Config, PretrainSection
from storage.locations import Location

# Ray sets this for the entrypoint of a submitted job
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def refuse_relative_paths(config: Config) -> None:
    """Inside a Ray job, raise ValueError for a relative path: the job's folder is temporary and its own."""
    if IN_RAY_JOB not in os.environ:
        return
    paths: dict[str, list[str | None]] = {"run.uri": [config.run.uri], "run.store": [config.run.store]}
    paths |= {"queries.path": [config.queries.path if config.queries else None]} | _read_by(config)
    if config.pretrain:
        paths |= {f"pretrain.{key}": values for key, values in _read_by(config.pretrain).items()}
    for key, values in paths.items():
        for path in values:
            if path and ":" not in path and not Path(path).is_absolute():
                raise ValueError(
                    f"{key}={path!r} is relative, which is not allowed inside a Ray job: its folder is temporary. "
                    f"Use an absolute path that every node sees, s3:// or package:NAME/path."
                )


def _read_by(stage: Config | PretrainSection) -> dict[str, list[str | None]]:
    """Return the paths that one stage's model and corpus are read from, by key."""
    path = stage.checkpoints.path
    listed = path if isinstance(path, list) else [path]
    found: dict[str, list[str | None]] = {
        "checkpoints.path": [str(c.get("path", "")) if isinstance(c, dict) else c for c in listed]
    }
    found |= {f"task.settings.{key}": [stage.task.settings.get(key)] for key in FOLDERS}
    return found | {"corpus.path": [stage.corpus.path]}


def refuse_unseen_paths(run: Location, models: list[ModelSpec], store: str | None = None) -> None:
    """On a cluster, raise ValueError if a node does not see the folder of the run, of `run.store` or of a checkpoint.

    Cost: a task per node and folder.
    """
    if not run.is_remote:
        refuse_unseen_folder(run, "run.uri")
    if store and not Location.parse(store).is_remote:
        _refuse(nodes_that_cannot_read([f"{Location.parse(store).uri}/manifest.json"]), f"run.store={store}")
    for checkpoint in (one for model in models for one in model.checkpoints):
        if not Location.parse(checkpoint.uri).is_remote:
            _refuse(nodes_that_cannot_read([checkpoint.uri]), f"checkpoint {checkpoint.uri}")


def refuse_unseen_folder(folder: Location, name: str) -> None:
    """Raise ValueError if a node does not read what this process writes there; `name`: the folder's in the config."""
    token = f".token-{secrets.token_hex(8)}"
    folder.create(token, b"seen")
    try:
        _refuse(nodes_that_cannot_read([f"{folder.uri}/{token}"]), f"{name}={folder.uri}")
    finally:
        folder.delete(token)


def _refuse(nodes: list[str], what: str) -> None:
    if nodes:
        raise ValueError(
            f"{what} is not there on {', '.join(nodes)}: with several nodes a local path must be on storage that all of "
            f"them mount. Use s3:// or a shared folder."
        )
