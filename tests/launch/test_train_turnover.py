"""Training with turn-over dropout from a config: what trains, what is written down, and that it goes on after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch, collate_ids
from engine.bottleneck import adapter_widths
from engine.models import read_state
from engine.tasks.text_classification import TextClassification
from engine.turnover import restore
from engine.turnover_scores import full_losses, paired_losses
from launch.config import make_config
from launch.train import OPTIMIZER, STATE, train_model
from launch.turnover import REPORT, trainings
from tests.conftest import ToyMlp, randomise, tiny_bert
from tests.end_to_end.conftest import write_texts

LAST = "checkpoint-6"


@pytest.fixture
def training(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A config that trains adapters and the head of a tiny BERT for two epochs of ten texts."""
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    for file in (tokenizer_folder / "wrapped").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    return {
        "run": str(tmp_path / "run"),
        "checkpoints": str(tmp_path / "out"),
        "corpus": str(write_texts(tmp_path / "train.jsonl", 10)),
        "queries": str(write_texts(tmp_path / "test.jsonl", 4, first=50)),
        "task": {"settings": {"max_tokens": 16}},
        "train": {"base": str(base), "epochs": 2, "batch_size": 4, "checkpoints": 2, "turnover": {"adapters": 4}},
    }


def changed(training: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return training | {"train": training["train"] | settings}


def masks(training: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return changed(training, turnover=training["train"]["turnover"] | settings)


def trained(training: dict[str, Any]) -> Path:
    return train_model(make_config(training), lambda _: None)


def contents(folder: Path) -> dict[str, Any]:
    """Return every file's bytes; of an optimizer's state all that it holds, since the file counts who refers to whom."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): plain(torch.load(file)) if file.name == OPTIMIZER else file.read_bytes()
        for file in files
    }


def plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, Tensor) else state


def test_adapters_and_head_train_and_the_masks_are_recorded(training: dict[str, Any], tmp_path: Path) -> None:
    folder = trained(training)
    first, last = (read_state(path) for path in (tmp_path / "base", folder / LAST))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert all(".adapter." in name for name in last.keys() - first.keys())
    record = json.loads((folder / LAST / "turnover.json").read_text())
    assert record["before"] == ["classifier"]
    assert set(record["widths"].values()) == {4, 8}
    assert len(record["after"]) == len(record["adapters"]) == 4
    assert record["masks"]["keep"] == 0.5


def test_a_wide_head_trains_by_itself(training: dict[str, Any]) -> None:
    folder = trained(changed(training, turnover={"head": 20}))
    record = json.loads((folder / LAST / "turnover.json").read_text())
    assert (record["adapters"], record["before"], record["after"]) == (
        {"classifier": 20}, ["classifier"], ["classifier.adapter.act"],
    )  # fmt: skip
    state = read_state(folder / LAST)
    assert state["classifier.adapter.up.weight"].abs().min() > 0
    assert {leak["name"] for leak in json.loads((folder / REPORT).read_text())["leaks"]} >= {"classifier.bias"}
    assert adapter_widths(TextClassification(str(folder / LAST), max_tokens=16).build(folder / LAST)) == {
        "classifier": 20
    }


def test_the_report_holds_the_curves_of_the_checkpoint_and_the_leaks(training: dict[str, Any]) -> None:
    folder = trained(masks(training, curves=6))
    report = json.loads((folder / REPORT).read_text())
    assert [(point["step"], point["epoch"]) for point in report["curves"]] == [(3, 1.0), (6, 2.0)]
    task = TextClassification(str(folder / LAST), max_tokens=16)
    turnover = restore(task.build(folder / LAST), folder / LAST)
    rows, asked = (
        [json.loads(line) | {"id": i} for i, line in enumerate(Path(training[name]).read_text().splitlines())]
        for name in ("corpus", "queries")
    )
    one, two = (task.collate([row | task.encode(row)[0] for row in part]) for part in (rows[:6], asked))
    for side in ("own", "flipped"):
        truth = paired_losses(turnover, task.loss, one, torch.arange(6), side).mean()
        assert report["curves"][-1][side] == pytest.approx(float(truth), rel=1e-5)
    assert report["curves"][-1]["test"] == pytest.approx(float(full_losses(turnover, task.loss, two).mean()), rel=1e-5)
    kinds = {leak["kind"] for leak in report["leaks"]}
    assert {"bias", "momentum"} <= kinds
    assert "weight decay" not in kinds
    assert not any(leak["name"].endswith("classifier.weight") for leak in report["leaks"])  # masked at its input


def test_the_top_third_alone_and_other_trainable_weights(training: dict[str, Any]) -> None:
    folder = trained(changed(masks(training, layers="top"), trainable=["*.adapter.up.*"]))
    record = json.loads((folder / LAST / "turnover.json").read_text())
    assert all(".layer.1." in name for name in record["adapters"])
    report = json.loads((folder / REPORT).read_text())
    assert {
        leak["name"].rpartition(".")[0].rpartition(".")[2] for leak in report["leaks"] if leak["kind"] == "bias"
    } == {"up"}


def test_several_seeds_are_several_trainings_with_other_masks(training: dict[str, Any]) -> None:
    folder = trained(masks(training, seeds=2))
    found = trainings(str(folder), lambda _: None)
    assert [Path(path).relative_to(folder) for path in found] == [Path(f"seed-{i}/{LAST}") for i in (0, 1)]
    records = [json.loads((Path(path) / "turnover.json").read_text()) for path in found]
    assert records[0]["masks"]["seed"] != records[1]["masks"]["seed"]
    first, second = (read_state(Path(path)) for path in found)
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    alone = trained(training | {"checkpoints": f"{folder}-alone"})
    assert torch.equal(read_state(alone / LAST)["classifier.weight"], first["classifier.weight"])
    assert trainings(str(alone), lambda _: None) == [str(alone / LAST)]


class Stopped(KeyboardInterrupt):
    pass


def stop_after(training: dict[str, Any], checkpoints: int) -> None:
    left = [checkpoints]

    def say(text: str) -> None:
        left[0] -= text.startswith("checkpoint-")
        if not left[0]:
            raise Stopped

    with pytest.raises(Stopped):
        train_model(make_config(training), say)


@pytest.mark.parametrize(
    ("turnover", "stop"), [(None, 1), ({"adapters": 4}, 1), ({"adapters": 4, "head": 6, "seeds": 2}, 3)]
)
def test_a_stopped_training_goes_on_to_the_same_bytes(training: dict[str, Any], turnover: Any, stop: int) -> None:
    config = changed(training, turnover=turnover, schedule="linear", learning_rate=0.05)
    whole = trained(config | {"checkpoints": training["checkpoints"] + "-whole"})
    stop_after(config, stop)
    again = trained(config)
    assert contents(again) == contents(whole)


def test_a_kill_while_a_checkpoint_is_written_is_no_checkpoint(training: dict[str, Any]) -> None:
    whole = trained(training | {"checkpoints": training["checkpoints"] + "-whole"})
    stop_after(training, 1)
    folder = Path(training["checkpoints"])
    (folder / LAST).mkdir()
    (folder / LAST / "model.safetensors").write_text("half")
    assert contents(trained(training)) == contents(whole)


def test_a_training_that_an_earlier_version_stopped_goes_on(training: dict[str, Any]) -> None:
    """It knew neither wide heads nor minima."""
    stop_after(training, 1)
    (state,) = Path(training["checkpoints"]).glob(f"checkpoint-*/{STATE}")
    known = json.loads(state.read_text())["training"]["train"]
    assert not {"minimum", "head"} & (known.keys() | known["turnover"].keys())
    assert (trained(training) / LAST).exists()
    with pytest.raises(ValueError, match="train.turnover.head"):
        stop_after(masks(training | {"checkpoints": training["checkpoints"] + "-wide"}, head=6), 1)
        trained(training | {"checkpoints": training["checkpoints"] + "-wide"})


def test_other_settings_do_not_go_on_from_a_stopped_training(training: dict[str, Any]) -> None:
    stop_after(training, 1)
    with pytest.raises(ValueError, match=r"that was stopped, with train.turnover.keep=0.5; this one has 0.4"):
        trained(masks(training, keep=0.4))
    write_texts(Path(training["corpus"]), 11)
    with pytest.raises(ValueError, match=r"that was stopped, with corpus.content="):
        trained(training)


def test_near_identical_texts_share_a_mask(training: dict[str, Any]) -> None:
    rows = [{"text": text, "label": 0} for text in ("The film is good", "a dull plot", "the film is GOOD.")]
    Path(training["corpus"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = trained(masks(training, duplicates=True))
    last = max(folder.glob("checkpoint-*"))
    assert json.loads((last / "turnover.json").read_text())["duplicates"] == [[2, 0]]


class Numbers:
    """A user's own task on a module of their own."""

    def build(self, folder: Path) -> nn.Module:
        model = randomise(ToyMlp(inputs=2))
        model.load_state_dict(read_state(folder))
        return model

    def initialise(self, folder: Path | None) -> nn.Module:
        return randomise(ToyMlp(inputs=2))

    def collate(self, rows: list[dict]) -> Batch:
        x = torch.tensor([row["x"] for row in rows])
        return Batch(collate_ids(rows), {"x": x, "y": torch.tensor([row["y"] for row in rows])})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.fixture
def own(training: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"x": [i / 10, 1.0], "y": i % 3} for i in range(10)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = training["train"] | {"base": None, "turnover": {"after": ["act"], "before": ["head"]}}
    del training["queries"]
    name = "tests.launch.test_train_turnover:Numbers"
    return training | {"task": name, "corpus": str(tmp_path / "numbers.jsonl"), "train": train}


def test_a_users_own_module_is_masked_where_the_config_says(own: dict[str, Any]) -> None:
    folder = trained(own)
    record = json.loads((folder / LAST / "turnover.json").read_text())
    assert (record["after"], record["before"], record["widths"]) == (["act"], ["head"], {"act": 6, "head.input": 6})
    report = json.loads((folder / REPORT).read_text())
    assert report["curves"][0]["own"] > 0
    assert report["curves"][0]["test"] is None
    names = {leak["name"]: leak["kind"] for leak in report["leaks"]}
    assert names["norm.weight"] == "norm"
    assert names["head.bias"] == "bias"


@pytest.mark.parametrize(
    ("turnover", "message"),
    [
        ({"adapters": 4}, r"no module of ToyMlp matches \*.output.dense.+name the output projections"),
        ({"after": ["first", "tail"]}, r"no module of ToyMlp matches 'tail'. It has, for example, "),
        ({"after": ["act"], "duplicates": True}, r"train.turnover.duplicates=True needs texts: this task has none"),
    ],
)
def test_places_that_are_not_there_are_refused(own: dict[str, Any], turnover: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(changed(own, turnover=turnover))
    assert not Path(own["checkpoints"]).exists()


@pytest.mark.parametrize(
    ("turnover", "message"),
    [
        ({}, "train.turnover masks no layer: set train.turnover.adapters for a transformer"),
        ({"adapters": 4, "keep": 1}, "train.turnover.keep=1 is not allowed: must be a number"),
        (
            {"adapters": 4, "picks": 9, "codebook": 3},
            "train.turnover.picks=9 is not allowed: at most train.turnover.co",
        ),
        ({"adapter": 4}, "train.turnover.adapter is not known. Did you mean train.turnover.adapters?"),
    ],
)
def test_impossible_masks_are_refused_by_name(training: dict[str, Any], turnover: Any, message: str) -> None:
    with pytest.raises(ValueError, match="train.turnover") as error:
        make_config(changed(training, turnover=turnover))
    assert message in str(error.value)
