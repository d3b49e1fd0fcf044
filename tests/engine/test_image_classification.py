import numpy as np
import pytest
import torch
from torch import nn

from engine.gradients import PerExampleGradients
from engine.models import save_checkpoint
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.tasks.image_classification import ImageClassification
from tests import oracles
from tests.conftest import randomise

FACTORY = "tests.engine.test_image_classification:pixels_to_classes"


def pixels_to_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def records(shape: tuple[int, ...] = (3, 4)) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"images": rng.integers(0, 256, shape, dtype=np.uint8), "labels": i % 3, "id": i} for i in range(4)]


def rows_of(task: ImageClassification, shape: tuple[int, ...] = (3, 4)) -> list[dict]:
    return [record | row for record in records(shape) for row in task.encode(record)]


def test_pixels_are_scaled_then_normalised():
    task = ImageClassification(FACTORY, classes=3, mean=(0.5,), std=(0.25,))
    pixels = task.collate(rows_of(task))["pixels"]
    assert pixels.shape == (4, 1, 3, 4)
    assert torch.allclose(pixels[2, 0], (torch.from_numpy(records()[2]["images"]) / 255.0 - 0.5) / 0.25)


def test_colours_come_first():
    task = ImageClassification(FACTORY, classes=3, mean=(0.0, 0.1, 0.2), std=(1.0, 1.0, 1.0))
    pixels = task.collate(rows_of(task, (2, 5, 3)))["pixels"]
    assert pixels.shape == (4, 3, 2, 5)
    assert pixels[0, 2, 1, 4] == pytest.approx(records((2, 5, 3))[0]["images"][1, 4, 2] / 255 - 0.2)


def test_losses_and_gradients_equal_autograd(tmp_path):
    task = ImageClassification(FACTORY, classes=3)
    save_checkpoint(randomise(pixels_to_classes()), tmp_path)
    model, batch = task.build(tmp_path).double().eval(), task.collate(rows_of(task))
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
        out = hooks(task.loss, batch)
    truth = oracles.gradients(model, task.loss, batch)
    assert all(oracles.relative_error(array, truth[name].flatten(1)) <= 1e-10 for name, array in out.arrays.items())
    assert task.predict(model, batch) == task.logits(model, batch).argmax(-1).tolist()


@pytest.mark.parametrize("image", [None, [[1, 2]], np.zeros((2, 2)), np.zeros(4, dtype=np.uint8)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match=r"field 'images' is .*: needs uint8 \[H, W\]"):
        ImageClassification(FACTORY, classes=3).encode({"images": image, "labels": 1})


def test_labels_out_of_range_and_mixed_shapes_are_refused():
    task = ImageClassification(FACTORY, classes=3)
    with pytest.raises(ValueError, match="allowed: 0 to 2"):
        task.encode(records()[0] | {"labels": 3})
    with pytest.raises(ValueError, match="images of different shapes"):
        task.collate([*rows_of(task), *rows_of(task, (2, 6))])
