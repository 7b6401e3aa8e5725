"""slmjax.config: strict round trips, errors that name the field, stable fingerprints."""

import abc
import dataclasses
import enum
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.config import (
    ConfigError,
    added_field,
    differences,
    dumps,
    fingerprint,
    from_json,
    loads,
    near_names,
    read_file,
    renamed_field,
    renamed_values,
    to_json,
)


class Norm(enum.Enum):
    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer(abc.ABC):
    num_heads: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    window: int | None = None
    rope_base: float = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(Mixer):
    width: int = 4


class Source(abc.ABC):
    @abc.abstractmethod
    def documents(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines(Source):
    path: Path = Path("corpus/a.txt")

    def documents(self) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromModel:
    directory: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    mixer: Mixer = Attention()
    norm: Norm = Norm.PRE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quant:
    bits: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    name: str = "nano"
    stack: tuple[tuple[Block, ...], ...] = ((Block(), Block(mixer=Convolution())), (Block(),))
    source: Source = Lines()
    init: Scratch | FromModel = Scratch()
    quant: Quant | None = None
    norms: tuple[Norm, ...] = (Norm.PRE, Norm.POST)
    betas: tuple[float, float] = (0.9, 0.95)
    learning_rate: Annotated[float, "shown by a command line"] = 1e-3
    dropout: float | None = None
    steps: int = 100
    tied: bool = True
    temperature: int | float = 1
    layers: int | tuple[int, ...] = 2
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: give at least 1")


CORNERS = Study(
    name="é ",
    stack=((Block(mixer=Attention(window=8, rope_base=5.0), norm=Norm.SANDWICH),), ()),
    init=FromModel(directory=Path("/runs/a b")),
    quant=Quant(bits=2),
    norms=(),
    dropout=0.0,
    tied=False,
    temperature=0.5,
    layers=(1, 2),
    counts={"a.txt": 3},
)


def changed(path: list[Any], value: Any, *, delete: bool = False) -> Any:
    """The JSON of Study() with one place changed."""
    data = to_json(Study())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.smoke
@pytest.mark.parametrize("study", [Study(), CORNERS])
def test_round_trip(study: Study) -> None:
    assert from_json(Study, to_json(study)) == study
    assert loads(Study, dumps(study)) == study


def test_json_form() -> None:
    data = to_json(CORNERS)
    assert data["stack"][0][0] == {
        "mixer": {"type": "Attention", "num_heads": 4, "window": 8, "rope_base": 5.0},
        "norm": "sandwich",
    }
    assert data["init"] == {"type": "FromModel", "directory": "/runs/a b"}
    assert data["quant"] == {"bits": 2}, "an optional config of one class needs no type"
    assert "type" not in data
    assert to_json(Convolution())["type"] == "Convolution", "at the root a subclass names itself"
    assert from_json(Mixer, to_json(Convolution(width=7))) == Convolution(width=7)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(min_value=1),
    st.text(),
    st.lists(st.integers()),
)
def test_round_trip_of_any_value(rate: float, steps: int, name: str, layers: list[int]) -> None:
    study = Study(learning_rate=rate, steps=steps, name=name, layers=tuple(layers))
    again = loads(Study, dumps(study))
    assert again == study
    assert fingerprint(again) == fingerprint(study)


def test_float_given_as_int() -> None:
    study = from_json(Study, changed(["learning_rate"], 1))
    assert type(study.learning_rate) is float
    assert fingerprint(Study(learning_rate=1)) == fingerprint(Study(learning_rate=1.0))
    assert type(from_json(Study, changed(["temperature"], 1)).temperature) is int


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["steps"], True, r"^steps: expected int, found bool True"),
        (["steps"], 1.0, r"^steps: expected int, found float 1.0"),
        (["steps"], None, r"^steps: expected int, found null"),
        (["steps"], "1", r"^steps: expected int, found str '1'"),
        (["steps"], 0, r"^the config: steps is 0: give at least 1"),
        (["learning_rate"], "1e-4", r"^learning_rate: expected float"),
        (["learning_rate"], True, r"^learning_rate: expected float"),
        (["learning_rate"], float("nan"), r"^learning_rate: expected float"),
        (["learning_rate"], 10**400, r"^learning_rate: expected float"),
        (["tied"], 1, r"^tied: expected bool"),
        (["dropout"], "no", r"^dropout: expected float \| None"),
        (["betas"], [0.9], r"^betas: expected 2 values"),
        (["betas"], [0.9, "x"], r"^betas\[1\]: expected float"),
        (["betas"], {"0": 0.9}, r"^betas: expected tuple\[float, float\], found dict"),
        (["layers"], "2", r"^layers: expected int \| tuple\[int, ...\]"),
        (["counts"], {"a": "b"}, r"^counts\.a: expected int"),
        (["quant"], [], r"^quant: expected Quant \| None, found list"),
        (["quant"], {"bit": 4}, r"^quant\.bit: Quant has no field 'bit'. Did you mean 'bits'\?"),
        (
            ["stack", 0, 1, "norm"],
            "prre",
            (
                r"^stack\[0\]\[1\]\.norm: expected Norm \('pre', .*'sandwich'\), found str 'prre'. Did you "
                r"mean "
                r"'pre'"
            ),
        ),
        (
            ["stack", 0, 1, "mixer", "widht"],
            3,
            r"^stack\[0\]\[1\]\.mixer\.widht: Convolution has no field 'widht'. Did you mean 'width'",
        ),
        (
            ["stack", 0, 0, "mixer", "type"],
            "Atention",
            r"^stack\[0\]\[0\]\.mixer\.type: 'Atention' is not one of .* Did you mean 'Attention'",
        ),
        (["stack", 0, 0, "mixer", "type"], "Mixer", r"'Mixer' is not one of Attention, Convolution"),
        (["stack", 0, 0, "mixer", "type"], "Scratch", r"'Scratch' is not one of Attention, Convolution"),
        (["stack", 0, 0, "mixer", "type"], 3, r"3 is not one of Attention"),
        (["init", "type"], "Lines", r"^init\.type: 'Lines' is not one of FromModel, Scratch"),
        (
            ["learning_rat"],
            3.0,
            r"^learning_rat: Study has no field 'learning_rat'. Did you mean 'learning_rate'",
        ),
    ],
)
def test_errors_name_the_field(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(Study, changed(path, value))


def test_a_field_added_later_has_its_former_meaning_in_older_files() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Extended:
        old: int = 1
        new: Norm = added_field(Norm.POST, before=Norm.PRE)

    assert Extended().new is Norm.POST
    assert from_json(Extended, {"old": 2}) == Extended(old=2, new=Norm.PRE)
    assert from_json(Extended, to_json(Extended())) == Extended()
    with pytest.raises(ConfigError, match="^old: missing"):
        from_json(Extended, {"new": "post"})
    before = hashlib.sha256(b'{"old":2}').hexdigest()[:16]
    assert fingerprint(Extended(old=2, new=Norm.PRE)) == before != fingerprint(Extended(old=2))


@renamed_values(free="untied")
class Head(enum.Enum):
    TIED = "tied"
    UNTIED = "untied"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renamed:
    num_loops: int = renamed_field(1, was="passes")
    head: Head = Head.TIED


def test_former_names_are_read_with_a_note_and_keep_their_fingerprint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="slmjax.config"):
        assert from_json(Renamed, {"passes": 2, "head": "free"}) == Renamed(num_loops=2, head=Head.UNTIED)
    assert "passes is now called num_loops" in caplog.text
    assert "head: 'free' is now called 'untied'" in caplog.text
    assert to_json(Renamed(num_loops=2, head=Head.UNTIED)) == {"num_loops": 2, "head": "untied"}
    former = hashlib.sha256(b'{"head":"free","passes":2}').hexdigest()[:16]
    assert fingerprint(Renamed(num_loops=2, head=Head.UNTIED)) == former
    with pytest.raises(ConfigError, match="no field 'passes'"):
        from_json(Renamed, {"passes": 2, "num_loops": 2, "head": "tied"})


def test_missing_fields() -> None:
    with pytest.raises(
        ConfigError, match=r"^steps: missing; Study needs it \(the default of this version is 100\)"
    ):
        from_json(Study, changed(["steps"], None, delete=True))
    with pytest.raises(ConfigError, match=r"^init\.directory: missing; FromModel needs it$"):
        from_json(Study, changed(["init"], {"type": "FromModel"}))
    with pytest.raises(ConfigError, match=r"^source\.type: missing; give one of Lines"):
        from_json(Study, changed(["source", "type"], None, delete=True))


def test_text_that_is_refused() -> None:
    text = dumps(Study())
    with pytest.raises(ConfigError, match="'steps' appears twice"):
        loads(Study, text.replace('"steps": 100', '"steps": 100, "steps": 100'))
    for constant in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(ConfigError, match=constant):
            loads(Study, text.replace('"learning_rate": 0.001', f'"learning_rate": {constant}'))
    for broken in ("", "{", "[" * 100_000):
        with pytest.raises(ConfigError, match="not JSON|nested too deeply"):
            loads(Study, broken)
    with pytest.raises(ConfigError, match="expected Study, found list"):
        loads(Study, "[]")
    # Digits that Python refuses to convert, and half of a character, which could not be printed.
    with pytest.raises(ConfigError, match="not JSON: Exceeds the limit"):
        loads(Study, text.replace('"steps": 100', f'"steps": {"9" * 5000}'))
    with pytest.raises(ConfigError, match="half of a surrogate pair"):
        loads(Study, text.replace('"steps": 100', r'"\ud800": 100'))


@pytest.mark.parametrize("value", [{}, [], 3, None, True, {"type": "Path"}], ids=str)
def test_a_type_must_be_a_name(value: Any) -> None:
    data = to_json(Study())
    data["source"]["type"] = value
    with pytest.raises(ConfigError, match=r"^source\.type: (.* is not one of|missing)"):
        from_json(Study, data)


def test_an_error_shows_the_beginning_of_a_long_value() -> None:
    data = {**to_json(Study()), "steps": "x" * 100_000}
    with pytest.raises(ConfigError, match=r"^steps: .*x\.\.\.") as refused:
        from_json(Study, data)
    assert len(str(refused.value)) < 200


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{\xff}")
    with pytest.raises(ConfigError, match="a.json: not UTF-8 text"):
        read_file(Study, tmp_path / "a.json")


def test_values_that_are_not_written() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"^betas\[1\]: .*finite"):
            to_json(Study(betas=(0.5, value)))
    with pytest.raises(ConfigError, match="a config cannot hold a value of type function"):
        to_json({"a": lambda: None})


def test_import_paths_are_never_resolved() -> None:
    assert "antigravity" not in sys.modules
    for name in (
        "antigravity.fly",
        "os.system",
        "tests.test_config.Attention",
        "slmjax.config.ConfigError",
        "builtins.dict",
    ):
        with pytest.raises(ConfigError, match="is not one of"):
            from_json(
                Study, changed(["stack", 0, 0, "mixer"], {"type": name, "_target_": name, "num_heads": 1})
            )
    assert "antigravity" not in sys.modules


def test_fingerprint_tells_every_field_and_class_apart() -> None:
    assert len(fingerprint(Study())) == 16
    trees = [
        Study(),
        CORNERS,
        Study(norms=(Norm.POST, Norm.PRE)),
        Study(steps=101),
        Study(tied=False),
        Study(quant=Quant()),
    ]
    trees += [Study(stack=((Block(mixer=Convolution()),),)), Scratch(), Attention(), Convolution()]  # type: ignore[list-item]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pinned:
    rate: float = 0.1
    name: str = "é"
    norms: tuple[Norm, ...] = (Norm.PRE,)


def test_fingerprint_is_the_same_in_every_process() -> None:
    # The value is that of `printf '{"name":"\u00e9","norms":["pre"],"rate":0.1}' | sha256sum`, with the
    # escape as six characters.
    assert fingerprint(Pinned()) == "dcd4f2bb359a4ea4"
    program = "from slmjax.config import fingerprint; print(fingerprint({'b': 1, 'a': (2.5, None)}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {fingerprint({"a": (2.5, None), "b": 1}) + "\n"}


def test_near_names() -> None:
    assert near_names("embed_dmi", ["embed_dim", "num_heads"]) == " Did you mean 'embed_dim'?"
    assert near_names("cosin", ["cosine", "cosines"]) == " Did you mean 'cosine' or 'cosines'?"
    assert near_names("zzz", ["embed_dim"]) == ""


def test_classes_that_share_a_name() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Base(abc.ABC):
        pass

    def define(module: str) -> type:
        cls = dataclasses.make_dataclass("Own", [("size", int)], bases=(Base,), frozen=True, kw_only=True)
        cls.__module__ = module
        return cls

    first = define("experiment")
    second = define("experiment")
    assert type(from_json(Base, {"type": "Own", "size": 1})) is second, (
        "an experiment file that was loaded again counts"
    )
    other = define("elsewhere")
    with pytest.raises(ConfigError, match="two classes are named Own"):
        from_json(Base, {"type": "Own", "size": 1})
    assert first is not other


def test_a_field_cannot_be_named_type() -> None:
    cls = dataclasses.make_dataclass("Bad", [("type", str)], frozen=True, kw_only=True)
    with pytest.raises(ConfigError, match=r"Bad\.type: .*rename"):
        to_json(cls(type="x"))


def test_json_is_plain() -> None:
    assert json.loads(dumps(CORNERS)) == to_json(CORNERS)


def test_differences_are_named_by_path() -> None:
    before = {"a": {"type": "X", "b": 1}, "c": [1, {"d": 2}], "e": [1], "f": 1}
    after = {"a": {"type": "Y", "b": 2}, "c": [1, {"d": 3}], "e": [1, 2], "f": 1.0, "g": 0}
    assert dict(differences(before, after)) == {
        "a": ({"type": "X", "b": 1}, {"type": "Y", "b": 2}),
        "c[1].d": (2, 3),
        "e": ([1], [1, 2]),
        "f": (1, 1.0),
        "g": (None, 0),
    }
