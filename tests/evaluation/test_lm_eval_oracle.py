"""lm-eval's figures are those of its own class for Hugging Face models, on the same model in their format."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slmjax import config
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.loading import Loaded
from slmjax.convert.import_export import Target, export_model
from slmjax.data.tokenizers import BpeTokenizer, Tokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import unstack
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from tests.untrained import untrained

pytestmark = pytest.mark.nightly
CONTEXT = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
LAYERS = 2
TEXT = "the theme of these things, then: another thing is the other theme of the thing. "
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(*, adds_bos: bool) -> Tokenizer:
    made = (
        BpeTokenizer(vocab_size=310)
        .build([TEXT * 20])
        .add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
    )
    return Tokenizer(
        made._backend,
        bos=made.bos,
        eos=made.eos,
        ends=["<|im_end|>"],
        adds_bos=adds_bos,
        has_bos=adds_bos,
        chat_template=TEMPLATE,
    )


def export(loaded: Loaded, path: Path) -> None:
    """The model as a Hugging Face directory, by way of an imported model's."""
    ours = jax.jit(lambda tree: unstack(loaded.config, tree))(loaded.params)
    kept = path.with_name(f"{path.name}-kept")
    safetensors_files.write_tensors(
        kept / safetensors_files.DIRECTORY, ((name, np.asarray(leaf)) for name, leaf in ours.items())
    )
    (kept / "model.json").write_text(config.dumps(loaded.config))
    loaded.tokenizer.save(kept / "tokenizer")
    assert export_model(kept, path, to=Target.HF).family == "Qwen3ForCausalLM"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    mixer = AttentionConfig(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, qk_norm=QkNorm.PER_HEAD
    )
    block = BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=48))
    made = tokenizer(adds_bos=True)
    small = ModelConfig(
        embed_dim=32,
        stack=(LayerGroup(pattern=(block,), repeats=LAYERS),),
        context_length=CONTEXT,
        vocab_size=made.vocab_size,
    )
    return untrained(small, tokenizer=made, path=tmp_path_factory.mktemp("base"), scale=0.3)


@pytest.fixture(scope="module")
def both(
    request: pytest.FixtureRequest, base: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """Our class and theirs, on the same model."""
    from lm_eval.models.huggingface import HFLM

    from slmjax.evaluation.lm_eval_adapter import SlmjaxLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = dataclasses.replace(base, own_tokenizer=tokenizer(adds_bos=request.param))
    path = tmp_path_factory.mktemp("hf") / "model"
    export(loaded, path)
    return SlmjaxLM(loaded, batch_size=4), HFLM(
        pretrained=str(path), device="cpu", dtype="float32", batch_size=1
    )


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)
    ]  # type: ignore[arg-type]


# No two have the same tokens but for the last: their class then takes the scores of one for the other's, from
# the wrong place.
PAIRS = [
    ("the theme", " of these"),
    ("the theme ", "of these"),
    ("the the", "me of"),
    ("the \n\t ", "thing"),
    ("", "the thing"),
    ("", "<|bos|>the thing"),
    ("<|bos|>of", " thing"),
    ("<|im_start|>user\nthing<|im_end|>\n", "other"),
    (TEXT * 5, " the theme"),
    ("a", "b"),
    ("naïve", " ☃"),
]


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize("both", [True, False], ids=["adds_bos", "no_bos"], indirect=True, scope="module")
def test_every_answer_is_that_of_lm_evals_own_class(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    expected = theirs.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(asked("loglikelihood", PAIRS))
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=1e-4, atol=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]
    texts = [("",), ("the",), ("<|bos|>the theme",), (TEXT,), (TEXT * 7 + "end",), (TEXT * 4,)]
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(asked("loglikelihood_rolling", texts)),
        theirs.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True),
        rtol=1e-4,
        atol=1e-3,
    )
    contexts = [
        "the theme",
        "the ",
        "<|im_start|>user\nthing<|im_end|>\n<|im_start|>assistant\n",
        TEXT * 5,
        "naïve ☃",
        "<|bos|>a",
    ]
    free = theirs.generate_until(
        asked("generate_until", [("the theme", {"max_gen_toks": 20})]), disable_tqdm=True
    )[0]
    settings: list[dict[str, Any]] = [
        {"max_gen_toks": 20},
        {"until": [free[3:5], "zzz"], "max_new_tokens": 20},
        {"until": free[2:3], "max_gen_toks": 40, "do_sample": False},
        {"until": ["<|im_end|>"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
    ]
    arguments = [(context, one) for one in settings for context in contexts]
    expected = theirs.generate_until(asked("generate_until", arguments), disable_tqdm=True)
    assert ours.generate_until(asked("generate_until", arguments)) == expected and len(set(expected)) > 8
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "thing "}]
    trimming = TEMPLATE.replace("m.content", "m.content | trim")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE
    for template in (trimming, refusing, TEMPLATE):  # which is left as it was
        ours.loaded.tokenizer.chat_template = theirs.tokenizer.chat_template = template
        for add_generation_prompt in (True, False):
            assert ours.apply_chat_template(messages, add_generation_prompt) == theirs.apply_chat_template(
                messages, add_generation_prompt
            )


TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{prompt}}"\ndoc_to_choice: '
    '"{{choices}}"\ndoc_to_target: "{{answer}}"\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "text": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{prompt}}"\nmetric_list: '
        "[{metric: bits_per_byte}]"
    ),
    "writing": 'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{prompt}}"\n'
    'generation_kwargs: {until: ["e"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]',
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("both", [True], ids=["adds_bos"], indirect=True, scope="module")
def test_every_example_of_a_local_task_scores_the_same(
    both: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    records = [
        {
            "prompt": TEXT[i : 9 * i + 12],
            "choices": [TEXT[i : i + 4], "theme", "of these things"],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in TASKS.items():
        files = f"{{data_files: {{test: {data}}}}}"
        where = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test\n"
        (tmp_path / f"local_{name}.yaml").write_text(where + text)
    manager = TaskManager(include_path=str(tmp_path))
    run: Any = simple_evaluate
    found, expected = (
        run(
            model=model,
            tasks=[f"local_{name}" for name in TASKS],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        for model in both
    )
    for task, samples in expected["samples"].items():
        assert len(samples) == len(records)
        for one, other in zip(found["samples"][task], samples, strict=True):
            assert one["arguments"] == other["arguments"]
            for answer, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert answer == (
                    wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-4, abs=1e-3)
                )
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isnan(value):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
