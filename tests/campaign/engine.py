"""Trials, verdicts and the registry of areas: what makes calls, and how one call is judged."""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.optim import layouts
from campaign.snapshot import difference, fingerprint

RIGHT, ERROR, FAILURE = "RIGHT", "CLEAR ERROR", "FAILURE"


@dataclass
class Trial:
    """One call. `expect`: "right", "refused", or "either" where both do.

    call: how it reads, for the report.
    run: makes the call, and nothing else: a bad argument is to be refused at once. What it returns goes to `right`,
        which goes on with it and raises AssertionError where it is not right.
    names: what an error has to name, one of them: the argument.
    got: the value that an error has to mention.
    watched: what a call that raises has to leave as it was.
    """

    call: str
    run: Callable[[], Any]
    expect: str
    right: Callable[[Any], None] | None = None
    names: tuple[str, ...] = ()
    got: Any = None
    watched: Any = field(default_factory=list)
    # An error that torch raises for the same input in its own twin: as good as ours.
    same_as: BaseException | None = None
    # Whether the error may quote one of a user's module: then it need not say what is expected itself.
    quotes: bool = False


class Outcome(NamedTuple):
    id: str
    area: str
    call: str
    verdict: str
    kind: str = ""
    why: str = ""

    def __str__(self) -> str:
        call = " ".join(self.call.split())
        return f"[{self.id}] {self.area}: {call}\n    {self.verdict}: {self.kind}: {self.why}"


class Area(NamedTuple):
    make: Callable[[Random], Trial]
    weight: int


# Name -> how a trial of the area is made; name -> a fixed case, which returns a Trial or asserts by itself.
AREAS: dict[str, Area] = {}
CASES: dict[str, Callable[[], Trial | None]] = {}


def area(name: str, weight: int) -> Callable[[Callable[[Random], Trial]], Any]:
    def register(make: Callable[[Random], Trial]) -> Callable[[Random], Trial]:
        AREAS[name] = Area(make, weight)
        return make

    return register


def case(name: str) -> Callable[[Callable[[], Trial | None]], Any]:
    def register(function: Callable[[], Trial | None]) -> Callable[[], Trial | None]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


def run_generated(seed: int, number: int) -> Outcome:
    """The call `number` of a seed; its id repeats it alone."""
    rng = Random(f"{seed}:{number}")
    name = rng.choices(list(AREAS), [a.weight for a in AREAS.values()])[0]
    return _judged(f"{seed}:{number}", name, lambda: AREAS[name].make(rng))


def run_case(name: str) -> Outcome:
    return _judged(name, f"point {name.split()[0]}", CASES[name])


def _judged(id: str, area: str, make: Callable[[], Trial | None]) -> Outcome:
    try:
        with _sandbox(id):
            trial = make()
            if trial is None:
                return Outcome(id, area, id, RIGHT)
            return Outcome(id, area, trial.call, *judge(trial))
    except AssertionError as problem:
        return Outcome(id, area, id, FAILURE, "wrong", _text(problem))
    except Exception as problem:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        why = f"{_text(problem)} ({where.name}, {where.filename.rpartition('/')[2]}:{where.lineno})"
        return Outcome(id, area, id, FAILURE, "raised", why)


def judge(trial: Trial) -> tuple[str, str, str]:
    """Verdict, kind of failure, and why."""
    before = fingerprint(trial.watched)
    try:
        result = trial.run()
    except Exception as problem:
        if trial.expect == "right":
            return FAILURE, "refused a good value", _text(problem)
        unclear = why_unclear(problem, trial)
        if unclear:
            return FAILURE, "obscure error", f"{unclear}: {_text(problem)}"
        if _PATH.search(str(problem)):
            return FAILURE, "a path in the message", _text(problem)
        changed = difference(before, fingerprint(trial.watched))
        if changed:
            return FAILURE, "changed by a call that raised", f"{changed}; {_text(problem)}"
        return ERROR, "", _text(problem)
    if trial.expect == "refused":
        return FAILURE, "accepted", f"returned {' '.join(repr(result).split()):.100}"
    try:
        if trial.right is not None:
            trial.right(result)
    except AssertionError as problem:
        return FAILURE, "accepted and wrong", _text(problem)
    except Exception as problem:
        return FAILURE, "accepted, raises later", _text(problem)
    return RIGHT, "", ""


def refuses(
    run: Callable[[], Any], *names: str, got: Any = None, watched: Any = (), quotes: bool = False
) -> None:
    """Assert, within a fixed case, that a call raises a clear error."""
    _assert_verdict(Trial("", run, "refused", None, names, got, watched, quotes=quotes))


def right_or_refused(
    run: Callable[[], Any], right: Callable[[Any], None], *names: str, watched: Any = ()
) -> None:
    """Assert that a call is right or raises a clear error."""
    _assert_verdict(Trial("", run, "either", right, names, None, watched))


def _assert_verdict(trial: Trial) -> None:
    verdict, kind, why = judge(trial)
    if verdict == FAILURE:
        raise AssertionError(f"{kind}: {why}")


def _text(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:400]}"


# What an error says that Python or torch raised for want of a check of ours.
_OBSCURE = re.compile(
    r"unsupported operand|'NoneType' object|not 'NoneType'|object is not|not supported between|"
    r"has no attribute|cannot be interpreted|is ambiguous|INTERNAL ASSERT|unhashable|values to unpack|"
    r"list index|index out of range|Could not run|setup_context|must be real number|can't multiply|"
    r"not implemented for|out of bounds|can't convert|could not convert|mat1 and mat2|size mismatch|"
    r"did not match C|is at version|not have been used in the graph"
)
# Of the machine that built or runs it.
_PATH = re.compile(r"(?<![\w.])/([\w.-]+/)+[\w.-]+\.(cpp|h|cu|cuh|py)\b")
_EXPECTED = re.compile(
    r"expect|must|needs?\b|only|give|takes|pass |use |can't|cannot|not support|should|first|do(es)? not |"
    r"nothing to|got no|go back|instead",
    re.I,
)


def why_unclear(problem: BaseException, trial: Trial) -> str | None:
    """Why an error is not clear, or None."""
    message = str(problem)
    same = trial.same_as
    if same is not None and type(same) is type(problem) and str(same) == message:
        return None
    if not isinstance(problem, TypeError | ValueError | RuntimeError):
        return f"a {type(problem).__name__}"
    # Python's own for a wrong signature is as clear as it gets.
    if re.search(r"(unexpected keyword|missing \d+ required|takes .* positional) ", message):
        return None
    bare = message if trial.got is None else message.replace(repr(trial.got), "")
    found = _OBSCURE.search(bare)
    if found and not trial.quotes:
        return f"says {found.group()!r}"
    named = (re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in trial.names)
    if trial.names and not any(named):
        return f"does not name {' or '.join(trial.names)}"
    if not trial.quotes and not _EXPECTED.search(message):
        return "does not say what is expected"
    tokens = [] if trial.got is None else _tokens(trial.got)
    if tokens and not any(token.lower() in message.lower() for token in tokens):
        return f"does not say that it got {trial.got!r:.60}"
    return None


def _tokens(value: Any) -> list[str]:
    """Of what a message mentions of a value one will do."""
    tokens = [f"{value!r}"[:30], f"{value!s}"[:30], type(value).__name__]
    if isinstance(value, type):
        tokens.append(value.__name__)
    if isinstance(value, int | float | np.generic):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            tokens += [f"{float(value):g}", str(float(value))]
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        long_names = {"int64": "Long", "int32": "Int", "float32": "Float", "float64": "Double"}
        tokens += [
            kind,
            long_names.get(kind, kind),
            str(list(value.shape)),
            str(tuple(value.shape)),
        ]
        tokens += [str(value.device), str(value.layout), "sparse", "strides", "device", "complex"]
        tokens += [] if value.dim() else ["scalar"]
        if value.layout == torch.strided and not value.is_meta and value.numel() < 20:
            entries = value.flatten().tolist()
            tokens += [str(entry) for entry in entries]
            # As of a number.
            tokens += [f"{entry:g}" for entry in entries if isinstance(entry, float)]
    if isinstance(value, list | tuple):
        tokens += [str(len(value)), *(token for entry in value for token in _tokens(entry))]
    if callable(value):
        tokens.append("function")
    if isinstance(value, int | list | tuple | dict | set) and not value:
        tokens += ["none", "nothing", "empty", "no "]
    return tokens


@contextmanager
def _sandbox(id: str) -> Iterator[None]:
    """The same start for every call, and a failure for one that leaves global state changed."""
    torch.manual_seed(hash_of(id))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = _global_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        changed = difference(fingerprint(before), fingerprint(_global_state()))
        assert changed is None, f"global state: {changed}"
    finally:
        torch.set_default_dtype(before["dtype"])
        torch.set_grad_enabled(before["grad"])
        torch.use_deterministic_algorithms(False)


def hash_of(id: str) -> int:
    """A seed of torch's generator: hash() differs between processes."""
    return Random(id).getrandbits(31)


def _global_state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "backend": backends.select("switch_update", torch.device("cpu")),
        "layouts": dict(layouts._RULES),
    }
