"""Evaluation batches: every target once, every byte once, in fixed shapes, on any number of processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data.batch import NO_ROW, Batch
from slmjax.data.scored import ScoredText
from slmjax.data.shards import ShardWriter, TokenShards
from slmjax.data.windows import evaluation_batches
from tests.data.in_memory import BOS, EOS, numbered

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)


def test_windows_by_hand():
    shards = numbered([9, 3, 2])  # 8 targets and 7 text tokens; 2 and 1; 1 and 0
    batches = evaluation_batches([shards], sequence_length=4, batch_size=2, overlap=1)
    first, second = batches
    assert first.tokens.tolist() == [[BOS, 1001, 1002, 1003], [1003, 1004, 1005, 1006]]
    assert first.targets.tolist() == [[1001, 1002, 1003, 1004], [1004, 1005, 1006, 1007]]
    assert first.loss_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]  # 1004 was scored in the row before
    assert first.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert first.segment_ids.tolist() == [[1] * 4] * 2
    assert first.num_bytes.tolist() == [4 * 3, 3 * 3]
    assert second.tokens.tolist() == [[1006, 1007, BOS, 2001], [BOS, 0, 0, 0]]
    assert second.targets.tolist() == [[1007, 1008, 2001, 2002], [3001, 0, 0, 0]]
    assert second.loss_mask.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]  # 1008, 2002 and 3001 are EOS: scored
    assert second.positions.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert second.segment_ids.tolist() == [[1, 1, 2, 2], [1, 0, 0, 0]]
    assert second.num_bytes.tolist() == [3, 0]  # 2001; EOS has no byte
    assert np.concatenate([first.row_ids, second.row_ids]).tolist() == [0, 1, 2, 3]
    assert (
        len(batches),
        batches.num_rows,
        batches.num_documents,
        batches.num_targets,
        batches.num_bytes,
    ) == (2, 4, 3, 11, 24)


@settings(max_examples=50, deadline=None)
@given(sources=st.lists(LENGTHS, min_size=1, max_size=3), sequence_length=st.integers(2, 12), data=st.data())
def test_every_target_and_every_byte_counts_once(sources, sequence_length, data):
    overlap = data.draw(st.integers(0, sequence_length - 1))
    batch_size = data.draw(st.integers(1, 5))
    shards_list = [numbered(lengths, bytes_per_token=data.draw(st.integers(1, 5))) for lengths in sources]
    for place, shards in enumerate(shards_list):  # the ids also identify the source
        for document in shards.documents:
            document[1:] += 100_000 * place
    batches = evaluation_batches(
        shards_list, sequence_length=sequence_length, batch_size=batch_size, overlap=overlap
    )
    made = list(batches)
    assert len(made) == len(batches)
    scored: dict[int, list[int]] = {}
    for batch in made:
        assert batch.tokens.shape == (batch_size, sequence_length)
        for token in batch.targets[batch.loss_mask == 1].tolist():
            scored.setdefault(token // 1000, []).append(token)
        check_context(batch, overlap)
    documents = [
        document[1:].tolist() for shards in shards_list for document in shards.documents if len(document) > 1
    ]
    assert sorted(scored.values()) == sorted(documents)  # each list in the document's own order
    assert (
        sum(int(batch.num_bytes.sum()) for batch in made)
        == batches.num_bytes
        == sum(int(s.num_bytes.sum()) for s in shards_list)
    )
    assert (
        sum(int(batch.loss_mask.sum()) for batch in made) == batches.num_targets == sum(map(len, documents))
    )
    rows = list(itertools.chain(*(batch.row_ids.tolist() for batch in made)))
    assert rows == [*range(batches.num_rows), *[NO_ROW] * (len(rows) - batches.num_rows)]


def check_context(batch: Batch, overlap: int) -> None:
    """A segment either starts with BOS and is scored throughout, or starts with `overlap` inputs that are not
    scored.
    """
    for row in range(len(batch.row_ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            inside = batch.segment_ids[row] == segment
            mask = batch.loss_mask[row][inside]
            unscored = 0 if batch.tokens[row][inside][0] == BOS else overlap
            assert not mask[:unscored].any() and mask[unscored:].all() and len(mask) > unscored
            assert np.array_equal(batch.targets[row][inside][:-1], batch.tokens[row][inside][1:])


def test_long_documents_see_the_overlap_and_short_ones_share_rows():
    lengths = [400, *[8] * 50]
    wide = evaluation_batches([numbered(lengths)], sequence_length=64, batch_size=4, overlap=32)
    none = evaluation_batches([numbered(lengths)], sequence_length=64, batch_size=4, overlap=0)
    # A window, and one more for each 32 (or 64) of the other 335 targets. The last has room for 2 (or 7) of
    # the 50 short documents of 7 targets; the others go 9 to a row.
    assert wide.num_rows == 1 + 11 + 6
    assert none.num_rows == 1 + 6 + 5


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 3], [0, 2], [3]])
def test_any_number_of_processes_sees_the_same_global_batches(rows):
    options = {"sequence_length": 6, "batch_size": 4, "overlap": 2}
    shards_list = [numbered([9, 3, 2, 30]), numbered([5, 17])]
    whole = list(evaluation_batches(shards_list, **options))
    part = list(evaluation_batches(shards_list, **options, rows=np.array(rows)))
    for result, batch in zip(part, whole, strict=True):
        for name, array in vars(batch).items():
            np.testing.assert_array_equal(vars(result)[name], array[rows], err_msg=name)


def test_the_first_documents_are_taken_whole():
    shards_list = [numbered([9, 3]), numbered([20, 5, 7])]
    for required, expected in ((1, [9]), (2, [9, 3]), (3, [9, 3, 20]), (9, [9, 3, 20, 5, 7])):
        batches = evaluation_batches(
            shards_list, sequence_length=4, batch_size=2, overlap=1, max_documents=required
        )
        assert batches.num_documents == len(expected)
        assert (
            batches.num_targets
            == sum(int(batch.loss_mask.sum()) for batch in batches)
            == sum(expected) - len(expected)
        )
        assert (
            batches.num_bytes
            == sum(int(batch.num_bytes.sum()) for batch in batches)
            == 3 * (sum(expected) - 2 * len(expected))
        )


def test_what_training_scores_is_scored_or_all_of_it():
    # the third has nothing to score, the last no prompt
    pairs = numbered([6, 20, 4, 9], prompt_lengths=[3, 14, 4, 0])
    options = {"sequence_length": 8, "batch_size": 1, "overlap": 2}
    batches = evaluation_batches([pairs], **options)
    scored = sorted(itertools.chain(*(batch.targets[batch.loss_mask == 1].tolist() for batch in batches)))
    assert scored == [1003, 1004, 1005, *range(2014, 2020), *range(4001, 4009)]
    assert (batches.num_targets, batches.num_tokens, batches.num_bytes) == (17, 35, 3 * (2 + 5 + 7))
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == batches.num_bytes
    everything = evaluation_batches([pairs], **options, text=ScoredText.ALL)
    assert (everything.num_targets, everything.num_tokens, everything.num_bytes) == (
        35,
        35,
        3 * (4 + 18 + 2 + 7),
    )
    assert sum(int(batch.loss_mask.sum()) for batch in everything) == 35
    with pytest.raises(ValueError, match="none of the 1 documents has a scored token.*--score all"):
        evaluation_batches([numbered([4], prompt_lengths=[4])], **options)


def test_bytes_that_do_not_divide_among_the_tokens_still_add_up():
    shards = numbered([40])
    shards.num_bytes[0] = shards.scored_bytes[0] = 1_999_999_999  # and nothing overflows
    batches = list(evaluation_batches([shards], sequence_length=4, batch_size=3, overlap=1))
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == 1_999_999_999
    rows = np.concatenate([batch.num_bytes for batch in batches])
    assert abs(rows[1] - 3 * 1_999_999_999 / 38) < 2


def test_windows_of_real_shards(tmp_path):
    documents = [
        np.array([BOS, *np.random.default_rng(seed).integers(2, 70_000, size=3000 * seed), EOS])
        for seed in range(1, 9)
    ]
    with ShardWriter(tmp_path, tokenizer_hash="t", vocab_size=70_000) as writer:
        for document in documents:
            writer.add(document, num_bytes=2 * (len(document) - 2))
        writer.close()
    batches = evaluation_batches([TokenShards.open(tmp_path)], sequence_length=512, batch_size=8, overlap=64)
    made = list(batches)
    scored = np.concatenate([batch.targets[batch.loss_mask == 1] for batch in made])
    expected = np.concatenate([document[1:] for document in documents])
    np.testing.assert_array_equal(np.sort(scored), np.sort(expected))
    assert sum(int(batch.num_bytes.sum()) for batch in made) == 2 * 3000 * 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1, "overlap": 0}, "sequence_length is 1"),
        ({"overlap": 8}, "overlap of 8 leaves no new target in a row of 8"),
        ({"overlap": -1}, "overlap of -1"),
        ({"rows": np.array([2])}, r"rows \[2\] are not rows of a batch of 2"),
        ({"batch_size": 0}, "batch of 0 rows"),
        ({"max_documents": 0}, "max_documents is 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options, message):
    settings = {"sequence_length": 8, "batch_size": 2, "overlap": 2, **options}
    with pytest.raises(ValueError, match=message):
        evaluation_batches([numbered([9, 3])], **settings)


@pytest.mark.parametrize("shards_list", [[], [numbered([])]])
def test_an_empty_split_is_refused(shards_list):
    with pytest.raises(ValueError, match="no documents to evaluate on, the held-out split is empty"):
        evaluation_batches(shards_list, sequence_length=8, batch_size=2, overlap=0)
