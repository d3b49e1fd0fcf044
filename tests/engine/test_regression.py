import numpy as np
import pytest
import torch
from torch import nn

from engine.gradients import PerExampleGradients
from engine.models import save_checkpoint
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.tasks.regression import Regression
from tests import oracles
from tests.conftest import randomise, tiny_bert

FACTORY = "tests.engine.test_regression:line"


def line() -> nn.Module:
    return nn.Linear(3, 1)


def rows_of(task: Regression) -> list[dict]:
    records = [{"x": [1.0, 2, i], "target": i / 2, "id": i} for i in range(4)]
    return [record | row for record in records for row in task.encode(record)]


def test_squared_errors_and_their_gradients_are_in_closed_form(tmp_path):
    task = Regression(FACTORY)
    save_checkpoint(randomise(line()), tmp_path)
    model, batch = task.build(tmp_path).double().eval(), task.collate(rows_of(task))
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        out = hooks(task.loss, batch)
    x = batch["inputs"].double()
    error = (x @ model.weight[0] + model.bias - batch["target"]).detach()
    assert torch.allclose(out.losses, error**2, rtol=1e-12)
    assert oracles.relative_error(out.arrays["weight"], 2 * error[:, None] * x) <= 1e-12
    assert oracles.relative_error(out.norms[:, 1], 2 * error.abs()) <= 1e-12
    assert task.predict(model, batch) == pytest.approx((error + batch["target"]).tolist())


def test_a_text_model_with_one_output_regresses(tokenizer_folder, tmp_path):
    task = Regression(tokenizer=str(tokenizer_folder / "wrapped"))
    save_checkpoint(tiny_bert(num_labels=1), tmp_path)
    model = task.build(tmp_path).double().eval()
    rows = [task.encode({"text": t, "target": 0.5})[0] for t in ("the film", "a very good plot")]
    with torch.inference_mode():
        batch = task.collate(rows)
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        assert torch.allclose(task.loss(model, batch), (out - 0.5) ** 2, rtol=1e-12)
    save_checkpoint(tiny_bert(num_labels=3), tmp_path / "three")
    with pytest.raises(ValueError, match="another architecture"):
        task.build(tmp_path / "three")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"x": [1, 2, 3]}, "field 'target' is None"),
        ({"x": [1, 2, 3], "target": "high"}, "field 'target' is 'high'"),
        ({"x": ["a", 2], "target": 1}, "field 'x' is .*, numbers needed"),
        ({"target": 1}, "field 'x' is None, numbers needed"),
        ({"x": [1, None], "target": 1}, "numbers needed"),
    ],
)
def test_records_without_numbers_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Regression(FACTORY).encode(record)


def test_number_types_are_taken():
    assert Regression(FACTORY).encode({"x": np.arange(3), "target": np.float32(2)})[0]["target"] == 2.0


@pytest.mark.parametrize("settings", [{}, {"factory": FACTORY, "tokenizer": "x"}])
def test_numbers_or_texts_must_be_chosen(settings):
    with pytest.raises(ValueError, match="needs either"):
        Regression(**settings)
