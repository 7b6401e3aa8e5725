"""How many key-value heads does attention need, at equal parameters and at equal bytes of the cache?

    slmjax ablate experiments/kv_heads_study.py --plan
    slmjax ablate experiments/kv_heads_study.py

Fewer key-value heads make the decoding cache smaller. The parameters that they save go into the feed-forward
layers. The last arm spends the saved cache on wider heads instead: its cache is that of the baseline.
"""

from study_base import attention, base

from slmjax.studies import Arm, Dimension, Match, Quantity, Study

MIXERS = "model.stack.*.pattern.*.mixer"


def study(size: str = "small") -> Study:
    """Return the study: one key-value head for each query head, for two, and for all."""
    heads = attention(size)
    num_heads = heads.num_heads
    assert heads.head_dim is not None
    wider = {f"{MIXERS}.num_kv_heads": num_heads // 2, f"{MIXERS}.head_dim": 2 * heads.head_dim}
    return Study(
        name=f"key-value-heads-{size}",
        question="How many key-value heads does attention need, at equal parameters?",
        base=base(size),
        arms=(
            Arm(name="a head each", changes={f"{MIXERS}.num_kv_heads": num_heads}),
            Arm(name="groups of 2", changes={f"{MIXERS}.num_kv_heads": num_heads // 2}),
            Arm(name="one for all", changes={f"{MIXERS}.num_kv_heads": 1}),
            Arm(name="groups of 2, wide heads", changes=wider),
        ),
        seeds=(0, 1, 2),
        baseline="a head each",
        matched=(Match(quantity=Quantity.PARAMETERS, by=Dimension.FFN),),
        comparisons=(("one for all", "groups of 2"),),
        equal_within=0.015,
        smallest_effect=0.015,
    )
