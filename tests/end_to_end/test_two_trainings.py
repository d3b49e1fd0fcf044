"""Both stages trained to a minimum by launch/train.py, scored by a job, and held against training again without an image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import minimum
from engine.models import save_checkpoint
from engine.tasks.image_classification import ImageClassification
from launch import train
from launch.config import make_config
from launch.job import score
from launch.run import Run
from launch.train import train_model
from storage.checkpoints import find_checkpoints
from tests import oracles
from tests.end_to_end.answers import dense, events
from tests.end_to_end.test_layers import MNIST

L2, TOLERANCE, IMAGES, COPIES = 0.06, 1e-9, 48, 4
LEFT_OUT = (0, 2)  # the effect of image 1 is far from its slope
SIZE = {"first": 2, "second": 2, "kernels": (7, 3)}


def first_stage() -> nn.Module:
    from launch.examples import TanhCnn

    return TanhCnn(4, **SIZE)


def second_stage() -> nn.Module:
    from launch.examples import TanhCnn

    return TanhCnn(6, **SIZE)


def write_digits(file: Path, digits: range, rows: slice, copies: int = 1) -> None:
    with np.load(MNIST) as data:
        chosen = np.flatnonzero(np.isin(data["labels"], digits))[rows].repeat(copies)
        np.savez(file, images=data["images"][chosen], labels=data["labels"][chosen])


def stage(folder: Path, name: str, digits: range, function: str, **given: Any) -> dict[str, Any]:
    """Return the config of one stage's training on <folder>/<name>.npz."""
    return {
        "task": {
            "name": "image-classification",
            "settings": {"factory": f"{__name__}:{function}", "labels": list(map(str, digits))},
        },
        "run": str(folder / "unused"),
        "corpus": str(folder / f"{name}.npz"),
        "checkpoints": str(folder / name),
        "train": {
            "epochs": 9, "batch_size": 96, "learning_rate": 0.01, "checkpoints": 1,
            "minimum": {"gradient_norm": TOLERANCE, "l2": L2, "steps": 40},
        } | given,
    }  # fmt: skip


def pretraining(folder: Path, **given: Any) -> dict[str, Any]:
    return stage(folder, "pretrain", range(4), "first_stage", **given)


def finetuning(folder: Path, base: Path, **given: Any) -> dict[str, Any]:
    return stage(folder, "finetune", range(4, 10), "second_stage", base=str(base), trainable=["head.*"], **given)


def last(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def quiet(_: str) -> None: ...


def trained(folder: Path) -> tuple[Path, Path]:
    """Train both stages; return their last checkpoints."""
    train_model(make_config(pretraining(folder)), quiet)
    base = last(folder / "pretrain")
    said: list[str] = []
    train_model(make_config(finetuning(folder, base)), said.append)
    assert said[0] == "4 of 6 tensors are the base's; new: head.weight, head.bias"
    return base, last(folder / "finetune")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    write_digits(folder / "pretrain.npz", range(4), slice(0, IMAGES), COPIES)
    write_digits(folder / "finetune.npz", range(4, 10), slice(0, IMAGES))
    write_digits(folder / "asked.npz", range(4, 10), slice(IMAGES, IMAGES + 4))
    return folder


@pytest.fixture(scope="module")
def both(digits: Path) -> Path:
    trained(digits)
    return digits


def batch_of(file: Path, digits: range) -> Any:
    task = ImageClassification(factory="unused", labels=list(map(str, digits)))
    with np.load(file) as data:
        records = [{"images": i, "labels": int(x)} for i, x in zip(data["images"], data["labels"], strict=True)]
    rows = [record | task.encode(record)[0] | {"id": number} for number, record in enumerate(records)]
    return task, task.collate(rows)


def loaded(checkpoint: Path, model: nn.Module) -> nn.Module:
    model = model.double()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model


def test_either_stage_ends_where_its_objective_has_no_slope(both: Path) -> None:
    pre, fine = loaded(last(both / "pretrain"), first_stage()), loaded(last(both / "finetune"), second_stage())
    for model, name, digits, names in (
        (pre, "pretrain", range(4), None), (fine, "finetune", range(4, 10), ["head.weight", "head.bias"]),
    ):  # fmt: skip
        task, batch = batch_of(both / f"{name}.npz", digits)
        weights = torch.cat([w.detach().flatten() for n, w in model.named_parameters() if names is None or n in names])
        slope = oracles.flat(oracles.gradients(model, task.loss, batch), names).mean(0) + L2 * weights
        assert float(slope.norm()) <= 2 * TOLERANCE
        assert float(weights.norm()) > 0.5
    for name, weight in pre.embed.named_parameters():
        assert torch.equal(weight, dict(fine.embed.named_parameters())[name]), "W is what pretraining left, to the bit"


def answers(checkpoint: Path, folder: Path) -> torch.Tensor:
    task, batch = batch_of(folder / "asked.npz", range(4, 10))
    with torch.no_grad():
        return task.loss(loaded(checkpoint, second_stage()), batch)


def test_a_job_over_both_foretells_what_leaving_an_image_out_does(both: Path, tmp_path: Path) -> None:
    pre, fine = last(both / "pretrain"), last(both / "finetune")
    first, second = pretraining(both), finetuning(both, pre)
    kept = {name: second[name] for name in ("task", "corpus")}
    config = kept | {
        "run": str(tmp_path / "run"), "checkpoints": str(fine), "cluster": {"backend": "in-process"},
        "queries": {"name": "asked", "path": str(both / "asked.npz")},
        "pretrain": {
            "task": first["task"], "checkpoints": str(pre), "corpus": first["corpus"],
            "shared": {"embed.*": "embed.*"}, "modules": ["head"],
        },
        "gradients": {"modules": ["head"], "projection": "none", "store": False},
        "method": {
            "name": "multistage", "curvature": "hessian", "solver": "exact", "dtype": "float64",
            "damping_absolute": 1e-9, "pretrain_damping_absolute": 1e-9, "l2": L2, "pretrain_l2": L2,
        },
        "output": {"top_k": 8, "label": "scores", "dense": True},
    }  # fmt: skip
    score(make_config(config), quiet)
    run = Run.open(config["run"])
    found = dense(run)[[image * COPIES for image in LEFT_OUT]]
    assert not [event for event in events(run) if event["kind"] == "failed"]

    before, truth, count = answers(fine, both), [], IMAGES * COPIES
    for image in LEFT_OUT:
        again = tmp_path / f"without-{image}"
        again.mkdir()
        (again / "finetune.npz").symlink_to(both / "finetune.npz")
        with np.load(both / "pretrain.npz") as data:
            np.savez(again / "pretrain.npz", **{name: np.delete(data[name], image * COPIES, 0) for name in data.files})
        left = {
            "gradient_norm": TOLERANCE,
            "l2": L2 * count / (count - 1),
            "steps": 20,
        }  # the divisor stays that of all
        near = {"learning_rate": 1e-9, "epochs": 1}
        train_model(make_config(pretraining(again, base=str(pre), minimum=left, **near)), quiet)
        base = last(again / "pretrain")
        train_model(make_config(finetuning(again, base)), quiet)
        truth.append((answers(last(again / "finetune"), both) - before).numpy())
    effect = np.array(truth)
    assert np.corrcoef(found.ravel(), effect.ravel())[0, 1] > 0.995
    slope = (found * effect).sum() / (found * found).sum()
    assert slope == pytest.approx(1.0, abs=0.1)


def head_alone(folder: Path, digits: Path, **given: Any) -> dict[str, Any]:
    """Return a training of the second stage's head on new convolutions: short, as its objective is convex."""
    (folder / "finetune.npz").symlink_to(digits / "finetune.npz")
    return stage(folder, "finetune", range(4, 10), "second_stage", trainable=["head.*"], **given)


def test_a_training_killed_before_its_minimum_goes_on_to_the_same_bits(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = head_alone(tmp_path, digits)
    whole = make_config(config | {"checkpoints": str(tmp_path / "whole")})
    train_model(whole, quiet)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "minimise", killed)
        with pytest.raises(KeyboardInterrupt):
            train_model(make_config(config), quiet)
    assert [path.name for path in (tmp_path / "finetune").glob("checkpoint-*")] == ["checkpoint-9"]
    said: list[str] = []
    train_model(make_config(config), said.append)
    assert said[0] == "going on from checkpoint-9"
    assert said[1].startswith("seeking a minimum: the gradient is ")
    assert "checkpoint-10: a minimum, objective" in said[-1]
    ends = find_checkpoints(str(tmp_path / "finetune"))
    assert [one.learning_rate for one in ends] == [0.01, 0.0], "no step of SGD comes from a minimum"
    files = [tmp_path / name / "checkpoint-10/model.safetensors" for name in ("whole", "finetune")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train_model(make_config(config), quiet)


def test_a_minimum_that_is_not_reached_is_said_and_may_be_tried_again_with_more_steps(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minimum, "PIECE", 1)
    few = {"gradient_norm": TOLERANCE, "l2": L2, "steps": 1, "rounds": 1}
    config = head_alone(tmp_path, digits, minimum=few)
    with pytest.raises(
        FloatingPointError, match="no minimum after 1 rounds of 1 steps: a gradient of length .* is left"
    ):
        train_model(make_config(config), quiet)
    config["train"]["minimum"] |= {"steps": 100, "rounds": 3}
    train_model(make_config(config), quiet)
    assert last(tmp_path / "finetune").name == "checkpoint-10"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 2}, "train.minimum and train.workers are not allowed together"),
        ({"turnover": {"adapters": 4}}, "train.minimum and train.turnover are not allowed together"),
        ({"minimum": {"gradient_norm": 0}}, "train.minimum.gradient_norm=0 is not allowed"),
        ({"minimum": {"l2": 1}}, "train.minimum.gradient_norm is missing"),
    ],
)
def test_bad_settings_of_a_minimum(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_config(pretraining(tmp_path, **given))


def test_a_base_of_another_shape_is_refused(digits: Path, tmp_path: Path) -> None:
    save_checkpoint(first_stage(), tmp_path / "base")
    config = finetuning(digits, tmp_path / "base", output=str(tmp_path / "out"))
    config["task"]["settings"]["factory"] = "launch.examples:digits"
    with pytest.raises(ValueError, match=r"train.base=.* has no weight of the name and shape of one of Sequential"):
        train_model(make_config(config), quiet)
