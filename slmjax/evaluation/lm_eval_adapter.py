"""lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a slmjax model: the `eval` extra.

    lm_eval.simple_evaluate(model=SlmjaxLM(load_model(run_dir)), tasks=["my_task"],
    task_manager=TaskManager(include_path="tasks")) run_tasks(loaded, ["my_task"], include_path="tasks")
    # the same, and only the figures

Figures of lm-eval are compared with published ones, so what a text becomes is as in lm-eval's own class for
Hugging Face models (`hf`), also where slmjax would choose otherwise: names of special tokens in a text are
these tokens; a context too long to continue loses its beginning and BOS with it; a text that is scored as a
whole is cut into windows that see one token of the last, and a BOS that the tokenizer puts before it is
scored too. `slmjax eval` has none of this.

Its tasks mostly fetch their data from a hub; one whose files are local needs no network.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from slmjax.checkpoints.loading import Loaded
from slmjax.evaluation.likelihood import DEFAULT_BATCH_SIZE, Pair, log_likelihoods, pair_tokens, refuse_nan
from slmjax.sampling import SamplingConfig, generate, render_chat

DEFAULT_NEW_TOKENS = 256  # of a task that does not say
NAMES_OF_NEW_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the first that is given counts

MARK = "\N{OBJECT REPLACEMENT CHARACTER} "  # where a message that is continued ends


class SlmjaxLM(LM):
    """A model as lm-eval asks it: likelihoods of continuations and of whole texts, and greedy or drawn
    continuations.
    """

    def __init__(self, loaded: Loaded, *, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        tokenizer = loaded.tokenizer
        # What comes before a text without a context: EOS for a model that has no BOS.
        self._prefix, self._prefix_id = (
            (tokenizer.bos, tokenizer.bos_id) if tokenizer.has_bos else (tokenizer.eos, tokenizer.eos_id)
        )

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache tells tokenizers apart by."""
        return self.loaded.tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, where lm-eval is asked to use one."""
        return self.loaded.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt it ends where the last message does, so
        that this is continued.
        """
        tokenizer = self.loaded.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError("this model has no chat template: leave out --apply_chat_template")
        names = {"bos_token": tokenizer.bos if tokenizer.has_bos else None, "eos_token": tokenizer.eos}
        last = chat_history[-1]
        marked = (
            chat_history
            if add_generation_prompt
            else [*chat_history[:-1], {**last, "content": last["content"] + MARK}]
        )
        try:
            text = render_chat(
                tokenizer.chat_template, marked, **names, add_generation_prompt=add_generation_prompt
            )
        except ValueError:  # some templates refuse system messages: lm-eval then goes without
            others = [message for message in marked if message["role"] != "system"]
            text = render_chat(
                tokenizer.chat_template, others, **names, add_generation_prompt=add_generation_prompt
            )
        if add_generation_prompt:
            return text
        if (place := text.rfind(MARK[0])) < 0:
            raise ValueError(
                "the model's chat template leaves out the last message, so that it cannot be continued"
            )
        return (
            text[:place] if text[place:].startswith(MARK) else text[:place].rstrip()
        )  # a template that trims has trimmed the mark

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation), and whether greedy decoding gives the
        continuation.

        Raises:
          ValueError: a log-likelihood is NaN, which lm-eval would take for the highest.
        """
        pairs = [self._pair(*_arguments(request)) for request in requests]
        found = log_likelihoods(self.loaded, pairs, batch_size=self.batch_size)
        for request, one in zip(requests, found, strict=True):
            refuse_nan([one], where=f"the request that ends {_arguments(request)[0][-60:]!r}")
        return [(one.logprob, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; one that is longer than the context in windows, no token scored
        twice.
        """
        pairs = []
        owners = []
        for index, request in enumerate(requests):
            windows = list(
                _windows(
                    self._ids(_arguments(request)[0]),
                    prefix_id=self._prefix_id,
                    room=self.loaded.config.context_length,
                )
            )
            pairs += windows
            owners += [index] * len(windows)
        sums = [0.0] * len(requests)
        for index, one in zip(
            owners, log_likelihoods(self.loaded, pairs, batch_size=self.batch_size), strict=True
        ):
            sums[index] += one.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to its stop texts; those with the same settings go
        together.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(_arguments(request)[1], sort_keys=True, default=str), []).append(
                index
            )
        found = {}
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                part = group[first : first + self.batch_size]
                texts = self._continued(
                    [_arguments(requests[index])[0] for index in part], _arguments(requests[part[0]])[1]
                )
                found |= dict(zip(part, texts, strict=True))
        return [found[index] for index in range(len(requests))]

    def _ids(self, text: str) -> list[int]:
        """A text with BOS where the model wants it and the text does not begin with its name."""
        tokenizer = self.loaded.tokenizer
        begins = [tokenizer.bos_id] if tokenizer.adds_bos and not text.startswith(self._prefix) else []
        return [*begins, *tokenizer.encode_with_special(text)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """The tokens of the whole text after as many as the context has alone, which it is given.

        `pair_tokens` differs where a token reaches over the boundary: it then gives the shorter context that
        the text has.
        """
        tokenizer = self.loaded.tokenizer
        if not context:
            ids = tokenizer.encode_with_special(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [self._prefix_id] else ([self._prefix_id], ids)
        cut = len(context.rstrip())
        before = self._ids(context[:cut])
        whole = self._ids(context + continuation)
        # Where nothing would be left of either, lm-eval's class fails.
        return (
            (before, whole[len(before) :])
            if 0 < len(before) < len(whole)
            else pair_tokens(tokenizer, context, continuation)
        )

    def _continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        asked = int(
            next(
                (settings[name] for name in NAMES_OF_NEW_TOKENS if settings.get(name) is not None),
                DEFAULT_NEW_TOKENS,
            )
        )
        tokenizer = self.loaded.tokenizer
        room = self.loaded.config.context_length
        # lm-eval's class fails where a task asks for too many
        new_tokens = asked if 0 < asked < room else max(room // 2, 1)
        prompts = [(self._ids(context) or [self._prefix_id])[-(room - new_tokens) :] for context in contexts]
        temperature = float(settings.get("temperature") or 0.0)
        config = SamplingConfig(
            max_tokens=new_tokens,
            temperature=0.0 if settings.get("do_sample") is False else temperature,
            stop=until,
        )
        found = generate(self.loaded, prompts, config=config, seeds=[config.seed] * len(prompts))
        # Decoded alone, as lm-eval does it: some vocabularies then lose the space before the first word.
        return [_cut(tokenizer.decode(one.tokens), until) for one in found]


def _arguments(request: Instance) -> tuple[Any, ...]:
    """What is asked: lm-eval's annotation says that there is nothing."""
    return request.args


def _windows(ids: list[int], *, prefix_id: int, room: int) -> Iterator[Pair]:
    """Contexts and what is scored after them: as much as there is room for, after one token that was scored
    before.
    """
    if ids:
        yield [prefix_id], ids[:room]
    for start in range(room, len(ids), room):
        end = min(start + room, len(ids))
        yield ids[end - room - 1 : start], ids[start:end]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def run_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as lm-eval names them.

    Raises:
      ValueError: a task that lm-eval does not know.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"lm-eval has no task {', '.join(unknown)}: name the directory of your own tasks with "
            "--lm-eval-path"
        )
    model = SlmjaxLM(loaded, batch_size=batch_size)
    run: Any = simple_evaluate  # its decorator hides its signature
    found = run(model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        for task, metrics in found["results"].items()
    }
