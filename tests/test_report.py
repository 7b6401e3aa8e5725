"""Pages of runs: what they hold, what they must not hold, and, in a browser without a window, how they look."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from slmjax.cli import main
from slmjax.report import RunRecords, config_differences, list_runs, read_run, write_comparison, write_report
from slmjax.report.charts import POINTS, lines, run_charts

EVIL = "</script><script>alert(1)</script><img src=http://example.com/x.png>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def write_run(path: Path, *, steps: int = 40, moe: bool = True, finished: bool = True, lr: float = 1e-3) -> Path:
    """A run directory as training leaves it: resumed once after step 20, so that steps 11 to 20 are there twice."""
    path.mkdir(parents=True)
    config = {"run": {"name": path.name, "steps": steps}, "optim": {"lr": lr}, "model": {"stack": [{"repeats": 2}], "note": EVIL}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"jax": "0.10"}, "command": ["slmjax", "train"]}))
    (path / "data.json").write_text(json.dumps([{"source": "a.txt", "weight": 1.0, "bytes": 12345}]))
    records = [{"kind": "message", "time": 0.5, "level": "WARNING", "text": f"beware {EVIL}"}]
    for step in [*range(1, 21), *range(11, steps + 1)]:
        late = 1.0 if len(records) >= 21 else 100.0  # what the first session found in the steps that were done again
        record = {
            "kind": "train", "time": float(step), "step": step, "loss": late * 5 / step, "bits_per_byte": 3 / step, "learning_rate": lr,
            "grad_norm": "nan" if step == 5 else 1 / step, "tokens_per_second": 1e3, "data_wait_share": 0.01, "mfu": None,
            "grad_norms": {"layers/0": 0.1, "layers/1": 0.2, "embed": 0.3},
        }  # fmt: skip
        records.append(record | ({"expert_loads": {"layers/1": [0.75, 0.25]}, "dropped": 0.0, "expert_imbalance": 1.5} if moe else {}))
    for step in (20, steps):
        records.append({"kind": "eval", "time": 50.0, "step": step, "loss": 6 / step, "bits_per_byte": 4 / step, "documents": 2})
        records.append({"kind": "sample", "time": 50.0, "step": step, "prompt": "def <x>", "text": f"def <x> at {step} {EVIL}"})
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        result = {"status": "finished", "loss": 0.15, "bits_per_byte": 0.1, "compressors": {"xz -9": 1.5}, "parameters": 1234567,
                  "tokens": 5000, "seconds": 61.0, "tokens_per_second": 1000.0, "step": steps, "samples": [EVIL],
                  "seconds_by_category": {"step": 60.0}, "commit": "a" * 40}  # fmt: skip
        (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "moe-run")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    return write_report(run_dir)


# What is read ---------------------------------------------------------------------------------------------------------
def test_of_steps_done_twice_the_later_counts(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert [record["step"] for record in run.train] == list(range(1, 41))
    assert [record["loss"] * record["step"] for record in run.train] == pytest.approx([500.0] * 10 + [5.0] * 30)
    assert [record["step"] for record in run.evals] == [20, 40] and run.status == "finished"


def test_what_is_no_run_is_refused(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a run directory.*slmjax runs"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="named twice"):
        write_comparison([run_dir, run_dir.parent / "." / run_dir.name], tmp_path / "page.html")
    with pytest.raises(ValueError, match="two runs or more, and 1 is named"):
        write_comparison([run_dir], tmp_path / "page.html")
    with pytest.raises(ValueError, match="holds no run"):
        list_runs(tmp_path)
    with pytest.raises(ValueError, match="there is no directory"):
        list_runs(tmp_path / "nowhere")
    damaged = write_run(tmp_path / "damaged")
    (damaged / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        read_run(damaged)
    assert [one.status for one in list_runs(tmp_path)] == ["damaged"]


def without_scripts(text: str) -> str:
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


# What a page holds ----------------------------------------------------------------------------------------------------
def test_a_page_holds_all_that_it_needs(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<[^>]*(?:src|href)\s*=", without_scripts(text))
    assert "default-src 'none'" in text and len(text) < 3_000_000
    for part in ("Loss", "Gradient norm by layer", "Load of experts, layers/1", "Samples", "Settings", "Environment", "Warnings"):
        assert part in text, part
    assert "step 40 of 40" in text and "1,234,567" in text and "xz -9 1.500" in text and "1m01s" in text


def test_texts_of_a_run_stay_texts(page: Path) -> None:
    text = page.read_text()
    assert "alert(1)" in text and "<script>alert" not in text and "<img" not in without_scripts(text)
    assert text.count("</script>") == 3


def test_what_was_not_logged_has_no_chart(run_dir: Path, tmp_path: Path) -> None:
    names = {chart.name for chart in run_charts(read_run(run_dir))}
    assert {"loss", "gradient-norm", "gradient-norm-by-layer", "experts-layers-1", "throughput"} <= names
    assert not {"utilisation", "dropped"} & names  # no peak is known; nothing was dropped
    dense = run_charts(read_run(write_run(tmp_path / "dense", moe=False)))
    assert not any("expert" in chart.name for chart in dense)


def test_values_that_are_not_finite_are_gaps(run_dir: Path) -> None:
    [chart] = [chart for chart in run_charts(read_run(run_dir)) if chart.name == "gradient-norm"]
    steps = [row["step"] for row in chart.spec["data"]["values"]]
    assert steps == [step for step in range(1, 41) if step != 5] and all(map(math.isfinite, steps))


def test_long_runs_are_thinned_to_their_last_record() -> None:
    records = [{"step": step, "loss": 1.0} for step in range(1, 12_346)]
    chart = lines("loss", "Loss", "", {"training": records}, "loss")
    assert chart is not None
    steps = [row["step"] for row in chart.spec["data"]["values"]]
    assert steps[0] == 1 and steps[-1] == 12_345 and POINTS / 2 < len(steps) <= POINTS + 1


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_that_has_just_begun(tmp_path: Path, logged: bool) -> None:
    run = write_run(tmp_path / "young", finished=False)
    if not logged:
        (run / "log.jsonl").unlink()
    text = write_report(run, with_images=False).read_text()
    assert ("unfinished" in text) and ("Nothing is logged yet" in text) == (not logged)
    assert list_runs(tmp_path)[0].status == "unfinished"


def test_images_are_drawn(run_dir: Path, page: Path) -> None:
    names = {path.name for path in (run_dir / "plots").iterdir()}
    assert names == {f"{chart.name}.png" for chart in run_charts(read_run(run_dir))}
    for path in (run_dir / "plots").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") > 1000 and len(content) > 5000


def test_differences_are_of_settings_that_differ(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", lr=3e-3)
    rows = config_differences([read_run(run_dir), read_run(other)])
    assert rows == [("run.name", "moe-run", "other"), ("optim.lr", "0.001", "0.003")]
    text = write_comparison([run_dir, other], tmp_path / "page.html").read_text()
    assert "optim.lr" in text and "Held-out loss" in text and "Comparison of moe-run and other" in text


# The commands ---------------------------------------------------------------------------------------------------------
def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code
    return capsys.readouterr().out


def test_commands(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "runs" / "other", finished=False, lr=3e-3)
    page = tmp_path / "pages" / "page.html"
    assert output(capsys, "report", str(other), "--output", str(page), "--no-images").strip() == str(page) and page.is_file()
    shown = output(capsys, "runs", str(tmp_path / "runs"))
    assert "other" in shown and "unfinished" in shown and "40/40" in shown and "0.100" in shown
    [record] = json.loads(output(capsys, "runs", "--json", str(tmp_path / "runs")))
    assert record["name"] == "other" and record["bits_per_byte"] == 0.1
    compared = tmp_path / "compared.html"
    assert "optim.lr" in output(capsys, "compare", str(run_dir), str(other), "--output", str(compared)) and compared.is_file()
    found = json.loads(output(capsys, "compare", str(run_dir), str(other), "--output", str(compared), "--json"))
    assert found["settings"]["optim.lr"] == {"moe-run": "0.001", "other": "0.003"} and found["results"]["status"]["other"] == "unfinished"


def test_without_the_extra(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    from slmjax.report.charts import drawing_code

    drawing_code.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(run_dir)])
    assert stopped.value.code == 2 and "slmjax[plot]" in capsys.readouterr().err


def test_training_writes_the_page(trained, workplace: Path) -> None:
    run: RunRecords = read_run(workplace / json.loads(trained.stdout)["run_dir"])
    text = (run.path / "report.html").read_text()
    assert "Load of experts, layers/3" in text and "finished · step 60 of 60" in text
    assert (run.path / "plots" / "loss.png").is_file()


# In a browser ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed, and CI has to look at the pages")
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: how pages look is not tested here")
    return found


def look(browser: str, page: Path, theme: str, width: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000",
               f"--window-size={width},1600", "--enable-logging=stderr", *options, f"file://{page}#theme={theme}"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 1400), ("light", 390), ("dark", 390)])
def test_in_a_browser(browser: str, page: Path, tmp_path: Path, theme: str, width: int) -> None:
    image = tmp_path / "page.png"
    done = look(browser, page, theme, width, f"--screenshot={image}")
    assert "CONSOLE" not in done.stderr, done.stderr
    red, green, blue = first_pixel(image)
    assert max(red, green, blue) < 60 if theme == "dark" else min(red, green, blue) > 200
    dom = without_scripts(look(browser, page, theme, width, "--dump-dom").stdout)
    root = re.search(r"<html[^>]*>", dom)
    num_charts = len(run_charts(read_run(page.parent)))
    assert root is not None and f'data-drawn="{num_charts}"' in root[0] and 'data-overflow="0"' in root[0], root and root[0]
    assert dom.count("<svg") == num_charts and f'data-theme="{theme}"' in root[0]


def first_pixel(image: Path) -> tuple[int, int, int]:
    """Of a PNG: no filter changes the first pixel of the first row."""
    content, place, packed = image.read_bytes(), 8, b""
    while place < len(content):
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        packed += content[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    row = zlib.decompressobj().decompress(packed, 8)
    return row[1], row[2], row[3]


def test_a_comparison_in_a_browser(browser: str, run_dir: Path, tmp_path: Path) -> None:
    page = write_comparison([run_dir, write_run(tmp_path / "other", lr=3e-3, finished=False)], tmp_path / "page.html")
    done = look(browser, page, "light", 390, "--dump-dom")
    dom = without_scripts(done.stdout)
    assert "CONSOLE" not in done.stderr and 'data-overflow="0"' in dom and dom.count("<svg") == 6
