import pytest
import torch

from engine.methods.contract import METHODS, Rows, load_method
from engine.methods.tracin import GradientDot, TracIn


@pytest.mark.parametrize("name", METHODS)
def test_every_named_method_loads_with_its_defaults_and_declares_itself(name):
    method = load_method(name, {})
    assert method.reads in ("gradients", "features", "examples", "ids")
    assert isinstance(method.score_unit, str)
    assert isinstance(method.online, bool)
    assert method.weighs_by_learning_rate == (name == "tracin")


def test_settings_reach_the_method():
    assert load_method("gradient-dot", {"checkpoint": 2}) == GradientDot(checkpoint=2)
    assert TracIn().checkpoints(3) == [0, 1, 2]
    assert GradientDot().checkpoints(3) == [2]


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"method.name='trac-in' is not known: use one of tracin"):
        load_method("trac-in", {})
    with pytest.raises(ValueError, match=r"tracin does not take these settings \['damping'\]"):
        load_method("tracin", {"damping": 0.1})


def test_rows_multiply_every_array_or_give_the_products_they_hold():
    a, b = torch.randn(3, 2), torch.randn(3, 5)
    queries = {"a": torch.randn(4, 2), "b": torch.randn(4, 5)}
    rows = Rows(torch.arange(3), {"a": a, "b": b}, None, ("a", "b"))
    assert torch.allclose(rows.dot(queries), a @ queries["a"].T + b @ queries["b"].T)
    made = torch.randn(3, 4)
    assert Rows(torch.arange(3), {}, None, (), made).dot(queries) is made


def test_half_precision_rows_are_multiplied_in_the_width_of_the_queries():
    rows = Rows(torch.arange(1), {"a": torch.full((1, 3000), 10.0, dtype=torch.float16)}, None, ("a",))
    assert rows.dot({"a": torch.full((1, 3000), 10.0)}).tolist() == [[300_000.0]]
