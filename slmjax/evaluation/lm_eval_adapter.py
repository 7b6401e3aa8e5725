"""lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a slmjax model: the `eval` extra.

    lm_eval.simple_evaluate(model=SlmjaxLM(load_model(run_dir)), tasks=["my_task"], task_manager=TaskManager(include_path="tasks"))
    run_tasks(loaded, ["my_task"], include_path="tasks")        # the same, and only the figures

Its tasks mostly fetch their data from a hub; one whose files are local needs no network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from slmjax.checkpoint import Loaded
from slmjax.data.windows import default_overlap
from slmjax.evaluation.likelihood import DEFAULT_BATCH_SIZE, log_likelihoods, pair_tokens
from slmjax.sampling import SamplingConfig, generate

DEFAULT_NEW_TOKENS = 256  # of a task that does not say


class SlmjaxLM(LM):
    """A model as lm-eval asks it: likelihoods of continuations and of whole texts, and greedy or drawn continuations."""

    def __init__(self, loaded: Loaded, *, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        super().__init__()
        self.loaded, self.batch_size = loaded, batch_size

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache tells tokenizers apart by."""
        return self.loaded.tokenizer.hash

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each (context, continuation), and whether it is what greedy decoding would give."""
        pairs = [pair_tokens(self.loaded.tokenizer, *request.args) for request in requests]
        return [(one.logprob, one.is_greedy) for one in log_likelihoods(self.loaded, pairs, batch_size=self.batch_size)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; one that is longer than the context in windows that overlap, no token scored twice."""
        tokenizer, room = self.loaded.tokenizer, self.loaded.config.context_length
        stride = room - default_overlap(room)
        pairs, owners = [], []
        for index, request in enumerate(requests):
            ids = [tokenizer.bos_id, *tokenizer.encode(request.args[0])]
            ends = [*range(room + 1, len(ids), stride), len(ids)] if len(ids) > 1 else []
            start = 1
            for end in ends:
                pairs.append((ids[max(end - room - 1, 0) : start], ids[start:end]))
                owners.append(index)
                start = end
        sums = [0.0] * len(requests)
        for index, one in zip(owners, log_likelihoods(self.loaded, pairs, batch_size=self.batch_size), strict=True):
            sums[index] += one.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to its stop texts."""
        return [self._continued(*request.args) for request in requests]

    def _continued(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        asked = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        tokenizer, room = self.loaded.tokenizer, self.loaded.config.context_length
        new_tokens = min(asked, room // 2)
        ids = tokenizer.encode(context)
        for kept in range(room - 1 - new_tokens, 0, -1):
            if len(ids) < room - new_tokens:
                break
            # The end of the context matters most. A torn character at its beginning goes too; what is left may be other tokens.
            context = tokenizer.decode(ids[-kept:]).lstrip("\N{REPLACEMENT CHARACTER}")
            ids = tokenizer.encode(context)
        is_drawn = bool(settings.get("do_sample")) and float(settings.get("temperature") or 0.0) > 0
        config = SamplingConfig(
            max_tokens=new_tokens, temperature=float(settings["temperature"]) if is_drawn else 0.0,
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )  # fmt: skip
        return generate(self.loaded, [context], config=config)[0].text


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
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}: name the directory of your own tasks with --lm-eval-path")
    model = SlmjaxLM(loaded, batch_size=batch_size)
    run: Any = simple_evaluate  # its decorator hides its signature
    found = run(model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
