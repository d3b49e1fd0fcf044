import pytest
import torch

from engine.gradients import PerExampleGradients
from engine.models import save_checkpoint
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.tasks.text_classification import TextClassification
from tests import oracles
from tests.conftest import tiny_bert

TEXTS = ["the film was good", "bad", "a very dull and never great plot", "so fine"]


@pytest.fixture
def task(tokenizer_folder) -> TextClassification:
    return TextClassification(str(tokenizer_folder / "wrapped"), max_tokens=8)


def rows_of(task: TextClassification) -> list[dict]:
    records = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    return [row | {"id": i} for i, record in enumerate(records) for row in task.encode(record)]


def test_losses_are_cross_entropies_and_do_not_depend_on_padding(task):
    model, rows = tiny_bert().double(), rows_of(task)
    with torch.inference_mode():
        together = task.loss(model, task.collate(rows))
        for row, found in zip(rows, together, strict=True):
            ids = torch.tensor(row["input_ids"].tolist())[None]
            exact = -model(ids).logits.log_softmax(-1)[0, row["target"]]
            assert torch.allclose(found, exact, rtol=1e-12)


def test_per_example_gradients_equal_autograd(task):
    model, batch = tiny_bert().double(), task.collate(rows_of(task))
    parameters = select_parameters(model, ["classifier", "*.query.weight"])
    with PerExampleGradients(model, parameters, Whole(parameters)) as hooks:
        out = hooks(task.loss, batch)
    truth = oracles.gradients(model, task.loss, batch)
    for name, array in out.arrays.items():
        assert oracles.relative_error(array, truth[name].flatten(1)) <= 1e-10


def test_long_texts_are_cut_and_counted(task):
    assert [row["truncated"] for row in rows_of(task)] == [False, False, True, False]
    assert max(len(row["input_ids"]) for row in rows_of(task)) == 8


def test_eager_and_sdpa_attention_agree(tokenizer_folder, tmp_path):
    save_checkpoint(tiny_bert(), tmp_path)
    losses = []
    for attention in ("eager", "sdpa"):
        task = TextClassification(str(tokenizer_folder / "wrapped"), str(tmp_path), attention=attention)
        with torch.inference_mode():
            losses.append(task.loss(task.build(tmp_path).eval(), task.collate(rows_of(task))))
    assert oracles.relative_error(losses[0], losses[1]) <= 1e-5


def test_classes_come_from_the_model_and_predictions_are_their_names(tokenizer_folder, tmp_path):
    model = tiny_bert(id2label={0: "neg", 1: "mid", 2: "pos"}, label2id={"neg": 0, "mid": 1, "pos": 2})
    save_checkpoint(model, tmp_path)
    task = TextClassification(str(tokenizer_folder / "wrapped"), str(tmp_path))
    row = task.encode({"text": "the film", "label": "pos"})[0]
    assert row["target"] == 2
    assert set(task.predict(task.build(tmp_path).eval(), task.collate([row]))) <= {"neg", "mid", "pos"}
    with pytest.raises(ValueError, match="allowed: 0 to 2, or one of neg, mid, pos"):
        task.encode({"text": "the film", "label": "great"})


def test_a_label_outside_the_model_is_refused(task):
    row = task.encode({"text": "the film", "label": 7})[0]
    with pytest.raises(ValueError, match="label 7 is outside the model's 3 classes"):
        task.loss(tiny_bert(), task.collate([row]))


def test_half_precision_logits_give_float32_losses(task):
    model = tiny_bert().to(torch.bfloat16)
    with torch.inference_mode():
        assert task.loss(model, task.collate(rows_of(task))).dtype == torch.float32


@pytest.mark.parametrize("record", [{"label": 1}, {"text": 3, "label": 1}, {"text": "the"}])
def test_records_without_text_or_label_are_refused(task, record):
    with pytest.raises(ValueError, match="field '(text|label)'"):
        task.encode(record)
