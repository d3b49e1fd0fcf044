"""The config schema: every section and field with its default, unit and meaning, and the reading of YAML and overrides.

Unknown keys are refused naming the nearest valid one; values out of range say what is allowed. `cluster` and `output`
never change a number beyond the tolerance the README states.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.methods.contract import load_method
from engine.training import TrainSettings


class Section(BaseModel):
    """A part of the config. A plain text stands for the field named by `shorthand`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, str | list) and cls.shorthand:
            return {cls.shorthand: data}
        if not isinstance(data, dict):
            raise ValueError(f"is {data!r}, a mapping of settings is needed")
        for key in data:
            if cls.model_config["extra"] == "forbid" and key not in cls.model_fields:
                raise ValueError(_unknown(str(key), list(cls.model_fields)))
        return data


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r}. {meant}Allowed: {', '.join(known)}."


class RunSection(Section):
    """Where everything that the job produces is kept."""

    shorthand = "uri"
    uri: str = Field(description="folder or s3://bucket/prefix of the run")
    store: str | None = Field(None, description="run whose gradient store is scored against, if not this one")
    seed: int = Field(0, ge=0, description="seed of projections and samples")


class TaskSection(Section):
    """How examples become batches and losses."""

    shorthand = "name"
    name: str = Field(
        "text-classification",
        description="text-classification, causal-lm, image-classification, regression, or package.module:Class",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the task's class: fields, max_tokens, tokenizer, …"
    )


class CheckpointsSection(Section):
    """The model, at one or more moments of its training."""

    shorthand = "path"
    path: str | list[dict[str, Any]] | None = Field(
        None,
        description="Hugging Face Trainer output folder, model folder, or a list of {path, learning_rate, step}",
    )
    learning_rate: float | None = Field(None, gt=0, description="η for checkpoints whose folder does not say it")


class CorpusSection(Section):
    """The training data that is scored."""

    shorthand = "path"
    path: str = Field(
        description=".jsonl[.gz], .parquet, .txt[.gz], .npz, a Hugging Face dataset folder, a folder of these; "
        "local, package:NAME/path or s3://"
    )
    split: str | None = Field(None, description="split of a Hugging Face dataset folder")
    limit: int | None = Field(None, ge=1, description="rows: read only the first so many")


class QueriesSection(CorpusSection):
    """The predictions that are asked about."""

    name: str = Field("queries", pattern=r"^[A-Za-z0-9_.-]+$", description="name of this query set in the run")


class TrainSection(Section):
    """What launch/train.py does; without effect on scoring."""

    output: str | None = Field(None, description="folder for the checkpoints; default: checkpoints.path")
    base: str | None = Field(
        None, description="model folder to start from; none for a torch module made by its factory"
    )
    epochs: int = Field(3, ge=1, description="passes over the corpus")
    batch_size: int = Field(32, ge=1, description="examples a step")
    learning_rate: float = Field(1e-3, gt=0, description="η at the first step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd, without momentum")
    schedule: Literal["constant", "linear"] = Field("constant", description="constant, or linear to 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled (adamw) or L2 (sgd)")
    trainable: list[str] = Field(["*"], description="globs over parameter names")
    checkpoints: int = Field(3, ge=1, description="how many to leave, evenly over the steps")
    seed: int = Field(0, ge=0, description="seed of weights, dropout and order")

    def settings(self) -> TrainSettings:
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainSettings)}
        return TrainSettings(**shared | {"trainable": tuple(self.trainable)})


class GradientsSection(Section):
    """Which per-example gradients are taken, and how they are kept."""

    modules: list[str] | Literal["changed"] = Field(
        "changed", description="globs over module or parameter names; changed: what training moved"
    )
    projection: Literal["two-sided", "gaussian", "rademacher", "none"] = Field("two-sided", description="see README")
    dim: int = Field(16, ge=1, description="columns: per side for two-sided, in all for gaussian and rademacher")
    store: bool = Field(True, description="false: score from the corpus in one pass and keep no rows")
    compute: Literal["float32", "bfloat16"] = Field("float32", description="dtype of forward and backward")
    dtype: Literal["float16", "float32", "bfloat16"] = Field("float16", description="dtype of stored rows")
    compression: Literal["none", "blosc-lz4", "zstd"] = Field("none", description="of stored rows; saves about 6 %")
    norms: bool = Field(True, description="exact per-parameter norms: self-influence and cosine need them")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="attention implementation of transformers models")
    token_budget: int = Field(2048, ge=1, description="padded tokens a batch")
    shard_rows: int | None = Field(None, ge=1, description="rows a unit of work; default from bytes and tokens")
    coverage: int = Field(16, ge=0, description="examples that the coverage report samples; 0: none")


class MethodSection(Section):
    """The attribution method and its settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    shorthand = "name"
    name: str = Field("tracin", description="tracin, gradient-dot or gradient-cosine")

    def settings(self) -> dict[str, Any]:
        return {key: tuple(v) if isinstance(v, list) else v for key, v in (self.model_extra or {}).items()}

    @model_validator(mode="after")
    def _known_settings(self) -> "MethodSection":
        load_method(self.name, self.settings())
        return self


class ClusterSection(Section):
    """Where the work runs; never changes a result."""

    address: str | None = Field(None, description="Ray address; default: the job's own cluster, else a local one")
    workers: int | Literal["auto"] = Field("auto", description="auto: one per GPU, else one per core")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if the cluster has any")
    backend: Literal["ray", "in-process"] = Field(
        "ray", description="in-process: no Ray, one worker (notebooks, tests)"
    )
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="share of non-finite rows at which the run stops")


class OutputSection(Section):
    """What the index holds; never changes a score."""

    top_k: int = Field(100, ge=1, description="proponents and opponents kept per query")
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$", description="default <method>-<queries>-<hash>")
    dense: bool = Field(False, description="also keep every score, N × Q float32")
    neighbours: Literal["exact", "ivf", "sqfp16"] = Field(
        "exact", description="index for new queries (FAISS but exact)"
    )


class Config(Section):
    """A job: sections and their fields."""

    run: RunSection
    task: TaskSection = TaskSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    corpus: CorpusSection
    queries: QueriesSection | None = None
    train: TrainSection = TrainSection()
    gradients: GradientsSection = GradientsSection()
    method: MethodSection = MethodSection()
    cluster: ClusterSection = ClusterSection()
    output: OutputSection = OutputSection()


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Return the config of a YAML file with `section.key=value` overrides applied.

    Raises ValueError naming the key, the value seen and what is allowed; FileNotFoundError for a missing file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config {path} does not exist (looked in {Path.cwd()})")
    try:
        data = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"config {path} holds {type(data).__name__}: it must be a mapping of sections")
    for override in overrides or []:
        _apply(data, override)
    return make_config(data)


def make_config(data: dict[str, Any]) -> Config:
    """Return the checked config of a mapping. Raises ValueError with one line per mistake."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join(_describe(e) for e in error.errors())) from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) < 2:
        raise ValueError(f"override {override!r} is not allowed: write it as section.key=value")
    here = data
    for key in keys[:-1]:
        below = here.get(key)
        if isinstance(below, str) and here is data:
            section = Config.model_fields.get(key)
            shorthand = getattr(section.annotation, "shorthand", None) if section else None
            below = {shorthand: below} if shorthand else None
        here[key] = below if isinstance(below, dict) else {}
        here = here[key]
    here[keys[-1]] = yaml.safe_load(text)


def _describe(error: Any) -> str:
    """Return one mistake in the house form: key, value seen, what is allowed, the default."""
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("list[", "literal[", "function")))
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if error["type"] == "missing":
        return f"{where} is missing: it has no default"
    default = _default(where.split("."))
    return f"{where}={error['input']!r} is not allowed: {message}." + (
        f" The default is {default!r}." if default else ""
    )


def _default(keys: list[str]) -> Any:
    model: Any = Config
    for key in keys:
        field = getattr(model, "model_fields", {}).get(key)
        if field is None:
            return None
        model = field.default if isinstance(field.default, Section) else field.annotation
        if key == keys[-1]:
            return None if field.is_required() else field.get_default(call_default_factory=True)
    return None


def describe_config() -> str:
    """Return every section and field with default and meaning, as `--help` prints it."""
    lines = ["A config is YAML with these sections; any field can be set on the command line as section.key=value."]
    for name, section in Config.model_fields.items():
        kind = next(
            (a for a in getattr(section.annotation, "__args__", [section.annotation]) if a is not type(None)), None
        )
        assert isinstance(kind, type)
        lines += ["", f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}"]
        for key, field in kind.model_fields.items():  # type: ignore[attr-defined]
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            lines.append(f"  {key:<17} {field.description} [{default}]")
    return "\n".join(lines)
