"""Records from files: one dict at a time, with the place it stands at, from whatever a user's corpus is made of.

Lines of JSON, plain text, Parquet, numpy archives, Hugging Face dataset folders; in a folder, on S3 or inside an
installed package. What the fields mean is the task's affair.
"""

import fnmatch
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from storage.locations import Location

Record = tuple[dict[str, Any], str]  # fields, and where they stand: "reviews.jsonl.gz line 17"

EXCERPT = 60  # characters of a bad line that an error shows
BATCH = 256  # Parquet rows decoded at once
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


def read_records(
    uri: str,  # file, folder or glob: a path, s3://bucket/key or package:NAME/path
    split: str | None = None,  # of a Hugging Face DatasetDict
    cache: Path | None = None,  # folder for a dataset folder fetched from S3
) -> Iterator[Record]:
    """Yield (record, place) one by one, files of a folder or glob in the order of their names.

    FileNotFoundError if nothing is there. ValueError for an unknown file type, a malformed line (with its number and
    an excerpt), a line that is no JSON object, a source without any record, archive columns of unequal length, or a
    split that is not there.
    """
    location, keys = source_files(uri)
    if any(key in DATASET_FILES for key in keys):
        yield from _dataset(location, uri, split, cache)
        return
    readable = [(key, _format_of(key or location.uri)) for key in keys]
    found = False
    for key, read in readable:
        place = f"{location.uri}/{key}" if key else location.uri
        with location.open(key) as file:
            for record in read(file, place):
                found = True
                yield record
    if not found:
        raise ValueError(f"{uri} has no records: every file in it is empty. Check the path and how it was written.")


def source_files(uri: str) -> tuple[Location, list[str]]:
    """Return a location and the keys below it to be read; [""] if it is itself a file."""
    if any(mark in uri for mark in "*?["):
        return _globbed(uri)
    location = Location.parse(uri)
    if location.exists():
        return location, [""]
    keys = [key for key in location.list() if not Path(key).name.startswith((".", "_"))]
    if not keys:
        raise FileNotFoundError(f"{uri} is not there, or is an empty folder. Check the path.")
    top = [key for key in keys if "/" not in key]
    if any(key in DATASET_FILES for key in top):
        return location, top
    known = [key for key in top if _suffix_of(key)]
    if not known:
        raise ValueError(f"{uri} holds no file of a known type. {_allowed()}")
    return location, known


def _globbed(uri: str) -> tuple[Location, list[str]]:
    fixed = uri[: min(uri.index(mark) for mark in "*?[" if mark in uri)].rpartition("/")[0]
    pattern = uri[len(fixed) :].lstrip("/")
    location = Location.parse(fixed or ("/" if uri.startswith("/") else "."))
    keys = [key for key in location.list() if key.count("/") == pattern.count("/") and fnmatch.fnmatch(key, pattern)]
    if not keys:
        raise FileNotFoundError(f"no file matches {uri}. Check the path.")
    return location, keys


def _json_lines(file: BinaryIO, place: str) -> Iterator[Record]:
    for text, where in _lines(file, place):
        try:
            record = json.loads(text)
        except ValueError as error:
            why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"{where} is not JSON ({why}): {_excerpt(text)}") from error
        if not isinstance(record, dict):
            raise ValueError(f'{where} must be a JSON object like {{"text": …}}, is {_excerpt(text)}')
        yield record, where


def _text_lines(file: BinaryIO, place: str) -> Iterator[Record]:
    for text, where in _lines(file, place):
        yield {"text": text}, where


def _lines(file: BinaryIO, place: str) -> Iterator[tuple[str, str]]:
    """Yield every line that is not blank, without its line break, and where it stands."""
    number = 0
    source = gzip.GzipFile(fileobj=file) if place.endswith(".gz") else file
    try:
        for number, line in enumerate(source, 1):
            where = f"{place} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}).") from error
            if text.strip():
                yield text, where
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{place} is damaged after line {number}: {error}. Copy it again.") from error


def _parquet(file: BinaryIO, place: str) -> Iterator[Record]:
    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH):
            for record in batch.to_pylist():
                number += 1
                where = f"{place} row {number}"
                yield {name: _decoded(value, where) for name, value in record.items()}, where
    except pa.ArrowException as error:
        raise ValueError(f"{place} is not readable as Parquet: {error}.") from error


def _archive(file: BinaryIO, place: str) -> Iterator[Record]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{place} is not a numpy archive of plain arrays: {error}.") from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{place}: all arrays must have the same first length, have {found or 'none'}.")
    for number in range(next(iter(lengths.values()))):
        row = {name: array[number] for name, array in arrays.items()}
        yield {k: v if v.ndim else v.item() for k, v in row.items()}, f"{place} row {number + 1}"


def _dataset(location: Location, uri: str, split: str | None, cache: Path | None) -> Iterator[Record]:
    from datasets import DatasetDict, load_from_disk  # slow to import, and only needed here

    folder = location.local_path() or location.fetch(cache or Path.home() / ".cache" / "influence-engine")
    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{uri} has no split {split!r}: must be one of {', '.join(dataset)}.")
        dataset = dataset[split]
    elif split is not None:
        raise ValueError(f"{uri} is one dataset without splits; split={split!r} is not allowed. Leave it out.")
    for number, record in enumerate(dataset, 1):
        where = f"{uri} row {number}"
        yield {name: _decoded(value, where) for name, value in record.items()}, where


def _decoded(value: Any, where: str) -> Any:
    """Return an image (a PIL image, or bytes and path as Hugging Face stores it) as uint8 [H, W] or [H, W, channels]."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        if value["bytes"] is None:
            raise ValueError(f"{where} names the image {value['path']!r} without its bytes. Store images embedded.")
        try:
            value = Image.open(io.BytesIO(value["bytes"]))
            value.load()
        except OSError as error:
            raise ValueError(f"{where} holds an image that does not decode: {error}.") from error
    if isinstance(value, Image.Image):
        return np.asarray(value if value.mode in ("L", "RGB", "RGBA") else _plain_mode(value))
    return value


def _plain_mode(image: Image.Image) -> Image.Image:
    return image.convert("L" if image.mode == "1" else "RGB")


FORMATS: dict[str, Callable[[BinaryIO, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_lines,
    ".json.gz": _json_lines,
    ".txt": _text_lines,
    ".txt.gz": _text_lines,
    ".parquet": _parquet,
    ".npz": _archive,
}


def _suffix_of(name: str) -> str | None:
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def _format_of(name: str) -> Callable[[BinaryIO, str], Iterator[Record]]:
    suffix = _suffix_of(name)
    if suffix is None:
        raise ValueError(f"{name} is not of a known type. {_allowed()}")
    return FORMATS[suffix]


def _allowed() -> str:
    return f"Allowed are {', '.join(FORMATS)} and folders saved by datasets.save_to_disk."


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…")
