"""Row plans: hand-worked examples, a naive packer as reference, and that nothing is lost or repeated."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data import packing
from slmjax.data.batch import Batch, empty_batch
from slmjax.data.config import Packing
from slmjax.data.packing import RowPlan, best_fit_rows, concatenated_rows, load_or_pack, write_row
from tests.data.in_memory import BOS, InMemoryDocuments, numbered

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25).filter(lambda lengths: max(lengths) > 1)


def write_all(plan: RowPlan, shards: InMemoryDocuments, **options) -> Batch:
    batch = empty_batch(len(plan), plan.sequence_length)
    for row in range(len(plan)):
        write_row(batch, row, plan=plan, row=row, shards=shards, **options)
    return batch


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Free positions of each row, by trying every row for every piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda row: rooms[row])] -= length
        else:
            rooms.append(capacity - length)
    return rooms


def test_best_fit_by_hand():
    # Targets per document: 3, 10, 2, 4, 0, 1. Rows of 6: the second document is cut into 6 + 4.
    plan = best_fit_rows(np.array([4, 11, 3, 5, 1, 2]), sequence_length=6, window=6)
    rows = [plan.pieces(row) for row in range(len(plan))]
    assert rows == [
        [(1, 0, 6)],
        [(1, 6, 4), (5, 0, 1)],  # 1 goes where 2 positions are free rather than 3
        [(2, 0, 2), (3, 0, 4)],  # 2 goes where 2 positions are free rather than 3
        [(0, 0, 3)],
    ]
    assert plan.efficiency == 20 / 24


def test_a_row_by_hand():
    plan = best_fit_rows(np.array([4, 3]), sequence_length=6, window=2)
    batch = write_all(plan, numbered([4, 3], prompt_lengths=[2, 0]))
    assert batch.tokens.tolist() == [[BOS, 1001, 1002, BOS, 2001, 0]]
    assert batch.targets.tolist() == [[1001, 1002, 1003, 2001, 2002, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 1, 0]]  # 1001 belongs to the prompt
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.num_bytes.tolist() == [3 + 3]  # 1002 and 2001; the prompt is not scored, and 1003 and 2002 end documents


def test_concatenation_by_hand():
    shards = numbered([3, 6, 2])
    plan = concatenated_rows(shards.lengths, sequence_length=4)
    assert [plan.pieces(row) for row in range(len(plan))] == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)], [(1, 5, 1), (2, 0, 1)]]
    batch = write_all(plan, shards)
    assert batch.tokens.tolist() == [[BOS, 1001, 1002, BOS], [2001, 2002, 2003, 2004], [2005, BOS, 0, 0]]
    assert batch.targets.tolist() == [[1001, 1002, 0, 2001], [2002, 2003, 2004, 2005], [0, 3001, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]]  # 0: BOS would be the target
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.num_bytes.tolist() == [3 + 3, 9, 0]
    assert plan.efficiency == 10 / 12


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, sequence_length=st.integers(2, 12), window=st.integers(1, 30), data=st.data())
def test_best_fit_scores_every_target_once(lengths, sequence_length, window, data):
    overlap = data.draw(st.integers(0, sequence_length - 1))
    shards = numbered(lengths)
    plan = best_fit_rows(shards.lengths, sequence_length=sequence_length, window=window, overlap=overlap)
    batch = write_all(plan, shards)
    scored = batch.targets[batch.loss_mask == 1].tolist()
    assert sorted(scored) == [1000 * (d + 1) + i for d, length in enumerate(lengths) for i in range(1, length)]
    for document in range(len(lengths)):  # the pieces of each document are in order
        own = [target for target in scored if target // 1000 == document + 1]
        assert own == sorted(own)
    assert batch.num_bytes.sum() == shards.num_bytes[shards.lengths > 1].sum()
    check_rows(plan, batch)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, sequence_length=st.integers(2, 12))
def test_concatenation_is_the_stream_cut_at_the_sequence_length(lengths, sequence_length):
    shards = numbered(lengths)
    plan = concatenated_rows(shards.lengths, sequence_length=sequence_length)
    batch = write_all(plan, shards)
    stream = list(itertools.chain(*(document.tolist() for document in shards.documents)))
    assert batch.tokens[batch.segment_ids > 0].tolist() == stream[:-1]
    assert batch.targets[batch.loss_mask == 1].tolist() == [token for token in stream if token != BOS]
    assert batch.num_bytes.sum() == shards.num_bytes.sum()
    assert (batch.segment_ids[:-1] > 0).all()  # full rows but for the last
    check_rows(plan, batch)


def check_rows(plan: RowPlan, batch: Batch) -> None:
    """Padding, segment ids and positions are consistent, and the plan's efficiency is what the rows show."""
    real = batch.segment_ids > 0
    assert real.any(axis=1).all()
    assert plan.efficiency == real.mean()
    assert not batch.loss_mask[~real].any() and not batch.tokens[~real].any() and not batch.positions[~real].any()
    for row in range(len(plan)):
        segments = batch.segment_ids[row][real[row]]
        assert np.array_equal(np.unique(segments), np.arange(1, segments[-1] + 1)) and (np.diff(segments) >= 0).all()
        for segment in np.unique(segments):
            inside = batch.segment_ids[row] == segment
            assert np.array_equal(batch.positions[row][inside], np.arange(inside.sum()))
            owners = {token // 1000 for token in batch.tokens[row][inside].tolist() if token != BOS}
            assert len(owners | {target // 1000 for target in batch.targets[row][inside & (batch.loss_mask[row] == 1)].tolist()}) <= 1


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60), capacity=st.integers(2, 30))
def test_best_fit_equals_the_naive_packer(lengths, capacity):
    plan = best_fit_rows(np.array(lengths), sequence_length=capacity, window=len(lengths))
    rooms = [capacity - sum(length for _, _, length in plan.pieces(row)) for row in range(len(plan))]
    pieces = [min(capacity, length - 1 - start) for length in lengths for start in range(0, length - 1, capacity)]
    assert sorted(rooms) == sorted(naive_best_fit_decreasing(pieces, capacity))


def test_best_fit_wastes_little_on_documents_of_usual_lengths():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, size=4000).astype(np.int64) + 2
    plan = best_fit_rows(lengths, sequence_length=512, window=1000)
    assert plan.efficiency > 0.98
    assert concatenated_rows(lengths, sequence_length=512).efficiency > 0.999


def test_windows_of_documents_are_packed_apart():
    plan = best_fit_rows(np.array([4, 4, 4, 4, 4, 4]), sequence_length=6, window=2)
    assert [[document for document, _, _ in plan.pieces(row)] for row in range(len(plan))] == [[0, 1], [2, 3], [4, 5]]


def test_bytes_are_exact_with_the_bytes_of_each_token():
    shards = InMemoryDocuments([[BOS, 2, 3, 4, 1], [BOS, 3, 1]], num_bytes=[10, 4], prompt_lengths=[2, 0], scored_bytes=[9, 4])
    token_bytes = np.array([0, 0, 1, 4, 5])
    plan = best_fit_rows(shards.lengths, sequence_length=4, window=2)
    exact = write_all(plan, shards, token_bytes=token_bytes)
    assert dict(zip(exact.tokens[:, 1].tolist(), exact.num_bytes.tolist(), strict=True)) == {2: 4 + 5, 3: 4}
    spread = write_all(plan, shards)
    assert dict(zip(spread.tokens[:, 1].tolist(), spread.num_bytes.tolist(), strict=True)) == {2: 9, 3: 4}


def test_a_prompt_longer_than_a_row_leaves_a_row_without_targets():
    shards = numbered([12], prompt_lengths=[7])
    plan = best_fit_rows(shards.lengths, sequence_length=5, window=1)
    batch = write_all(plan, shards)
    assert batch.loss_mask.tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.num_bytes.tolist() == [0, 12, 0]


OPTIONS = {"packing": Packing.BEST_FIT, "sequence_length": 8, "window": 4}


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    shards = numbered([5, 9, 3, 30, 7])
    made = load_or_pack(shards, cache_dir=tmp_path, **OPTIONS)
    assert [path.suffix for path in (tmp_path / "packing").iterdir()] == [".npz"]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "best_fit_rows", None)
        found = load_or_pack(shards, cache_dir=tmp_path, **OPTIONS)
    assert [found.pieces(row) for row in range(len(found))] == [made.pieces(row) for row in range(len(made))]
    assert (found.documents.dtype, found.row_starts.dtype) == (np.int32, np.int64)


def test_other_data_or_settings_have_a_plan_of_their_own(tmp_path):
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **OPTIONS)
    load_or_pack(numbered([5, 10]), cache_dir=tmp_path, **OPTIONS)
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "sequence_length": 9})
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "window": 5})
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "packing": Packing.CONCATENATE})
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "packing": Packing.CONCATENATE, "window": 5})  # not a setting of it
    assert len(list((tmp_path / "packing").iterdir())) == 5


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_plan_is_made_again(tmp_path, damage):
    shards = numbered([5, 9, 3, 30, 7])
    made = load_or_pack(shards, cache_dir=tmp_path, **OPTIONS)
    (path,) = (tmp_path / "packing").iterdir()
    sound = path.read_bytes()
    damaged = bytearray(sound)
    place = sound.index(made.documents.tobytes())
    damaged[place] ^= 2
    path.write_bytes({"flip": bytes(damaged), "truncate": sound[: len(sound) // 2], "empty": b""}[damage])
    again = load_or_pack(shards, cache_dir=tmp_path, **OPTIONS)
    assert np.array_equal(again.documents, made.documents)
    (path,) = (tmp_path / "packing").iterdir()
    assert path.read_bytes()[place : place + 4] == sound[place : place + 4]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(packing.np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **OPTIONS)
    assert list((tmp_path / "packing").iterdir()) == []


def test_what_cannot_be_packed_is_refused():
    lengths = np.array([5, 9])
    with pytest.raises(ValueError, match="sequence_length is 1: a row needs at least 2"):
        best_fit_rows(lengths, sequence_length=1, window=1)
    with pytest.raises(ValueError, match="sequence_length is 1: a row needs at least 2"):
        concatenated_rows(lengths, sequence_length=1)
    with pytest.raises(ValueError, match="packing window to at least 1"):
        best_fit_rows(lengths, sequence_length=4, window=0)
    with pytest.raises(ValueError, match="overlap of 4 leaves a row of 4 no new target: choose 0 to 3"):
        best_fit_rows(lengths, sequence_length=4, window=1, overlap=4)
    for empty in (np.zeros(0, np.int64), np.ones(3, np.int64)):
        with pytest.raises(ValueError, match="no documents"):
            best_fit_rows(empty, sequence_length=4, window=2)
    with pytest.raises(ValueError, match="no documents"):
        concatenated_rows(np.zeros(0, np.int64), sequence_length=4)
