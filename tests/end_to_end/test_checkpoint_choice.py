"""`checkpoints.choose` through the whole job: it keeps these checkpoints alone, scores by them, and says why."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint_choice import choose_checkpoints
from launch.config import make_config
from launch.job import score
from launch.run import Run
from launch.train import train_model
from tests.conftest import tiny_bert
from tests.end_to_end.answers import dense, oracle_scores
from tests.end_to_end.conftest import Settings, write_texts
from tests.end_to_end.test_users import train_with_hugging_face

EPOCHS, STEPS = 6, 5  # 40 texts in batches of 8
ENDS = [STEPS * (i + 1) for i in range(EPOCHS)]
HEAD = ["classifier.weight", "classifier.bias"]


def check_choice(folder: Path, config: dict[str, Any], said: list[str]) -> None:
    """Compare run, index and messages with the rule applied to the means of the losses that the log holds."""
    state = json.loads((folder / f"checkpoint-{ENDS[-1]}/trainer_state.json").read_text())
    log = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    losses = [float(np.mean([loss for step, loss in log if end - STEPS < step <= end])) for end in ENDS]
    kept = [verdict.kept for verdict in choose_checkpoints(losses, 2)]
    run = Run.open(config["run"])
    meta = run.index().meta
    assert sum(kept) == 2
    assert [c["step"] for c in meta["checkpoints"]] == [end for end, keep in zip(ENDS, kept, strict=True) if keep]
    choice = meta["checkpoint_choice"]
    assert [(v["step"], v["kept"]) for v in choice] == list(zip(ENDS, kept, strict=True))
    np.testing.assert_allclose([v["loss"] for v in choice], losses, rtol=1e-12)
    for v in choice:
        assert f"{v['name']}: {'kept' if v['kept'] else 'left out'} at loss {v['loss']:.4g}, {v['why']}" in said
    assert {c.name for c in run.checkpoints()} == {v["name"] for v in choice if v["kept"]}
    exact, _, bound = oracle_scores(run, folder, HEAD)
    assert (np.abs(dense(run) - exact) <= 1e-5 * bound).all()


def learnable(path: Path) -> Path:
    """Write texts of one label, so that the loss falls steadily."""
    write_texts(path, 40)
    path.write_text(
        "".join(json.dumps(json.loads(line) | {"label": 1}) + "\n" for line in path.read_text().splitlines())
    )
    return path


def job(settings: Settings, folder: Path, corpus: Path) -> dict[str, Any]:
    head = {"modules": ["classifier"], "projection": "none", "dtype": "float32"}
    return settings(checkpoints={"path": str(folder), "choose": 2}, corpus=str(corpus), gradients=head)


def test_a_folder_of_the_real_trainer(tmp_path: Path, tokenizer_folder: Path, settings: Settings) -> None:
    corpus = learnable(tmp_path / "train.jsonl")
    train_with_hugging_face(tmp_path, tokenizer_folder, epochs=EPOCHS)
    config, said = job(settings, tmp_path / "out", corpus), list[str]()
    score(make_config(config), said.append)
    check_choice(tmp_path / "out", config, said)
    fewer = config | {"checkpoints": {"path": str(tmp_path / "out"), "choose": 1}, "output": {"label": "fewer"}}
    score(make_config(fewer), lambda _: None)  # the same run: another choice is another label
    run = Run.open(config["run"])
    both = [{c["step"] for c in run.index(label).meta["checkpoints"]} for label in ("scores", "fewer")]
    assert [len(steps) for steps in both] == [2, 1]


def test_a_folder_of_our_own_training(tmp_path: Path, tokenizer_folder: Path, settings: Settings) -> None:
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    for file in (tokenizer_folder / "wrapped").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = job(settings, tmp_path / "out", learnable(tmp_path / "train.jsonl"))
    how = {"base": str(base), "epochs": EPOCHS, "batch_size": 8, "checkpoints": EPOCHS, "learning_rate": 1e-2}
    train_model(make_config(config | {"train": how | {"trainable": ["*pooler*", "classifier*"]}}), lambda _: None)
    said: list[str] = []
    score(make_config(config), said.append)
    check_choice(tmp_path / "out", config, said)
