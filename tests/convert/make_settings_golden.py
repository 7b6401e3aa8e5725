"""What transformers makes of settings, as tests/convert/golden_settings.json: `python -m
tests.convert.make_settings_golden` (oracle).

Angles of the settings in settings_cases.py, and of each family's configuration class: the defaults of its
fields, what an empty configuration comes to, and what a null in each field does.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from slmjax.convert.families import HF_FAMILIES
from tests.convert.settings_cases import ROPES, config_with
from tests.convert.test_families import read_golden

FILE = Path(__file__).parent / "golden_settings.json"
NOT_THERE = (
    "MobileLLMForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)  # not in transformers, and a wrapping of another
# What an empty configuration of these lacks, to be one that is read.
GIVEN: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
}


def angles(case: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The frequencies and magnitudes of a model of transformers with these settings, and its scale of
    scores.
    """
    import transformers

    # transformers adds keys to the tables that it is given
    config = copy.deepcopy(config_with(read_golden(case)["config"], changes))
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class(model_class.config_class(**config))
    rotary = model.model.rotary_emb
    found = {}
    for kind in ("full_attention", "sliding_attention"):
        name = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        found[kind] = {
            "frequencies": [float(f"{x:.7g}") for x in getattr(rotary, f"{name}inv_freq")],
            "magnitude": float(f"{getattr(rotary, f'{name}attention_scaling'):.7g}"),
        }
    found["scale"] = float(f"{model.model.layers[0].self_attn.scaling:.7g}")
    return found


def published(architecture: str) -> dict[str, Any]:
    """The defaults of a configuration class, what it comes to with none of its keys, and which keys may be
    null.
    """
    import transformers

    config_class = getattr(transformers, architecture).config_class
    given = GIVEN.get(architecture, {})
    fields = {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.default is not dataclasses.MISSING
    }
    defaults = json.loads(json.dumps(fields, default=repr))
    empty = config_class(**given).to_dict()
    nulls = {}
    for name in fields:
        try:
            other = config_class(**{**given, name: None}).to_dict()
        except Exception:  # it raises classes of its own for values of another type
            nulls[name] = "refused"
            continue
        if changed := {key: value for key, value in other.items() if value != empty.get(key)}:
            nulls[name] = changed
    theta = config_class.default_theta if hasattr(config_class, "default_theta") else None
    return {"given": given, "theta": theta, "defaults": defaults, "empty": empty, "nulls": nulls}


def golden() -> dict[str, Any]:
    """What the golden file holds."""
    import transformers

    return {
        "made_by": {"transformers": transformers.__version__},
        "ropes": {name: angles(*case) for name, case in ROPES.items()},
        "families": {
            one.architecture: published(one.architecture)
            for one in HF_FAMILIES
            if one.architecture not in NOT_THERE
        },
    }


if __name__ == "__main__":
    lines = json.loads(json.dumps(golden(), default=repr))
    groups = (
        (name, value if name == "made_by" else {key: value[key] for key in value})
        for name, value in lines.items()
    )
    text = ",\n".join(
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f" {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
        + "\n}"
        for name, value in groups
    )
    FILE.write_text(f"{{\n{text}\n}}\n")
