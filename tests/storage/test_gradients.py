"""The store gives back what was written, names what is missing or damaged, and never mixes two writers."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.gradients import (
    DamagedRows,
    GradientStore,
    RowBlock,
    StoreMismatch,
    StoreSettings,
    shard_rows_for,
)
from storage.locations import Location, ObjectConflict, ObjectRecord
from storage.zarr_groups import MissingRows

AT = ("train", "000", "000000.0")
ROWS, SHARD = 10, 4
SETTINGS = StoreSettings({"rows": 300}, [{"module": "a", "start": 0, "stop": 300}], ["a", "b"], "float32")


def block(start: int, stop: int, settings: StoreSettings = SETTINGS, seed: int = 0) -> RowBlock:
    """Rows that depend on their number alone, exact in bfloat16 and float16."""
    rng = [np.random.default_rng([seed, i]) for i in range(start, stop)]
    rows = {n: np.stack([r.integers(-100, 100, d) for r in rng]).astype(np.float32) for n, d in settings.arrays.items()}
    norms = np.stack([r.random(len(settings.modules)) for r in rng]).astype(np.float32) if settings.norms else None
    return RowBlock(rows, np.array([r.random() for r in rng]), norms, np.ones(stop - start, np.uint8))


def filled(run: Location, settings: StoreSettings = SETTINGS) -> GradientStore:
    store = GradientStore.create(run, settings)
    store.prepare(*AT, ROWS, SHARD)
    for start in range(0, ROWS, SHARD):
        store.write(*AT, start, block(start, min(start + SHARD, ROWS), settings))
    return store


def assert_same(found: RowBlock, expected: RowBlock) -> None:
    for name, rows in expected.rows.items():
        assert found.rows[name].dtype == np.float32
        np.testing.assert_array_equal(found.rows[name].view(np.uint32), rows.view(np.uint32))
    np.testing.assert_array_equal(found.losses.view(np.uint64), expected.losses.view(np.uint64))
    np.testing.assert_array_equal(found.state, expected.state)
    if expected.norms is None:
        assert found.norms is None
    else:
        assert found.norms is not None
        np.testing.assert_array_equal(found.norms.view(np.uint32), expected.norms.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compression", ["none", "blosc-lz4"])
def test_rows_come_back_to_the_bit(run: Location, dtype: str, compression: str) -> None:
    settings = replace(SETTINGS, dtype=dtype, compression=compression)
    store = filled(run, settings)
    assert_same(store.read(*AT, 0, ROWS), block(0, ROWS))
    assert_same(pickle.loads(pickle.dumps(store)).read(*AT, 3, 9), block(3, 9))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 5), (4, 8), (9, 10), (5, 5)])
def test_any_range_is_those_rows(run: Location, start: int, stop: int) -> None:
    filled(run)
    assert_same(GradientStore.open(run).read(*AT, start, stop), _slice(start, stop))


def test_the_same_on_s3(bucket: str) -> None:
    run = Location.parse(f"s3://{bucket}/run")
    store = filled(run)
    assert_same(GradientStore.open(run).read(*AT, 3, 9), _slice(3, 9))
    with pytest.raises(ObjectConflict, match="rows/c/1/0"):
        store.write(*AT, 4, block(4, 8, seed=1))
    run.delete("gradients/train/000/000000.0/rows/c/1/0")
    with pytest.raises(MissingRows, match="rows/c/1/0 is missing"):
        store.read(*AT, 3, 9)


def _slice(start: int, stop: int) -> RowBlock:
    every = block(0, ROWS)
    assert every.norms is not None
    rows = {name: array[start:stop] for name, array in every.rows.items()}
    return RowBlock(rows, every.losses[start:stop], every.norms[start:stop], every.state[start:stop])


def test_one_array_per_module_and_no_norms(run: Location) -> None:
    settings = StoreSettings({"layer.0": 3, "layer.1": 257, "head": 1}, [], [], "float16", norms=False)
    store = filled(run, settings)
    assert_same(store.read(*AT, 0, ROWS), block(0, ROWS, settings))


def test_float16_scales_over_all_arrays_of_a_row(run: Location) -> None:
    settings = StoreSettings({"a": 1, "b": 1}, [], [], "float16", norms=False)
    store = GradientStore.create(run, settings)
    store.prepare(*AT, 2, 2)
    a, b = np.array([[1e6], [1e-9]], np.float32), np.array([[3e6], [1e-10]], np.float32)
    store.write(*AT, 0, RowBlock({"a": a, "b": b}, np.zeros(2), None, np.ones(2, np.uint8)))
    found = store.read(*AT, 0, 2).rows
    np.testing.assert_allclose(found["a"], a, rtol=2**-11)
    np.testing.assert_allclose(found["b"], b, rtol=2**-11)


def test_plain_zarr_reads_it(run: Location) -> None:
    filled(run, replace(SETTINGS, dtype="float16"))
    group = zarr.open_group(f"{run.uri}/gradients/train/000/000000.0", mode="r")
    rows = np.asarray(group["rows"]).astype(np.float32) * np.asarray(group["row_scale"])[:, None]
    np.testing.assert_array_equal(rows, block(0, ROWS).rows["rows"])
    assert group.attrs["ranges"] == SETTINGS.ranges
    assert (group["rows"].shards, group["rows"].chunks) == ((4, 512), (4, 256))
    assert np.isnan(group["rows"].fill_value)
    assert np.asarray(group["state"]).tolist() == [1] * ROWS


def test_quarantined_rows_are_nan_and_marked(run: Location) -> None:
    store = GradientStore.create(run, replace(SETTINGS, dtype="float16"))
    store.prepare(*AT, 3, 4)
    given = block(0, 3)
    given.rows["rows"][1, 7] = np.inf
    given.state[1] = 2
    store.write(*AT, 0, given)
    found = store.read(*AT, 0, 3)
    assert found.state.tolist() == [1, 2, 1]
    assert np.isnan(found.rows["rows"]).all(axis=1).tolist() == [False, True, False]
    assert found.norms is not None
    assert np.isnan(found.norms).all(axis=1).tolist() == [False, True, False]
    np.testing.assert_array_equal(found.rows["rows"][2], block(0, 3).rows["rows"][2])


def test_records_name_every_object(run: Location) -> None:
    store = GradientStore.create(run, replace(SETTINGS, dtype="float16"))
    store.prepare(*AT, ROWS, SHARD)
    before = set(run.list())
    records = store.write(*AT, 4, block(4, 8))
    assert [r.key for r in records] == [
        f"gradients/train/000/000000.0/{name}"
        for name in ("rows/c/1/0", "row_scale/c/1", "losses/c/1", "norms/c/1/0", "state/c/1")
    ]
    assert set(run.list()) - before == {r.key for r in records}
    assert records == [ObjectRecord.of(r.key, run.read(r.key)) for r in records]


def test_missing_rows_are_named_not_nan(run: Location) -> None:
    store = GradientStore.create(run, SETTINGS)
    with pytest.raises(MissingRows, match=r"gradients/train/000/000000.0 is missing. Run launch"):
        store.read(*AT, 0, 1)
    store.prepare(*AT, ROWS, SHARD)
    store.write(*AT, 0, block(0, 4))
    store.write(*AT, 8, block(8, 10))
    store.read(*AT, 0, 4)
    with pytest.raises(MissingRows, match=r"rows 4:8 of .*gradients/train/000/000000.0 are missing"):
        store.read(*AT, 2, 10)


@pytest.mark.parametrize("name", ["rows/c/1/0", "losses/c/1", "norms/c/1/0"])
def test_a_deleted_object_is_named(run: Location, name: str) -> None:
    store = filled(run)
    run.delete(f"gradients/train/000/000000.0/{name}")
    with pytest.raises(MissingRows, match=f"gradients/train/000/000000.0/{name} is missing"):
        store.read(*AT, 0, ROWS)
    store.read(*AT, 0, 4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("written", range(4))
def test_a_killed_writer_leaves_the_unit_missing_and_the_next_completes_it(
    run: Location, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    store = GradientStore.create(run, SETTINGS)
    store.prepare(*AT, ROWS, SHARD)
    create = Location.create
    left = iter(range(written))

    def dying(self: Location, key: str, data: bytes) -> None:
        if next(left, None) is None:
            raise Killed
        create(self, key, data)

    monkeypatch.setattr(Location, "create", dying)
    with pytest.raises(Killed):
        store.write(*AT, 0, block(0, 4))
    monkeypatch.setattr(Location, "create", create)
    with pytest.raises(MissingRows, match="rows 0:4"):
        store.read(*AT, 0, 4)
    store.write(*AT, 0, block(0, 4))
    assert_same(store.read(*AT, 0, 4), block(0, 4))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_flipped_byte_anywhere_raises(run: Location, dtype: str) -> None:
    settings = StoreSettings({"rows": 3}, [], ["a"], dtype)
    store = GradientStore.create(run, settings)
    store.prepare(*AT, 2, 2)
    for record in store.write(*AT, 0, block(0, 2, settings)):
        data = run.read(record.key)
        for place in range(0, len(data), 3):
            run.replace(record.key, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(OSError, match=r"damaged|missing"):
                store.read(*AT, 0, 2)
        run.replace(record.key, data)
    assert_same(store.read(*AT, 0, 2), block(0, 2, settings))


@pytest.mark.parametrize("name", ["rows/c/0/0", "losses/c/0", "state/c/0"])
def test_a_cut_object_is_damaged(run: Location, name: str) -> None:
    store = filled(run)
    key = f"gradients/train/000/000000.0/{name}"
    run.replace(key, run.read(key)[:-5])
    with pytest.raises(DamagedRows, match=f"{name.partition('/')[0]} rows 0:10 of .* are damaged"):
        store.read(*AT, 0, ROWS)


def test_the_first_writer_wins(run: Location) -> None:
    store = filled(run)
    store.write(*AT, 4, block(4, 8))
    with pytest.raises(ObjectConflict, match=r"rows/c/1/0 is already there with other bytes"):
        store.write(*AT, 4, block(4, 8, seed=1))
    assert_same(store.read(*AT, 0, ROWS), block(0, ROWS))
    store.delete_shard(*AT, 4)
    with pytest.raises(MissingRows, match="rows 4:8"):
        store.read(*AT, 0, ROWS)
    store.write(*AT, 4, block(4, 8, seed=1))
    assert_same(store.read(*AT, 4, 8), block(4, 8, seed=1))
    assert_same(store.read(*AT, 8, 10), block(8, 10))


def test_a_cut_object_is_a_conflict_for_the_next_writer(run: Location) -> None:
    store = filled(run)
    key = "gradients/train/000/000000.0/rows/c/1/0"
    run.replace(key, run.read(key)[:50])
    with pytest.raises(ObjectConflict):
        store.write(*AT, 4, block(4, 8))


def test_delete_removes_all_of_one_shard_and_nothing_else(run: Location) -> None:
    store = GradientStore.create(run, replace(SETTINGS, dtype="float16"))
    store.prepare(*AT, ROWS, SHARD)
    store.write(*AT, 0, block(0, 4))
    before = run.list()
    store.write(*AT, 8, block(8, 10))
    store.delete_shard(*AT, 8)
    assert run.list() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"seed": 2}}, "built with run.seed=1, this run has 2. Use another run, or run.seed=1."),
        ({"dtype": "float16"}, 'built with gradients.dtype="float32", this run has "float16"'),
        ({"arrays": {"rows": 64}}, "built with gradients.arrays.rows=300, this run has 64"),
        ({"norms": False}, "built with gradients.norms=true, this run has false"),
    ],
)
def test_a_store_with_other_settings_is_refused(run: Location, change: dict[str, object], message: str) -> None:
    settings = replace(SETTINGS, extra={"seed": 1, "sides": (16, 16)})
    assert GradientStore.create(run, settings).settings == GradientStore.create(run, settings).settings
    with pytest.raises(StoreMismatch) as caught:
        GradientStore.create(run, replace(settings, **{"extra": settings.extra, **change}))
    assert message in str(caught.value)
    with pytest.raises(FileNotFoundError, match="has no gradient store"):
        GradientStore.open(run.child("other"))


def test_prepare_again_is_fine_another_shape_is_not(run: Location) -> None:
    store = filled(run)
    GradientStore.open(run).prepare(*AT, ROWS, SHARD)
    with pytest.raises(StoreMismatch, match="10 rows in shards of 4, this run has 10 in shards of 2"):
        store.prepare(*AT, ROWS, 2)
    store.prepare("train", "000", "000001.0", 3, 4096)
    attributes = run.read_json("gradients/train/000/000001.0/zarr.json")["attributes"]
    assert (attributes["rows"], attributes["shard_rows"]) == (3, 3)
    assert_same(store.read(*AT, 0, ROWS), block(0, ROWS))


def test_a_segment_without_rows_has_no_group(run: Location) -> None:
    store = GradientStore.create(run, SETTINGS)
    before = run.list()
    store.prepare("train", "000", "000001.0", 0, SHARD)
    assert run.list() == before


def test_prepare_interrupted_is_completed(run: Location) -> None:
    store = GradientStore.create(run, SETTINGS)
    store.prepare(*AT, ROWS, SHARD)
    run.delete("gradients/train/000/000000.0/zarr.json")
    GradientStore.open(run).prepare(*AT, ROWS, SHARD)
    assert run.read_json("gradients/train/000/000000.0/zarr.json")["attributes"]["rows"] == ROWS


@pytest.mark.parametrize(
    ("start", "change", "message"),
    [
        (2, {}, "row 2 begins no shard: must be a multiple of 4 below 10"),
        (12, {}, "row 12 begins no shard"),
        (4, {"losses": np.zeros(3)}, r"losses of the shard at row 4 is float64 \[3\], must be float64 \[4\]"),
        (4, {"losses": np.zeros(4, np.float32)}, "losses of the shard at row 4 is float32"),
        (4, {"rows": {}}, "rows of the shard at row 4 is absent"),
        (4, {"norms": None}, "norms of the shard at row 4 is absent"),
        (4, {"state": np.array([1, 1, 0, 1], np.uint8)}, "row 6 has state 0: must be 1"),
        (4, {"losses": np.array([0, 0, 0, np.nan])}, "row 7 is not finite but marked as done"),
        (4, {"norms": np.full((4, 2), np.inf, np.float32)}, "row 4 is not finite but marked as done"),
    ],
)
def test_a_block_that_is_not_that_shard_is_refused(
    run: Location, start: int, change: dict[str, object], message: str
) -> None:
    store = GradientStore.create(run, SETTINGS)
    store.prepare(*AT, ROWS, SHARD)
    with pytest.raises(ValueError, match=message):
        store.write(*AT, start, replace(block(4, 8), **change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "gradients.dtype='int8' is not allowed: must be one of float32, float16, bfloat16"),
        ({"compression": "zip"}, "gradients.compression='zip' is not allowed: must be one of none, blosc-lz4"),
        ({"arrays": {"losses": 3}}, "array 'losses' with 3 columns is not allowed"),
        ({"arrays": {"a/b": 3}}, "array 'a/b' with 3 columns is not allowed"),
        ({"modules": []}, "norms without modules are not allowed"),
    ],
)
def test_settings_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **fields)


@pytest.mark.parametrize(
    ("columns", "itemsize", "rows"),
    [
        (1024, 2, 8192),
        (1025, 2, 4096),
        (1024, 4, 4096),
        (1, 2, 8192),
        (1 << 24, 4, 32),
        (262144, 2, 32),
        (262144, 1, 64),
    ],
)
def test_shards_aim_at_16_mib(columns: int, itemsize: int, rows: int) -> None:
    assert shard_rows_for(columns, itemsize) == rows


def test_compression_makes_smooth_rows_smaller(tmp_path: Path) -> None:
    sizes = {}
    for compression in ("none", "blosc-lz4"):
        run = Location.parse(str(tmp_path / compression))
        filled(run, replace(SETTINGS, compression=compression))
        sizes[compression] = run.size("gradients/train/000/000000.0/rows/c/0/0")
    assert sizes["blosc-lz4"] < 0.7 * sizes["none"]


def test_a_shard_of_quarantined_rows_is_written_not_left_out(run: Location) -> None:
    store = GradientStore.create(run, SETTINGS)
    store.prepare(*AT, ROWS, SHARD)
    given = replace(block(0, 4), losses=np.full(4, np.nan), state=np.full(4, 2, np.uint8))
    assert len(store.write(*AT, 0, given)) == 4
    assert np.isnan(store.read(*AT, 0, 4).rows["rows"]).all()
