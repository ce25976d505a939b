"""What a training shows of Alrao: numbers for a logger, a line for a progress bar, and the posterior's history."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.arguments import Flag, Instance, checked, shown
from alrao_fast.nn.clones import LinearClones
from alrao_fast.nn.heads import head_of, heads_of

# More clones than these are summed up.
_EACH_UP_TO = 16
_BARS = "▁▂▃▄▅▆▇█"
_KINDS = {
    "prefix": Instance(str, "a string"),
    "reset": Flag(),
}


def metrics(
    net: nn.Module,
    opt: torch.optim.Optimizer | None = None,
    prefix: str = "alrao/",
    *,
    reset: bool = False,
) -> dict[str, float]:
    """What there is to see of a training by Alrao, flat, for TensorBoard, W&B, a progress bar, ...

        for name, value in alrao.metrics(net, opt).items():
            writer.add_scalar(name, value, step)

    Args:
        net: an `AlraoModel`, a head, or any module with heads in it. With several heads their names follow the prefix.
        opt: the optimizer, for its multiplier of all rates.
        prefix: of every name.
        reset: start the running losses anew, as `clone_metrics(reset=True)`: those of the next call are of the
            samples in between.

    Names, after the prefix:

    - `observations`, `posterior_entropy` (in nats: 0 where the switch trusts one clone, log N where it knows nothing);
    - `best_clone`, its number; `best_posterior`, `best_lr`, `best_loss`, `best_accuracy` (regression:
      `best_squared_error`), its probability, learning rate, and means over the training samples;
    - `mean_lr`, the rates' geometric mean under the posterior, as `suggested_lr()` but without its refusals;
    - `dead_clones`, the share of the clones with parameters that are not finite (of a head that is sharded over ranks,
      with losses that were not: one rank may ask by itself);
    - `posterior/0`, `loss/0`, `accuracy/0`, ... of each clone, where there are at most 16; those that `retire_clones`
      leaves keep their numbers;
    - `lr`, the optimizer's multiplier; `lr/0`, `lr/1`, ... where its groups differ.

    What is not known yet (the losses before the first sample, the rates without an optimizer) is left out. A clone that
    was dead for a sample has an infinite loss. The values come from the device together: one wait for it, however many
    there are. TypeError or ValueError for a `net` without clones and for arguments of another type.
    """
    checked(_KINDS, locals())
    heads = heads_of(net)
    groups = [] if opt is None else _groups(opt)
    running = [head.clone_metrics(reset) for head in heads.values()]
    parts = [_tensors(head, means) for head, means in zip(heads.values(), running)]
    multipliers = [g["lr"] for g in groups if isinstance(g["lr"], Tensor)]
    values = iter(_read([*chain(*parts), *multipliers]))
    found: dict[str, float] = {}
    for name, means, tensors in zip(heads, running, parts):
        start = prefix if len(heads) == 1 else f"{prefix}{name}/"
        rows = [list(islice(values, tensor.numel())) for tensor in tensors]
        numbers = heads[name].clone_numbers
        found |= {start + key: v for key, v in _described(list(means)[1], numbers, *rows)}
    rates = [next(values) if isinstance(g["lr"], Tensor) else float(g["lr"]) for g in groups]
    if len(set(rates)) == 1:
        found[f"{prefix}lr"] = rates[0]
    else:
        found |= {f"{prefix}lr/{number}": rate for number, rate in enumerate(rates)}
    return found


def _groups(opt: Any) -> list[dict[str, Any]]:
    # Not by its type: Accelerate and Lightning wrap optimizers.
    groups = getattr(opt, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(f"opt: got {shown(opt)}, expected an optimizer, or None")
    return groups


def _read(tensors: list[Tensor]) -> list[float]:
    """The values of all, waiting once for the device of the first."""
    flat = [t.detach().flatten().to(tensors[0].device, torch.float64) for t in tensors]
    return torch.cat(flat).tolist()


def _tensors(head: LinearClones, means: dict[str, Tensor]) -> list[Tensor]:
    """What `_described` takes; `means` are the head's `clone_metrics`, the loss, the score and the count."""
    return [
        head.switch.t,
        head.switch.posterior(),
        head.clone_lr,
        head.clones_seen_finite(),
        *means.values(),
    ]


def _described(
    score: str,
    numbers: tuple[int, ...],
    t: list[float],
    posterior: list[float],
    rates: list[float],
    finite: list[float],
    losses: list[float],
    scores: list[float],
    count: list[float],
) -> Iterator[tuple[str, float]]:
    clones = range(len(posterior))
    best = max(clones, key=lambda n: posterior[n])
    yield "observations", t[0] - 1
    # NaN, of a switch that knows of no clone, stays NaN.
    yield "posterior_entropy", -sum(p * math.log(p) for p in posterior if p != 0)
    yield "best_clone", float(numbers[best])
    yield "best_posterior", posterior[best]
    if not any(map(math.isnan, rates)):
        yield "best_lr", rates[best]
        trusted = [n for n in clones if finite[n] and posterior[n] > 0]
        mass = sum(posterior[n] for n in trusted)
        if trusted and all(rates[n] > 0 for n in trusted):
            log_mean = sum(posterior[n] * math.log(rates[n]) for n in trusted) / mass
            yield "mean_lr", math.exp(log_mean)
    if count[0]:
        yield "best_loss", losses[best]
        yield f"best_{score}", scores[best]
    yield "dead_clones", 1 - sum(finite) / len(clones)
    for n in clones if len(clones) <= _EACH_UP_TO else ():
        yield f"posterior/{numbers[n]}", posterior[n]
        if count[0]:
            yield f"loss/{numbers[n]}", losses[n]
            yield f"{score}/{numbers[n]}", scores[n]


def posterior_line(net: nn.Module) -> str:
    """The posterior as a line of bars, one for each clone, from the least learning rate to the largest.

        bar.set_postfix_str(alrao.posterior_line(net))      # tqdm: 1e-05 ▁▁▁▁▁▁▂█▃▁ 10

    The bars' heights are the probabilities. Waits for the device once. Errors as `metrics` without `opt`; ValueError
    for several heads.
    """
    head = head_of(net)
    values = torch.cat([head.switch.posterior(), head.clone_lr.double()]).tolist()
    posterior, rates = values[: head.num_clones], values[head.num_clones :]
    top = len(_BARS) - 1
    bars = ["?" if math.isnan(p) else _BARS[round(p * top)] for p in posterior]
    if any(map(math.isnan, rates)):
        return "".join(bars)
    line = "".join(bars[n] for n in sorted(range(len(rates)), key=rates.__getitem__))
    return f"{min(rates):.3g} {line} {max(rates):.3g}"


class History:
    """The posterior over time, for `alrao.plot.posterior`.

        history = alrao.History(net)
        for x, y in loader:
            ...
            history.record()

    A record costs a few microseconds and waits for nothing: it stays on the device until it is read.

    Args:
        net: an `AlraoModel`, a head, or any module with one head in it; errors as `posterior_line`.
    """

    def __init__(self, net: nn.Module) -> None:
        self._head = head_of(net)
        # Of the clones that the records are of, the numbers and the rates at the first record.
        self._numbers = self._head.clone_numbers
        self._first_lr: Tensor | None = None
        self._records: list[tuple[tuple[int, ...], Tensor]] = []

    def record(self) -> None:
        """Keep the present posterior."""
        head, switch = self._head, self._head.switch
        if self._first_lr is None:
            self._numbers, self._first_lr = head.clone_numbers, head.clone_lr.clone()
        values = torch.cat([switch.posterior(), switch.t.reshape(1).double()])
        self._records.append((head.clone_numbers, values))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def posterior(self) -> Tensor:
        """Probabilities `[T, N]` of the clones in the T records, float64, on the CPU; 0 of those that were retired."""
        return self._table()[:, :-1]

    @property
    def observations(self) -> Tensor:
        """How many observations `[T]` the switch had made, int64, on the CPU."""
        return self._table()[:, -1].long() - 1

    @property
    def clone_lr(self) -> Tensor:
        """The clones' learning rates `[N]`, float32, on the CPU; NaN without an optimizer.

        Of clones that were retired those at the first record.
        """
        rates = self._head.clone_lr.cpu()
        if self._first_lr is None:
            return rates
        found = self._first_lr.cpu().clone()
        found[self._columns(self._head.clone_numbers)] = rates
        return found

    def _columns(self, numbers: tuple[int, ...]) -> list[int]:
        return [self._numbers.index(number) for number in numbers]

    def _table(self) -> Tensor:
        table = torch.zeros(len(self._records), len(self._numbers) + 1, dtype=torch.float64)
        if self._records:
            device = self._records[0][1].device
            values = torch.cat([values.to(device) for _, values in self._records]).cpu()
            sizes = [len(numbers) + 1 for numbers, _ in self._records]
            for row, (numbers, _), own in zip(table, self._records, values.split(sizes)):
                row[[*self._columns(numbers), len(self._numbers)]] = own
        return table
