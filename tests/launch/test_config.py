from pathlib import Path
from typing import Any

import pytest

from engine.methods.contract import METHODS
from engine.tasks.contract import BUILT_IN
from launch.config import load_config, make_config
from launch.describe import describe_config

LEAST: dict[str, Any] = {"run": "runs/a", "corpus": "train.jsonl", "queries": "test.jsonl"}


def mistakes(**sections: Any) -> list[str]:
    with pytest.raises(ValueError) as error:
        make_config(LEAST | sections)
    return str(error.value).splitlines()


def test_a_text_stands_for_a_section() -> None:
    config = make_config(LEAST | {"method": "gradient-dot", "checkpoints": "model", "gradients": None})
    assert (config.run.uri, config.corpus.path, config.checkpoints.path) == ("runs/a", "train.jsonl", "model")
    assert config.queries
    assert (config.queries.name, config.method.name, config.gradients.dim) == ("queries", "gradient-dot", 16)
    assert make_config(LEAST | {"checkpoints": ["a", {"path": "b"}]}).checkpoints.path == ["a", {"path": "b"}]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gradient": {}}, "gradient is not known. Did you mean gradients? Allowed: run, task, checkpoints, corpus,"),
        ({"gradients": {"dimm": 3}}, "gradients.dimm is not known. Did you mean gradients.dim? Allowed: modules, proj"),
        ({"output": {"zzz": 3}}, "output.zzz is not known. Allowed: top_k, label, dense, neighbours."),
        ({"method": {"modles": []}}, "method.modles is not known. Did you mean method.modules? Allowed: "),
        ({"method": {"damping": 1}}, "method.damping is not known. Allowed: "),
        ({"method": "tracn"}, "method.name='tracn' is not known. Did you mean tracin? Allowed: tracin, gradient-dot,"),
        ({"task": "causal"}, "task.name='causal' is not known. Did you mean causal-lm? Allowed: text-classification,"),
        ({"task": {"settings": {"max_token": 9}}}, "task.settings.max_token is not known. Did you mean task.settings"),
        ({"task": "no_such_module:Task"}, "'no_such_module:Task': no module 'no_such_module' on the Python path."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(sections: dict[str, Any], message: str) -> None:
    (line,) = mistakes(**sections)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"cluster": {"workers": "all"}},
            "cluster.workers='all' is not allowed: must be 'auto' or a whole number of at least 1 or a mapping of min and max. "
            "The default is 'auto'.",
        ),
        (
            {"cluster": {"workers": 0}},
            "cluster.workers=0 is not allowed: must be 'auto' or a whole number of at least 1 or a mapping of min and max. "
            "The default is 'auto'.",
        ),
        (
            {"cluster": {"max_bad_fraction": 2}},
            "cluster.max_bad_fraction=2 is not allowed: must be a number from 0 to 1. The default is 0.001.",
        ),
        (
            {"gradients": {"projection": "two_sided"}},
            "gradients.projection='two_sided' is not allowed: must be 'two-sided', 'gaussian', 'rademacher' or 'none'. "
            "The default is 'two-sided'.",
        ),
        (
            {"gradients": {"modules": [5]}},
            "gradients.modules=[5] is not allowed: must be 'changed' or 'top' or a list of texts.",
        ),
        (
            {"gradients": {"norms": "maybe"}},
            "gradients.norms='maybe' is not allowed: must be true or false. The default is True.",
        ),
        (
            {"train": {"learning_rate": float("nan")}},
            "train.learning_rate=nan is not allowed: must be a number above 0. The default is 0.001.",
        ),
        (
            {"queries": {"path": "q", "limit": 0}},
            "queries.limit=0 is not allowed: must be a whole number of at least 1.",
        ),
        (
            {"queries": {"path": "q", "name": ".."}},
            "queries.name='..' is not allowed: must be a text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$. "
            "The default is 'queries'.",
        ),
        (
            {"queries": {"path": "q", "name": "train"}},
            "queries.name='train' is not allowed: the scored corpus has that name. Choose another.",
        ),
        (
            {"method": {"name": "gradient-dot", "checkpoint": "last"}},
            "method.checkpoint='last' is not allowed: must be a whole number. The default is -1.",
        ),
        (
            {"method": {"modules": "classifier*"}},
            "method.modules='classifier*' is not allowed: must be a list of texts. The default is ('*',).",
        ),
        (
            {"task": {"settings": {"max_tokens": "long"}}},
            "task.settings.max_tokens='long' is not allowed: must be a whole number. The default is 512.",
        ),
        (
            {"corpus": 5},
            "corpus=5 is not allowed: must be a mapping of settings (path, split, limit), or a text for its path.",
        ),
        ({"run": {}}, "run.uri is missing: folder or s3://bucket/prefix of the run."),
    ],
)
def test_a_value_that_is_not_allowed_gives_one_line(sections: dict[str, Any], message: str) -> None:
    assert mistakes(**sections) == [message]


def test_every_mistake_has_its_line() -> None:
    with pytest.raises(ValueError) as error:
        make_config({"corpus": "c", "output": {"top_k": -1}, "gradients": {"dimm": 1}})
    lines = str(error.value).splitlines()
    assert lines[0] == "run is missing: where everything that the job produces is kept."
    assert sorted(line.split()[0] for line in lines) == ["gradients.dimm", "output.top_k=-1", "run"]


def test_settings_of_methods_and_tasks_have_their_own_types() -> None:
    config = make_config(
        LEAST | {"method": {"modules": ["a*"]}, "task": {"settings": {"max_tokens": "16", "labels": ["no", "yes"]}}}
    )
    assert config.method.settings() == {"modules": ("a*",)}
    assert config.task.settings == {"max_tokens": 16, "labels": ["no", "yes"]}
    assert make_config(LEAST).method.settings() == {}


class OwnTask:
    def __init__(self, width, depth: int = 2, **more: Any) -> None: ...


def test_a_users_own_task_is_checked_by_its_arguments() -> None:
    name = f"{__name__}:OwnTask"
    settings = make_config(LEAST | {"task": {"name": name, "settings": {"width": [1], "other": 3}}}).task.settings
    assert settings == {"width": [1], "other": 3}
    (line,) = mistakes(task={"name": name, "settings": {"depth": "deep"}})
    assert line == "task.settings.depth='deep' is not allowed: must be a whole number. The default is 2."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("run: runs/a\ncorpus: train.jsonl\ntask: causal-lm\ncheckpoints: [a, b]\n")
    return path


def test_overrides_go_over_the_file(file: Path) -> None:
    overrides = ["gradients.dim=8", "task.settings.max_tokens=32", "run.seed=3", "checkpoints.learning_rate=1e-3"]
    config = load_config(str(file), overrides)
    assert (config.gradients.dim, config.run.uri, config.run.seed) == (8, "runs/a", 3)
    assert (config.task.name, config.task.settings) == ("causal-lm", {"max_tokens": 32})
    assert (config.checkpoints.path, config.checkpoints.learning_rate) == (["a", "b"], 0.001)


@pytest.mark.parametrize("override", ["dim=8", "gradients.dim", "gradients.=8", "=8"])
def test_an_override_of_no_field_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ValueError, match="is not allowed: write it as section.key=value"):
        load_config(str(file), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [1", "job.yaml is not valid YAML: while parsing"),
        (b"run: \xff", "job.yaml is not valid YAML: "),
        (b"- run", "job.yaml holds list: it must be a mapping of sections"),
        (b"", "run is missing"),
    ],
)
def test_a_file_that_is_no_config(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_config(str(file))
    assert all(line.strip() for line in str(error.value).splitlines())


def test_an_override_of_a_whole_section_says_what_was_meant(file: Path) -> None:
    with pytest.raises(ValueError, match=r"override 'method=tracin' is not allowed: write it as method\.name=tracin$"):
        load_config(str(file), ["method=tracin"])
    with pytest.raises(ValueError, match=r"'output=5' is not allowed: write it as section\.key=value$"):
        load_config(str(file), ["output=5"])


def test_an_override_that_is_no_yaml(file: Path) -> None:
    with pytest.raises(ValueError, match=r"override 'run.uri=\[' is not valid YAML: [^\n]*$"):
        load_config(str(file), ["run.uri=["])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.yaml is not there, or is no file \(looked in"):
        load_config(str(tmp_path / "none.yaml"))


def test_help_names_every_field_with_its_default() -> None:
    text = describe_config()
    for part in ("run: Where everything", "token_budget", "[32]", "queries: The predictions", "uri  ", "[required]"):
        assert part in text


def test_help_says_what_every_field_takes_and_what_methods_and_tasks_have_besides() -> None:
    text = " ".join(describe_config().split())
    for part in (
        "a whole number of at least 1 [32]", "'two-sided', 'gaussian', 'rademacher' or 'none' [two-sided]",
        "method of tracin: Σ η", 'modules a list of texts [["*"]]', "checkpoint position in the list of checkpoints; a who",
        "task.settings of causal-lm:", "prompt_field text in front that is read but not predicted; a text [none]",
        "A text for the whole section is its name.", "norms exact per-parameter norms: self-influence and cosine need th",
    ):  # fmt: skip
        assert part in text
    for name in (*METHODS, *BUILT_IN):
        assert f" of {name}: " in text
    assert max(map(len, describe_config().splitlines())) <= 100
