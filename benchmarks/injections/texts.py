"""Kind "data": damaged shards, text and tokenizers, before a run and while it trains.

Promises: what is damaged is not trained on; the error names the file and how to make it again, and with sound
data the run resumes to the reference's bits. Bad documents are counted, and too many are refused.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.injections.damage import damage_bytes, mutate_json
from benchmarks.injections.lab import Lab, is_complete, is_finite_number, new_runs
from benchmarks.injections.sessions import End, Plan, session
from benchmarks.injections.verdicts import (
    Case,
    Defect,
    Outcome,
    refused,
    require_clean,
    require_refusal,
    survived,
)


def data(lab: Lab, case: Case) -> Outcome:
    """Damage the data of a run."""
    variants = (_shards, _text, _shards_while_training, _records, _shards, _tokenizer)
    return variants[case.number % len(variants)](lab, case)


# Prepared data ----------------------------------------------------------------------------------------------
def _cache(lab: Lab, folder: Path) -> dict[str, str]:
    """Return the environment of a cache that may be damaged, a copy of the campaign's."""
    cache = folder / "cache"
    shutil.copytree(lab.work / "cache", cache)
    return {"SLMJAX_CACHE": str(cache)}


def _cached_file(cache: Path, lab: Lab, case: Case) -> Path:
    # Those of the run, whose key data.json has: the cache may have others.
    key = json.loads((lab.run("part") / "data.json").read_text())[0]["shards"]
    files = sorted(path for path in (cache / "shards" / key).rglob("*") if path.is_file())
    packing = sorted(path for path in (cache / "packing").glob("*") if path.is_file())
    return case.rng.choice([*files, *files, *packing])


def _shards(lab: Lab, case: Case) -> Outcome:
    """Damage a file of the cache, and resume."""
    with lab.scratch() as folder:
        run = lab.copy("part", folder)
        environment = _cache(lab, folder)
        path = _cached_file(folder / "cache", lab, case)
        is_manifest = path.suffix == ".json" and case.rng.random() < 0.7
        way = mutate_json(path, case.rng) if is_manifest else damage_bytes(path, case.rng)
        case.describe(f"{path.parent.name}/{path.name} of the cache, resumed: {way}")
        end = lab.resume(run, plan=Plan(environment=environment))
        return _judge_damaged_cache(lab, run, end, path, activity="resuming")


def _shards_while_training(lab: Lab, case: Case) -> Outcome:
    """Damage a file of the cache at a random moment of a session."""
    delay = case.rng.uniform(0.0, lab.seconds)
    with lab.scratch() as folder:
        run = lab.copy("begun", folder)
        environment = _cache(lab, folder)
        path = _cached_file(folder / "cache", lab, case)
        case.describe(f"{path.parent.name}/{path.name} of the cache damaged {delay:.3f} s after the start")
        damage = functools.partial(_describe_damage, path, case)
        end = lab.resume(run, plan=Plan(environment=environment, meanwhile=(delay, damage)))
        return _judge_damaged_cache(lab, run, end, path, activity="training")


def _judge_damaged_cache(lab: Lab, run: Path, end: End, path: Path, *, activity: str) -> Outcome:
    """Judge a session whose cache, in the folder of the run, has a damaged file."""
    names = (path.name, path.parent.name, str(run.parent / "cache"))
    outcome = lab.judge_resume(run, end, activity=activity, names=names)
    if end.status != 0:
        lab.require_resumable(run, activity="resuming with sound data")
    return outcome


def _describe_damage(path: Path, case: Case) -> None:
    case.describe(damage_bytes(path, case.rng))


# Text -------------------------------------------------------------------------------------------------------
_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "white space": lambda text: b" \n" * 50,
    "one byte": lambda text: b"a",
    "invalid UTF-8 in the middle": lambda text: text[:900] + b"\xff\xfe" + text[900:],
    "binary": lambda text: bytes(range(256)) * 20,
    "NUL bytes": lambda text: text[:500] + bytes(500) + text[500:],
    "one long line": lambda text: text.replace(b"\n", b"") * 30,
    "one long word": lambda text: b"a" * 300_000,
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "carriage returns": lambda text: text.replace(b"\n", b"\r\n"),
    "truncated character": lambda text: text + "é".encode()[:1],
    "special tokens": lambda text: text.replace(b"fox", b"<|eos|>"),
    "surrogates": lambda text: text + b"\xed\xa0\x80",
}


def _text(lab: Lab, case: Case) -> Outcome:
    """Damage the source text, and train a new run or resume one."""
    name = case.rng.choice([*_TEXTS, "deleted", "directory", "random"])
    is_resumed = case.rng.random() < 0.3
    case.describe(f"text.txt {name}, {'resumed' if is_resumed else 'a new run'}")
    with lab.scratch() as folder:
        path = folder / "text.txt"
        if name in ("deleted", "directory"):
            damage_bytes(path, case.rng, way=name.removesuffix("d") if name == "deleted" else name)
        elif name == "random":
            case.describe(damage_bytes(path, case.rng))
        else:
            path.write_bytes(_TEXTS[name](path.read_bytes()))
        environment = {"SLMJAX_CACHE": str(folder / "cache")}
        argv = ["train", "tiny.py"]
        if is_resumed:
            lab.copy("part", folder)
            argv = ["train", "--resume", "run", "--data.path", str(path)]
        end = session(argv, folder=folder, plan=Plan(environment=environment))
        return _judge_new(folder / "run" if is_resumed else None, folder, end, names=[path.name])


def _records(lab: Lab, case: Case) -> Outcome:
    """Damage a file of JSON records, and train on it."""
    with lab.scratch() as folder:
        lines = (folder / "text.txt").read_text().splitlines()
        path = folder / "text.jsonl"
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        way = mutate_json(path, case.rng)
        case.describe(f"text.jsonl: {way}")
        environment = {"SLMJAX_CACHE": str(folder / "cache")}
        argv = ["train", "tiny.py", "--data.path", "text.jsonl", "--data.max-bad-fraction", "0.05"]
        end = session(argv, folder=folder, plan=Plan(environment=environment))
        return _judge_new(None, folder, end, names=[path.name])


def _tokenizer(lab: Lab, case: Case) -> Outcome:
    """Damage the run's tokenizer, or give it an expression that takes forever; resume or evaluate."""
    with lab.scratch() as folder:
        is_resumed = case.rng.random() < 0.5
        run = lab.copy("part" if is_resumed else "done", folder)
        path = run / "tokenizer" / "tokenizer.json"
        if case.rng.random() < 0.3:
            content = json.loads(path.read_text())
            content["pre_tokenizer"] = {
                "type": "Split",
                "pattern": {"Regex": "(a|a|a|aa)*$|((a*)*)*b"},
                "behavior": "Isolated",
                "invert": False,
            }
            path.write_text(json.dumps(content))
            way = "a catastrophic regular expression"
        else:
            way = mutate_json(path, case.rng)
        case.describe(f"tokenizer.json, {'resumed' if is_resumed else 'evaluated'}: {way}")
        (folder / "text.txt").write_text("a" * 5000 + "!")
        end = (
            lab.resume(run)
            if is_resumed
            else session(["eval", "run", "--data.path", "text.txt"], folder=folder)
        )
        require_clean(end, activity="with another tokenizer")
        if end.status == 0:
            return survived("it means the same, or other text was measured")
        require_refusal(end, activity="with another tokenizer", names=["tokenizer", "run"])
        return refused(end)


def _judge_new(run: Path | None, folder: Path, end: End, *, names: list[str]) -> Outcome:
    """Judge a training on bad text: finite and finished, or refused with the file's name."""
    require_clean(end, activity="training")
    if end.status != 0:
        require_refusal(end, activity="training", names=names)
        if run is None and new_runs(folder):
            raise Defect(f"refused, and left the run {new_runs(folder)[0].name}")
        return refused(end)
    run = run or new_runs(folder)[0]
    if not is_complete(run):
        raise Defect("status 0, and the run is not complete")
    loss = json.loads((run / "result.json").read_text())["loss"]
    if not is_finite_number(loss):
        raise Defect(f"finished with the loss {loss}")
    return survived("trained on what is left")


KINDS: dict[str, Callable[[Lab, Case], Outcome]] = {"data": data}
