"""A corpus is read back as it was ingested, however often the ingest was killed."""

import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import segments as segments_module
from storage.corpus import Corpus, ingest
from storage.damage import mark_damaged
from storage.locations import Location
from storage.segments import SourceChanged
from storage.verify import verify


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.segments.ROW_GROUP", 4)
    monkeypatch.setattr("storage.corpus.ROW_GROUP", 4)


def source(count: int, start: int = 0) -> Iterator[tuple[dict[str, Any], str]]:
    for i in range(start, start + count):
        yield {"id": f"s{i}", "text": "word " * i, "label": i % 2}, f"file line {i + 1}"


def encode(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunks of at most three tokens; an empty text gives none."""
    tokens = np.arange(len(record["text"].split()), dtype=np.int32)
    return [{"input_ids": tokens[i : i + 3], "label": 10 + record["label"]} for i in range(0, len(tokens), 3)]


def whole(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"input_ids": np.arange(2), "truncated": record["label"] == 1}]


def all_rows(corpus: Corpus) -> list[dict[str, Any]]:
    return [row for s in corpus.segments for row in corpus.read(s, 0, s.rows)]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in row.items()} for row in rows]


def test_rows_are_what_was_ingested(place: Location) -> None:
    report = ingest(place, "train", source(8), encode, segment_rows=4)
    corpus = Corpus.open(place, "train")
    expected = [(f"s{i}", i, c, chunk) for i in range(8) for c, chunk in enumerate(encode(next(source(1, i))[0]))]
    rows = all_rows(corpus)
    assert [(r["source_id"], r["doc_id"], r["chunk"]) for r in rows] == [(s, d, c) for s, d, c, _ in expected]
    assert [r["input_ids"].tolist() for r in rows] == [chunk["input_ids"].tolist() for *_, chunk in expected]
    assert [r["length"] for r in rows] == [len(chunk["input_ids"]) for *_, chunk in expected]
    assert [r["id"] for r in rows] == list(range(len(expected)))
    assert [r["label"] for r in rows] == [10 + d % 2 for _, d, _, _ in expected]
    assert rows[0]["input_ids"].dtype == np.int32
    assert (report.examples, report.documents, report.skipped, report.chunked) == (12, 7, 1, 4)
    assert report.tokens == 28 == sum(r["length"] for r in rows)


def test_segments_follow_one_another(run: Location) -> None:
    ingest(run, "train", source(8), encode, segment_rows=4)
    corpus = Corpus.open(run, "train")
    assert [s.name for s in corpus.segments] == ["000000.0", "000001.0", "000002.0"]
    assert [(s.base, s.rows) for s in corpus.segments] == [(0, 5), (5, 4), (9, 3)]  # a document is never cut
    assert [s.ends for s in corpus.segments] == [False, False, True]
    assert corpus.rows == 12


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 5), (4, 8), (0, 11), (10, 11), (6, 6)])
def test_any_range_is_those_rows(run: Location, start: int, stop: int) -> None:
    ingest(run, "train", source(11), whole)
    corpus = Corpus.open(run, "train")
    found = corpus.read(corpus.segments[0], start, stop)
    assert [r["id"] for r in found] == list(range(start, stop))
    assert [r["text"] for r in found] == ["word " * i for i in range(start, stop)]


def test_only_the_needed_row_groups_are_read(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest(run, "train", source(20), whole)
    corpus = Corpus.open(run, "train")
    segment = corpus.segments[0]
    groups: list[int] = []
    file = corpus._file(segment)
    read = file.read_row_group
    monkeypatch.setattr(file, "read_row_group", lambda group, **more: (groups.append(group), read(group, **more))[1])
    corpus.read(segment, 9, 13)
    corpus.read(segment, 13, 15)
    assert groups == [2, 3]


def test_a_row_shows_its_original_fields_and_what_encode_put_in_their_place(run: Location) -> None:
    records = [({"id": 7, "length": "long", "text": "a", "image": np.eye(2, dtype=np.uint8)}, "x")]
    ingest(run, "q", iter(records), lambda record: [{"input_ids": np.arange(4), "text": "encoded"}])
    row = Corpus.open(run, "q").row(0)
    assert row["image"].tolist() == [[1, 0], [0, 1]]
    del row["image"]
    assert row == {
        "id": 0,
        "source_id": "7",
        "doc_id": 0,
        "chunk": 0,
        "length": 4,
        "length_": "long",
        "text": "encoded",
    }


def test_length_is_one_without_tokens_and_the_id_a_number_without_ids(run: Location) -> None:
    ingest(run, "q", iter([({"x": 1}, "a"), ({"x": 2, "id": None}, "b")]), lambda record: [{"y": 1}])
    rows = all_rows(Corpus.open(run, "q"))
    assert [(r["source_id"], r["length"]) for r in rows] == [("0", 1), ("1", 1)]


def test_find(run: Location) -> None:
    ingest(run, "train", source(8), encode, segment_rows=5)
    corpus = Corpus.open(run, "train")
    assert corpus.find("s1") == 0
    assert corpus.find("s7") == next(r["id"] for r in all_rows(corpus) if r["source_id"] == "s7")
    with pytest.raises(ValueError, match="'train' has no example with source id 's99'"):
        corpus.find("s99")
    with pytest.raises(ValueError, match="example 12 is not in corpus 'train', which has ids 0 to 11"):
        corpus.row(12)


def test_ids_that_several_records_have_are_counted_and_a_look_up_names_the_rows(run: Location) -> None:
    assert ingest(run, "unique", source(9), encode, segment_rows=3).repeated == 0
    records = [({**r, "id": "twice" if i in (2, 6, 7) else r["id"]}, w) for i, (r, w) in enumerate(source(9))]
    report = ingest(run, "train", iter(records), encode, segment_rows=4)
    assert (report.repeated, report.first_repeated) == (2, "twice")
    corpus = Corpus.open(run, "train")
    rows = [r["id"] for r in all_rows(corpus) if r["source_id"] == "twice" and r["chunk"] == 0]
    with pytest.raises(
        ValueError, match=f"'twice' names 3 records of corpus 'train': .* its row, {rows[0]}, {rows[1]}"
    ):
        corpus.find("twice")
    corpus.erase([r["id"] for r in all_rows(corpus) if r["doc_id"] in (2, 7)])
    assert corpus.find("twice") == rows[1], "the others have left"


class Lost(OSError):  # noqa: N818
    pass


def test_an_ingest_that_lost_its_run_commits_nothing_more(run: Location) -> None:
    left = [2]

    def may_commit() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Lost

    with pytest.raises(Lost):
        ingest(run, "train", source(9), whole, segment_rows=2, may_commit=may_commit)
    assert [s.name for s in segments_module.committed_segments(run, "train")] == ["000000.0", "000001.0"]
    ingest(run, "train", source(9), whole, segment_rows=2)
    assert [r["source_id"] for r in all_rows(Corpus.open(run, "train"))] == [f"s{i}" for i in range(9)]


def test_records_that_are_skipped_at_the_end_make_a_segment_without_rows(run: Location) -> None:
    records = [*source(4, start=1), ({"id": "empty", "text": "", "label": 0}, "line 5")]
    ingest(run, "train", iter(records), encode, segment_rows=5)
    corpus = Corpus.open(run, "train")
    assert [s.rows for s in corpus.segments] == [5, 0]
    assert corpus.find("s4") == 3
    assert len(all_rows(corpus)) == corpus.rows == 5


def test_rows_are_looked_up_without_listing_what_was_erased_again(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(run, "train", source(8), whole)
    corpus, listed = Corpus.open(run, "train"), []
    real = Location.list
    monkeypatch.setattr(Location, "list", lambda self, prefix="": (listed.append(prefix), real(self, prefix))[1])
    assert [corpus.row(i)["source_id"] for i in (2, 5, 3)] == ["s2", "s5", "s3"]
    assert listed == ["corpus/train/erased"]


def test_erased_examples_leave_every_answer(run: Location) -> None:
    ingest(run, "train", source(8), whole)
    corpus = Corpus.open(run, "train")
    corpus.erase([3])
    corpus.erase([5, 1])
    assert Corpus.open(run, "train").erased() == {1, 3, 5}
    with pytest.raises(ValueError, match="example 3 of corpus 'train' was erased"):
        corpus.row(3)
    with pytest.raises(ValueError, match="source id 's3'"):
        corpus.find("s3")
    with pytest.raises(ValueError, match="example 8 is not in"):
        corpus.erase([8])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(0, 9, 2))
def test_a_killed_ingest_resumes_to_the_same_corpus(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole_run = Location.parse(str(tmp_path / "undisturbed"))
    ingest(whole_run, "train", source(9), encode, segment_rows=4)

    def dying() -> Iterator[tuple[dict[str, Any], str]]:
        yield from itertools.islice(source(9), after)
        raise Killed

    with pytest.raises(Killed):
        ingest(run, "train", dying(), encode, segment_rows=4)
    with pytest.raises(FileNotFoundError, match="no finished corpus 'train'"):
        Corpus.open(run, "train")
    report = ingest(run, "train", source(9), encode, segment_rows=4)
    expected, found = Corpus.open(whole_run, "train"), Corpus.open(run, "train")
    assert found.segments == expected.segments
    assert plain(all_rows(found)) == plain(all_rows(expected))
    assert report.examples == 15
    assert after < 8 or report.ingested < 15


def test_rows_without_their_record_are_written_again(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Location.create_json

    def die(self: Location, key: str, value: object) -> None:
        raise Killed

    monkeypatch.setattr(Location, "create_json", die)
    with pytest.raises(Killed):
        ingest(run, "train", source(3), whole)
    assert run.list() == ["corpus/train/000000.0/rows.parquet"]
    monkeypatch.setattr(Location, "create_json", create)
    ingest(run, "train", source(6), whole)
    assert Corpus.open(run, "train").rows == 6


def test_a_finished_corpus_is_not_read_again(run: Location) -> None:
    first = ingest(run, "train", source(5), whole)
    again = ingest(run, "train", iter(()), whole)
    assert (again.examples, again.ingested, first.ingested) == (5, 0, 5)


def test_appending_adds_segments_and_keeps_ids(run: Location) -> None:
    ingest(run, "train", source(5), whole, segment_rows=3)
    before = Corpus.open(run, "train")
    report = ingest(run, "train", source(9), whole, segment_rows=3, grow=True)
    corpus = Corpus.open(run, "train")
    assert (report.examples, report.ingested) == (9, 4)
    assert corpus.segments[: len(before.segments)] == before.segments
    assert [r["source_id"] for r in all_rows(corpus)] == [f"s{i}" for i in range(9)]
    assert [r["doc_id"] for r in all_rows(corpus)] == list(range(9))


def test_a_killed_append_resumes_and_leaves_the_old_corpus_readable(run: Location) -> None:
    def dying() -> Iterator[tuple[dict[str, Any], str]]:
        yield from source(9)
        raise Killed

    ingest(run, "train", source(5), whole, segment_rows=3)
    with pytest.raises(Killed):
        ingest(run, "train", dying(), whole, segment_rows=2, grow=True)
    assert Corpus.open(run, "train").rows == 5
    ingest(run, "train", source(11), whole, segment_rows=2)
    assert [r["source_id"] for r in all_rows(Corpus.open(run, "train"))] == [f"s{i}" for i in range(11)]


@pytest.mark.parametrize(
    ("records", "part"),
    [
        (lambda: source(3), "5 records were ingested before, the source now has only 3"),
        (
            lambda: _with(3, {"text": "other"}),
            "was made with text='word word word ' at file line 4, its source now has 'other'",
        ),
        (
            lambda: itertools.islice(source(9), 1, None),
            "was made with source_id='s0' at file line 2, its source now has 's1'",
        ),
    ],
)
def test_what_changed_before_its_end_does_not_grow(run: Location, records: Callable[[], Any], part: str) -> None:
    ingest(run, "train", source(5), whole, segment_rows=3)
    before = {key: run.read(key) for key in run.list()}
    with pytest.raises(SourceChanged, match=part):
        ingest(run, "train", records(), whole, segment_rows=3, grow=True)
    assert {key: run.read(key) for key in run.list()} == before


def _with(number: int, changed: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for i, (record, place) in enumerate(source(9)):
        yield (record | changed if i == number else record), place


@pytest.mark.parametrize("number", [0, 1])
def test_damaged_rows_are_made_anew_from_the_source(run: Location, number: int) -> None:
    ingest(run, "train", source(5), whole, segment_rows=3)
    key, before = f"corpus/train/00000{number}.0/rows.parquet", all_rows(Corpus.open(run, "train"))
    data = run.read(key)
    run.replace(key, data[:-9])
    mark_damaged(run, "ingest-train", f"00000{number}.0", ["cut"])
    with pytest.raises(SourceChanged, match=f"segment 00000{number}.0 .* its source has changed since"):
        ingest(run, "train", _with(3 * number, {"text": "other"}), whole, segment_rows=3)
    ingest(run, "train", source(5), whole, segment_rows=3)
    assert run.read(key) == data
    assert plain(all_rows(Corpus.open(run, "train"))) == plain(before)
    assert not verify(run).damages


def test_the_fingerprint_is_a_chain_over_content(run: Location) -> None:
    for name, rows, size in (("a", 6, 3), ("b", 6, 3), ("c", 5, 3)):
        ingest(run, name, source(rows), whole, segment_rows=size)
    changed = [({**r, "text": r["text"] + ("!" if i == 0 else "")}, w) for i, (r, w) in enumerate(source(6))]
    ingest(run, "d", iter(changed), whole, segment_rows=3)
    a, b, c, d = (Corpus.open(run, name) for name in "abcd")
    assert a.fingerprint == b.fingerprint == a.segments[-1].fingerprint
    assert a.segments[0].fingerprint == c.segments[0].fingerprint
    assert a.fingerprint != c.fingerprint
    assert d.segments[0].fingerprint != a.segments[0].fingerprint
    assert d.segments[1].fingerprint != a.segments[1].fingerprint


def test_truncated_examples_are_counted_and_the_mark_not_stored(run: Location) -> None:
    assert ingest(run, "train", source(7), whole).truncated == 3
    assert "truncated" not in all_rows(Corpus.open(run, "train"))[0]


def refuse_third(record: dict[str, Any]) -> list[dict[str, Any]]:
    if record["id"] == "s2":
        raise ValueError("field 'text' is empty")
    return [{"input_ids": np.arange(2)}]


def test_refused_records_are_named(run: Location) -> None:
    with pytest.raises(ValueError, match="file line 3: field 'text' is empty"):
        ingest(run, "train", source(5), refuse_third)
    with pytest.raises(ValueError, match="file line 1: encode must not return 'doc_id'"):
        ingest(run, "train", source(5), lambda record: [{"doc_id": 1}])
    with pytest.raises(ValueError, match="corpus 'train': the source has no records"):
        ingest(run, "train", iter(()), whole)
    with pytest.raises(ValueError, match="none of 5 records gave an example"):
        ingest(run, "train", source(5), lambda record: [])
    assert run.list() == []


def test_a_later_record_that_does_not_fit_is_named(run: Location) -> None:
    records = [*source(9), ({"id": "x", "text": "a", "label": "bad"}, "file line 10")]
    with pytest.raises(ValueError, match="file line 10: field 'label' must be int64"):
        ingest(run, "train", iter(records), whole, segment_rows=8)
    assert [s.rows for s in segments_module.committed_segments(run, "train")] == [8]


def test_a_source_that_shrank_is_refused(run: Location) -> None:
    with pytest.raises(ValueError, match="line 10"):
        ingest(run, "train", iter([*source(9), ({"new": 1}, "line 10")]), lambda r: [{"x": 1}], segment_rows=8)
    with pytest.raises(SourceChanged, match="8 records were ingested before, the source now has only 3"):
        ingest(run, "train", source(3), whole, segment_rows=8)


def test_damaged_rows_are_named(run: Location) -> None:
    ingest(run, "train", source(8), whole)
    key = "corpus/train/000000.0/rows.parquet"
    data = run.read(key)
    run.replace(key, data[:-20])
    with pytest.raises(OSError, match=r"rows.parquet does not open"):
        all_rows(Corpus.open(run, "train"))
    run.delete(key)
    with pytest.raises(OSError, match=r"rows.parquet is missing"):
        all_rows(Corpus.open(run, "train"))


def test_a_corpus_travels_to_workers_and_sql_reads_it(run: Location) -> None:
    ingest(run, "train", source(8), whole, segment_rows=5)
    corpus = Corpus.open(run, "train")
    corpus.read(corpus.segments[0], 0, 1)
    assert plain(all_rows(pickle.loads(pickle.dumps(corpus)))) == plain(all_rows(corpus))
    corpus.close()
    pattern = f"{run.uri}/corpus/train/*/rows.parquet"
    query = f"select count(*), sum(len(encoded.input_ids)), max(source_id) from '{pattern}'"
    assert pytest.importorskip("duckdb").sql(query).fetchall() == [(8, 16, "s7")]
