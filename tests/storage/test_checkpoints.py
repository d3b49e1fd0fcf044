"""Checkpoints as the Trainer leaves them: in order of step, with the learning rate each was trained at."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from storage.checkpoints import RECORD, find_checkpoints, fingerprint, logged_losses

HISTORY = [
    {"step": 10, "loss": 1.0, "learning_rate": 1.0},
    {"step": 20, "learning_rate": 0.5},
    {"step": 20, "eval_loss": 2.0},
    {"step": 40, "learning_rate": 0.1},
]


def model(folder: Path, history: list[dict[str, Any]] | None = None, step: int = 0, weights: bytes = b"w") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    if history is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return folder


def trainer_output(folder: Path, steps: list[int], history: list[dict[str, Any]]) -> Path:
    for step in steps:
        seen = [entry for entry in history if entry["step"] <= step]
        model(folder / f"checkpoint-{step}", history if step == max(steps) else seen, step)
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("")
    return folder


def test_a_trainer_folder_in_order_of_step(tmp_path: Path) -> None:
    found = find_checkpoints(str(trainer_output(tmp_path / "out", [10, 100, 20, 30, 5], HISTORY)))
    assert [(ref.name, ref.step) for ref in found] == [(f"checkpoint-{s}", s) for s in (5, 10, 20, 30, 100)]
    assert [ref.learning_rate for ref in found] == pytest.approx([1.0, 1.0, 0.5, 0.3, 0.1])
    assert [ref.how for ref in found] == [
        "taken from step 10",
        "logged",
        "logged",
        "interpolated between steps 20 and 40",
        "taken from step 40",
    ]
    assert found[1].path.local_path() == tmp_path / "out" / "checkpoint-10"


def test_a_checkpoint_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder, said = trainer_output(tmp_path / "out", [10, 20, 40], HISTORY), list[str]()
    (folder / "checkpoint-40" / "trainer_state.json").unlink()
    found = find_checkpoints(str(folder), say=said.append)
    assert [(ref.step, ref.learning_rate) for ref in found] == [(10, 1.0), (20, 0.5)]
    assert said == [
        "checkpoint-40 left out: it has no trainer_state.json, which a Trainer writes last, so it is not finished"
    ]
    for step in (10, 20):  # a folder that no Trainer wrote
        (folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert [ref.step for ref in find_checkpoints(str(folder), learning_rate=0.1, say=said.append)] == [10, 20, 40]
    assert len(said) == 1


def test_losses_are_those_that_the_last_checkpoint_logged_by_kind(tmp_path: Path) -> None:
    found = find_checkpoints(str(trainer_output(tmp_path / "out", [10, 20, 40], HISTORY)))
    assert logged_losses(found[-1]) == {"loss": [(10, 1.0)], "eval_loss": [(20, 2.0)]}
    assert logged_losses(found[0]) == {"loss": [(10, 1.0)], "eval_loss": []}
    [alone] = find_checkpoints(str(model(tmp_path / "final")))
    assert logged_losses(alone) == {"loss": [], "eval_loss": []}


def test_interpolation_weighs_by_distance(tmp_path: Path) -> None:
    history = [{"step": 0, "learning_rate": 1.0}, {"step": 10, "learning_rate": 0.0}]
    found = find_checkpoints(str(trainer_output(tmp_path / "out", [1, 9], history)))
    assert [ref.learning_rate for ref in found] == pytest.approx([0.9, 0.1])


def test_a_single_model_is_one_checkpoint(tmp_path: Path) -> None:
    [ref] = find_checkpoints(str(model(tmp_path / "final")))
    assert (ref.name, ref.step, ref.learning_rate, ref.how) == ("final", 0, None, "unknown")
    [ref] = find_checkpoints(str(model(tmp_path / "checkpoint-40", HISTORY, 40)))
    assert (ref.step, ref.learning_rate, ref.how) == (40, 0.1, "logged")


def test_a_recorded_rate_goes_before_the_log_wherever_the_folder_is_named(tmp_path: Path) -> None:
    folder = trainer_output(tmp_path / "out", [10, 20], HISTORY)
    (folder / "checkpoint-20" / RECORD).write_text(json.dumps({"step": 20, "learning_rate": 0.7, "groups": []}))
    found = find_checkpoints(str(folder))
    assert [(ref.learning_rate, ref.how) for ref in found] == [(1.0, "logged"), (0.7, "recorded")]
    (alone,) = find_checkpoints(str(folder / "checkpoint-20"))
    (listed,) = find_checkpoints([str(folder / "checkpoint-20")])
    assert [(ref.step, ref.learning_rate, ref.how) for ref in (alone, listed)] == [(20, 0.7, "recorded")] * 2


def test_an_explicit_list(tmp_path: Path) -> None:
    a, b, c = (str(model(tmp_path / f"{n}" / "m")) for n in "abc")
    given = [{"path": b, "learning_rate": 0.2, "step": 7}, {"path": a, "learning_rate": 0.1, "step": 3}]
    found = find_checkpoints(given)
    assert [(r.path.uri, r.step, r.learning_rate, r.how) for r in found] == [(a, 3, 0.1, "given"), (b, 7, 0.2, "given")]
    assert len({r.name for r in found}) == 2
    found = find_checkpoints([b, c, a], learning_rate=1.0)
    assert [(r.path.uri, r.step, r.learning_rate) for r in found] == [(b, 0, 1.0), (c, 1, 1.0), (a, 2, 1.0)]


def test_a_given_learning_rate_fills_in_what_is_not_known(tmp_path: Path) -> None:
    logged = str(trainer_output(tmp_path / "out", [10, 20], HISTORY))
    assert find_checkpoints(logged, 3.0) == find_checkpoints(logged)
    a, b = (str(model(tmp_path / name)) for name in "ab")
    found = find_checkpoints([{"path": a, "learning_rate": 0.1}, b], 3.0)
    assert [(r.learning_rate, r.how) for r in found] == [(0.1, "given"), (3.0, "given")]


def test_a_list_without_all_steps_keeps_its_order(tmp_path: Path) -> None:
    first, last = str(model(tmp_path / "checkpoint-10")), str(model(tmp_path / "final"))
    found = find_checkpoints([first, last], 1.0)
    assert [(r.path.uri, r.step) for r in found] == [(first, 0), (last, 1)]


def test_unknown_learning_rates_are_asked_for(tmp_path: Path) -> None:
    folder = trainer_output(tmp_path / "out", [10, 20], [])
    with pytest.raises(
        ValueError, match=r"of checkpoint-10, checkpoint-20 is not logged. Give checkpoints.learning_rate"
    ):
        find_checkpoints(str(folder))


@pytest.mark.parametrize("content", [[], ["checkpoint-10/optimizer.pt", "checkpoint-10/rng_state.pth"]])
def test_nothing_found_says_what_was_looked_for(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: looked for checkpoint-<step> .*\*.safetensors"):
        find_checkpoints(str(tmp_path))


def test_bad_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoints is an empty list"):
        find_checkpoints([])
    with pytest.raises(ValueError, match=r"checkpoint 0 has \['lr', 'path'\], must have path"):
        find_checkpoints([{"path": str(tmp_path), "lr": 1}])


def test_the_fingerprint_is_of_weights_and_config_only(tmp_path: Path) -> None:
    a, b, c = (model(tmp_path / n, weights=w) for n, w in (("a", b"w"), ("b", b"w"), ("c", b"v")))
    (b / "README.md").write_text("words")
    (b / "optimizer.pt").write_bytes(b"state")
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    (b / "config.json").write_text('{"layers": 2}')
    assert fingerprint(a) != fingerprint(b)
    (a / "model.safetensors").rename(a / "other.safetensors")
    assert fingerprint(a) != fingerprint(model(tmp_path / "d"))
    with pytest.raises(FileNotFoundError, match=r"holds no weights: looked for \*.safetensors"):
        fingerprint(tmp_path)


def test_a_file_is_read_once_in_a_process_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = (model(tmp_path / name, weights=name.encode()) for name in ("base", "one", "two"))
    opened: list[str] = []
    plain = Path.open

    def counted(path: Path, *args: Any, **settings: Any) -> Any:
        opened.append(path.parent.name)
        return plain(path, *args, **settings)

    monkeypatch.setattr(Path, "open", counted)
    first = [fingerprint(folder, base) for folder in (one, two)]
    assert len(set(first)) == 2
    assert opened.count("base") == 2  # its config and its weights, once for both
    assert [fingerprint(folder, base) for folder in (one, two)] == first
    assert len(opened) == 6
    (base / "model.safetensors").write_bytes(b"BASE")
    os.utime(base / "model.safetensors", ns=(1, 1))
    changed = [fingerprint(folder, base) for folder in (one, two)]
    assert set(changed).isdisjoint(first)
    digest = hashlib.sha256()
    for path in (one / "config.json", one / "model.safetensors"):
        digest.update(json.dumps([path.name, path.stat().st_size]).encode() + path.read_bytes())
    digest.update(fingerprint(base).encode())
    assert changed[0] == digest.hexdigest()


def test_on_s3(bucket: str, tmp_path: Path) -> None:
    from storage.locations import Location

    place = Location.parse(f"s3://{bucket}/out")
    place.create("checkpoint-5/model.safetensors", b"w")
    place.create_json("checkpoint-5/trainer_state.json", {"log_history": [{"step": 5, "learning_rate": 0.5}]})
    [ref] = find_checkpoints(place.uri)
    assert (ref.name, ref.learning_rate) == ("checkpoint-5", 0.5)
    assert fingerprint(ref.path.fetch(tmp_path / "cache")) != ""
