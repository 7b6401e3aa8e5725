"""Golden logits of small models of every family, by transformers: `python -m tests.convert.make_golden [NAME
...]` (the oracle extra).

A golden file holds the configuration as transformers writes it, the names and shapes of the tensors as it
saves them, and its logits.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.convert.cases import CASES
from tests.convert.synthetic import VOCAB_SIZE, tokens, write_model

GOLDEN = Path(__file__).parent / "golden"


def golden(class_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the golden file of a model holds."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**settings)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model_class(config).save_pretrained(directory)
        written = json.loads((directory / "config.json").read_text())
        with safe_open(directory / "model.safetensors", "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
        write_model(directory, written, shapes)
        # The library's defaults may be faster kernels, which leave out what they cannot do.
        model = model_class.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens(VOCAB_SIZE))).logits[0].numpy()
    written.pop("transformers_version")
    about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    return {
        "made_by": about,
        "config": written,
        "shapes": shapes,
        "logits": [[round(float(x), 5) for x in row] for row in logits],
    }


def text_of(value: dict[str, Any]) -> str:
    """JSON with a line for each tensor and each row."""
    shapes = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in value["shapes"].items()
    )
    rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in value["logits"])
    about = json.dumps(value["made_by"])
    config = json.dumps(value["config"])
    return (
        f'{{\n"made_by": {about},\n"config": {config},\n"shapes": {{\n{shapes}\n}},\n'
        f'"logits": [\n{rows}\n]\n}}\n'
    )


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        (GOLDEN / f"{case}.json").write_text(text_of(golden(*CASES[case])))
        print(case)
