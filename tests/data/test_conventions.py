"""What a model expects around text, kept through save and load, and the same to Hugging Face's
transformers.
"""

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, Tokenizer

TEXTS = ["", " ", "def main(arguments):\n    return 1", "grüße <|bos|> ☃", "a<s>b"]
SPECIAL = ["<s>", "</s>", "<|eot_id|>", "<unk>"]


def foreign(path: Path, *, config: dict[str, object] | None = None, post_processor: object = None) -> Path:
    """A byte-level tokenizer.json as others write it, and the file next to it."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if post_processor is not None:
        backend.post_processor = post_processor
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, pair="$A $B", special_tokens=[("<s>", 256), ("</s>", 257)]
    )


BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
LLAMA = processors.Sequence([BYTE_LEVEL, template("<s> $A")])  # type: ignore[arg-type]  (the stub knows no list)
CASES = {
    "nothing": (None, None, False),
    "byte_level": (BYTE_LEVEL, {}, False),
    "template": (template("<s> $A"), {}, True),
    "template_of_eos": (template("$A </s>"), {}, False),
    "sequence": (LLAMA, {"bos_token": "<s>"}, True),
    "config_says_no": (LLAMA, {"add_bos_token": False}, False),
    "config_says_yes": (BYTE_LEVEL, {"add_bos_token": True}, True),
    "no_bos_at_all": (BYTE_LEVEL, {"bos_token": None, "add_bos_token": False, "eos_token": "</s>"}, False),
    "config_is_all": (None, {"add_bos_token": True, "eos_token": {"content": "<|eot_id|>"}}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_bos_comes_first_where_the_model_wants_it(case: str, tmp_path: Path) -> None:
    processor, config, expected = CASES[case]
    loaded = Tokenizer.load(foreign(tmp_path, config=config, post_processor=processor))
    assert loaded.adds_bos == expected and loaded.has_bos == (case != "no_bos_at_all")
    ids = loaded.encode("ab<s>")
    assert 256 not in ids  # special tokens are no text
    assert loaded.prompt_ids("ab<s>") == ([256, *ids] if expected else ids)
    begin = 257 if case == "no_bos_at_all" else 256  # EOS stands in for it
    assert loaded.prompt_batch(["", "ab<s>"]) == [[begin], loaded.prompt_ids("ab<s>")]
    loaded.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.adds_bos, again.has_bos, again.hash) == (loaded.adds_bos, loaded.has_bos, loaded.hash)
    # Hugging Face's libraries go by the post-processor alone.
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    kept_eos = [257] if case == "template_of_eos" else []
    assert saved.encode("ab").ids == [*([256] if expected else []), *loaded.encode("ab"), *kept_eos]
    # A run keeps what the files specify. If they specify nothing, texts of a new model begin with BOS.
    is_specified = (
        not (config or {}).get("add_bos_token", True) or (config or {}).get("bos_token", "") is None
    )
    of_run = FileTokenizer(path=str(tmp_path)).build([])
    assert of_run.adds_bos == (expected or not is_specified) and of_run.bos_id == begin
    assert FileTokenizer(path=str(tmp_path), adds_bos=True).build([]).prompt_ids("ab")[0] == begin


def test_documents_do_not_begin_with_the_mark_of_a_turn(tmp_path: Path) -> None:
    """SmolLM2-Instruct names <|im_start|> as BOS, and begins no text with it."""
    words = (
        ByteTokenizer().build([]).add_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], special=True)
    )
    words.save(tmp_path)
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = FileTokenizer(path=str(tmp_path)).build([])
    assert (loaded.bos, loaded.named_bos, loaded.adds_bos) == ("<|eos|>", "<|im_start|>", False)
    assert "turns of a chat" in loaded.special_tokens["bos"].source
    loaded.save(tmp_path / "run")
    written = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert config.items() <= written.items()
    again = Tokenizer.load(tmp_path / "run")
    assert (again.bos, again.named_bos, again.hash) == (loaded.bos, loaded.named_bos, loaded.hash)
    asked = FileTokenizer(path=str(tmp_path), adds_bos=True).build([])
    assert (asked.bos, asked.adds_bos) == ("<|im_start|>", True)
    # A base model, whose BOS also separates documents.
    base = config | {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(base))
    assert FileTokenizer(path=str(tmp_path)).build([]).bos == "<|endoftext|>"


def test_vocabularies_made_here_begin_with_bos_and_keep_their_hash(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer().build([])
    tokenizer.save(tmp_path)
    specification = json.loads((tmp_path / "tokenizer.json").read_text())
    assert specification["post_processor"]["type"] == "TemplateProcessing"
    without = json.dumps(
        [{**specification, "post_processor": None}, "<|bos|>", "<|eos|>"],
        sort_keys=True,
        separators=(",", ":"),
    )
    assert hashlib.sha256(without.encode()).hexdigest() == tokenizer.hash  # which runs on disk have
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash and Tokenizer.load(tmp_path).adds_bos
    # As runs before this wrote it: no post-processor, and no word about BOS.
    (tmp_path / "tokenizer.json").write_text(json.dumps({**specification, "post_processor": None}))
    old = {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(old))
    older = Tokenizer.load(tmp_path)
    assert older.prompt_ids("a") == [0, 99] and older.hash == tokenizer.hash
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).adds_bos
    # The vocabulary of another, in a run before this.
    other = foreign(tmp_path / "other", config={**old, "bos_token": "<s>", "eos_token": "</s>"})
    assert Tokenizer.load(other).adds_bos


def test_nothing_is_lost_between_save_and_load(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(foreign(tmp_path) / "tokenizer.json"))
    tokenizer = Tokenizer(
        backend,
        bos="<s>",
        eos="</s>",
        ends=["<|eot_id|>", "</s>"],
        adds_bos=False,
        has_bos=False,
        chat_template="{{ 'ü' }}\n",
        unk="<unk>",
        pad="</s>",
    )
    assert tokenizer.end_ids == (257, 258) and tokenizer.special_ids == {
        name: 256 + i for i, name in enumerate(SPECIAL)
    }
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    for name in (
        "bos",
        "eos",
        "ends",
        "end_ids",
        "adds_bos",
        "has_bos",
        "chat_template",
        "unk",
        "pad",
        "hash",
        "vocab_size",
    ):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    given = Tokenizer.load(tmp_path / "saved", ends=["<unk>"], adds_bos=True)
    assert given.end_ids == (257, 259) and given.adds_bos and given.has_bos
    with pytest.raises(ValueError, match="no token '<|im_end|>': add it first"):
        Tokenizer.load(tmp_path / "saved", ends=["<|im_end|>"])


OLDER = {
    "eos_token": "</s>",
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


@pytest.mark.parametrize(
    ("config", "model_ids", "bos", "eos"),
    [
        (
            None,
            {},
            ("<s>", "first of the usual names in the vocabulary"),
            ("</s>", "first of the usual names in the vocabulary"),
        ),
        (
            {"eos_token": "</s>"},
            {},
            ("<s>", "first of the usual names in the vocabulary"),
            ("</s>", "eos_token of tokenizer_config.json"),
        ),
        (
            {"bos_token": None, "eos_token": "</s>"},
            {},
            ("</s>", "EOS, since the tokenizer has no BOS"),
            ("</s>", "eos_token of tokenizer_config.json"),
        ),
        (
            {"bos_token": None, "eos_token": None},
            {"bos": 259, "eos": 258},
            ("<unk>", "bos_token_id of the model's configuration"),
            ("<|eot_id|>", "eos_token_id of the model's configuration"),
        ),
        (
            {"bos_token": "<unk>"},
            {"bos": 256},
            ("<unk>", "bos_token of tokenizer_config.json"),
            ("</s>", "first of the usual names"),
        ),
        # What slmjax wrote before for a model without BOS, whose documents began with the first of the usual
        # names.
        (
            {**OLDER, "bos_token": None, "add_bos_token": False},
            {},
            ("<s>", "first of the usual names"),
            ("</s>", "eos_token of tokenizer_config.json"),
        ),
    ],
)
def test_bos_and_eos_follow_the_rules_and_say_which(
    config: dict[str, object] | None,
    model_ids: dict[str, int | None],
    bos: tuple[str, str],
    eos: tuple[str, str],
    tmp_path: Path,
) -> None:
    loaded = Tokenizer.load(foreign(tmp_path, config=config), model_ids=model_ids)
    has_bos = (config or {}).get("bos_token", "") is not None
    for kind, (name, source) in (("bos", bos), ("eos", eos)):
        token = loaded.special_tokens[kind]
        assert (token.name, token.id) == (name, 256 + SPECIAL.index(name)) and token.source.startswith(source)
    loaded.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.special_tokens == loaded.special_tokens and again.has_bos == loaded.has_bos == has_bos, (
        "the reason is kept"
    )
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert written["bos_token"] == (bos[0] if has_bos else None), "for transformers there is still none"
    named = Tokenizer.load(tmp_path, bos="<|eot_id|>", eos="<unk>").special_tokens
    assert [(token.name, token.source) for token in named.values()] == [
        ("<|eot_id|>", "named by the user"),
        ("<unk>", "named by the user"),
    ]


def test_a_null_eos_must_be_named(tmp_path: Path) -> None:
    path = foreign(tmp_path, config={"bos_token": "<s>", "eos_token": None})
    with pytest.raises(ValueError, match=r"the eos_token of tokenizer_config.json is null.*--tokenizer\.eos"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, eos="<|eot_id|>").eos_id == 258


def test_padding_and_unknown_tokens_are_those_of_the_config_alone(tmp_path: Path) -> None:
    path = foreign(tmp_path, config={"unk_token": None, "pad_token": "</s>", "eos_token": "</s>"})
    assert (Tokenizer.load(path).unk, Tokenizer.load(path).pad) == (None, "</s>"), (
        "no <unk> because of its name"
    )


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({"chat_template": "a"}, None, "a"),
        (
            {"chat_template": [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]},
            None,
            "a",
        ),
        ({"chat_template": [{"name": "tool_use", "template": "b"}]}, None, None),
        ({"chat_template": "b"}, "a", "a"),
        ({}, "a", "a"),
        ({}, None, None),
    ],
)
def test_where_a_chat_template_is_found(
    config: dict[str, object], file: str | None, expected: str | None, tmp_path: Path
) -> None:
    foreign(tmp_path, config=config)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    loaded = Tokenizer.load(tmp_path)
    loaded.save(tmp_path)
    assert loaded.chat_template == expected == Tokenizer.load(tmp_path).chat_template


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    foreign(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds a list, not an object: repair it"):
        Tokenizer.load(tmp_path)


def test_tokens_are_added_and_recognised_where_asked() -> None:
    for tokenizer in (
        BpeTokenizer(vocab_size=270).build(["the theme"]),
        CharTokenizer().build(["the theme"]),
    ):
        size = tokenizer.vocab_size
        chatty = tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
        assert (chatty.vocab_size, chatty.hash != tokenizer.hash, tokenizer.vocab_size) == (
            size + 2,
            True,
            size,
        )
        the = tokenizer.encode("the")
        assert chatty.encode_with_special("<|im_start|>the<|im_end|><|eos|>") == [size, *the, size + 1, 1]
        assert chatty.decode([size, *the, size + 1, 1]) == "the"
        plain = chatty.add_tokens(["[th]"], special=False)
        assert plain.encode("the[th]the") == [*the, size + 2, *the] and plain.decode([size + 2]) == "[th]"
    with pytest.raises(ValueError, match="has no '<', '>', '|'"):
        chatty.encode("<|>")
    # Of what is plain text, names of special tokens stay text.
    byte = ByteTokenizer().build([]).add_tokens(["<x>"], special=True)
    assert byte.encode("<x>") == [2 + b for b in b"<x>"] and byte.encode_with_special("<x>") == [258]


# Those who read the files -----------------------------------------------------------------------------------
@pytest.mark.nightly
@pytest.mark.parametrize("case", ["byte", "bpe", "char", *CASES])
def test_transformers_reads_the_same_ids(case: str, tmp_path: Path) -> None:
    """Special tokens in a text excepted, which transformers recognises."""
    from transformers import AutoTokenizer

    made = {"byte": ByteTokenizer(), "bpe": BpeTokenizer(vocab_size=300), "char": CharTokenizer()}
    if case in made:
        tokenizer = made[case].build(TEXTS)
    else:
        processor, config, _ = CASES[case]
        tokenizer = Tokenizer.load(foreign(tmp_path / "theirs", config=config, post_processor=processor))
    tokenizer = tokenizer.add_tokens(["<|im_end|>"], special=True)
    tokenizer.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "ours"))
    after = [tokenizer.eos_id] if case == "template_of_eos" else []
    for text in TEXTS[1:]:
        begins = [tokenizer.bos_id] if tokenizer.adds_bos else []
        assert theirs(text)["input_ids"] == [*begins, *tokenizer.encode_with_special(text), *after]
        if tokenizer.encode_with_special(text) == tokenizer.encode(text):
            assert theirs(text)["input_ids"] == [*tokenizer.prompt_ids(text), *after]
            assert theirs.decode(tokenizer.prompt_ids(text), skip_special_tokens=True) == text
    assert theirs("")["input_ids"] == [*([tokenizer.bos_id] if tokenizer.adds_bos else []), *after]
    assert (theirs.bos_token, theirs.eos_token) == (
        tokenizer.bos if tokenizer.has_bos else None,
        tokenizer.eos,
    )
    assert len(theirs) == tokenizer.vocab_size
    # As transformers writes it again, without a word about BOS.
    theirs.save_pretrained(str(tmp_path / "again"))
    again = Tokenizer.load(tmp_path / "again")
    assert (again.adds_bos, again.has_bos, again.prompt_ids("ab")) == (
        tokenizer.adds_bos,
        tokenizer.has_bos,
        tokenizer.prompt_ids("ab"),
    )
