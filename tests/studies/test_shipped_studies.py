"""The studies that are shipped: each is built at both sizes, and its arms can be made equal."""

from pathlib import Path

import pytest

from slmjax.studies import load_studies
from slmjax.studies.costs import arm_cost
from slmjax.studies.design import Quantity
from slmjax.studies.matching import match_arms
from slmjax.training import BpeTokenizer

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = ("depth", "kv_heads", "window", "experts", "embeddings", "optimizer", "schedule", "qk_norm")


@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", NAMES)
def test_a_study_asks_a_question_of_equal_arms(name: str, size: str) -> None:
    for study in load_studies(FOLDER / f"{name}_study.py", size=size):
        assert study.question.endswith("?") and size in study.name
        matched, choices = match_arms(study)
        assert all(choice.is_met for choice in choices)
        assert study.base is not None and isinstance(study.base.tokenizer, BpeTokenizer)
        vocab_size = study.base.tokenizer.vocab_size
        costs = [arm_cost(matched.experiment(arm.name, 0), vocab_size=vocab_size) for arm in matched.arms]
        assert len({cost.tokens for cost in costs}) == 1
        if any(match.quantity is Quantity.PARAMETERS for match in study.matched):
            assert max(cost.parameters for cost in costs) < 1.02 * min(cost.parameters for cost in costs)
