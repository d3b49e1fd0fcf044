"""What the README promises its readers, run from the README's own text."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from launch.config import load_config
from launch.job import score
from launch.query import answer
from launch.run import Run
from tests import oracles
from tests.conftest import tiny_bert
from tests.end_to_end.answers import everything
from tests.end_to_end.conftest import run_job, write_texts

README = (Path(__file__).parents[2] / "README.md").read_text()
IN_PROCESS = ["cluster.backend=in-process"]


def block(name: str) -> str:
    """Return the README's code block whose first line is a comment with this file name."""
    found = re.search(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```$", README, flags=re.S | re.M)
    assert found, f"the README has no block {name}"
    return found[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder: current, and on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def train_with_hugging_face(folder: Path, tokenizer_folder: Path, epochs: int = 2) -> None:
    """Train with the real Trainer and leave its output folder `out` as it is."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "wrapped")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    data = [{"input_ids": tokenizer(r["text"])["input_ids"], "labels": r["label"]} for r in rows]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=1e-2,
        save_strategy="epoch", logging_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = tiny_bert()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(("classifier", "bert.pooler")))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()


def test_a_trainer_folder_and_a_jsonl_file(here: Path, tokenizer_folder: Path) -> None:
    write_texts(here / "train.jsonl", 40)
    write_texts(here / "test.jsonl", 3, first=500)
    train_with_hugging_face(here, tokenizer_folder)
    config = block("reviews.yaml")
    assert len(config.strip().splitlines()) <= 15
    (here / "reviews.yaml").write_text(config)
    said: list[str] = []
    score(load_config("reviews.yaml", IN_PROCESS), said.append)
    text = "\n".join(said)
    assert re.search(r"checkpoint-5: step 5, learning rate [\d.e-]+ \(", text)
    run = Run.open("runs/reviews")
    settings = run.location.read_json("gradients/store.json")
    assert sorted(settings["modules"]) == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight",
    ]  # fmt: skip
    found = answer(run, None, "a dull film", None, 3, None)
    assert found["query"]["label"] in (0, 1, 2)  # the model's own prediction
    assert len(found["proponents"]) == 3
    assert found["proponents"][0]["score"] > found["proponents"][1]["score"] > 0
    stored = answer(run, "source:r501", None, None, 2, None)
    assert stored["query"]["id"] == 1
    run_readme_python(here)


def run_readme_python(here: Path) -> None:
    (code,) = re.findall(r"^```python\n(from launch import Run.*?)^```$", README, flags=re.S | re.M)
    exec(compile(code, "README.md", "exec"), {})


def test_new_text_is_answered_as_the_same_text_was_when_stored(here: Path, tokenizer_folder: Path) -> None:
    write_texts(here / "train.jsonl", 40)
    write_texts(here / "test.jsonl", 3, first=500)
    train_with_hugging_face(here, tokenizer_folder)
    (here / "reviews.yaml").write_text(block("reviews.yaml"))
    score(load_config("reviews.yaml", IN_PROCESS), lambda _: None)
    run = Run.open("runs/reviews")
    asked = everything(run, "queries")[1]
    stored = answer(run, "1", None, None, 5, None)
    fresh = answer(run, None, asked["text"], asked["label"], 5, None)
    for side in ("proponents", "opponents"):
        assert [r["id"] for r in stored[side]] == [r["id"] for r in fresh[side]]
        np.testing.assert_allclose([r["score"] for r in stored[side]], [r["score"] for r in fresh[side]], rtol=1e-4)


def test_a_plain_torch_module(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("housing.py")
    assert len(code.strip().splitlines()) <= 30
    (here / "housing.py").write_text(code)
    (here / "housing.yaml").write_text(block("housing.yaml"))
    generator = np.random.default_rng(0)
    for name, count in (("homes", 50), ("asked", 4)):
        rows = [
            dict(zip(("rooms", "age", "income"), map(float, generator.normal(size=3)), strict=True))
            for _ in range(count)
        ]
        lines = [json.dumps(row | {"price": row["rooms"] + row["income"]}) for row in rows]
        (here / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    (here / "model").mkdir()
    torch.save(model.state_dict(), here / "model" / "model.pt")
    score(load_config("housing.yaml", [*IN_PROCESS, "gradients.projection=none"]), lambda _: None)
    run = Run.open("runs/housing")
    sys.modules.pop("housing", None)
    import housing

    task = housing.Housing()
    batches = [task.collate(everything(run, name)) for name in ("train", "queries")]
    double = [type(b)(b.ids, {k: t.double() for k, t in b.tensors.items()}) for b in batches]
    a, b = (oracles.flat(oracles.gradients(model.double(), task.loss, batch)) for batch in double)
    exact = 0.01 * (a @ b.T).numpy()
    for query in range(4):
        rows = run.top(query, k=50).to_pylist()
        kept = sorted((r["score"] for r in rows), reverse=True)  # both sides hold all 50 rows, each row once
        np.testing.assert_allclose(kept, np.sort(exact[:, query])[::-1], rtol=5e-3, atol=1e-4)
    sys.modules.pop("housing", None)


def test_a_language_model_on_documents_longer_than_a_chunk(here: Path, tokenizer_folder: Path) -> None:
    from tests.conftest import tiny_gpt2

    model = tiny_gpt2(bos_token_id=None, eos_token_id=1)
    model.save_pretrained(here / "model")
    for file in (tokenizer_folder / "plain").iterdir():
        (here / "model" / file.name).write_bytes(file.read_bytes())
    write_texts(here / "train.jsonl", 30)
    write_texts(here / "asked.jsonl", 2, first=900)
    (here / "lm.yaml").write_text(
        "run: run\n"
        "task: {name: causal-lm, settings: {max_tokens: 5}}\n"
        "checkpoints: {path: model, learning_rate: 0.1}\n"
        "corpus: train.jsonl\n"
        "queries: asked.jsonl\n"
    )
    said: list[str] = []
    score(load_config("lm.yaml", IN_PROCESS), said.append)
    assert re.search(r"train: \d+ examples of 30 records, .* [1-9]\d* chunked", "\n".join(said))
    run = Run.open("run")
    rows = everything(run, "train")
    assert max(len(row["input_ids"]) for row in rows) == 5
    assert run.index().meta["granularity"] == "chunk"
    chunked = [row for row in rows if row["chunk"] == 1]
    document = [row for row in rows if row["doc_id"] == chunked[0]["doc_id"]]
    assert [row["chunk"] for row in document] == list(range(len(document)))
    assert document[0]["text"] != document[1]["text"]  # a chunk shows its own text
    assert len(run.score(["the film was good"], k=2)[0].proponents) == 2


def test_a_stored_query_is_asked_with_its_own_or_the_predicted_label(settings) -> None:
    run = run_job(settings())
    own = everything(run, "asked")[2]["label"]
    predicted = answer(run, "2", label="predicted")["query"]["label"]
    assert predicted in (0, 1, 2)
    same = answer(run, "2", label=str(own))
    stored = answer(run, "2")
    assert [r["id"] for r in same["proponents"]] == [r["id"] for r in stored["proponents"]]
    other = next(c for c in (0, 1, 2) if c != own)
    assert answer(run, "2", label=str(other))["proponents"] != stored["proponents"]
    json.dumps(stored)


def test_each_side_holds_its_own_sign_and_files_are_for_all(settings) -> None:
    run = run_job(settings())  # top_k is above the number of rows: the sides would overlap
    rows = run.top(0, k=50).to_pylist()
    assert {r["side"] for r in rows if r["score"] > 0} == {"proponent"}
    assert {r["side"] for r in rows if r["score"] < 0} == {"opponent"}
    fresh = run.score(["the film was dull"], k=50)[0]
    assert min(r["score"] for r in fresh.proponents) > 0 > max(r["score"] for r in fresh.opponents)
    assert answer(run, None, "the film was dull", "predicted")["query"]["label"] in (0, 1, 2)
    modes = {p.stat().st_mode & 0o777 for p in Path(run.location.uri).rglob("*") if p.is_file()}
    assert len(modes) == 1


def test_an_override_keeps_a_path_given_in_short(here: Path) -> None:
    (here / "reviews.yaml").write_text(block("reviews.yaml"))
    queries = load_config("reviews.yaml", ["queries.limit=5"]).queries
    assert queries is not None
    assert (queries.path, queries.limit) == ("test.jsonl", 5)
