"""Kind "non-finite": NaN, infinities and overflow in gradients, parameters and optimizer state.

Promises: nothing that is not finite is saved as good; a run whose steps are not finite ends as diverged
(status 1), and keeps the last good checkpoint, from which it resumes with better settings.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.injections.lab import STEPS, Lab, in_fork, is_finite_checkpoint, is_finite_number
from benchmarks.injections.sessions import End, Plan
from benchmarks.injections.verdicts import Case, Defect, Outcome, require_clean, survived, tail

_VALUES = (float("nan"), float("inf"), float("-inf"), 3e38, -3e38)


def non_finite(lab: Lab, case: Case) -> Outcome:
    """Make numbers non-finite."""
    variants = (_tainted_step, _tainted_checkpoint, _bad_rate, _tainted_checkpoint)
    return variants[case.number % len(variants)](lab, case)


def _tainted_step(lab: Lab, case: Case) -> Outcome:
    """Make the state after a step non-finite, once or from then on at every step."""
    first = case.rng.randrange(1, STEPS + 1)
    last = first if case.rng.random() < 0.5 else STEPS
    case.describe(f"state after steps {first} to {last} made non-finite")
    fault = ",".join(f"step:{step}=nan" for step in range(first, last + 1))
    with lab.scratch() as folder:
        run = lab.copy(case.rng.choice(("begun", "part")), folder)
        has_checkpoint = (run / "checkpoints").is_dir()
        end = lab.resume(run, plan=Plan(fault=fault))
        # Nothing good can be kept of a run that has saved nothing before.
        return _judge(lab, run, end, keeps_good=has_checkpoint)


def _bad_rate(lab: Lab, case: Case) -> Outcome:
    """Resume with a learning rate that overflows, then with the old one."""
    rate = case.rng.choice(("1e10", "1e20", "1e30", "1e38"))
    case.describe(f"resumed with optim.lr={rate}")
    with lab.scratch() as folder:
        run = lab.copy("part", folder)
        end = lab.resume(run, "--optim.lr", rate)
        _judge(lab, run, end)
        if end.status == 0:
            return survived("ended with finite parameters")
        again = lab.resume(run, "--optim.lr", "0.01")
        require_clean(again, activity="resuming with the old rate")
        if again.status != 0:
            raise Defect(f"resuming with the old rate: status {again.status}: {tail(again)}")
        # The log has steps of both rates.
        lab.require_reference(run, partly=True)
        return survived("diverged, and the last good checkpoint gave the reference's bits")


def _tainted_checkpoint(lab: Lab, case: Case) -> Outcome:
    """Write a checkpoint that is valid but for one number, and resume from it."""
    item = case.rng.choice(("optimizer", "optimizer", "model"))
    value = case.rng.choice(_VALUES)
    position = case.rng.random()
    case.describe(f"{value} in a valid checkpoint of step 8, item {item}, leaf at {position:.3f}")
    with lab.scratch() as folder:
        run = lab.copy("begun", folder)
        taint = functools.partial(_taint_saves, item=item, value=value, position=position)
        # Killed when its manifest is written: what follows resumes from this checkpoint.
        made = lab.resume(run, plan=Plan(in_child=taint, fault="checkpoint.verified:8=kill"))
        if made.status != -9:
            # A save that checks its arrays itself is as good.
            require_clean(made, activity="saving the tainted checkpoint")
        end = lab.resume(run)
        return _judge(lab, run, end, accepted=[8])


def _taint_saves(*, item: str, value: float, position: float) -> None:
    """Change one number of what the save of step 8 writes; called in the child."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    original = ocp.args.StandardSave
    saves = iter(range(10**6))

    def tainted(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if _item_of(tree) == item and next(saves) == _SAVE_OF_STEP_8:
            names = sorted(name for name in tree if jnp.issubdtype(tree[name].dtype, jnp.floating))
            name = names[int(position * len(names))]
            array = np.array(tree[name])
            array.reshape(-1)[int(position * array.size)] = value
            tree = {**tree, name: jax.device_put(array, tree[name].sharding)}
        return original(tree, *args, **kwargs)

    ocp.args.StandardSave = tainted  # type: ignore[misc]  # the campaign's own change, in a process of its own


_SAVE_OF_STEP_8 = 2  # after those of steps 4 and 6


def _item_of(tree: dict[str, Any]) -> str:
    """Return which item of a checkpoint a tree is, by its leaves."""
    if any(name.endswith("/mu") for name in tree):
        return "optimizer"
    return "model" if any(name.startswith("params/") for name in tree) else "another"


def _judge(
    lab: Lab, run: Path, end: End, *, accepted: list[int] | None = None, keeps_good: bool = True
) -> Outcome:
    """Judge the end of a run with non-finite numbers.

    Args:
      accepted: steps whose checkpoints the injection itself has made non-finite.
      keeps_good: whether a good checkpoint must be left.
    """
    require_clean(end, activity="training")
    if end.status not in (0, 1, 2):
        raise Defect(f"status {end.status}: {tail(end)}")
    good = 0
    for path in sorted((run / "checkpoints").glob("*")):
        if path.name.isdecimal() and int(path.name) not in (accepted or ()):
            if not in_fork(functools.partial(is_finite_checkpoint, path), folder=run.parent):
                raise Defect(f"status {end.status}, and checkpoint {path.name} is not finite")
            good += 1
    result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else {}
    if end.status == 0 and not is_finite_number(result.get("loss")):
        raise Defect(f"finished with the loss {result.get('loss')}")
    if end.status == 0 and not (run / "checkpoints" / str(STEPS)).is_dir():
        raise Defect("finished without a checkpoint of the last step")
    if not good and keeps_good:
        raise Defect(f"status {end.status}, and no good checkpoint is left")
    return survived(f"status {end.status}, every checkpoint is finite")


KINDS: dict[str, Callable[[Lab, Case], Outcome]] = {"non-finite": non_finite}
