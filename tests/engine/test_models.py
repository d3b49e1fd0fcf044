from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.models import (
    architecture_of,
    import_path,
    load_hugging_face,
    load_torch,
    read_state,
    ready_for_scoring,
    save_checkpoint,
    weight_files,
)
from tests.conftest import ToyMlp, randomise, tiny_bert, tiny_gpt2

CPU = torch.device("cpu")
FACTORY = "tests.conftest:toy_mlp"


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_models_come_back_as_saved(tmp_path, attention):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for model, auto in ((tiny_bert(), AutoModelForSequenceClassification), (tiny_gpt2(), AutoModelForCausalLM)):
        folder = tmp_path / type(model).__name__
        save_checkpoint(model, folder)
        back = load_hugging_face(folder, auto, attention)
        assert same_weights(model, back)
        assert back.config._attn_implementation == attention


@pytest.mark.parametrize("change", [{"hidden_size": 12}, {"num_labels": 5}, {"num_hidden_layers": 3}])
def test_weights_of_another_architecture_are_refused(tmp_path, change):
    from transformers import AutoModelForSequenceClassification

    save_checkpoint(tiny_bert(), tmp_path / "a")
    tiny_bert(**change).config.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="is of another architecture than BertForSequenceClassification"):
        load_hugging_face(tmp_path / "a", AutoModelForSequenceClassification, "eager")


def test_a_checkpoint_without_the_task_head_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    tiny_bert().bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another architecture"):
        load_hugging_face(tmp_path, AutoModelForSequenceClassification, "eager")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(ValueError, match=r"has no config.json"):
        load_hugging_face(tmp_path, AutoModelForSequenceClassification, "eager")
    tiny_bert().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not load as"):
        load_hugging_face(tmp_path, AutoModelForSequenceClassification, "eager")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_torch_modules_come_back_from_either_form(tmp_path, form):
    model = randomise(ToyMlp())
    if form == "safetensors":
        save_checkpoint(model, tmp_path)
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_weights(model, load_torch(tmp_path, FACTORY))


def test_torch_weights_of_another_architecture_are_refused(tmp_path):
    state = ToyMlp().state_dict()
    less = {name: weight for name, weight in state.items() if name != "head.bias"}
    more = state | {"extra": state["head.bias"]}
    for name, other in (("wide", ToyMlp(width=7).state_dict()), ("less", less), ("more", more)):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file({n: w.clone() for n, w in other.items()}, tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match="of another architecture"):
            load_torch(tmp_path / name, FACTORY)


def test_a_tied_module_is_saved_and_read_whole(tmp_path):
    model = ToyMlp(6, 6, 6)
    model.head.weight = model.first.weight
    save_checkpoint(model, tmp_path)
    assert torch.equal(read_state(tmp_path)["head.weight"], model.first.weight)


def test_optimizer_state_is_no_weight_file_and_safetensors_come_first(tmp_path):
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "pytorch_model.bin", "notes.txt"):
        (tmp_path / name).touch()
    assert [f.name for f in weight_files(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").touch()
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]
    with pytest.raises(ValueError, match="holds no weights"):
        read_state(tmp_path / "missing")


class Code:
    """Would run on loading if pickles were trusted."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_code_in_torch_files_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    torch.save({"x": Code()}, tmp_path / "m" / "weights.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        read_state(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def test_scoring_freezes_everything_in_evaluation_mode():
    model = ready_for_scoring(tiny_bert().train(), CPU, torch.float64)
    assert not any(m.training for m in model.modules())
    assert all(not w.requires_grad and w.dtype == torch.float64 for w in model.parameters())


def test_a_batch_norm_by_batch_statistics_is_refused():
    with pytest.raises(ValueError, match="module 1 is a batch norm that uses the statistics of the batch"):
        ready_for_scoring(
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), CPU, torch.float32
        )
    ready_for_scoring(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), CPU, torch.float32)


def test_a_module_that_stays_in_training_mode_is_refused():
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True):
            return super().train(True)

    with pytest.raises(ValueError, match="module 0 stays in training mode"):
        ready_for_scoring(nn.Sequential(Stubborn()), CPU, torch.float32)


def test_architecture_is_equal_for_checkpoints_and_only_for_them(tmp_path):
    models = {"a": tiny_bert(), "b": randomise(tiny_bert(), 7), "other": tiny_bert(num_labels=2)}
    for name, model in models.items():
        save_checkpoint(model, tmp_path / name)
    a, b, other = (architecture_of(tmp_path / name) for name in models)
    assert a == b != other


def test_architecture_is_the_same_from_either_form_of_weights(tmp_path):
    model = ToyMlp()
    save_checkpoint(model, tmp_path / "safetensors")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert architecture_of(tmp_path / "safetensors") == architecture_of(tmp_path / "bin")


def test_dotted_paths_say_which_half_is_missing():
    assert import_path(FACTORY)().__class__ is ToyMlp
    for path, message in (
        ("tests.conftest", "not a dotted path"), ("nowhere.at:all", "no module"), ("tests.conftest:gone", "has no 'gone'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            import_path(path)
    with pytest.raises(ValueError, match=r"not a torch.nn.Module"):
        load_torch(Path("."), "tests.conftest:mlp_batch")
