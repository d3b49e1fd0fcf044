import json

import numpy as np
import pytest

from engine.tasks.labels import Labels


def test_names_come_from_the_config_or_the_caller(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "neg", "1": "pos"}}))
    for labels in (Labels(tmp_path, None), Labels(None, ["neg", "pos"])):
        assert labels.index("pos", "label") == 1
        assert labels.index(1, "label") == 1
        assert labels.name(0) == "neg"
        assert labels.count == 2


def test_default_names_count_as_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}))
    labels = Labels(tmp_path, None)
    assert labels.count == 3
    assert labels.name(2) == 2


@pytest.mark.parametrize("label", [1, 1.0, "1", np.int64(1), np.float32(1), True])
def test_whole_numbers_in_any_form_are_taken(label):
    assert Labels(None, None, 2).index(label, "label") == 1


@pytest.mark.parametrize("label", [2, -1, 0.5, "good", "", float("nan"), float("inf"), [1]])
def test_other_labels_are_refused_with_what_is_allowed(label):
    with pytest.raises(ValueError, match=r"field 'y' is .*, allowed: 0 to 1"):
        Labels(None, None, 2).index(label, "y")


def test_a_missing_label_is_refused_and_without_a_count_any_whole_number_goes():
    with pytest.raises(ValueError, match="field 'y' is missing"):
        Labels(None, None).index(None, "y")
    assert Labels(None, None).index(2**20, "y") == 2**20


def test_names_that_are_numbers_are_names_first() -> None:
    labels = Labels(None, ["1", "2", "3"])
    assert [labels.index(label, "stars") for label in ("1", 2, 3)] == [0, 1, 2]
