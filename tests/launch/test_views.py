"""The DuckDB views and the worked queries, over a run with several labels."""

from pathlib import Path

import duckdb
import pytest

from launch.run import Run

SQL = Path("configs/sql")


@pytest.fixture
def connection(served: Run) -> duckdb.DuckDBPyConnection:
    found = duckdb.connect()
    found.execute(f"SET VARIABLE run = '{served.location.uri}'")
    found.execute((SQL / "views.sql").read_text())
    return found


def test_every_table_has_a_view_with_all_labels(connection: duckdb.DuckDBPyConnection) -> None:
    for view, rows in (("by_example", 3 * 45), ("queries", 3 * 5)):
        assert connection.sql(f"SELECT count(*) FROM {view}").fetchall() == [(rows,)]
        labels = connection.sql(f"SELECT DISTINCT scores FROM {view} ORDER BY 1").fetchall()
        assert labels == [("first",), ("offline",), ("second",)]
    counts = [connection.sql(f"SELECT count(*) FROM {view}").fetchall() for view in ("by_query", "influenced")]
    assert counts[0] == counts[1]
    assert connection.sql("SELECT count(*) FROM train").fetchall() == [(45,)]


def test_worked_queries_say_what_python_says(connection: duckdb.DuckDBPyConnection, served: Run) -> None:
    worst, rolled, overlap = [q for q in (SQL / "examples.sql").read_text().split(";\n") if q.strip()]
    rows = connection.sql(worst).fetchall()
    lowest = connection.sql(
        "SELECT min(total) FROM by_example JOIN train t USING (id) WHERE t.label = '0' AND scores = 'first'"
    )
    assert [row[2] for row in rows if row[0] == "first"] == [lowest.fetchall()[0][0]]
    groups = {(row[0], row[1]): row for row in connection.sql(rolled).fetchall()}
    kept = connection.sql("SELECT sum(score) FROM by_query WHERE scores = 'first'").fetchall()[0][0]
    assert sum(row[3] for key, row in groups.items() if key[0] == "first") == pytest.approx(kept)
    shares = {(row[0], row[1]): row[2] for row in connection.sql(overlap).fetchall()}
    lists = [
        {(q, row["id"]) for q in range(5) for row in served.index(label).top(q, 10)[0].to_pylist()}
        for label in ("first", "second")
    ]
    assert shares["first", "second"] == pytest.approx(len(lists[0] & lists[1]) / 50)


def test_the_corpus_may_lie_in_another_run(served: Run, tmp_path: Path) -> None:
    connection = duckdb.connect()
    connection.execute(f"SET VARIABLE run = '{tmp_path}'; SET VARIABLE home = '{served.location.uri}'")
    text = (SQL / "views.sql").read_text()
    connection.execute(text[text.index("-- id, source_id, doc_id") :])
    assert connection.sql("SELECT count(*) FROM train").fetchall() == [(45,)]
