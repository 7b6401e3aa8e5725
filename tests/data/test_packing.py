"""Row plans: hand-worked examples, a naive packer as reference, and that nothing is lost or repeated."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slmjax.data import packing
from slmjax.data.batch import Batch, empty_batch
from slmjax.data.config import Packing
from slmjax.data.left_out import describe_left_out, find_left_out
from slmjax.data.packing import (
    RowPlan,
    best_fit_rows,
    concatenated_rows,
    load_or_pack,
    spans_of,
    with_targets,
    write_row,
)
from slmjax.data.scored import pieces_around
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
    assert batch.num_bytes.tolist() == [
        3 + 3
    ]  # 1002 and 2001; the prompt is not scored, and 1003 and 2002 end documents


def test_concatenation_by_hand():
    shards = numbered([3, 6, 2])
    plan = concatenated_rows(shards.lengths, sequence_length=4)
    assert [plan.pieces(row) for row in range(len(plan))] == [
        [(0, 0, 3), (1, 0, 1)],
        [(1, 1, 4)],
        [(1, 5, 1), (2, 0, 1)],
    ]
    batch = write_all(plan, shards)
    assert batch.tokens.tolist() == [[BOS, 1001, 1002, BOS], [2001, 2002, 2003, 2004], [2005, BOS, 0, 0]]
    assert batch.targets.tolist() == [[1001, 1002, 0, 2001], [2002, 2003, 2004, 2005], [0, 3001, 0, 0]]
    assert batch.loss_mask.tolist() == [
        [1, 1, 0, 1],
        [1, 1, 1, 1],
        [0, 1, 0, 0],
    ]  # 0: BOS would be the target
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
    assert sorted(scored) == [
        1000 * (d + 1) + i for d, length in enumerate(lengths) for i in range(1, length)
    ]
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
    assert (
        not batch.loss_mask[~real].any()
        and not batch.tokens[~real].any()
        and not batch.positions[~real].any()
    )
    for row in range(len(plan)):
        segments = batch.segment_ids[row][real[row]]
        assert (
            np.array_equal(np.unique(segments), np.arange(1, segments[-1] + 1))
            and (np.diff(segments) >= 0).all()
        )
        for segment in np.unique(segments):
            inside = batch.segment_ids[row] == segment
            assert np.array_equal(batch.positions[row][inside], np.arange(inside.sum()))
            owners = {token // 1000 for token in batch.tokens[row][inside].tolist() if token != BOS}
            assert (
                len(
                    owners
                    | {
                        target // 1000
                        for target in batch.targets[row][inside & (batch.loss_mask[row] == 1)].tolist()
                    }
                )
                <= 1
            )


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60), capacity=st.integers(2, 30))
def test_best_fit_equals_the_naive_packer(lengths, capacity):
    plan = best_fit_rows(np.array(lengths), sequence_length=capacity, window=len(lengths))
    rooms = [capacity - sum(length for _, _, length in plan.pieces(row)) for row in range(len(plan))]
    pieces = [
        min(capacity, length - 1 - start) for length in lengths for start in range(0, length - 1, capacity)
    ]
    assert sorted(rooms) == sorted(naive_best_fit_decreasing(pieces, capacity))


def test_best_fit_wastes_little_on_documents_of_usual_lengths():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, size=4000).astype(np.int64) + 2
    plan = best_fit_rows(lengths, sequence_length=512, window=1000)
    assert plan.efficiency > 0.98
    assert concatenated_rows(lengths, sequence_length=512).efficiency > 0.999


def test_windows_of_documents_are_packed_apart():
    plan = best_fit_rows(np.array([4, 4, 4, 4, 4, 4]), sequence_length=6, window=2)
    assert [[document for document, _, _ in plan.pieces(row)] for row in range(len(plan))] == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]


def test_bytes_are_exact_with_the_bytes_of_each_token():
    shards = InMemoryDocuments(
        [[BOS, 2, 3, 4, 1], [BOS, 3, 1]], num_bytes=[10, 4], prompt_lengths=[2, 0], scored_bytes=[9, 4]
    )
    token_bytes = np.array([0, 0, 1, 4, 5])
    plan = best_fit_rows(shards.lengths, sequence_length=4, window=2)
    exact = write_all(plan, shards, token_bytes=token_bytes)
    assert dict(zip(exact.tokens[:, 1].tolist(), exact.num_bytes.tolist(), strict=True)) == {2: 4 + 5, 3: 4}
    spread = write_all(plan, shards)
    assert dict(zip(spread.tokens[:, 1].tolist(), spread.num_bytes.tolist(), strict=True)) == {2: 9, 3: 4}


def flags(text: str) -> list[bool]:
    return [character == "x" for character in text]


@pytest.mark.parametrize(
    ("scored", "sequence_length", "overlap", "pieces"),
    [
        # A pair of 10 tokens of prompt and 3 targets: the row is filled up with the end of the prompt.
        ("." * 10 + "xxx", 6, 0, [(6, 6, 3)]),
        # A completion of 5 targets fits a row of 6, with 2 inputs before it.
        ("." * 10 + "xxxxx", 6, 0, [(8, 6, 1)]),
        ("." * 10 + "xxxxxx", 6, 0, [(9, 6, 0)]),
        # A completion of 9 does not: half a row of prompt, then running text.
        ("." * 10 + "x" * 9, 6, 0, [(7, 6, 2), (13, 5, 0)]),
        ("." * 10 + "x" * 9, 6, 2, [(7, 6, 2), (11, 6, 2), (15, 3, 2)]),
        (".." + "x" * 9, 6, 0, [(0, 6, 1), (6, 4, 0)]),  # the prompt is shorter than that
        # Turns: both of the first two are within a row that begins half a row before them; what is in between
        # is context.
        ("...x.x" + "." * 9 + "xx...", 6, 0, [(0, 5, 2), (10, 6, 4)]),
        # The second piece repeats a turn that the first one scored, as context.
        ("....xxx.xx", 6, 0, [(0, 6, 3), (3, 6, 4)]),
    ],
)
def test_documents_longer_than_a_row_are_cut_around_what_is_scored(scored, sequence_length, overlap, pieces):
    documents = numbered([len(scored)], scored=[flags(scored)])
    (spans,) = spans_of(documents, sequence_length=sequence_length).values()
    assert pieces_around(spans, sequence_length=sequence_length, overlap=overlap) == pieces


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    sequence_length=st.integers(2, 12),
    window=st.integers(1, 30),
    packing=st.sampled_from(Packing),
)
def test_every_row_has_a_target_and_every_scored_target_is_in_one(data, sequence_length, window, packing):
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, 20)), min_size=1, max_size=6)
    scored = [
        [False, *itertools.chain(*([flag] * n for flag, n in data.draw(runs)))]
        for _ in range(data.draw(st.integers(1, 8)))
    ]
    overlap = data.draw(st.integers(0, sequence_length - 1)) if packing is Packing.BEST_FIT else 0
    documents = numbered([len(of_document) for of_document in scored], scored=scored)
    expected = [
        1000 * (d + 1) + i
        for d, of_document in enumerate(scored)
        for i, flag in enumerate(of_document)
        if flag
    ]
    assume(expected)
    if packing is Packing.BEST_FIT:
        spans = spans_of(documents, sequence_length=sequence_length)
        plan = best_fit_rows(
            documents.lengths, sequence_length=sequence_length, window=window, overlap=overlap, spans=spans
        )
    else:
        plan = with_targets(concatenated_rows(documents.lengths, sequence_length=sequence_length), documents)
    batch = write_all(plan, documents)
    assert batch.loss_mask.any(axis=1).all()
    assert sorted(batch.targets[batch.loss_mask == 1].tolist()) == expected
    assert batch.num_bytes.sum() == documents.scored_bytes[documents.num_scored > 0].sum()
    check_rows(plan, batch)
    result = find_left_out(plan, documents)
    inputs = [set() for _ in scored]
    for row in range(len(plan)):
        for document, start, length in plan.pieces(row):
            inputs[document] |= set(range(start, start + length))
    partial = [d for d, of_document in enumerate(scored) if not all(of_document[1:])]
    assert result.entirely.tolist() == [d for d in partial if not inputs[d]]
    assert result.partly.tolist() == [d for d in partial if 0 < len(inputs[d]) < len(scored[d]) - 1]


def test_what_is_left_out_is_counted_and_named():
    documents = numbered([12, 5, 4, 13, 6], prompt_lengths=[9, 2, 4, 10, 0])
    plan = best_fit_rows(
        documents.lengths, sequence_length=6, window=5, spans=spans_of(documents, sequence_length=6)
    )
    whole, part = describe_left_out(plan, documents, name="pairs", decode=str)
    assert (
        whole.startswith("pairs: 1 of 5 documents have no token that is scored")
        and "document 2, which begins '[3001, 3002, " in whole
    )
    assert (
        part.startswith("pairs: of 2 of 5 documents some text that is not scored")
        and "document 0, which begins '[1001, " in part
    )
    plain = numbered([12, 5])
    assert (
        describe_left_out(
            best_fit_rows(plain.lengths, sequence_length=6, window=5), plain, name="", decode=str
        )
        == []
    )
    with pytest.raises(ValueError, match="none of its text is scored"):
        nothing = numbered([4], prompt_lengths=[4])
        best_fit_rows(
            nothing.lengths, sequence_length=6, window=5, spans=spans_of(nothing, sequence_length=6)
        )


OPTIONS = {"packing": Packing.BEST_FIT, "sequence_length": 8, "window": 4}


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    shards = numbered([5, 9, 3, 30, 7])
    made = load_or_pack(shards, cache_dir=tmp_path, **OPTIONS)
    assert [path.suffix for path in (tmp_path / "packing").iterdir()] == [".npz"]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "best_fit_rows", None)
        result = load_or_pack(shards, cache_dir=tmp_path, **OPTIONS)
    assert [result.pieces(row) for row in range(len(result))] == [
        made.pieces(row) for row in range(len(made))
    ]
    assert (result.documents.dtype, result.row_starts.dtype) == (np.int32, np.int64)


def test_other_data_or_settings_have_a_plan_of_their_own(tmp_path):
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **OPTIONS)
    load_or_pack(numbered([5, 10]), cache_dir=tmp_path, **OPTIONS)
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "sequence_length": 9})
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "window": 5})
    load_or_pack(numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "packing": Packing.CONCATENATE})
    load_or_pack(
        numbered([5, 9]), cache_dir=tmp_path, **{**OPTIONS, "packing": Packing.CONCATENATE, "window": 5}
    )  # not a setting of it
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
    with pytest.raises(ValueError, match="packing window is 0 documents: set it to at least 1"):
        best_fit_rows(lengths, sequence_length=4, window=0)
    with pytest.raises(ValueError, match="overlap of 4 leaves no new target in a row of 4: choose 0 to 3"):
        best_fit_rows(lengths, sequence_length=4, window=1, overlap=4)
    for empty in (np.zeros(0, np.int64), np.ones(3, np.int64)):
        with pytest.raises(ValueError, match="no documents"):
            best_fit_rows(empty, sequence_length=4, window=2)
    with pytest.raises(ValueError, match="no documents"):
        concatenated_rows(np.zeros(0, np.int64), sequence_length=4)
