"""The config schema: every section and field with its default, unit and meaning, and the reading of YAML and overrides.

Unknown keys are refused naming the nearest valid one; values out of range say what is allowed. `cluster` and `output`
never change a number beyond the tolerance the README states.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, PositiveInt, ValidationError, create_model, field_validator, model_validator

from engine.methods.contract import METHODS
from engine.models import import_path
from engine.tasks.contract import BUILT_IN
from engine.training import TrainSettings
from launch.sections import Section, explain, section_in, section_of, unknown_name
from launch.turnover_section import TurnOverSection

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of a folder in the run


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

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BUILT_IN and ":" not in name:
            raise ValueError(unknown_name(f"task.name={name!r}", name, [*BUILT_IN, "package.module:Class"]))
        return name


class CheckpointsSection(Section):
    """The model, at one or more moments of its training."""

    shorthand = "path"
    path: str | list[str | dict[str, Any]] | None = Field(
        None,
        description="Hugging Face Trainer output folder, model folder, or a list of {path, learning_rate, step}",
    )
    learning_rate: float | None = Field(None, gt=0, description="η for checkpoints whose folder does not say it")
    choose: int | None = Field(
        None, ge=1, description="keep so many, where the logged loss falls steadily (TracIn, appendix D); default: all"
    )


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

    name: str = Field("queries", pattern=NAME, description="name of this query set in the run")

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name in ("train", "pretrain"):
            raise ValueError(f"queries.name={name!r} is not allowed: the scored corpus has that name. Choose another.")
        return name


class MinimumSection(Section):
    """A training that ends at a minimum of its objective, as influence functions assume; all of it in float64."""

    gradient_norm: float = Field(gt=0, description="length of the objective's gradient at which it ends")
    l2: float = Field(0.0, ge=0, description="of ½ l2 ‖θ‖² in the objective, over the weights that train")
    steps: int = Field(500, ge=1, description="of L-BFGS in one round")
    rounds: int = Field(
        6, ge=1, description="with a new Hessian each, where at most 16,384 weights train; beyond: none is made"
    )


class TrainSection(Section):
    """What launch/train.py does; without effect on scoring."""

    output: str | None = Field(None, description="folder for the checkpoints; default: checkpoints.path")
    base: str | None = Field(
        None, description="model folder to start from; a torch module takes from it what has the same name and shape"
    )
    epochs: int = Field(3, ge=1, description="passes over the corpus")
    batch_size: int = Field(32, ge=1, description="examples a step, whatever the number of workers")
    workers: int = Field(
        1, ge=1, description="processes that train one model, each its share of every batch; above 1 through Ray Train"
    )
    learning_rate: float = Field(1e-3, gt=0, description="η at the first step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd, without momentum")
    schedule: Literal["constant", "linear"] = Field("constant", description="constant, or linear to 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled (adamw) or L2 (sgd)")
    trainable: list[str] = Field(["*"], description="globs over parameter names")
    checkpoints: int = Field(3, ge=1, description="how many to leave, evenly over the steps")
    seed: int = Field(0, ge=0, description="seed of weights, dropout, order and masks")
    minimum: MinimumSection | None = Field(
        None, description="after the epochs, on to a minimum over all examples: one more checkpoint; none: without"
    )
    turnover: TurnOverSection | None = Field(
        None, description="turn-over dropout, which method turnover asks; none: without"
    )

    @model_validator(mode="after")
    def _alone(self) -> "TrainSection":
        for name, value in (("workers", self.workers if self.workers > 1 else None), ("turnover", self.turnover)):
            if self.minimum and value is not None:
                raise ValueError(
                    f"train.minimum and train.{name} are not allowed together: a minimum is sought by one process, over "
                    f"all examples at once and without masks. Leave one out."
                )
        return self

    def settings(self) -> TrainSettings:
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainSettings)}
        return TrainSettings(**shared | {"trainable": tuple(self.trainable)})


class GradientsSection(Section):
    """Which per-example gradients are taken, and how they are kept."""

    modules: Literal["changed", "top"] | list[str] | None = Field(
        None,
        description="globs over module or parameter names; changed: what training moved; top: of that the last two "
        "layers and what follows them; default: top for influence but on stored rows, else changed",
    )
    projection: Literal["two-sided", "gaussian", "rademacher", "none"] = Field("two-sided", description="see README")
    dim: int = Field(16, ge=1, description="columns: per side for two-sided, in all for gaussian and rademacher")
    store: bool = Field(True, description="false: score from the corpus in one pass and keep no rows")
    compute: Literal["float32", "bfloat16"] = Field("float32", description="dtype of forward and backward")
    dtype: Literal["float16", "float32", "bfloat16"] = Field("float16", description="dtype of stored rows")
    compression: Literal["none", "blosc-lz4"] = Field("none", description="of stored rows; saves about 6 %")
    norms: bool = Field(True, description="exact per-parameter norms: self-influence and cosine need them")
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="of transformers models; auto: sdpa where the model has it"
    )
    token_budget: Literal["auto"] | PositiveInt = Field(
        "auto", description="padded tokens a batch; auto: what is fastest on a CPU, what fits a GPU"
    )
    shard_rows: int | None = Field(None, ge=1, description="rows a unit of work; default from bytes and tokens")
    coverage: int = Field(16, ge=0, description="examples that the coverage report samples; 0: none")


class MethodSection(Section):
    """The attribution method and its settings."""

    model_config = ConfigDict(extra="allow")
    shorthand = "name"
    name: str = Field("tracin", description=", ".join(METHODS))

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(unknown_name(f"method.name={name!r}", name, METHODS))
        return name

    def settings(self) -> dict[str, Any]:
        """Return what was set of the method's own settings."""
        return dict(self.model_extra or {})


class ClusterSection(Section):
    """Where the work runs; never changes a result."""

    address: str | None = Field(None, description="Ray address; default: the job's own cluster, else a local one")
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] | dict[Literal["min", "max"], PositiveInt] = Field(
        "auto", description="auto: one per GPU, else one per core; {min, max}: as many as an autoscaling cluster gives"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if the cluster has any")
    backend: Literal["ray", "in-process"] = Field(
        "ray", description="in-process: no Ray, one worker (notebooks, tests)"
    )
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="share of non-finite rows at which the run stops")

    @field_validator("workers")
    @classmethod
    def _in_order(cls, workers: Any) -> Any:
        if isinstance(workers, dict) and not (len(workers) == 2 and workers["min"] <= workers["max"]):
            raise ValueError(f"cluster.workers={workers!r} is not allowed: give min and max, min not above max.")
        return workers


class OutputSection(Section):
    """What the index holds; never changes a score."""

    top_k: int = Field(
        100,
        ge=1,
        description="proponents and opponents kept per query; another number is another label: all is ranked anew",
    )
    label: str | None = Field(
        None, pattern=NAME, description="name of these scores in the run; default <method>-<queries>-<hash>"
    )
    dense: bool = Field(False, description="also keep every score, N × Q float32")
    neighbours: Literal["exact", "ivf", "sqfp16"] = Field(
        "exact", description="index for new queries (FAISS but exact)"
    )


class CorrectSection(Section):
    """What launch/correct.py does; without effect on scoring."""

    anchors: CorpusSection = Field(description="validation set that a round's anchors are drawn from")
    held_out: CorpusSection = Field(description="set that is evaluated before and after, never learned from")
    output: str = Field(description="local folder for the checkpoints, one a round")
    pool: CorpusSection | None = Field(None, description="new data to learn from in place of the corpus (augmentation)")
    rounds: int = Field(10, ge=1, description="steps of SGD, each after a scoring")
    batch: int = Field(10, ge=1, description="anchors a round")
    points: int = Field(10, ge=1, description="examples a step, at most: those that help the anchors most")
    learning_rate: float = Field(1e-4, gt=0, description="η of a step on the examples' mean loss")
    seed: int = Field(0, ge=0, description="seed of the anchors")


class PlanSection(Section):
    """What launch/plan.py is told in the place of looking; without effect on a job."""

    examples: int | None = Field(None, ge=1, description="of the corpus; default: counted, which reads it once")
    tokens: int | None = Field(None, ge=1, description="in all of them; default: counted")
    queries: int | None = Field(None, ge=1, description="number of queries; default: counted")
    checkpoints: int = Field(1, ge=1, description="number of checkpoints, where plan.model is given")
    model: dict[str, Any] | None = Field(
        None, description="a model's shape as in its config.json: then nothing is read, loaded or measured"
    )
    devices: list[str] = Field(["l4", "a100", "h100"], description="kinds of GPU in configs/cluster/devices.yaml")
    counts: list[PositiveInt] = Field([1, 8, 64], description="numbers of devices")


class PretrainSection(Section):
    """The first of two stages, for method multistage: its corpus is what is scored, the other sections are fine-tuning."""

    task: TaskSection = TaskSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    corpus: CorpusSection
    shared: dict[str, str] = Field(
        description="the weights W that both stages have, name in pretraining: name in fine-tuning; one * in both stands "
        "for the same text"
    )
    modules: list[str] = Field(["*"], description="globs over pretraining's other weights that take part, U")


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
    plan: PlanSection = PlanSection()
    correct: CorrectSection | None = None
    pretrain: PretrainSection | None = None

    @model_validator(mode="after")
    def _stages(self) -> "Config":
        if (self.method.name == "multistage") != (self.pretrain is not None):
            raise ValueError(
                "method.name=multistage and the section pretrain belong together: say what came before fine-tuning in "
                "pretrain, or leave both out."
            )
        return self


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Return the config of a YAML file with `section.key=value` overrides applied.

    Raises ValueError naming the key, the value seen and what is allowed; FileNotFoundError for a missing file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config {path} is not there, or is no file (looked in {Path.cwd()}). Check the path.")
    data = _read_yaml(file.read_bytes(), f"config {path}") or {}
    if not isinstance(data, dict):
        raise ValueError(f"config {path} holds {type(data).__name__}: it must be a mapping of sections")
    for override in overrides or []:
        _apply(data, override)
    return make_config(data)


def make_config(data: dict[str, Any]) -> Config:
    """Return the checked config of a mapping. Raises ValueError with one line per mistake."""
    schema = _schema_for(data)
    try:
        checked = schema.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, schema)) from None
    return Config.model_validate(checked.model_dump(exclude_unset=True))


def _schema_for(data: dict[str, Any]) -> type[Config]:
    """Return the schema with the settings of the method and the task that the config names."""
    method, task = METHODS.get(_name_in(data, "method")), _name_in(data, "task")
    fields: dict[str, Any] = {}
    if method:
        own = section_of(import_path(method))
        own_method: Any = create_model("Method", __base__=(MethodSection, own), __doc__=MethodSection.__doc__)
        fields["method"] = (own_method, own_method())
    if own_task := _task_section(task):
        fields["task"] = (own_task, own_task())
    pretrain = data.get("pretrain")
    first = _task_section(_name_in(pretrain, "task")) if isinstance(pretrain, dict) else None
    if first:
        own_pretrain: Any = create_model(
            "Pretrain", __base__=PretrainSection, __doc__=PretrainSection.__doc__, task=(first, first())
        )
        fields["pretrain"] = (own_pretrain | None, None)
    return create_model("Schema", __base__=Config, **fields)


def _task_section(task: str) -> Any:
    """Return the task's section with the settings of its own; None for a name that is not known."""
    if task not in BUILT_IN and ":" not in task:
        return None
    settings = section_of(import_path(BUILT_IN.get(task, task)))
    return create_model("Task", __base__=TaskSection, __doc__=TaskSection.__doc__, settings=(settings, settings()))


def _name_in(data: dict[str, Any], section: str) -> str:
    """Return the name that a section gives, or its default; what is wrong with it the schema says."""
    given = data.get(section)
    name = given.get("name") if isinstance(given, dict) else given
    return name if isinstance(name, str) else Config.model_fields[section].default.name


def _read_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        whole = section_in(Config.model_fields[path].annotation) if path in Config.model_fields else None
        meant = f"{path}.{whole.shorthand}={text}" if equals and whole and whole.shorthand else "section.key=value"
        raise ValueError(f"override {override!r} is not allowed: write it as {meant}")
    here = data
    for key in keys[:-1]:
        below = here.get(key)
        if isinstance(below, str | list) and here is data:
            section = Config.model_fields.get(key)
            kind = section_in(section.annotation) if section else None
            shorthand = kind.shorthand if kind else None
            below = {shorthand: below} if shorthand else None
        here[key] = below if isinstance(below, dict) else {}
        here = here[key]
    here[keys[-1]] = _read_yaml(text, f"override {override!r}")
