"""Overlap and rank correlation against scores that are known in full."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from launch import compare as module
from launch.compare import compare
from launch.run import Run
from tests.end_to_end.answers import dense


def test_two_methods_are_compared_as_their_full_scores_say(served: Run) -> None:
    found = compare(served.index("first"), served.index("second"), 5)
    a, b = dense(served, "first").astype(float), dense(served, "second").astype(float)
    for side, sign in (("proponent", 1), ("opponent", -1)):
        shares, correlations = [], []
        for query in range(5):
            tops = [
                [i for i in np.argsort(-sign * s[:, query], kind="stable") if sign * s[i, query] > 0] for s in (a, b)
            ]
            size = min(5, *map(len, tops))
            if size:
                shares.append(len(set(tops[0][:size]) & set(tops[1][:size])) / size)
            common = sorted(set(tops[0]) & set(tops[1]))
            if len(common) > 2:
                correlations.append(spearmanr(a[common, query], b[common, query]).statistic)
        assert found[side]["overlap"] == pytest.approx(np.mean(shares))
        assert found[side]["correlation"] == pytest.approx(np.mean(correlations), abs=0.02)  # float32 dense scores
    assert found["total"] == pytest.approx(spearmanr(a.sum(1), b.sum(1)).statistic, abs=0.02)


def test_a_run_beside_itself(served: Run) -> None:
    found = compare(served.index("first"), served.index("first"), 50)
    assert [found[side]["overlap"] for side in ("proponent", "opponent")] == [1.0, 1.0]
    assert found["self_influence"] == pytest.approx(1.0)


def test_different_data_is_refused(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--top 51 is not allowed: 1 to 50"):
        compare(served.index("first"), served.index("second"), 51)
    tables = {"first": "r1000", "second": "other"}

    def table(index: object, name: str, columns: list[str] | None = None) -> list[pa.RecordBatch]:
        return pa.table({"query": [0], "query_source_id": [tables[index.label]]}).to_batches()

    monkeypatch.setattr(module.ScoreIndex, "table", table)
    with pytest.raises(ValueError, match="query 0 is 'r1000' in one and 'other' in the other"):
        compare(served.index("first"), served.index("second"), 5)


def test_the_command_prints_both_ways(served: Run, capsys: pytest.CaptureFixture[str]) -> None:
    uri = served.location.uri
    module.main(uri, uri, "first", "second", 5, True)
    assert json.loads(capsys.readouterr().out)["top"] == 5
    module.main(uri, uri, "first", "second", 5, False)
    assert "overlap of the top 5" in capsys.readouterr().out
