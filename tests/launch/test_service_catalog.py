"""What a run holds, asked through the catalog: against the index read whole, at every state of a run."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from launch.online import predicted_label
from launch.run import Run
from launch.service.catalog import Catalog, NotFound, NotOnline, NotReady, RunView
from launch.service.media import plain_record, png_of
from storage.corpus import Corpus, ingest
from storage.index import ScoreIndex
from storage.locations import Location
from tests.end_to_end.answers import dense, self_influence
from tests.launch.service_runs import asking, half_done


@pytest.fixture
def view(served: Run) -> RunView:
    return Catalog([served.location.uri]).run("tiny")


def table(run: Run, name: str, label: str = "first") -> pa.Table:
    return pa.Table.from_batches(list(ScoreIndex.open(run.location, label).table(name)))


def test_names_are_the_folders_and_stay_apart(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "run", tmp_path / "b", tmp_path / "c" / "b", tmp_path / "odd name?"]
    assert Catalog([str(place) for place in places]).names == ["a", "b", "b-2", "odd-name-"]
    assert Catalog(["s3://bucket/some/run"]).names == ["some"]
    with pytest.raises(NotFound, match="there is no run '../b': there are b"):
        Catalog([str(tmp_path / "b")]).run("../b")


def test_scores_say_what_they_are(view: RunView) -> None:
    about = {one["label"]: one for one in view.scores()}
    assert {label: (one["method"], one["online"]) for label, one in about.items()} == {
        "first": ("tracin", True), "second": ("gradient-dot", True), "offline": ("tracin", False),
    }  # fmt: skip
    first = about["first"]
    assert (first["queries"], first["examples"], first["top_k"], first["covered"]) == (5, 45, 50, 1.0)
    assert first["complete"]
    assert view.progress()["state"] == "finished"
    assert {stage["stage"] for stage in view.progress()["stages"]} >= {"ingest-train", "collect-train", "index-first"}
    assert all(stage["done"] == stage["units"] for stage in view.progress()["stages"])
    with pytest.raises(ValueError, match="name one of first, offline, second"):
        view.pick(None)
    with pytest.raises(NotFound, match="has no scores '../first'"):
        view.pick("../first")


def test_influences_are_the_stored_scores_in_order(view: RunView, served: Run) -> None:
    scores = dense(served, "first")
    for query in range(5):
        rows = view.influences("first", query, 4)
        for side, sign in (("proponent", 1), ("opponent", -1)):
            mine = [row for row in rows if row["side"] == side]
            order = np.argsort(-sign * scores[:, query], kind="stable")
            expected = [int(i) for i in order if sign * scores[i, query] > 0][:4]
            assert [row["id"] for row in mine] == expected
            np.testing.assert_allclose([row["score"] for row in mine], scores[expected, query], rtol=1e-5)
            assert {row["side"] for row in view.influences("first", query, 4, side)} <= {side}
    with pytest.raises(NotFound, match="no query 5: there are 5"):
        view.influences("first", 5)


def test_filters_hold_of_the_training_records(view: RunView, served: Run) -> None:
    corpus = Corpus.open(served.location, "train")
    labels = {i: corpus.row(i)["label"] for i in range(corpus.rows)}
    rows = view.influences("first", 1, 50, where={"label": "2"})
    everything = view.influences("first", 1, 50)
    assert rows == [row for row in everything if labels[row["id"]] == 2]
    assert 0 < len(rows) < len(everything)
    assert view.influences("first", 1, 50, where={"label": "2", "source_id": "r2"}) == [r for r in rows if r["id"] == 2]
    assert view.influences("first", 1, 50, where={"label": "none"}) == []
    with pytest.raises(ValueError, match=r"where=secret:… is not allowed: one of id, source_id"):
        view.influences("first", 1, where={"secret": "x"})
    assert "encoded" not in view.fields("first")


def test_an_example_knows_the_queries_it_moved(view: RunView, served: Run) -> None:
    rows = table(served, "by_query").to_pylist()
    for example in (0, 7, 44):
        found = view.example_influences("first", example, 100)
        mine = [row for row in rows if row["id"] == example]
        assert {(f["query"], f["side"], f["rank"], f["score"]) for f in found} == {
            (row["query"], row["side"], row["rank"], row["score"]) for row in mine
        }
        strengths = [abs(f["score"]) for f in found]
        assert strengths == sorted(strengths, reverse=True)
        assert len(view.example_influences("first", example, 2)) == min(2, len(mine))
    with pytest.raises(NotFound, match="no example 45: there are 45"):
        view.example_influences("first", 45)


def test_queries_are_mispredicted_first_and_filtered(view: RunView, served: Run) -> None:
    rows = view.queries("first").rows
    keys = [(not row["misclassified"], -row["loss"]) for row in rows]
    assert keys == sorted(keys)
    labels = {row["query"]: row["label"] for row in rows}
    corpus = Corpus.open(served.location, "asked")
    assert labels == {i: str(corpus.row(i)["label"]) for i in range(5)}
    wrong = view.queries("first", misclassified=True)
    assert [row["query"] for row in wrong.rows] == [r["query"] for r in rows if r["predicted"] != r["label"]]
    assert wrong.total + view.queries("first", misclassified=False).total == 5
    word = corpus.row(2)["text"].split()[0]
    expected = {i for i in range(5) if word in corpus.row(i)["text"].lower()}
    assert {row["query"] for row in view.queries("first", text=word.upper()).rows} == expected
    assert view.queries("first", label="1").total == sum(label == "1" for label in labels.values())
    page = view.queries("first", order="query", offset=3, limit=2)
    assert ([row["query"] for row in page.rows], page.total) == ([3, 4], 5)


def test_examples_are_ordered_by_any_number(view: RunView, served: Run) -> None:
    own = self_influence(served, "first")
    page = view.examples("first", limit=45)
    assert [row["id"] for row in page.rows] == list(np.argsort(-own, kind="stable"))
    assert page.total == 45
    totals = table(served, "by_example")["total"].to_numpy()
    rising = view.examples("first", order="-total", offset=2, limit=3).rows
    assert [row["id"] for row in rising] == list(np.argsort(totals, kind="stable")[2:5])
    assert [row["id"] for row in view.examples("first", order="-id", limit=2).rows] == [44, 43]
    kept = view.examples("first", where={"label": "0"}, limit=100)
    assert kept.total == 15 == len(kept.rows)
    with pytest.raises(ValueError, match="order='size' is not allowed"):
        view.examples("first", order="size")


def test_histogram_and_graph(view: RunView, served: Run) -> None:
    own = self_influence(served, "first")
    found = view.histogram("first", bins=6)
    counts, edges = np.histogram(own, 6)
    assert found == {"edges": edges.tolist(), "counts": counts.tolist()}
    graph = view.graph("first", [1, 3, 1], k=2)
    assert [q["query"] for q in graph["queries"]] == [1, 3]
    assert {(e["query"], e["id"]) for e in graph["edges"]} == {
        (q, row["id"]) for q in (1, 3) for row in view.influences("first", q, 2)
    }
    assert {e["id"] for e in graph["examples"]} == {e["id"] for e in graph["edges"]}


def test_new_text_is_answered_as_from_python(view: RunView, served: Run) -> None:
    text = "the film was never dull"
    (found,) = view.attribute("first", [text], k=3)
    (expected,) = served.score([text], k=3, scores="first")
    assert [row["id"] for row in found["proponents"]] == [row["id"] for row in expected.proponents]
    assert found["prediction"] == found["label"] == expected.query["label"]
    again = view.attribute("first", [text, {"text": text, "label": 2}, text], [None, 2, 1], k=3)
    for ours, alone in zip(again[0]["proponents"], found["proponents"], strict=True):
        assert (ours["id"], ours["score"]) == (alone["id"], pytest.approx(alone["score"], rel=1e-4))
    assert [one["label"] for one in again] == [found["label"], 2, 1]
    assert again[1]["prediction"] == found["prediction"]
    with pytest.raises(NotOnline, match="takes a job"):
        view.attribute("offline", [text])
    with pytest.raises(ValueError, match="label"):
        view.attribute("first", [text], [17])


def test_token_ids_stand_for_their_text(view: RunView, served: Run) -> None:
    setting = served.setting("first")
    task = setting.context.task(setting.model)
    (row,) = task.encode({"text": "the film was good", "label": 0})
    expected = view.attribute("first", ["the film was good"], [0], k=3)
    assert view.attribute("first", [{"token_ids": [int(t) for t in row["input_ids"][1:-1]]}], [0], k=3) == expected
    with pytest.raises(ValueError, match="not what the tokenizer makes of any text"):
        view.attribute("first", [{"token_ids": [3, 5]}])  # "[CLS] the" is read as other tokens
    with pytest.raises(ValueError, match="token_ids must lie in 0 to"):
        view.attribute("first", [{"token_ids": [10**6]}])


def test_an_empty_run_waits(tmp_path: Path) -> None:
    view = Catalog([str(tmp_path / "later")]).run("later")
    assert (view.manifest(), view.scores(), view.progress()["state"]) == ({}, [], "waiting")
    with pytest.raises(NotReady, match="no scores yet"):
        view.pick(None)


def test_a_run_in_the_middle_of_its_job_answers_from_what_is_done_and_grows(served: Run, tmp_path: Path) -> None:
    source = Path(served.location.uri)
    run = half_done(source, tmp_path / "half", shards=1)
    now = [0.0]
    view = Catalog([str(run)], clock=lambda: now[0]).run("half")
    scores = dense(served, "first")
    for shards in (1, 2):
        (about,) = view.scores()
        assert (about["complete"], about["covered"]) == (False, 16 * shards / 45)
        found = view.influences("first", 2, 50, "proponent")
        seen = scores[: 16 * shards, 2]
        assert [row["id"] for row in found] == [int(i) for i in np.argsort(-seen, kind="stable") if seen[i] > 0]
        assert view.example_influences("first", 3, 9)[0]["query"] in range(5)
        assert view.examples("first").total == 16 * shards
        assert view.example("first", 40)["self_influence"] is None
        assert view.queries("first").total == 5
        assert view.progress()["state"] == "stalled"
        with pytest.raises(NotReady, match="are being made"):
            view.attribute("first", ["a film"])
        done = sorted((source / "journal" / "score-first").iterdir())[shards]
        shutil.copytree(done, run / "journal" / "score-first" / done.name)
        now[0] += 0.5
        assert view.scores()[0]["covered"] == about["covered"], "looked again within a second"
        now[0] += 1.0
    shutil.copytree(source / "index" / "first", run / "index" / "first")
    now[0] += 2.0
    assert view.scores()[0]["complete"]
    assert view.influences("first", 2, 50) == Catalog([str(source)]).run("tiny").influences("first", 2, 50)
    assert view.progress()["state"] == "finished"


def test_an_older_index_answers_too(served: Run, tmp_path: Path) -> None:
    run = tmp_path / "older"
    shutil.copytree(served.location.uri, run)
    for name in ("queries", "influenced"):
        (run / "index" / "first" / f"{name}.parquet").unlink()
    (run / "states" / "first" / "answers.json").unlink()
    old, new = Catalog([str(run)]).run("older"), Catalog([served.location.uri]).run("tiny")
    assert old.example_influences("first", 7, 50) != []
    for ours, theirs in zip(
        old.example_influences("first", 7, 50), new.example_influences("first", 7, 50), strict=True
    ):
        assert (ours["query"], ours["score"]) == (theirs["query"], theirs["score"])
    rows = old.queries("first").rows
    assert {row["predicted"] for row in rows} == {None}
    assert {row["query"]: row["loss"] for row in rows} == {r["query"]: r["loss"] for r in new.queries("first").rows}


def test_an_erased_example_leaves_every_answer(served: Run, tmp_path: Path) -> None:
    run = tmp_path / "erasing"
    shutil.copytree(served.location.uri, run)
    now = [0.0]
    view = Catalog([str(run)], clock=lambda: now[0]).run("erasing")
    gone = view.influences("first", 1, 1)[0]["id"]
    Corpus.open(Run.open(str(run)).location, "train").erase([gone])
    now[0] += 2.0
    assert gone not in {row["id"] for row in view.influences("first", 1, 50)}
    assert gone not in {row["id"] for row in view.examples("first", limit=100).rows}
    for ask in (view.example, view.example_influences):
        with pytest.raises(NotFound, match="erased"):
            ask("first", gone)


def test_stalled_and_running_tell_themselves_apart(served: Run, tmp_path: Path) -> None:
    run = half_done(Path(served.location.uri), tmp_path / "held")
    lease = max((run / "journal" / "run").glob("lease.*"), key=lambda file: int(file.suffix[1:]))
    lease.with_name(f"over{lease.suffix}").unlink()  # its driver has not ended
    text = lease.read_text()
    assert '"released": true' in text
    now = [0.0]
    view = Catalog([str(run)], clock=lambda: now[0]).run("held")
    lease.write_text(text.replace('"released": true', '"released": false').replace('"host": "', '"host": "elsewhere-'))
    assert view.progress()["state"] == "running"
    now[0] += 50
    assert view.progress()["state"] == "running"
    now[0] += 50
    assert view.progress()["state"] == "stalled", "the counter stood still for more than a minute"


def test_records_are_plain_and_images_are_named() -> None:
    picture = np.zeros((2, 3), np.uint8)
    record = {"id": 4, "x": np.float32(0.5), "bad": float("nan"), "v": np.arange(3.0), "img": picture, "raw": b"ab"}
    plain = plain_record(record, "train")
    assert plain["img"] == {"image": "train/4"}
    assert (plain["x"], plain["bad"], plain["v"]) == (0.5, None, {"shape": [3], "values": [0.0, 1.0, 2.0]})
    assert isinstance(plain["raw"], str)
    assert png_of(record).startswith(b"\x89PNG")
    assert png_of({"img": np.zeros((2, 3, 1), np.uint8)}).startswith(b"\x89PNG")
    with pytest.raises(LookupError):
        png_of({"text": "none"})


def test_wrong_side_would_be_seen(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    before = view.influences("first", 1, 4)
    monkeypatch.setattr("launch.service.catalog.SIDES", ("opponent", "proponent"))
    assert view.influences("first", 1, 4) != before


def test_predictions_and_losses_are_the_last_checkpoints(view: RunView, served: Run) -> None:
    setting = served.setting("first")
    corpus = Corpus.open(served.location, "asked")
    losses = served.states("first")[-1].losses.tolist()
    for row in view.queries("first", order="query").rows:
        record = corpus.row(row["query"])
        assert row["predicted"] == str(predicted_label(setting, record))
        assert row["misclassified"] == (row["predicted"] != str(record["label"]))
        assert row["loss"] == losses[row["query"]]


def test_images_of_a_corpus_come_as_png(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    rows = (({"images": picture, "labels": i}, "here") for i, picture in enumerate(pictures))
    ingest(Location.parse(str(tmp_path / "pictures")), "digits", rows, lambda _: [{"target": 0}])
    with asking(tmp_path / "pictures") as client:
        view = client.app.state.service.catalog.run("pictures")
        assert view.record("digits", 2)["images"] == {"image": "digits/2"}
        answer = client.get("/v1/runs/pictures/images/digits/2")
        assert answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), pictures[2])
        assert client.get("/v1/runs/pictures/images/digits/3").status_code == 404
