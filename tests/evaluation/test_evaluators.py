"""Multiple choice, lm-eval and efficiency, on the model that the end-to-end tests train."""

import dataclasses
import itertools
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax import evaluation
from slmjax.checkpoints.loading import Loaded
from slmjax.cli import main
from slmjax.data.tokenizers import BpeTokenizer
from slmjax.evaluation import efficiency, multiple_choice
from slmjax.evaluation.likelihood import Likelihood
from slmjax.evaluation.multiple_choice import continuation_of, read_questions
from slmjax.models.decoder import Decoder
from slmjax.sampling import Continuation, SamplingConfig

QUESTIONS = [
    {"prompt": "The statement is", "choices": ["not", "xqzj", "executed"], "answer": 0},
    {"prompt": "An expression ", "choices": ["list", "of"], "answer": "of"},
    {"question": "", "choices": ["The", "zzz zzz"], "answer": 1},
    {"prompt": "import", "choices": ["a" * 40, "the", "b", "c"], "answer": 1},
]


@pytest.fixture(scope="module")
def loaded(trained, workplace: Path) -> Loaded:
    return slmjax.load_model(workplace / json.loads(trained.stdout)["run_dir"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


@jax.jit
def padded_logits(model: Decoder, ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(slmjax.logits(model, ids))


def log_probabilities(loaded: Loaded, ids: list[int]) -> np.ndarray:
    """[T V] of the full forward pass, of a sequence up to the context."""
    return np.asarray(
        padded_logits(loaded.model, jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids)))
    )[0, : len(ids)]


# Likelihood -------------------------------------------------------------------------------------------------
def test_likelihoods_are_those_of_the_full_forward(loaded: Loaded) -> None:
    """Pairs of all lengths, one longer than the context, in batches that do not divide them."""
    draws = np.random.default_rng(0)
    pairs = [
        (draws.integers(2, 258, a).tolist(), draws.integers(2, 258, b).tolist())
        for a, b in ((1, 1), (5, 30), (40, 3), (70, 9), (2, 2))
    ]
    found = evaluation.log_likelihoods(loaded, pairs, batch_size=2)
    for (context, continuation), one in zip(pairs, found, strict=True):
        cut = max(len(context) + len(continuation) - 65, 0)
        rows = log_probabilities(loaded, [*context[cut:], *continuation][:-1])[-len(continuation) :]
        assert one.logprob == pytest.approx(
            float(np.sum(rows[np.arange(len(continuation)), continuation])), rel=1e-4
        )
        assert (one.num_tokens, one.truncated) == (len(continuation), cut)
        assert one.is_greedy == (np.argmax(rows, axis=-1).tolist() == continuation)
    best = [int(np.argmax(log_probabilities(loaded, [0, 70])[-1]))]
    assert evaluation.log_likelihoods(loaded, [([0, 70], best)])[0].is_greedy


def test_what_cannot_be_scored_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="pair 1 has 0 tokens of context"):
        evaluation.log_likelihoods(loaded, [([0], [5]), ([], [5])])
    with pytest.raises(ValueError, match="65 tokens, more than the model's context_length=64"):
        evaluation.log_likelihoods(loaded, [([0], [5] * 65)])


def test_a_boundary_within_a_token_belongs_to_the_continuation() -> None:
    tokenizer = BpeTokenizer(vocab_size=300).build(["the theme then these them " * 50])
    whole = tokenizer.encode("the theme")
    for cut in range(1, len("the theme")):
        context, continuation = evaluation.pair_tokens(tokenizer, "the theme"[:cut], "the theme"[cut:])
        assert [*context, *continuation] == [tokenizer.bos_id, *whole] and continuation
    spaced = evaluation.pair_tokens(tokenizer, "the ", "theme")
    assert spaced == evaluation.pair_tokens(tokenizer, "the", " theme")


# Multiple choice --------------------------------------------------------------------------------------------
def test_answers_follow_the_likelihoods(loaded: Loaded, file: Path) -> None:
    right = []
    right_per_byte = []
    for question in read_questions(file):
        space = "" if not question.prompt or question.prompt.endswith(" ") else " "
        pairs = [
            evaluation.pair_tokens(loaded.tokenizer, question.prompt, space + choice)
            for choice in question.choices
        ]
        logprobs = [one.logprob for one in evaluation.log_likelihoods(loaded, pairs)]
        per_byte = [logprob / len(choice) for logprob, choice in zip(logprobs, question.choices, strict=True)]
        right.append(logprobs.index(max(logprobs)) == question.answer)
        right_per_byte.append(per_byte.index(max(per_byte)) == question.answer)
    found = evaluation.answer_questions(loaded, file)
    assert found.accuracy == pytest.approx(np.mean(right)) and found.accuracy_per_byte == pytest.approx(
        np.mean(right_per_byte)
    )
    assert found.accuracy_stderr == pytest.approx(np.std(right, ddof=1) / 2)
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 4) / 4) and (
        found.questions,
        found.truncated,
    ) == (4, 0)


@pytest.mark.parametrize(
    ("prompt", "choice", "joined"),
    [
        ("The capital is", "Paris", "The capital is Paris"),
        ("The capital is", " Paris", "The capital is Paris"),
        ("The capital is ", "Paris", "The capital is Paris"),
        ("The capital is ", " Paris", "The capital is Paris"),
        ("def f():\n", "    return 1", "def f():\n    return 1"),
        ("def f():", "\n    return 1", "def f():\n    return 1"),
        ("", " Paris", " Paris"),
        ("It is", " ", "It is  "),
    ],
)
def test_one_blank_stands_between_prompt_and_choice(prompt: str, choice: str, joined: str) -> None:
    assert prompt + continuation_of(prompt, choice) == joined


def test_one_question_has_no_error_bar_and_a_long_prompt_is_counted(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 100, "choices": ["a", "b"], "answer": 0}))
    found = evaluation.answer_questions(loaded, path)
    assert math.isnan(found.accuracy_stderr) and found.truncated == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a JSON list"),
        ('{"text": "a"}', 'line 2 has no text in "prompt"'),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two or more texts"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "not empty"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            '"answer" is 2, and must be an index from 0 to 1',
        ),
        ('{"prompt": "a", "choices": ["b", "c"]}', '"answer" is None'),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": "b"}', "\"answer\" is 'b'"),
        ('{"prompt": "a", "choices": ["b", "' + "c" * 80 + '"], "answer": 0}', "context_length=64"),
    ],
)
def test_what_is_no_question_is_named(loaded: Loaded, file: Path, line: str, expected: str) -> None:
    file.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError) as refused:
        evaluation.answer_questions(loaded, file)
    assert expected in str(refused.value) and "questions.jsonl" in str(refused.value)


def test_an_answer_is_not_chosen_by_nan(loaded: Loaded, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = itertools.count()

    def of_pairs(loaded: Loaded, pairs: Sequence[Any], *, batch_size: int) -> list[Likelihood]:
        values = [
            math.nan if next(scores) == 4 else -math.inf for _ in pairs
        ]  # the second choice of the second question
        return [Likelihood(logprob=value, is_greedy=False, num_tokens=1, truncated=0) for value in values]

    monkeypatch.setattr(multiple_choice, "log_likelihoods", of_pairs)
    with pytest.raises(ValueError, match=r"questions.jsonl, line 2: a log-likelihood is NaN.*--step"):
        evaluation.answer_questions(loaded, file)


# lm-eval ----------------------------------------------------------------------------------------------------
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT_TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING_TASK = """
task: local_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{prompt}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


def test_lm_eval_agrees_on_a_local_task(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from slmjax.evaluation.lm_eval_adapter import run_tasks

    words = [f"word{i} of the statement {'x' * (i % 7)}" for i in range(12)]
    records = [
        {"prompt": words[i] * (1 + i % 4), "choices": [words[-i], "the", "is a list"], "answer": i % 3}
        for i in range(12)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    tasks = {"local_choice": CHOICE_TASK, "local_text": TEXT_TASK, "local_writing": WRITING_TASK}
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    found = run_tasks(loaded, list(tasks), include_path=tmp_path)
    ours = evaluation.answer_questions(loaded, data)
    assert found["local_choice"]["acc"] == pytest.approx(ours.accuracy)
    assert found["local_choice"]["acc_norm"] == pytest.approx(ours.accuracy_per_byte)
    # Texts of up to 130 tokens in a context of 64: each token once, BOS too, in windows that begin with a
    # token of the last one.
    total = 0.0
    for record in records:
        bos = loaded.tokenizer.bos_id
        ids = [bos, bos, *loaded.tokenizer.encode(record["prompt"])]
        for start in range(1, len(ids), 64):
            end = min(start + 64, len(ids))
            rows = log_probabilities(loaded, ids[max(end - 65, 1 if start > 1 else 0) : end - 1])[
                start - end :
            ]
            total += float(rows[np.arange(end - start), ids[start:end]].sum())
    num_bytes = sum(len(record["prompt"].encode()) for record in records)
    assert found["local_text"]["bits_per_byte"] == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-4)
    assert found["local_writing"]["exact_match"] == 0.0
    with pytest.raises(ValueError, match="no task absent"):
        run_tasks(loaded, ["absent"], include_path=tmp_path)


@pytest.fixture(scope="module")
def chaotic(loaded: Loaded) -> Loaded:
    """The same with random weights: where the trained model writes spaces, each letter here depends on all
    before it.

    Bytes that are no printable ASCII have small rows in the embedding, which are the head's too, and are
    never the likeliest.
    """
    draws = np.random.default_rng(0)
    params = {path: np.asarray(leaf) for path, leaf in loaded.params.items()}
    params |= {
        path: draws.normal(0, 0.3, leaf.shape).astype(np.float32)
        for path, leaf in params.items()
        if not path.endswith("/scale")
    }
    printable = loaded.tokenizer.encode("".join(map(chr, range(32, 127))))
    params["embed/table"][np.setdiff1d(np.arange(258), printable)] *= 0.01
    return dataclasses.replace(loaded, params={path: jnp.asarray(leaf) for path, leaf in params.items()})


def test_lm_eval_continues_as_generate_does(chaotic: Loaded) -> None:
    from lm_eval.api.instance import Instance

    from slmjax.evaluation.lm_eval_adapter import SlmjaxLM

    def continued(context: str | list[int], max_tokens: int, *, temperature: float = 0.0) -> str:
        return slmjax.generate(
            chaotic, [context], config=SamplingConfig(max_tokens=max_tokens, temperature=temperature)
        )[0].text

    free = continued("The ", 32)
    drawn = continued("The ", 32, temperature=0.9)
    stop = free[9:11]
    late = free[20:23]
    long = "The object is 1234567. " * 4
    # of a context of 64 tokens: BOS goes with the beginning
    kept = continued(chaotic.tokenizer.encode(long)[-52:], 12)
    assert (
        len(free) == 32
        and 0 < free.index(stop) < free.index(late)
        and drawn != free
        and kept != continued(long[:51], 12)
    )
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("The ", {}, free),  # half of the context, where a task asks for more than that, or does not say
        ("The ", {"until": None, "max_gen_toks": 500}, free),
        ("The ", {"max_new_tokens": 5, "max_tokens": 7}, free[:5]),
        ("The ", {"until": [late, stop]}, free[: free.index(stop)]),
        ("The ", {"until": late}, free[: free.index(late)]),
        ("The ", {"until": [stop], "max_gen_toks": 5}, continued("The ", 5)),
        ("The ", {"until": ["", "absent"], "max_gen_toks": 28}, free[:28]),
        ("The ", {"do_sample": False, "temperature": 0.9}, free),
        ("The ", {"do_sample": True, "temperature": 0.9}, drawn),
        ("The ", {"temperature": 0.9}, drawn),
        (long, {"max_gen_toks": 12}, kept),
        (
            "a<|bos|>b",
            {"max_gen_toks": 6},
            continued([0, 99, 0, 100], 6),
        ),  # the name of a special token is the token
        ("<|bos|>ab", {"max_gen_toks": 6}, continued("ab", 6)),
    ]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=one[:2], idx=index)
        for index, one in enumerate(asked)
    ]
    assert SlmjaxLM(chaotic).generate_until(requests) == [one[2] for one in asked]


# Efficiency and the command ---------------------------------------------------------------------------------
@pytest.mark.filterwarnings(
    "ignore"
)  # codecarbon catches all that goes wrong in it, a warning made an error too, and then says nothing
def test_efficiency(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "ENERGY_SECONDS", 1.5)
    found = evaluation.measure_efficiency(loaded, energy=True)
    assert found.parameters == sum(leaf.size for leaf in loaded.params.values()) > found.active_parameters
    assert found.bytes_by_dtype == {"float32": 4 * found.parameters}
    # Two window layers of 16 slots with 2 heads of 8, two full ones with 4 heads of 8; keys and values in
    # float32.
    assert (
        found.cache_bytes
        == 2 * (2 * 16 * 2 * 8 * 4) + 2 * (2 * 64 * 4 * 8 * 4)
        == found.cache_bytes_per_token * 64
    )
    assert found.training_flops_per_token == 3 * found.forward_flops_per_token
    assert found.time_to_first_token > 0 and found.prompt_tokens == 32
    # NaN where so tiny a model takes less time for its tokens than the measurement varies by.
    speed = found.decode_tokens_per_second
    assert math.isnan(speed) or 1 < speed < 1e7
    assert found.peak_memory_bytes > 1e8 and 0 < (found.energy_joules_per_token or 0) < 1e4
    with pytest.raises(ValueError, match="prompt_tokens=63 must be from 1 to 62"):
        evaluation.measure_efficiency(loaded, prompt_tokens=63)


class FakeMachine:
    """A clock, and a `sample` of which each token of a prompt takes 10 ms and each new one after the first 2
    ms, at 36 watts.

    The first call of a kind takes far longer, as compilation does; of the next five the fastest and the mean
    are not the median.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls = Counter()
        self.consumed = 0.0

    def sample(
        self,
        _definition: object,
        _params: object,
        _buffers: object,
        prompts: list[list[int]],
        *,
        config: SamplingConfig,
        eos_id: int | None,
    ) -> list[Continuation]:
        assert config.temperature == 0.0 and eos_id is None, "not always the same number of tokens"
        [prompt] = prompts
        kind = len(prompt), config.max_tokens
        off = (
            [100.0, -0.05, 0.0, 4.0, 0.0, -0.05][self.calls[kind]]
            if len(prompt) > 1 or not self.calls[kind]
            else 0.0
        )
        self.calls[kind] += 1
        self.now += 0.01 * len(prompt) + 0.002 * (config.max_tokens - 1) + off
        return [Continuation(tokens=[5] * config.max_tokens, logprobs=[0.0] * config.max_tokens)]

    def start(self) -> None:
        self.consumed -= 36 * self.now / 3.6e6

    def stop(self) -> None:
        self.consumed += 36 * self.now / 3.6e6

    @property
    def final_emissions_data(self) -> SimpleNamespace:
        """As codecarbon's tracker has it, in kilowatt-hours."""
        return SimpleNamespace(energy_consumed=self.consumed)


@pytest.mark.parametrize(("prompt_tokens", "length", "new_tokens"), [(None, 32, 32), (10, 10, 40)])
def test_efficiency_by_a_clock_of_ours(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, prompt_tokens: int | None, length: int, new_tokens: int
) -> None:
    machine = FakeMachine()
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    monkeypatch.setattr(efficiency, "sample", machine.sample)
    monkeypatch.setattr(efficiency, "_energy_tracker", lambda: machine)
    monkeypatch.setattr(efficiency, "NEW_TOKENS", 40)  # or what the context of 64 has room for
    found = evaluation.measure_efficiency(loaded, energy=True, prompt_tokens=prompt_tokens)
    assert found.prompt_tokens == length and found.time_to_first_token == pytest.approx(0.01 * length)
    assert found.decode_tokens_per_second == pytest.approx(500.0)
    seconds = 0.01 + 0.002 * (new_tokens - 1)  # after a prompt of one token, again and again for ten seconds
    assert found.energy_joules_per_token == pytest.approx(36 * seconds / new_tokens)
    assert machine.calls == {
        (length, 1): 6,
        (length, new_tokens): 6,
        (1, new_tokens): 1 + math.ceil(10 / seconds),
    }
    assert evaluation.measure_efficiency(loaded, prompt_tokens=20).energy_joules_per_token is None


def test_energy_without_its_package(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ValueError, match=r"slmjax\[energy\]"):
        evaluation.measure_efficiency(loaded, energy=True)


def test_one_table_and_json(
    loaded: Loaded, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficiency, "ROUNDS", 1)
    monkeypatch.setenv("COLUMNS", "140")

    def output(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(
                [
                    "eval",
                    "--multiple-choice",
                    str(file),
                    "--efficiency",
                    *words,
                    "--step",
                    str(loaded.step),
                    str(loaded.path),
                ]
            )
        assert not stopped.value.code
        return capsys.readouterr().out

    found = json.loads(output("--json"))
    assert (
        found.keys() == {"run_dir", "step", "multiple_choice", "efficiency"}
        and found["multiple_choice"][0]["questions"] == 4
    )
    shown = output("--text")
    for part in (
        "bits per byte",
        "questions.jsonl: accuracy",
        "4 questions, chance 0.396",
        "cache per token",
        "tokens/s",
        "peak memory",
    ):
        assert part in shown, shown


def test_lm_eval_without_its_package(
    loaded: Loaded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "slmjax.evaluation.lm_eval_adapter", raising=False)
    with pytest.raises(SystemExit):
        main(["eval", str(loaded.path), "--lm-eval", "arc_easy"])
    assert "slmjax[eval]" in capsys.readouterr().err
