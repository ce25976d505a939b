"""The tables of many tensors on the device, made once, and what changes from step to step. Knows no op."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import TYPES, Prepared, accumulator


@triton.jit(do_not_specialize=["num"])
def count_steps_kernel(steps_ptr, found_inf_ptr, num, HAS_FOUND: tl.constexpr, BLOCK: tl.constexpr):
    """steps += 1, unless found_inf. Apart from the update, whose every program reads the counts."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    one = tl.full([], 1, tl.int64)
    if HAS_FOUND:
        one = tl.where(tl.load(found_inf_ptr) == 0, one, 0)
    tl.store(steps_ptr + offs, tl.load(steps_ptr + offs, mask=mask, other=0) + one, mask=mask)


_COUNT = 256
# By whether there is a found_inf.
_count_steps = [
    Prepared(count_steps_kernel, num_warps=1, HAS_FOUND=has_found, BLOCK=_COUNT)
    for has_found in (False, True)
]


def count_steps(steps: Tensor, found_inf: Tensor | None) -> None:
    """steps += 1 on the device, unless found_inf is not 0."""
    num = steps.numel()
    blocks = triton.cdiv(num, _COUNT)
    given = steps if found_inf is None else found_inf
    _count_steps[found_inf is not None]((blocks, 1, 1), steps, given, num)


def reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift) with n // divisor == (umulhi(n, magic) + n) >> shift for 0 <= n < 2^31; 1 <= divisor < 2^31."""
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift


class Lists(NamedTuple):
    """The tensors of a feature op that stay from step to step; `states` has a list for each state that there is."""

    params: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    masters: Sequence[Tensor]
    rates: Sequence[Tensor]
    inners: Sequence[int]
    seeds: Sequence[int]
    steps: Tensor
    averages: Sequence[Tensor] = ()


class Group(NamedTuple):
    """Tensors that one launch serves: those of the same dtypes; and the kernels for them."""

    table: Tensor
    chunks: Tensor
    num_chunks: int
    constants: dict[str, object]
    num_warps: int
    # By what the optimizer's options, and the scalars that are tensors, make of it.
    kernels: dict[object, Prepared]


# Below this many entries in all, small chunks give every multiprocessor its share.
SMALL = 1 << 22


def _configuration(total: int, wide: bool) -> tuple[int, int, int]:
    """(CHUNK, BLOCK, warps) for `total` entries; `wide` arithmetic takes twice the registers."""
    if wide:
        return 1024, 512, 4
    return (1024, 1024, 4) if total < SMALL else (4096, 1024, 4)


# Called for every tensor at every step: as functions of C they take half the time of an expression in Python.
_address, _numel, _strides = Tensor.data_ptr, Tensor.numel, Tensor.stride
_shape, _dtype = Tensor.shape.__get__, Tensor.dtype.__get__


class _Looks(NamedTuple):
    """What tables were made of, beyond the numbers in the lists."""

    addresses: list[int]
    numels: list[int]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


def _look(lists: Lists) -> _Looks:
    params, states = lists.params, chain.from_iterable(lists.states)
    others = [*states, *lists.masters, *lists.averages]
    # Parameters share rates.
    others += {id(rate): rate for rate in lists.rates}.values()
    return _Looks(
        [*map(_address, params), *map(_address, others)],
        [*map(_numel, others)],
        [*map(_shape, params)],
        [*map(_strides, params)],
        [*map(_dtype, params)],
    )


# Their tables and gradients' addresses are read by every replay of a graph, whatever becomes of who made them: some
# kilobytes, kept for the life of the process.
_captured_plans: list["Plan"] = []


class Plan:
    """The device tables of some lists, and the gradients' pointers, which alone change from step to step.

    The tables hold addresses, the plan no tensor: `unchanged` says whether lists still are those it was made for. That
    they have not been freed in between, and their memory taken by others, is up to whoever keeps the plan.
    """

    def __init__(self, lists: Lists) -> None:
        if _capturing(lists.steps.device):
            raise RuntimeError(
                "an optimizer step with new tensors during CUDA graph capture: take one step before capturing"
            )
        self.groups = self._make_groups(lists)
        self._looks = _look(lists)
        self._pointers: list[int] = []
        self._grads: Tensor | None = None
        # What captured graphs read, kept as it was at capture.
        self._captured: list[tuple[Tensor, ...]] = []
        self.captured = False

    def unchanged(self, lists: Lists) -> bool:
        """Whether every tensor has the memory, and every parameter the shape, strides and dtype, that the plan saw."""
        return _look(lists) == self._looks

    def fits(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are dense gradients of the parameters' shapes and dtypes, in their memory order.

        Not whether they are on the device: a parameter's `grad` is.
        """
        return (
            [*map(_shape, grads)] == self._looks.shapes
            and [*map(_dtype, grads)] == self._looks.dtypes
            and all(grad.layout is torch.strided for grad in grads)
            and [*map(_strides, grads)] == self._looks.strides
        )

    @staticmethod
    def _make_groups(lists: Lists) -> list[Group]:
        members: dict[tuple[object, ...], list[int]] = {}
        for t, param in enumerate(lists.params):
            if param.numel():
                master = bool(lists.masters) and lists.masters[t].numel() > 0
                average = bool(lists.averages) and lists.averages[t].numel() > 0
                states = tuple(state[t].dtype for state in lists.states)
                key = (param.dtype, states, lists.rates[t].dtype, master, average)
                members.setdefault(key, []).append(t)
        groups = []
        device = lists.steps.device
        for (dtype, states, rate_dtype, master, average), indices in members.items():
            total = sum(lists.params[t].numel() for t in indices)
            chunk, block, warps = _configuration(total, dtype == torch.float64)
            # Largest tensors first, so that the last programs are not all of one large tensor.
            indices.sort(key=lambda t: -lists.params[t].numel())
            rows = [_row(lists, t, chunk) for t in indices]
            numel = torch.tensor([lists.params[t].numel() for t in indices], device="cpu")
            counts = (numel + chunk - 1) // chunk
            owner = torch.arange(len(indices), device="cpu").repeat_interleave(counts)
            within = torch.arange(owner.numel(), device="cpu") - (counts.cumsum(0) - counts)[owner]
            low = dtype in (torch.bfloat16, torch.float16)
            constants = {
                "P_DTYPE": TYPES[dtype],
                "R_DTYPE": TYPES[rate_dtype],
                "ACC": TYPES[accumulator(dtype)],
                "HAS_MASTER": master,
                "HAS_AVERAGE": average,
                "STOCHASTIC": bool(lists.seeds) and low and not master,
                "CHUNK": chunk,
                "BLOCK": block,
            }
            for k, state in enumerate(states, 1):
                constants[f"S{k}_DTYPE"] = TYPES[state]
            groups.append(
                Group(
                    torch.tensor(rows, dtype=torch.int64, device=device),
                    torch.stack([owner, within], 1).to(device),
                    owner.numel(),
                    constants,
                    warps,
                    {},
                )
            )
        return groups

    def on_device(self, pointers: list[int], device: torch.device) -> Tensor:
        """Device vector of the gradients' addresses; uploaded only when one has changed."""
        if pointers != self._pointers or self._grads is None:
            staged = torch.tensor(pointers, dtype=torch.int64, device="cpu")
            if device.type == "cuda":
                staged = staged.pin_memory()
            # A vector that a captured graph reads is never written again.
            frozen = any(entry[0] is self._grads for entry in self._captured)
            if self._grads is None or frozen or _capturing(device):
                # Steps outside of inference mode write into it, too.
                with torch.inference_mode(False):
                    self._grads = torch.empty(len(pointers), dtype=torch.int64, device=device)
            self._grads.copy_(staged, non_blocking=True)
            self._pointers = pointers
            if _capturing(device):
                # Replays copy from the staging memory again.
                self._captured.append((self._grads, staged))
        if _capturing(device):
            if not self.captured:
                self.captured = True
                _captured_plans.append(self)
            if not any(entry[0] is self._grads for entry in self._captured):
                self._captured.append((self._grads,))
        return self._grads


def _row(lists: Lists, t: int, chunk: int) -> list[int]:
    numel, period, inner = lists.params[t].numel(), lists.rates[t].numel(), lists.inners[t]
    if period == 1:
        inner = numel
    # Used only where they are below the chunk.
    inner_magic, inner_shift = reciprocal(min(inner, chunk))
    period_magic, period_shift = reciprocal(min(period, chunk))
    states = [state[t].data_ptr() for state in lists.states]
    return [
        lists.params[t].data_ptr(),
        *states,
        *[0] * (3 - len(states)),
        lists.masters[t].data_ptr() if lists.masters else 0,
        lists.rates[t].data_ptr(),
        numel,
        inner,
        inner_magic,
        inner_shift,
        period,
        period_magic,
        period_shift,
        lists.seeds[t] if lists.seeds else 0,
        t,
        lists.averages[t].data_ptr() if lists.averages else 0,
    ]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# Plans by everything their tables hold, so that memory that was freed and taken again cannot mislead.
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
_MAX_PLANS = 64


def find_plan(lists: Lists, check: Callable[[], None]) -> Plan:
    """The plan of these tensors, made at first use; the least recently used go, but never one that a graph reads.

    For calls that bring all tensors each time. `check` raises where the lists do not fit together; it is called unless
    they are known to.
    """
    states = chain.from_iterable(lists.states)
    tensors = [*lists.params, *states, *lists.masters, *lists.averages]
    if any(t.layout != torch.strided for t in tensors):
        check()
    key = (
        lists.steps.device,
        lists.steps.shape,
        lists.steps.dtype,
        len(lists.params),
        tuple([len(state) for state in lists.states]),
        (len(lists.masters), len(lists.averages)),
        tuple([(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]),
        tuple([(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in lists.rates]),
        tuple(lists.inners),
        tuple(lists.seeds),
    )
    plan = _plans.get(key)
    if plan is None:
        check()
        plan = _plans[key] = Plan(lists)
        for old in [k for k, p in _plans.items() if not p.captured][: len(_plans) - _MAX_PLANS]:
            del _plans[old]
    else:
        _plans.move_to_end(key)
    return plan


def in_memory_order(grads: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in their parameters' memory order: themselves, or copies where strides differ."""
    found = []
    for grad, param in zip(grads, params):
        if grad.stride() != param.stride():
            strided = torch.empty_strided(
                param.size(), param.stride(), dtype=grad.dtype, device=grad.device
            )
            grad = strided.copy_(grad)
        found.append(grad)
    return found
