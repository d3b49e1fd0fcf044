"""Every format gives its records one by one, with their places, and names what is wrong with a file."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from storage.locations import Location
from storage.readers import read_records

RECORDS = [{"id": str(i), "text": f"text {i}", "label": i % 2} for i in range(3)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
IMAGE = np.arange(12, dtype=np.uint8).reshape(3, 4)


def fields(uri: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [record for record, _ in read_records(str(uri), **options)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    found = list(read_records(str(tmp_path / name)))
    assert [record for record, _ in found] == RECORDS
    assert [where for _, where in found] == [f"{tmp_path / name} line {i}" for i in (1, 2, 3)]


def test_records_come_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b"not json\n")
    stream = read_records(str(tmp_path / "a.jsonl"))
    assert [next(stream)[0] for _ in RECORDS] == RECORDS
    with pytest.raises(ValueError, match=r"a.jsonl line 4 is not JSON \(.*\): 'not json'"):
        next(stream)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_lines(tmp_path: Path, name: str) -> None:
    data = "\ufeffone\r\n\n  \ntwö \n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = list(read_records(str(tmp_path / name)))
    assert found == [({"text": "one"}, f"{tmp_path / name} line 1"), ({"text": "twö "}, f"{tmp_path / name} line 4")]


def test_parquet(tmp_path: Path) -> None:
    images = [{"bytes": png(Image.fromarray(IMAGE)), "path": None}] * 3
    table = pa.Table.from_pylist([{**record, "image": image} for record, image in zip(RECORDS, images, strict=True)])
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(read_records(str(tmp_path / "a.parquet")))
    assert found[2][0]["text"] == "text 2"
    assert found[2][1] == f"{tmp_path}/a.parquet row 3"
    np.testing.assert_array_equal(found[0][0]["image"], IMAGE)


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (3, 4)), ("RGB", (3, 4, 3)), ("RGBA", (3, 4, 4)), ("1", (3, 4)), ("P", (3, 4, 3))]
)
def test_image_modes(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    data = png(Image.fromarray(IMAGE * 20).convert(mode))
    pq.write_table(pa.Table.from_pylist([{"x": {"bytes": data, "path": "p"}}]), tmp_path / "a.parquet")
    found = fields(tmp_path / "a.parquet")[0]["x"]
    assert (found.shape, found.dtype) == (shape, np.uint8)


def test_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.stack([IMAGE, IMAGE + 1]), labels=np.array([3, 4]))
    found = list(read_records(str(tmp_path / "a.npz")))
    assert [record["labels"] for record, _ in found] == [3, 4]
    assert type(found[0][0]["labels"]) is int
    np.testing.assert_array_equal(found[1][0]["images"], IMAGE + 1)
    assert found[1][1] == f"{tmp_path}/a.npz row 2"


def test_folder_and_glob_in_order_of_name(tmp_path: Path) -> None:
    for name, line in (("b.jsonl", {"n": 2}), ("a.jsonl", {"n": 1}), ("c.txt", None), (".hidden.jsonl", {"n": 0})):
        (tmp_path / name).write_text("three\n" if line is None else json.dumps(line) + "\n")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_text('{"n": 4}\n')
    assert fields(tmp_path) == [{"n": 1}, {"n": 2}, {"text": "three"}]
    assert fields(tmp_path / "[ab].jsonl") == [{"n": 1}, {"n": 2}]
    assert fields(tmp_path / "*" / "*.jsonl") == [{"n": 4}]
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*.csv"):
        fields(tmp_path / "*.csv")


def test_on_s3(bucket: str) -> None:
    place = Location.parse(f"s3://{bucket}/data")
    place.create("b.jsonl.gz", gzip.compress(LINES))
    place.create("a.jsonl", b'{"n": 1}\n')
    pq_file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), pq_file)
    place.create("c/d.parquet", pq_file.getvalue())
    assert fields(place.uri) == [{"n": 1}, *RECORDS]
    assert fields(f"{place.uri}/b*") == RECORDS
    assert fields(f"{place.uri}/c/d.parquet") == RECORDS
    with pytest.raises(FileNotFoundError, match=r"data/none.jsonl is not there"):
        fields(f"{place.uri}/none.jsonl")


def test_dataset_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    one = datasets.Dataset.from_list([{"text": "a", "image": Image.fromarray(IMAGE)}], features=features)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    [(record, where)] = list(read_records(str(tmp_path / "one")))
    assert (record["text"], where) == ("a", f"{tmp_path}/one row 1")
    np.testing.assert_array_equal(record["image"], IMAGE)
    assert fields(tmp_path / "two", split="test")[0]["text"] == "a"
    with pytest.raises(ValueError, match="has no split None: must be one of train, test"):
        fields(tmp_path / "two")
    with pytest.raises(ValueError, match="is one dataset without splits; split='train' is not allowed"):
        fields(tmp_path / "one", split="train")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a.jsonl line 2 must be a JSON object like .*, is '\[1\]'"),
        ("a.jsonl", b"{" + b"x" * 200, r"line 1 is not JSON \(.*\): '{x{59}…'"),
        ("a.jsonl", b'{"a": 1}\n\n"\xff"\n', "line 3 is not UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES * 50, mtime=0)[:-20],
            r"a.jsonl.gz is damaged after line \d+: .*Copy it again",
        ),
        ("a.jsonl.gz", LINES, "a.jsonl.gz is damaged after line 0"),
        ("a.csv", b"a,b\n", r"a.csv is not of a known type. Allowed are .jsonl, .jsonl.gz, .*save_to_disk"),
        ("a.parquet", b"PAR1 no", "a.parquet is not readable as Parquet"),
        ("a.npz", b"PK no", "a.npz is not a numpy archive of plain arrays"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        fields(tmp_path / name)


def test_bad_archives_and_images_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(4))
    with pytest.raises(ValueError, match="all arrays must have the same first length, have x 3, y 4"):
        fields(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match=r"b.npz is not a numpy archive of plain arrays"):
        fields(tmp_path / "b.npz")
    pq.write_table(pa.Table.from_pylist([{"x": {"bytes": b"no", "path": "p"}}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet row 1 holds an image that does not decode"):
        fields(tmp_path / "a.parquet")
    pq.write_table(
        pa.table(
            {
                "x": pa.array(
                    [{"bytes": None, "path": "p.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                )
            }
        ),
        tmp_path / "b.parquet",
    )
    with pytest.raises(ValueError, match="row 1 names the image 'p.png' without its bytes"):
        fields(tmp_path / "b.parquet")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.jsonl is not there"):
        fields(tmp_path / "none.jsonl")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match="holds no file of a known type"):
        fields(tmp_path)
