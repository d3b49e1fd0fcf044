"""Rows go to Arrow and come back as they were."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.rows import from_column, from_table, infer_schema, rename_field, to_batch


def row(number: int = 0, encoded: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    own = {"id": number, "source_id": str(number), "doc_id": number, "chunk": 0, "length": 1}
    return {**own, **fields, "encoded": encoded or {}}


def back_and_forth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = [f"row {i}" for i in range(len(rows))]
    batch = to_batch(rows, infer_schema(rows, places), places)
    return from_table(pa.Table.from_batches([batch]))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float16", "float32", "float64", "bool"])
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 3), (2, 3, 4)])
def test_arrays_keep_type_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for found in back_and_forth([row(x=array, encoded={"y": array}), row(1, x=array[:1], encoded={"y": array})]):
        assert found["y"].dtype == array.dtype
        np.testing.assert_array_equal(found["y"], array)
    assert found["x"].shape == (min(1, shape[0]), *shape[1:])
    assert found["x"].flags.writeable


def test_a_transposed_image_keeps_its_pixels() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    np.testing.assert_array_equal(back_and_forth([row(image=image)])[0]["image"], image)


def test_values_keep_their_meaning() -> None:
    values = {"text": "ü", "n": 3, "f": 0.1, "b": True, "words": ["a", "b"], "numbers": [1, 2], "nested": {"k": [1.5]}}
    found = back_and_forth([row(**values)])[0]
    assert found["numbers"].tolist() == [1, 2]
    assert {name: found[name] for name in values if name != "numbers"} == {
        name: value for name, value in values.items() if name != "numbers"
    }


def test_missing_fields_are_none() -> None:
    found = back_and_forth([row(a=1), row(1, b=np.ones(2)), row(2, c=None, d=np.ones((2, 2)))])
    assert (found[0]["b"], found[1]["a"], found[0]["d"], found[2]["c"]) == (None, None, None, None)
    assert (found[0]["a"], found[1]["b"].tolist(), found[2]["d"].shape) == (1, [1, 1], (2, 2))


def test_encoded_fields_win_but_never_over_our_own() -> None:
    found = back_and_forth([row(7, label="good", encoded={"label": 1})])[0]
    assert found["label"] == 1
    assert [found[name] for name in ("id", "source_id", "doc_id", "chunk", "length")] == [7, "7", 7, 0, 1]


def test_a_slice_of_a_table_is_those_rows() -> None:
    rows = [row(i, x=np.full(i, i), image=np.full((1, i), i)) for i in range(5)]
    batch = to_batch(rows, infer_schema(rows, [""] * 5), [""] * 5)
    found = from_table(pa.Table.from_batches([batch]).slice(2, 2))
    assert [r["x"].tolist() for r in found] == [[2, 2], [3, 3, 3]]
    assert [r["image"].tolist() for r in found] == [[[2, 2]], [[3, 3, 3]]]
    assert [r["id"] for r in found] == [2, 3]


@pytest.mark.parametrize("name", ["id", "source_id", "doc_id", "chunk", "length", "encoded"])
def test_fields_named_like_ours_are_renamed(name: str) -> None:
    assert rename_field(name) == f"{name}_"
    assert rename_field("text") == "text"


def test_mixed_types_in_the_first_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"'score' must have one type in every record, has str \(a\), float \(b\)"):
        infer_schema([row(score="x"), row(score=1.0)], ["a", "b"])


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (row(new=1), "place 9: field 'new' is not in the first records, which have: a, s"),
        (row(encoded={"new": 1}), "place 9: field 'new' is not in the first records, which have: t"),
        (row(a=0.5), "place 9: field 'a' must be int64 as in the first records, is float 0.5"),
        (row(s=1), "place 9: field 's' must be string as in the first records, is int 1"),
        (row(encoded={"t": "x"}), "place 9: field 't' must be list<item: int64> as in the first records, is str 'x'"),
    ],
)
def test_later_rows_must_fit(later: dict[str, Any], message: str) -> None:
    first = row(a=1, s="x", encoded={"t": np.arange(3)})
    schema = infer_schema([first], [""])
    with pytest.raises(ValueError) as caught:
        to_batch([first, later], schema, ["place 8", "place 9"])
    assert str(caught.value).startswith(message)


def test_a_slice_of_an_array_is_those_rows() -> None:
    lists = pa.array([[1], [2, 2], [3, 3, 3], None]).slice(1)
    assert [None if x is None else x.tolist() for x in from_column(lists)] == [[2, 2], [3, 3, 3], None]
