"""Steps of all schemes on all numbers of ranks, timed in turns by one set of processes over gloo, a thread each."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.scaling.cases import SCHEMES, Case, Step
from benchmarks.timing import turns

# What is measured: a scheme on so many ranks.
Key = tuple[str, int]


class Effort:
    """Rounds, after `seconds` no further one but the first 3, and about how long a block of steps takes."""

    def __init__(self, rounds: int, seconds: float, block: float) -> None:
        self.rounds, self.seconds, self.block = rounds, seconds, block


def measure(
    case: Case, schemes: list[str], ranks: list[int], clones: int, effort: Effort
) -> dict[Key, list[float]]:
    """Seconds of a step in each round, the slowest rank's, by scheme and number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (max(ranks), folder, case, schemes, ranks, clones, effort)
        # Forked: the package lies on no path that a fresh process would look at.
        mp.start_processes(_work, arguments, nprocs=max(ranks), start_method="fork")
        return torch.load(Path(folder) / "seconds.pt", weights_only=False)


def _work(
    rank: int,
    world: int,
    folder: str,
    case: Case,
    schemes: list[str],
    ranks: list[int],
    clones: int,
    effort: Effort,
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    # A rank that is not among those of a mesh waits for the others at each barrier, and takes no time of a core.
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in ranks}
    steps: dict[Key, Step | None] = {}
    for size, mesh in meshes.items():
        for name in schemes:
            here = rank < size
            steps[name, size] = SCHEMES[name].prepare(case, clones, mesh) if here else None
            dist.barrier()
    counts = {key: _count(step, effort.block) for key, step in steps.items()}
    found: dict[Key, list[float]] = {key: [] for key in steps}
    for key in _turns(list(steps), effort):
        found[key].append(_block(steps[key], counts[key]))
    if rank == 0:
        torch.save(found, f"{folder}/seconds.pt")
    dist.barrier()
    dist.destroy_process_group()


def _turns(keys: list[Key], effort: Effort) -> Any:
    """Whose turn it is, as the first rank's clock says."""
    names = {str(key): key for key in keys}
    begin, own = time.perf_counter(), turns(list(names), effort.rounds, float("inf"), None)
    for number, name in enumerate(own):
        if number % len(keys) == 0 and number >= 3 * len(keys):
            over = torch.tensor(time.perf_counter() - begin > effort.seconds)
            dist.broadcast(over, 0)
            if over:
                return
        yield names[name]


def _count(step: Step | None, seconds: float) -> int:
    """How many steps make a block of about so many seconds, the same on all ranks."""
    _block(step, 2)
    return max(1, round(seconds / _block(step, 1)))


def _block(step: Step | None, count: int) -> float:
    """Seconds of one of so many steps, the slowest rank's."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count if step is not None else 0):
        step()  # type: ignore[misc]
    taken = torch.tensor(time.perf_counter() - begin if step is not None else 0.0)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken) / count
