"""Masks against their definition written out in Python integers, and against what their formulas promise."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine import masks as masks_module
from engine.counters import derive_key
from engine.duplicates import near_identical
from engine.masks import Masks, MaskSettings, average, duplicate_pairs, factor, philox, unseen_ids
from tests.conftest import Caught

LAYER = "encoder.adapter.act"
IDS = [0, 1, 2**24, 2**24 + 1, 2**33, 2**40]
GOLDEN = {
    "volatile": [
        "011110111000101111000010",
        "001110111011000111011001",
        "011000001100110010111011",
        "000111010100110011111011",
        "001101011101101010000101",
        "001001101101111101100011",
    ],
    "hashed": [
        "100110110100100001101010",
        "000101000000001111010000",
        "001110100100111011101010",
        "011000100111100001100001",
        "011011111000001001011101",
        "010001111100110010011110",
    ],
}


def philox_words(key: int, example: int) -> Iterator[int]:
    """Yield the 32-bit words of an id's part of a stream: Philox4x32-10 written out in Python's integers."""
    block = 0
    while True:
        a, b, c, d = block, 0, example & 0xFFFFFFFF, example >> 32
        k, l = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF  # noqa: E741
        for _ in range(10):
            first, second = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = second >> 32 ^ b ^ k, second & 0xFFFFFFFF, first >> 32 ^ d ^ l, first & 0xFFFFFFFF
            k, l = (k + 0x9E3779B9) & 0xFFFFFFFF, (l + 0xBB67AE85) & 0xFFFFFFFF  # noqa: E741
        yield from (a, b, c, d)
        block += 1


def drawn(key: int, example: int, width: int, keep: float) -> list[bool]:
    words = philox_words(key, example)
    return [next(words) < keep * 2**32 for _ in range(width)]


def volatile_mask(settings: MaskSettings, layer: str, example: int, width: int) -> list[bool]:
    return drawn(derive_key(settings.seed, "mask", layer), example, width, settings.keep)


def chosen_rows(settings: MaskSettings, layer: str, example: int) -> set[int]:
    """Return the k different rows of an id: Floyd's algorithm with a set."""
    words, rows = philox_words(derive_key(settings.seed, "picks", layer), example), set[int]()
    for last in range(settings.codebook - settings.picks, settings.codebook):
        row = next(words) * (last + 1) // 2**32
        rows.add(last if row in rows else row)
    return rows


def hashed_mask(settings: MaskSettings, layer: str, example: int, width: int) -> list[bool]:
    key, rate = derive_key(settings.seed, "codebook"), settings.keep ** (1 / settings.picks)
    rows = [drawn(key, row, width, rate) for row in chosen_rows(settings, layer, example)]
    return [all(row[unit] for row in rows) for unit in range(width)]


ORACLES = {"volatile": volatile_mask, "hashed": hashed_mask}
SOME = [
    MaskSettings(keep=keep, kind=kind, seed=3, codebook=16, picks=picks)
    for kind, keep, picks in (("volatile", 0.5, 1), ("volatile", 0.3, 1), ("hashed", 0.5, 2), ("hashed", 0.7, 5))
]


def bits(settings: MaskSettings, ids: list[int] | Tensor, width: int = 24, layer: str = LAYER) -> Tensor:
    return Masks(settings).bits(torch.as_tensor(ids), {layer: width})[layer]


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_bits(kind: str) -> None:
    found = bits(MaskSettings(seed=7, kind=kind, codebook=64, picks=2), IDS)
    assert ["".join(str(int(bit)) for bit in row) for row in found] == GOLDEN[kind]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the authors' Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    a, b, c, d = (torch.tensor([word]) for word in counter)
    k, l = (torch.tensor([word]) for word in key)  # noqa: E741
    assert tuple(int(word) for word in philox((a, b, c, d), (k, l))) == words


@pytest.mark.parametrize("settings", SOME)
def test_bits_equal_the_definition(settings: MaskSettings, caught: Caught) -> None:
    widths = {"a": 7, "b.input": 24}

    def compare() -> None:
        found = Masks(settings).bits(torch.tensor(IDS), widths)
        for layer, width in widths.items():
            truth = [ORACLES[settings.kind](settings, layer, example, width) for example in IDS]
            assert found[layer].tolist() == truth

    caught(compare, masks_module, "_WEYL", (0x9E3779B9, 0x9E3779B9))
    if settings.kind == "hashed":
        caught(compare, masks_module, "_distinct", lambda words, total, count: (words[:, :count] * total) >> 32)


@pytest.mark.parametrize("settings", SOME)
def test_bits_depend_on_seed_layer_and_id_alone(settings: MaskSettings) -> None:
    ids = torch.tensor(IDS)
    whole = Masks(settings).bits(ids, {"a": 10, LAYER: 24, "c": 600})[LAYER]
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(bits(settings, ids[order]), whole[order])  # batch order
    assert all(torch.equal(bits(settings, [i])[0], row) for i, row in zip(IDS, whole, strict=True))  # batch mates
    assert torch.equal(bits(settings, ids, 9), whole[:, :9])  # width
    assert not torch.equal(bits(settings, ids, layer="other"), whole)
    assert not torch.equal(bits(MaskSettings(**vars(settings) | {"seed": 4}), ids), whole)
    with torch.inference_mode():
        assert torch.equal(bits(settings, ids), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    for settings in SOME:
        whole = bits(settings, IDS)
        torch.set_default_dtype(dtype)
        try:
            found = bits(settings, IDS)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, whole)


def test_random_state_changes_nothing_and_is_not_changed() -> None:
    torch.manual_seed(1)
    first = bits(MaskSettings(kind="hashed"), IDS)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(bits(MaskSettings(kind="hashed"), IDS), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_neighbouring_large_ids_have_unrelated_masks() -> None:
    for start in (2**24, 2**33, 2**40):
        a, b = bits(MaskSettings(), [start, start + 1], 4096)
        assert abs(float((a == b).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(4096)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("picks", [0, 1, 2, 4])
def test_the_keep_rate_is_p_and_masks_are_unrelated(keep: float, picks: int) -> None:
    """`picks` 0: volatile. The paper's own rate of ones, 1 − p^(1/k), would keep (1 − p^(1/k))^k."""
    kind = "hashed" if picks else "volatile"
    settings = MaskSettings(keep=keep, kind=kind, codebook=512, picks=max(1, picks))
    width, layers = 4096, Masks(settings).bits(torch.arange(64), {"a": 4096, "b": 4096})
    error = math.sqrt(keep * (1 - keep) / (width * (64 if kind == "volatile" else 512 / settings.picks)))
    assert abs(float(layers["a"].double().mean()) - keep) < 4 * error
    if picks > 1:
        assert abs((1 - keep ** (1 / picks)) ** picks - keep) > 4 * error
    rows = [chosen_rows(settings, layer, i) if picks else {(layer, i)} for layer in "ab" for i in range(64)]
    both = torch.cat([layers["a"], layers["b"]]).double()
    apart = torch.tensor([[not (one & other) for other in rows] for one in rows])
    correlation = (both - keep) @ (both - keep).T / width / (keep * (1 - keep))
    assert float(correlation[apart].abs().max()) < 5 / math.sqrt(width)  # the largest of 16,000 pairs: 4.4 expected
    assert float(correlation[apart].mean().abs()) < 0.01


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_masks_that_share_rows_correlate_by_the_formula(shared: int) -> None:
    settings, width = MaskSettings(kind="hashed", codebook=12, picks=4), 4096
    rows = [chosen_rows(settings, LAYER, i) for i in range(60)]
    kept = bits(settings, list(range(60)), width).double()
    pairs = [(i, j) for i in range(60) for j in range(i) if len(rows[i] & rows[j]) == shared]
    joint = sum(float((kept[i] * kept[j]).mean()) for i, j in pairs) / len(pairs)
    assert joint == pytest.approx(0.5 ** (2 - shared / 4), abs=0.015)
    assert abs(joint - 0.25) > 0.03


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
def test_the_flip_completes_the_mask(keep: float) -> None:
    kept = bits(MaskSettings(keep=keep), IDS)
    settings = MaskSettings(keep=keep)
    own, flipped = (factor(kept, side, settings, torch.float64) for side in ("own", "flipped"))
    assert torch.equal(own + flipped, torch.full_like(own, 1 / keep))  # equation 2's m̃ = 1/p − m
    assert not (own * flipped).any()
    assert torch.equal(factor(~kept, "flipped", settings, torch.float64), own)
    wide = bits(settings, IDS, 4096)
    mean = float(factor(wide, "flipped", MaskSettings(keep=keep, flip_scale="unbiased"), torch.float64).mean())
    assert mean == pytest.approx(1, abs=0.05)
    assert float(factor(wide, "flipped", settings, torch.float64).mean()) == pytest.approx((1 - keep) / keep, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_are_zero_or_the_scale(dtype: torch.dtype) -> None:
    assert factor(bits(MaskSettings(), IDS), "own", MaskSettings(), dtype).unique().tolist() == [0.0, 2.0]


def held_bytes(masks: Masks) -> int:
    return sum(value.untyped_storage().nbytes() for value in vars(masks).values() if isinstance(value, Tensor))


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_million_ids_leave_nothing_behind(kind: str) -> None:
    masks = Masks(MaskSettings(kind=kind, codebook=64, picks=2))
    masks.bits(torch.arange(1), {LAYER: 16})
    before, kept = held_bytes(masks), 0
    for ids in torch.arange(10**6).split(1 << 16):
        kept += int(masks.bits(ids, {LAYER: 16})[LAYER].sum())
    assert held_bytes(masks) == before == (64 * 16 if kind == "hashed" else 0)
    assert kept / 16e6 == pytest.approx(0.5, abs=0.02)


def test_duplicates_share_the_mask_of_the_first() -> None:
    texts = ["a fine film", "dull and poor", "A fine film!", "dull and poor"]
    ids = torch.tensor([70, 10, 20, 30])
    pairs = duplicate_pairs(ids, near_identical(texts))
    assert pairs.tolist() == [[20, 70], [30, 10]]
    masks = Masks(MaskSettings(), pairs)
    shared = masks.bits(ids, {LAYER: 64})[LAYER]
    assert torch.equal(shared[[0, 1, 0, 1]], shared)
    alone = Masks(MaskSettings()).bits(ids, {LAYER: 64})[LAYER]
    assert torch.equal(alone[:2], shared[:2])
    assert not torch.equal(alone[2:], shared[2:])
    assert masks.mask_ids(torch.tensor([5, 99])).tolist() == [5, 99]


def test_unseen_ids_are_no_corpus_s() -> None:
    assert int(unseen_ids(3).min()) > 2**40
    assert torch.equal(unseen_ids(5)[3:], unseen_ids(2, start=3))


def test_the_average_over_mask_seeds_has_a_standard_error() -> None:
    blocks = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)) + 1e6
    mean, error = average(blocks)
    truth = blocks.double()
    assert torch.allclose(mean, truth.mean(0), rtol=1e-14)
    assert error is not None
    assert torch.allclose(error, truth.std(0, correction=1) / math.sqrt(5), rtol=1e-6)
    assert not torch.allclose(error, truth.std(0, correction=0) / math.sqrt(5), rtol=1e-2)
    assert average(blocks[:1])[1] is None
    with pytest.raises(ValueError, match="at least one block"):
        average([])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 1.0}, "between 0 and 1"),
        ({"keep": 0.0}, "between 0 and 1"),
        ({"flip_scale": "none"}, "use one of paper, unbiased"),
        ({"kind": "stored"}, "use one of volatile, hashed"),
        ({"picks": 300}, "1 to masks.codebook=256"),
    ],
)
def test_settings_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MaskSettings(**changes)
