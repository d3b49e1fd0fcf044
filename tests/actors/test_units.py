import json
import pickle

import pytest

from actors.units import Receipt, Stage, Unit


def test_a_unit_names_its_rows() -> None:
    assert Unit("c0/41", {"start": 10496, "stop": 10752}).label() == "c0/41 (rows 10496:10752)"
    assert Unit("c0/41").label() == "c0/41"


def test_a_receipt_becomes_a_json_record() -> None:
    receipt = Receipt("u", rows=3, quarantined={4: "the loss"}, objects=[{"key": "a", "size": 1}])
    record = json.loads(json.dumps(receipt.record()))
    assert record == receipt.record()
    assert record["quarantined"] == {"4": "the loss"}
    assert record["objects"] == [{"key": "a", "size": 1}]


def test_a_stage_refuses_two_units_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"stage s has two units named 'b'"):
        Stage("s", "f", {}, [Unit("a"), Unit("b"), Unit("b")])


def test_records_pickle() -> None:
    stage = Stage("s", "f", {"x": 1}, [Unit("a", {"start": 0})])
    assert pickle.loads(pickle.dumps(stage)) == stage
