"""lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a slmjax model: the `eval` extra.

    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path="tasks")
    lm_eval.simple_evaluate(model=SlmjaxLM(load_model(run_dir)), tasks=["my_task"], task_manager=manager)
    run_tasks(loaded, ["my_task"], include_path="tasks")   # the same, returns the metrics alone

Results of lm-eval are compared with published ones. Texts are therefore tokenized as in lm-eval's own class
for Hugging Face models (`hf`), also where slmjax would do otherwise: names of special tokens in a text are
these tokens; a context that is too long is cut at its beginning, BOS included; a full text is scored in
windows that share one token with the previous one, and a BOS that the tokenizer adds is scored too.
`slmjax eval` does none of this.

Most tasks download their data from a hub; a task with local files needs no network.
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

DEFAULT_NEW_TOKENS = 256  # for a task without a limit
# Settings of a task that limit its new tokens: the first that is set counts.
NAMES_OF_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

MARK = "\N{OBJECT REPLACEMENT CHARACTER} "  # marks the end of a message that is to be continued


class SlmjaxLM(LM):
    """The interface of lm-eval: likelihoods of continuations and of full texts, and generation."""

    def __init__(self, loaded: Loaded, *, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        tokenizer = loaded.tokenizer
        # The token before a text without a context: EOS for a model without BOS.
        # The names of the model's files, as lm-eval has for Hugging Face models.
        self._prefix, self._prefix_id = (
            (tokenizer.eos, tokenizer.eos_id)
            if tokenizer.named_bos is None or tokenizer.named_bos_id is None
            else (tokenizer.named_bos, tokenizer.named_bos_id)
        )

    @property
    def tokenizer_name(self) -> str:
        """Return the name that identifies the tokenizer in lm-eval's cache."""
        return self.loaded.tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template if lm-eval uses one."""
        return self.loaded.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation.

        Without a generation prompt it ends where the last message ends, so that the model continues it.
        """
        tokenizer = self.loaded.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError("this model has no chat template: leave out --apply_chat_template")
        # Templates of Hugging Face models use these two names.
        names = {"bos_token": tokenizer.named_bos, "eos_token": tokenizer.eos}
        last = chat_history[-1]
        # The mark finds the end of the last message in the rendered text, whatever the template adds to it.
        marked = (
            chat_history
            if add_generation_prompt
            else [*chat_history[:-1], {**last, "content": last["content"] + MARK}]
        )
        try:
            text = render_chat(
                tokenizer.chat_template, marked, **names, add_generation_prompt=add_generation_prompt
            )
        except ValueError:
            # Some templates refuse system messages: lm-eval then drops them.
            others = [message for message in marked if message["role"] != "system"]
            text = render_chat(
                tokenizer.chat_template, others, **names, add_generation_prompt=add_generation_prompt
            )
        if add_generation_prompt:
            return text
        if (end := text.rfind(MARK[0])) < 0:
            raise ValueError(
                "the model's chat template leaves out the last message, so that it cannot be continued"
            )
        # A template that trims messages has trimmed the blank of the mark.
        return text[:end] if text[end:].startswith(MARK) else text[:end].rstrip()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation), and whether it is the greedy one.

        Raises:
          ValueError: a log-likelihood is NaN, which lm-eval would take for the highest.
        """
        pairs = [self._pair(*_arguments(request)) for request in requests]
        likelihoods = log_likelihoods(self.loaded, pairs, batch_size=self.batch_size)
        for request, likelihood in zip(requests, likelihoods, strict=True):
            refuse_nan([likelihood], where=f"the request that ends {_arguments(request)[0][-60:]!r}")
        return [(likelihood.logprob, likelihood.is_greedy) for likelihood in likelihoods]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows if it is longer than the context.

        No token is scored twice.
        """
        context_length = self.loaded.config.context_length
        pairs = []
        # Windows of all texts share batches, and are summed by text afterwards.
        request_of_pair = []
        for index, request in enumerate(requests):
            ids = self._ids(_arguments(request)[0])
            windows = list(_windows(ids, prefix_id=self._prefix_id, context_length=context_length))
            pairs += windows
            request_of_pair += [index] * len(windows)
        likelihoods = log_likelihoods(self.loaded, pairs, batch_size=self.batch_size)
        sums = [0.0] * len(requests)
        for index, likelihood in zip(request_of_pair, likelihoods, strict=True):
            sums[index] += likelihood.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to its stop texts."""
        # Requests with the same settings share batches.
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = json.dumps(_arguments(request)[1], sort_keys=True, default=str)
            groups.setdefault(settings, []).append(index)
        continuations = {}
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                part = group[first : first + self.batch_size]
                texts = self._continued(
                    [_arguments(requests[index])[0] for index in part], _arguments(requests[part[0]])[1]
                )
                continuations |= dict(zip(part, texts, strict=True))
        return [continuations[index] for index in range(len(requests))]

    def _ids(self, text: str) -> list[int]:
        """Return the tokens of a text, with BOS if the model uses it and the text does not start with it."""
        tokenizer = self.loaded.tokenizer
        # A chat template may have written BOS already.
        prefix = [tokenizer.bos_id] if tokenizer.adds_bos and not text.startswith(self._prefix) else []
        return [*prefix, *tokenizer.encode_with_special(text)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Return the tokens of the context alone, and those of the full text after as many.

        `pair_tokens` differs if a token crosses the boundary: its context is then the shorter one that the
        full text has.
        """
        tokenizer = self.loaded.tokenizer
        if not context:
            ids = tokenizer.encode_with_special(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [self._prefix_id] else ([self._prefix_id], ids)
        cut = len(context.rstrip())
        # White space at the end of the context belongs to the continuation, as in lm-eval's class.
        before = self._ids(context[:cut])
        full = self._ids(context + continuation)
        # lm-eval's class fails if nothing is left of either.
        if 0 < len(before) < len(full):
            return before, full[len(before) :]
        return pair_tokens(tokenizer, context, continuation)

    def _continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        # Tasks give one text or a list; an empty one would end every generation at once.
        until = settings.get("until") or []
        until = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        limits = (settings[name] for name in NAMES_OF_NEW_TOKENS if settings.get(name) is not None)
        new_tokens = int(next(limits, DEFAULT_NEW_TOKENS))
        tokenizer = self.loaded.tokenizer
        context_length = self.loaded.config.context_length
        if not 0 < new_tokens < context_length:
            # lm-eval's class fails if a task sets more new tokens than the context has.
            new_tokens = max(context_length // 2, 1)
        # The end of a prompt has the question: its beginning is cut.
        prompt_length = context_length - new_tokens
        prompts = [(self._ids(context) or [self._prefix_id])[-prompt_length:] for context in contexts]
        temperature = float(settings.get("temperature") or 0.0)
        config = SamplingConfig(
            max_tokens=new_tokens,
            temperature=0.0 if settings.get("do_sample") is False else temperature,
            stop=until,
        )
        results = generate(self.loaded, prompts, config=config, seeds=[config.seed] * len(prompts))
        # Decoded without the prompt, as lm-eval does: some vocabularies then lose the space before the first
        # word.
        return [_cut(tokenizer.decode(result.tokens), until) for result in results]


def _arguments(request: Instance) -> tuple[Any, ...]:
    """Return the arguments of a request, which lm-eval annotates as an empty tuple."""
    return request.args


def _windows(ids: list[int], *, prefix_id: int, context_length: int) -> Iterator[Pair]:
    """Yield pairs of a context and the tokens that are scored after it.

    Each window is full: the last one repeats tokens of the one before as context.
    """
    if ids:
        yield [prefix_id], ids[:context_length]
    for start in range(context_length, len(ids), context_length):
        end = min(start + context_length, len(ids))
        yield ids[end - context_length - 1 : start], ids[start:end]


def _cut(text: str, stops: Sequence[str]) -> str:
    # The sampler stops at the token in which a stop text ends, which may contain more text.
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
    """Return task -> metric -> value, under lm-eval's names.

    Args:
      loaded: the model, from `load_model`.
      tasks: names of tasks.
      include_path: directory of further tasks.
      limit: examples of each task; None: all.
      batch_size: sequences at a time.

    Raises:
      ValueError: lm-eval has no such task.
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
    output = run(model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        for task, metrics in output["results"].items()
    }
