"""Coordinate check: what is flat where theory says so, and what is not."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from slmjax.cli import main
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.planning.coordinates import (
    CoordinateCheck,
    Row,
    coordinate_check,
    log_slope,
    synthetic_batches,
)
from slmjax.planning.coordinates_page import check_json, check_lines, write_check
from slmjax.planning.sizes import HeadGrowth, at_depth, at_width, head_growth, query_dim
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.optim import OptimConfig, Optimizer
from tests.tiny import experiment as tiny

STANDARD, MUP, COMPLETEP = Parameterization


def experiment(*, lr: float, kind: Optimizer = Optimizer.ADAMW, **more) -> Experiment:
    """Two layers of width 64, which is the base."""
    block = BlockConfig(mixer=AttentionConfig(num_heads=4, head_dim=16), ffn=MlpConfig(hidden_dim=128))
    model = ModelConfig(embed_dim=64, stack=(LayerGroup(pattern=(block,), repeats=2),), **more)
    return dataclasses.replace(
        tiny(), model=model, optim=OptimConfig(kind=kind, lr=lr, muon_lr=20 * lr), run=RunConfig(name="tiny")
    )


def slopes(check: CoordinateCheck, kind: Parameterization, axis: str) -> dict[tuple[str, str, str], float]:
    """Exponents after the last step, without updates, by layer, name and measure."""
    return {
        (row.layer, row.name, row.measure): row.slope
        for row in check.last_rows
        if (row.parameterization, row.axis, row.is_judged) == (kind.value, axis, True)
    }


def test_mup_keeps_activations_over_widths_and_the_standard_does_not():
    check = coordinate_check(
        experiment(lr=1e-3), widths=(64, 256), depths=(), kinds=(STANDARD, MUP), steps=(8,)
    )
    of_mup = slopes(check, MUP, "width")
    # Theory says 0; four times as wide a standard model changes by 2 to 16 times as much.
    assert max(map(abs, of_mup.values())) < 0.25
    of_standard = slopes(check, STANDARD, "width")
    assert of_standard["1", "block_output", "change"] > 0.5
    assert of_standard["1", "ffn_output", "size"] > 1.0
    # Adam's updates of matrices shrink as 1 / width, those of embeddings stay.
    updates = {
        (row.parameterization, row.name): row.slope for row in check.last_rows if row.measure == "update"
    }
    assert updates["mup", "hidden"] == pytest.approx(-1.0, abs=0.1)
    assert updates["mup", "input"] == pytest.approx(0.0, abs=0.1)
    assert [verdict.holds for verdict in check.verdicts] == [False, True]
    assert "mup over widths: all 13 rows are flat" in check_lines(check)


def test_completep_keeps_activations_over_depths_and_the_standard_does_not():
    check = coordinate_check(
        experiment(lr=2e-3), widths=(), depths=(2, 8), kinds=(STANDARD, COMPLETEP), steps=(8,)
    )
    stream = ("last", "block_output", "change")
    assert max(map(abs, slopes(check, COMPLETEP, "depth").values())) < 0.25
    assert slopes(check, STANDARD, "depth")[stream] > 0.25
    assert [verdict.holds for verdict in check.verdicts] == [False, True]


@pytest.mark.nightly
@pytest.mark.parametrize("head", list(HeadKind))
@pytest.mark.parametrize("kind", [Optimizer.ADAMW, Optimizer.MUON])
def test_full_ranges(kind, head):
    """Width 64 to 1024 and depth 2 to 16, tied and untied heads, AdamW and Muon."""
    wide = coordinate_check(
        experiment(lr=1e-3, kind=kind, head=head),
        depths=(),
        kinds=tuple(Parameterization),
        steps=(8,),
        seeds=2,
    )
    for each in (MUP, COMPLETEP):
        assert max(map(abs, slopes(wide, each, "width").values())) < 0.25, each
    assert slopes(wide, STANDARD, "width")["1", "block_output", "change"] > 0.5
    deep = coordinate_check(
        experiment(lr=2e-3, kind=kind, head=head), widths=(), kinds=(STANDARD, COMPLETEP), steps=(8,), seeds=2
    )
    assert abs(slopes(deep, COMPLETEP, "depth")["last", "block_output", "change"]) < 0.25
    assert slopes(deep, STANDARD, "depth")["last", "block_output", "change"] > 0.25


# Rows -------------------------------------------------------------------------------------------------------
def row(*values: float, **more) -> Row:
    sizes = (64, 256)
    fields = {
        "parameterization": "mup",
        "axis": "width",
        "layer": "1",
        "name": "ffn_output",
        "measure": "change",
        "step": 2,
        **more,
    }
    return Row(sizes=sizes, values=values, slope=log_slope(sizes, values), **fields)


def test_slopes_and_trends():
    # By hand: 4 times as wide and 8 times as large is an exponent of 1.5.
    assert log_slope((64, 256), (1.0, 8.0)) == pytest.approx(1.5)
    assert log_slope((1, 2, 4), (3.0, 3.0, 3.0)) == pytest.approx(0.0, abs=1e-12)
    assert row(1.0, 8.0).trend == "grows as width^1.50"
    assert row(1.0, 0.5).trend == "shrinks as width^-0.50"
    assert row(1.0, 1.2).trend == "flat"
    assert row(0.0, 1.0).trend == "zero"
    assert row(1.0, float("nan")).trend == "not finite"
    assert row(1.0, 1.0).is_judged
    for more in ({"measure": "update"}, {"step": 0}, {"name": "logits", "measure": "size"}):
        assert not row(1.0, 1.0, **more).is_judged


def written_check(**more) -> CoordinateCheck:
    fields = {
        "experiment": "tiny",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "muon_lr": None,
        "tokens": "synthetic",
        "heads": "number",
        "base": (64, 2),
        "steps": (2,),
        "seeds": 1,
        "tolerance": 0.25,
        "rows": (row(1.0, 1.1), row(1.0, 8.0, name="mixer_output"), row(1.0, float("nan"), layer="0")),
    }
    return CoordinateCheck(**{**fields, **more})


def test_text_json_and_page(tmp_path):
    check = written_check()
    lines = "\n".join(check_lines(check))
    assert re.search(r"1 +mixer_output +change +1 +8 +\+1\.50 +grows as width\^1\.50", lines)
    assert "mup over widths: 1 of 3 rows are flat; layer 0 ffn_output (change) not finite" in lines
    assert check_json(check)["verdicts"][0]["holds"] is False
    page, data = write_check(check, tmp_path / "new")
    text = page.read_text()
    assert "Coordinate check of tiny" in text and "grows as width^1.50" in text
    stored = json.loads(data.read_text())
    assert stored["rows"][2]["values"] == [1.0, None]
    assert [row["judged"] for row in stored["rows"]] == [True, True, True]


def test_command(capsys, monkeypatch):
    """What the command parses reaches the check; its result is printed as JSON."""
    asked = {}

    def recorded(experiment, **options):
        asked.update(options, lr=experiment.optim.lr)
        return written_check(rows=(row(1.0, 1.1),))

    monkeypatch.setattr("slmjax.planning.coordinates.coordinate_check", recorded)
    line = "coordinate-check nano --widths 64 256 --depths 2 8 --parameterization mup --seeds 3 --json"
    with pytest.raises(SystemExit) as ended:
        main([*line.split(), "--optim.lr", "0.25"])
    assert ended.value.code == 0
    assert (asked["widths"], asked["depths"], asked["kinds"]) == ((64, 256), (2, 8), (MUP,))
    assert (asked["seeds"], asked["lr"]) == (3, 0.25)
    assert json.loads(capsys.readouterr().out)["verdicts"][0]["holds"] is True


def test_synthetic_tokens():
    batches = synthetic_batches(num_steps=2, vocab_size=32, shape=(4, 16))
    assert batches.tokens.shape == (2, 4, 16)
    np.testing.assert_array_equal(batches.tokens[..., 1:], batches.targets[..., :-1])
    # Most tokens have one successor.
    pairs = {(int(a), int(b)) for a, b in zip(batches.tokens.flat, batches.targets.flat, strict=True)}
    assert len(pairs) < 0.6 * batches.tokens.size
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batches))


# Sizes ------------------------------------------------------------------------------------------------------
def test_widths_and_depths():
    model = tiny().model
    assert head_growth(model, widths=(16, 64)) is HeadGrowth.NUMBER
    assert head_growth(model, widths=(8, 64)) is HeadGrowth.SIZE
    wider = at_width(model, 64, growth=HeadGrowth.NUMBER)
    window, experts = wider.stack[0].pattern
    assert (window.mixer.num_heads, window.mixer.kv_heads, query_dim(wider)) == (8, 4, 8)
    assert (window.ffn.hidden_dim, experts.ffn.hidden_dim, experts.ffn.num_experts) == (128, 64, 4)
    larger = at_width(model, 64, growth=HeadGrowth.SIZE)
    assert (next(larger.blocks()).mixer.num_heads, query_dim(larger)) == (4, 16)
    latent = LatentAttentionConfig(
        num_heads=2, latent_dim=8, plain_dim=4, rope_dim=4, value_dim=4, query_rank=6
    )
    block = BlockConfig(mixer=latent, ffn=MoeConfig(hidden_dim=8, shared_hidden_dim=4))
    of_latent = ModelConfig(embed_dim=8, stack=(LayerGroup(pattern=(block,), repeats=1),))
    mixer = next(at_width(of_latent, 16, growth=HeadGrowth.NUMBER).blocks()).mixer
    assert (mixer.num_heads, mixer.latent_dim, mixer.query_rank, mixer.plain_dim) == (4, 16, 12, 4)
    mixer = next(at_width(of_latent, 16, growth=HeadGrowth.SIZE).blocks()).mixer
    assert (mixer.num_heads, mixer.plain_dim, mixer.rope_dim, mixer.value_dim) == (2, 8, 8, 8)
    assert at_depth(model, 8).depth == 8


def test_refusals():
    model = tiny().model
    with pytest.raises(ValueError, match=r"a stack of 4 layers cannot have 3: choose multiples of 2"):
        at_depth(model, 3)
    with pytest.raises(ValueError, match=r"head_dim=8 times 33/32, the ratio of the widths, is no whole"):
        at_width(model, 33, growth=HeadGrowth.SIZE)
    with pytest.raises(ValueError, match="leave nothing to compare: give two widths or two depths"):
        coordinate_check(experiment(lr=1e-3), widths=(64,), depths=(2,))
    with pytest.raises(ValueError, match=r"steps are \[0\], of which one must be at least 1"):
        coordinate_check(experiment(lr=1e-3), steps=(0,))
