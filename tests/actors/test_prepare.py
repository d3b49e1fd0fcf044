import numpy as np
import pytest
import torch

from actors.prepare import misclassified, plain, query_batches, refuse_nonfinite
from engine.batches import Batch
from engine.methods.contract import QueryState
from engine.projection import Range, RowLayout
from engine.tasks.labels import Labels

LAYOUT = RowLayout({"rows": 3}, (Range("a.weight", "rows", 0, 2, 2, 1), Range("b.bias", "rows", 2, 3, 1, 1)))


class Ids:
    def collate(self, rows: list[dict]) -> Batch:
        return Batch(torch.tensor([row["id"] for row in rows]), {})


@pytest.mark.parametrize(("budget", "cuts"), [(100, [5]), (6, [2, 1, 1, 1]), (1, [1, 1, 1, 1, 1])])
def test_queries_keep_their_order_within_the_budget(budget: int, cuts: list[int]) -> None:
    rows = [{"id": i, "length": n} for i, n in enumerate((3, 2, 4, 9, 1))]
    batches = query_batches(Ids(), rows, budget)  # type: ignore[arg-type]
    assert [len(batch) for batch in batches] == cuts
    assert torch.cat([batch.ids for batch in batches]).tolist() == [0, 1, 2, 3, 4]


def state(rows: list[list[float]], losses: list[float]) -> QueryState:
    return QueryState({"rows": torch.tensor(rows)}, None, torch.tensor(losses), 1.0, (0, 1))


def test_a_query_that_is_not_finite_is_named_with_the_place() -> None:
    nan = float("nan")
    refuse_nonfinite(state([[1, 2, 3]], [0.5]), LAYOUT, ["0"], "c-1")
    with pytest.raises(
        FloatingPointError, match=r"query 1 \(source:x\) is not finite: the gradient of b.bias under c-1"
    ):
        refuse_nonfinite(state([[1, 2, 3], [1, 2, nan]], [0.5, 0.5]), LAYOUT, ["0", "1 (source:x)"], "c-1")
    with pytest.raises(FloatingPointError, match="query 0 is not finite: the loss under c-1"):
        refuse_nonfinite(state([[nan, 2, 3], [1, 2, nan]], [nan, 0.5]), LAYOUT, ["0", "1"], "c-1")


class Named:
    label_field = "mood"
    labels = Labels(None, ["bad", "good"])


class Free:
    label_field = "mood"


@pytest.mark.parametrize(
    ("task", "label", "predicted", "wrong"),
    [
        (Named(), 1, "good", False),
        (Named(), "good", "good", False),
        (Named(), "bad", "good", True),
        (Named(), "good", None, None),
        (Named(), None, "good", None),
        (Free(), 3, "3", False),
        (Free(), 3, "4", True),
        (Ids(), 3, "4", None),
    ],
)
def test_a_mistake_is_another_class_than_the_querys_own(
    task: object, label: object, predicted: object, wrong: bool | None
) -> None:
    assert misclassified(task, {"mood": label}, predicted) is wrong  # type: ignore[arg-type]


def test_predictions_are_plain() -> None:
    given = [torch.tensor(2), np.float32(0.5), float("inf"), "good", None, (1, 2)]
    assert [plain(one) for one in given] == [2, 0.5, "inf", "good", None, "(1, 2)"]
