import numpy as np
import pytest
import torch

from engine import counters
from engine.counters import derive_key, normals, permutation, signs, words

KEY = 0x329E682F425EA723DD546071EE135011


def philox_4x64_10(counter: int, key: int) -> list[int]:
    """Return the four words of one counter, from the definition in Salmon et al. 2011."""
    mask = (1 << 64) - 1
    c = [(counter >> (64 * i)) & mask for i in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & mask, first >> 64 ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_golden_key_of_a_named_stream():
    assert derive_key(0, "classifier.weight", "input") == KEY


def test_golden_words():
    assert words(KEY, 0, 4).tolist() == [
        16841799316387601480, 266878830039480517, 6508784109982839143, 4471590322935117087,
    ]  # fmt: skip
    assert words(KEY, 2**40 + 1, 3).tolist() == [6475382667003264699, 4054907411075844005, 205233266161729306]


def test_golden_normals():
    assert normals(KEY, 0, 4) == pytest.approx(
        [0.4249092850469217, 0.03873191994428012, 0.0688515589805605, 1.4417801130827435], rel=1e-14
    )
    assert normals(KEY, 2**40 + 1, 2) == pytest.approx([1.1648820108139428, 1.736415227833765], rel=1e-14)


def test_golden_signs():
    assert signs(KEY, 0, 16).tolist() == [-1, -1, -1, 1, -1, -1, 1, -1, -1, -1, 1, 1, 1, -1, -1, -1]
    assert signs(KEY, 2**40 + 5, 8).tolist() == [-1, -1, 1, -1, 1, -1, -1, 1]


def test_golden_permutation():
    assert permutation(KEY, 10).tolist() == [1, 8, 3, 2, 6, 7, 4, 9, 5, 0]


@pytest.mark.parametrize("counter", [0, 1, 2**38, 2**40])
def test_words_equal_the_definition_of_philox(counter):
    # numpy steps the counter before its first block
    assert words(KEY, 4 * counter, 4).tolist() == philox_4x64_10(counter + 1, KEY)


@pytest.mark.parametrize("draw", [words, normals, signs])
@pytest.mark.parametrize("origin", [0, 2**24 - 3, 2**33 + 1, 2**40 - 5])
def test_a_position_gives_the_same_number_in_every_window(draw, origin):
    whole = draw(KEY, origin, 200)
    for start, count in ((0, 1), (1, 3), (63, 66), (64, 64), (199, 1), (7, 0)):
        assert np.array_equal(draw(KEY, origin + start, count), whole[start : start + count])


def test_numpy_positions_are_taken():
    assert np.array_equal(words(KEY, np.int64(2**40), 3), words(KEY, 2**40, 3))


def test_normals_are_the_same_in_any_chunk_length(monkeypatch):
    whole = normals(KEY, 3, 101)
    monkeypatch.setattr(counters, "_CHUNK", 8)
    assert np.array_equal(normals(KEY, 3, 101), whole)


def test_neighbouring_ids_and_names_have_unrelated_streams():
    keys = [derive_key(7, "mask", i) for i in (2**24, 2**24 + 1, 2**33, 2**33 + 1, 2**40)]
    drawn = np.stack([signs(key, 0, 4096) for key in keys]).astype(float)
    agreement = (drawn @ drawn.T / 4096)[~np.eye(len(keys), dtype=bool)]
    assert np.abs(agreement).max() < 4 / np.sqrt(4096)


def test_a_number_and_its_text_are_different_names():
    assert derive_key(1, "a") != derive_key("1", "a")
    assert derive_key(1, "ab", "c") != derive_key(1, "a", "bc")


def test_normals_have_the_moments_of_a_normal():
    drawn = normals(KEY, 0, 200_000)
    assert abs(drawn.mean()) < 4 / np.sqrt(200_000)
    assert abs(drawn.var() - 1) < 4 * np.sqrt(2 / 200_000)
    assert abs((drawn**4).mean() - 3) < 4 * np.sqrt(96 / 200_000)
    assert np.isfinite(drawn).all()


def test_signs_are_fair():
    assert abs(signs(KEY, 0, 100_000).mean()) < 4 / np.sqrt(100_000)


def test_torch_seeds_change_nothing():
    torch.manual_seed(1)
    first = permutation(KEY, 50)
    torch.manual_seed(2)
    assert np.array_equal(permutation(KEY, 50), first)
    assert sorted(first) == list(range(50))
