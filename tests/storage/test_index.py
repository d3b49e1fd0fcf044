"""The index answers both ways, in order, and stands only once it is whole."""

import pickle
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import index as index_module
from storage.index import ScoreIndex, write_index
from storage.locations import Location, ObjectConflict

META = {"method": "tracin", "score_unit": "dot", "queries": 6}


def by_query(queries: range = range(6), k: int = 3) -> Iterator[pa.Table]:
    """Per query its opponents, then its proponents, ranks in falling order."""
    for query in queries:
        for side, sign in (("opponent", -1), ("proponent", 1)):
            ranks = list(range(k))[::-1]
            yield pa.table(
                {
                    "query": [query] * k,
                    "rank": pa.array(ranks, pa.int32()),
                    "side": [side] * k,
                    "id": [query * 10 + rank for rank in ranks],
                    "score": [sign * (9.0 - rank) for rank in ranks],
                    "snippet": [f"text {rank}" for rank in ranks],
                }
            )


def by_example(ids: range = range(10)) -> Iterator[pa.Table]:
    for example in ids:
        yield pa.table({"id": [example], "source_id": [f"s{example}"], "self_influence": [example / 2]})


def queries(count: range = range(6)) -> Iterator[pa.Table]:
    for query in count:
        yield pa.table({"query": [query], "loss": [query / 2]})


def test_top_is_best_first_on_each_side(place: Location) -> None:
    write_index(place, "a", META, by_query(), by_example(), queries())
    proponents, opponents = pickle.loads(pickle.dumps(ScoreIndex.open(place, "a"))).top(4, 2)
    assert proponents["id"].to_pylist() == [40, 41]
    assert proponents["score"].to_pylist() == [9.0, 8.0]
    assert opponents["score"].to_pylist() == [-9.0, -8.0]
    assert opponents["snippet"].to_pylist() == ["text 0", "text 1"]


def test_all_that_is_there_if_more_is_asked_for(run: Location) -> None:
    index = write_index(run, "a", META, by_query(), by_example(), queries())
    assert [side.num_rows for side in index.top(0, 100)] == [3, 3]


def test_example(run: Location) -> None:
    index = write_index(run, "a", META, by_query(), by_example(), queries())
    assert index.example(7) == {"id": 7, "source_id": "s7", "self_influence": 3.5}
    assert index.meta == META
    assert sum(batch.num_rows for batch in index.table("by_example", ["id"])) == 10


def test_only_the_row_groups_of_a_query_are_read(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "ROW_GROUP", 30)
    index = write_index(run, "a", META, by_query(range(300)), by_example(), queries())
    read: list[int] = []
    whole = pq.ParquetFile.read_row_groups

    def counting(self: pq.ParquetFile, groups: list[int], **more: object) -> pa.Table:
        read.extend(groups)
        return whole(self, groups, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counting)
    assert index.top(299, 1)[0]["query"].to_pylist() == [299]
    assert read == [59]
    assert pq.ParquetFile(run.local_path() / "index/a/by_query.parquet").num_row_groups == 60


def test_by_example_the_strongest_stand_first(run: Location) -> None:
    index = write_index(run, "a", META, by_query(), by_example(), queries())
    rows = [row for table in by_query() for row in table.to_pylist()]
    names = ["id", "query", "side", "rank", "score"]
    with index.open_table("influenced") as table:
        found = table.columns(names).to_pylist()
        keys = [(row["id"], -abs(row["score"]), row["query"]) for row in found]
        assert keys == sorted(keys)
        assert sorted(map(str, found)) == sorted(str({name: row[name] for name in names}) for row in rows)
        assert {row["query"] for row in table.where(40).to_pylist()} == {4}


def test_what_is_not_there_is_named(run: Location) -> None:
    index = write_index(run, "a", META, by_query(), by_example(), queries())
    with pytest.raises(ValueError, match="index 'a' has no query 6: it has rows 0 to 5"):
        index.top(6, 1)
    with pytest.raises(ValueError, match="index 'a' has no example 10"):
        index.example(10)
    with pytest.raises(ValueError, match="top=0 is not allowed: must be at least 1"):
        index.top(0, 0)
    with pytest.raises(FileNotFoundError, match="has no score index 'b': there are a"):
        ScoreIndex.open(run, "b")


def test_labels_are_those_of_finished_indices(run: Location) -> None:
    assert ScoreIndex.labels(run) == []
    write_index(run, "b", META, by_query(), by_example(), queries())
    write_index(run, "a", META, by_query(), by_example(), queries())
    run.create("index/c/by_query.parquet", b"killed")
    assert ScoreIndex.labels(run) == ["a", "b"]


def test_a_killed_writer_leaves_no_index_and_the_next_replaces_its_tables(run: Location) -> None:
    def dying() -> Iterator[pa.Table]:
        yield from by_example(range(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_index(run, "a", META, by_query(range(2)), dying(), queries())
    assert ScoreIndex.labels(run) == []
    index = write_index(run, "a", META, by_query(), by_example(), queries())
    assert index.top(5, 1)[0]["id"].to_pylist() == [50]


def test_a_finished_index_stays(run: Location) -> None:
    write_index(run, "a", META, by_query(), by_example(), queries())
    write_index(run, "a", META, iter(()), iter(()), iter(()))
    assert ScoreIndex.open(run, "a").example(3)["id"] == 3
    with pytest.raises(ObjectConflict, match="index/a/meta.json"):
        write_index(run, "a", {**META, "method": "other"}, iter(()), iter(()), iter(()))


def test_tables_must_be_in_order_and_complete(run: Location) -> None:
    with pytest.raises(ValueError, match="by_query.parquet must be written in order of 'query'"):
        write_index(run, "a", META, [*by_query(range(2)), *by_query(range(1))], by_example(), queries())
    swapped = pa.concat_tables([*by_query(range(1, 2)), *by_query(range(1))])
    with pytest.raises(ValueError, match="in order of 'query'"):
        write_index(run, "a", META, [swapped], by_example(), queries())
    with pytest.raises(ValueError, match="by_query.parquet lacks the column 'score'"):
        write_index(run, "a", META, [next(by_query()).drop_columns(["score"])], by_example(), queries())
    assert run.list() == []


def test_an_index_without_scores_can_be_asked(run: Location) -> None:
    index = write_index(run, "a", META, iter(()), iter(()), iter(()))
    with pytest.raises(ValueError, match="has no query 0"):
        index.top(0, 1)
