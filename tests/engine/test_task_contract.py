import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.tasks.contract import (
    encode,
    initialise,
    load_task,
    measurement,
    predict,
    with_model_folder,
)
from tests.conftest import ToyMlp, mlp_batch, mlp_loss, randomise, toy_mlp


class OwnTask:
    """Only what is required."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def build(self, folder) -> nn.Module:
        return toy_mlp()

    def collate(self, rows: list[dict]) -> Batch:
        return mlp_batch(len(rows))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.scale * mlp_loss(model, batch)


class Half:
    def build(self, folder) -> nn.Module:
        return toy_mlp()


OWN = "tests.engine.test_task_contract:OwnTask"


def test_a_class_with_the_required_methods_gets_the_other_ones():
    task, model, batch = load_task(OWN, {"scale": 2.0}), randomise(ToyMlp()).double(), mlp_batch()
    assert encode(task, {"text": "x"}) == [{}]
    assert torch.equal(measurement(task, model, batch), 2 * mlp_loss(model, batch))
    assert predict(task, model, batch) is None
    assert isinstance(initialise(task, __import__("pathlib").Path(".")), ToyMlp)
    with pytest.raises(ValueError, match=r"train.base is missing"):
        initialise(task, None)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("text-clasification", {}, "is not known: use one of text-classification"),
        (OWN, {"size": 1}, r"does not take these settings \['size'\]"),
        ("tests.engine.test_task_contract:Half", {}, "has no method 'collate'"),
        ("tests.engine.nowhere:Task", {}, "no module"),
    ],
)
def test_what_is_no_task_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, settings)


def test_built_in_tasks_take_tokenizer_and_classes_from_the_model_folder(tmp_path):
    both = {"model": str(tmp_path), "tokenizer": str(tmp_path)}
    assert with_model_folder("text-classification", {}, tmp_path) == both
    assert with_model_folder("causal-lm", {"tokenizer": "own"}, tmp_path) == both | {"tokenizer": "own"}
    assert with_model_folder("image-classification", {}, tmp_path) == {"model": str(tmp_path)}
    for name, settings in (("regression", {"factory": "a:b"}), (OWN, {})):
        assert with_model_folder(name, settings, tmp_path) == settings
