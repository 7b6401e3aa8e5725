"""GGUF files: what is written is read back, block formats against hand-worked blocks and the gguf package,
damage is noticed.
"""

import functools
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from slmjax.convert.gguf.container import GgufTensor, GgufValue, PendingTensor, read_gguf, write_gguf

METADATA = {
    "general.name": "naïve ☂",
    "t.layers": 3,
    "t.epsilon": 1e-5,
    "t.on": True,
    "t.names": ["a", "", "ß"],
    "t.types": [1, -2, 3],
    "t.scores": [0.5, -1.0],
    "t.flags": [True, False],
}


def pending(name: str, value: np.ndarray, dtype: Any = None) -> PendingTensor:
    return PendingTensor(
        name=name, shape=value.shape, dtype=dtype or value.dtype, read=functools.partial(np.asarray, value)
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of some metadata and two tensors, the last of which ends at a multiple of the alignment."""
    path = tmp_path / "small.gguf"
    values = [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(16, dtype=np.float16)]
    write_gguf(
        path,
        architecture="t",
        metadata=METADATA,
        tensors=[pending(f"x{i}", value) for i, value in enumerate(values)],
    )
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    values = {
        "a": np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5),
        "b": np.linspace(-9, 9, 8, dtype=np.float16).reshape(2, 2, 2),
        "c": np.linspace(-3, 3, 7).astype(ml_dtypes.bfloat16),
        "d": np.arange(4, dtype=np.float32)[::-1],  # not contiguous
    }
    path = tmp_path / "x.gguf"
    write_gguf(
        path,
        architecture="t",
        metadata=METADATA,
        tensors=(pending(name, value) for name, value in values.items()),
    )
    file = read_gguf(path)
    assert list(file.metadata) == ["general.architecture", *METADATA]
    assert file.metadata == {"general.architecture": "t", **METADATA, "t.epsilon": float(np.float32(1e-5))}
    assert [(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()] == [
        ("a", (3, 5), "F32"),
        ("b", (2, 2, 2), "F16"),
        ("c", (7,), "BF16"),
        ("d", (4,), "F32"),
    ]
    for name, value in values.items():
        read = file.tensors[name].read()
        assert read.dtype == value.dtype
        np.testing.assert_array_equal(read, value)
    assert list(tmp_path.iterdir()) == [path]


def test_the_gguf_package_reads_the_same(small: Path) -> None:
    reader = gguf.GGUFReader(small)
    kinds = {
        name: [type.name for type in field.types] for name, field in reader.fields.items() if name in METADATA
    }
    assert kinds == {
        "general.name": ["STRING"],
        "t.layers": ["UINT32"],
        "t.epsilon": ["FLOAT32"],
        "t.on": ["BOOL"],
        "t.names": ["ARRAY", "STRING"],
        "t.types": ["ARRAY", "INT32"],
        "t.scores": ["ARRAY", "FLOAT32"],
        "t.flags": ["ARRAY", "BOOL"],
    }
    file = read_gguf(small)
    assert {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
    } == file.metadata
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, file.tensors[tensor.name].read())


def test_other_types_of_metadata(tmp_path: Path) -> None:
    metadata = {
        "big": GgufValue(value=2**40, type="UINT64"),
        "bytes": GgufValue(value=[1, 255], type="UINT8"),
        "minus": -1,
    }
    with pytest.raises(ValueError, match="minus is -1, which does not fit UINT32"):
        write_gguf(tmp_path / "x.gguf", architecture="t", metadata=metadata, tensors=[])
    write_gguf(
        tmp_path / "x.gguf",
        architecture="t",
        metadata={**metadata, "minus": GgufValue(value=-1, type="INT64")},
        tensors=[],
    )
    assert read_gguf(tmp_path / "x.gguf").metadata == {
        "general.architecture": "t",
        "big": 2**40,
        "bytes": [1, 255],
        "minus": -1,
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "empty list"),
        ([1, 2.0], "must be of one type"),
        (None, "a NoneType"),
        (np.float32(1), "a float32"),
        ([2**31], "INT32"),
    ],
)
def test_metadata_that_gguf_does_not_hold(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "x.gguf", architecture="t", metadata={"key": value}, tensors=[])
    assert not list(tmp_path.iterdir())


# Block formats ----------------------------------------------------------------------------------------------


def block(scale: float, *rest: bytes) -> np.ndarray:
    return np.frombuffer(struct.pack("<e", scale) + b"".join(rest), np.uint8)


def blocks_of_a_hand() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Each format's block of 32 numbers, and the numbers worked out from the format's definition."""
    lows = np.arange(16) % 16
    highs = (np.arange(16) * 3 + 1) % 16
    # the first half of the block in the low four bits
    nibbles = (lows | highs << 4).astype(np.uint8).tobytes()
    codes = np.concatenate([lows, highs])
    signed = np.arange(-16, 16, dtype=np.int8)
    return [
        ("Q4_0", block(0.5, nibbles), 0.5 * (codes - 8)),
        ("Q4_1", block(0.25, struct.pack("<e", -1.5), nibbles), 0.25 * codes - 1.5),
        ("Q8_0", block(0.125, signed.tobytes()), 0.125 * signed),
    ]


@pytest.mark.parametrize(
    ("name", "raw", "wanted"), blocks_of_a_hand(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_block_worked_by_hand(name: str, raw: np.ndarray, wanted: np.ndarray, tmp_path: Path) -> None:
    rows = np.stack([np.tile(raw, 2), np.tile(raw, 2)])
    path = tmp_path / "x.gguf"
    tensor = PendingTensor(name="w", shape=(2, 64), dtype=name, read=lambda: rows)
    write_gguf(path, architecture="t", metadata={}, tensors=[tensor])
    read = read_gguf(path).tensors["w"]
    assert (read.shape, read.type) == ((2, 64), name)
    assert read.read().dtype == np.float32
    np.testing.assert_array_equal(read.read(), np.tile(wanted.astype(np.float32), (2, 2)))


@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_blocks_against_the_gguf_package(name: str) -> None:
    format = gguf.GGMLQuantizationType[name]
    _, num_bytes = gguf.GGML_QUANT_SIZES[format]
    # small bytes: no scale is infinite
    raw = np.random.default_rng(0).integers(0, 40, size=(3, 2 * num_bytes), dtype=np.uint8)
    wanted = gguf.quants.dequantize(raw, format)
    tensor = GgufTensor(name="w", shape=wanted.shape, type=name, raw=raw.reshape(-1))
    np.testing.assert_array_equal(tensor.read(), wanted)
    assert np.isfinite(wanted).all() and wanted.std() > 0


def test_a_format_that_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rows = np.zeros((1, 66), np.uint8)
    write_gguf(
        path,
        architecture="t",
        metadata={},
        tensors=[PendingTensor(name="w", shape=(1, 256), dtype="IQ2_XXS", read=lambda: rows)],
    )
    with pytest.raises(ValueError, match="tensor 'w' is in IQ2_XXS, which is not supported.*llama-quantize"):
        read_gguf(path).tensors["w"].read()


# Writing ----------------------------------------------------------------------------------------------------


def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Numbers(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= self.base is None

    def read() -> np.ndarray:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return Numbers((64, 64), np.float32)

    tensors = [PendingTensor(name=f"x{i}", shape=(64, 64), dtype=np.float32, read=read) for i in range(6)]
    write_gguf(tmp_path / "x.gguf", architecture="t", metadata={}, tensors=tensors)
    assert most <= 2


@pytest.mark.parametrize(
    ("shape", "dtype", "read", "message"),
    [
        (
            (2,),
            np.float32,
            lambda: np.zeros(3, np.float32),
            r"was declared as float32 \(2,\), but is float32 \(3,\)",
        ),
        ((2,), np.float32, lambda: np.zeros(2, np.float16), "but is float16"),
        ((2,), np.float64, lambda: np.zeros(2), "is float64: use"),
        ((2, 33), "Q8_0", lambda: np.zeros((2, 34), np.uint8), "not a multiple of 32"),
        ((2, 32), "Q8_0", lambda: np.zeros((2, 32), np.uint8), r"was declared as uint8 \(2, 34\)"),
    ],
)
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray], message: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there before")
    with pytest.raises(ValueError, match=message):
        tensor = PendingTensor(name="w", shape=shape, dtype=dtype, read=read)
        write_gguf(path, architecture="t", metadata={}, tensors=[tensor])
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"what was there before"


# Damage -----------------------------------------------------------------------------------------------------


def test_every_way_of_cutting_a_file_short(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged, or its download is incomplete|is not a GGUF file"):
            read_gguf(small)


def test_damaged_bytes_raise_nothing_but_value_errors(small: Path) -> None:
    whole = small.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for place in generator.integers(4, len(whole), size=4):
            damaged[place] = generator.integers(256)
        small.write_bytes(damaged)
        try:
            for tensor in read_gguf(small).tensors.values():
                tensor.read()
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_count_that_no_file_can_hold(small: Path) -> None:
    """The length of a list of numbers: a reader that trusts it allocates until the machine gives up."""
    whole = small.read_bytes()
    place = whole.index(b"t.types") + len(b"t.types") + 4 + 4
    small.write_bytes(whole[:place] + struct.pack("<Q", 2**60) + whole[place + 8 :])
    with pytest.raises(ValueError, match="is damaged"):
        read_gguf(small)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.count", "2"),
        ("split.count", True),
        ("general.alignment", 32.0),
        ("general.license", 7),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.token_type", 1),
        ("tokenizer.ggml.bos_token_id", "0"),
        ("tokenizer.ggml.add_bos_token", 1),
        ("tokenizer.chat_template", ["a"]),
    ],
)
def test_values_of_another_type_are_damage(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture="t", metadata={key: value}, tensors=[])
    with pytest.raises(ValueError, match=f"model.gguf is damaged.*{key} has values of another type"):
        read_gguf(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*give a GGUF file"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "x").write_bytes(b"PK\x03\x04 an archive")
    with pytest.raises(ValueError, match="is not a GGUF file: it does not start with 'GGUF'"):
        read_gguf(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))  # big-endian
    with pytest.raises(ValueError, match="must be 2 or 3"):
        read_gguf(tmp_path / "x")


def test_one_part_of_several(tmp_path: Path) -> None:
    metadata = {"split.count": GgufValue(value=3, type="UINT16")}
    write_gguf(tmp_path / "x.gguf", architecture="t", metadata=metadata, tensors=[])
    with pytest.raises(ValueError, match="is one of 3 parts of a model: merge them"):
        read_gguf(tmp_path / "x.gguf")


def test_without_the_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'slmjax\[gguf\]'"):
        read_gguf(small)
