"""Networks, and the ways of training them over ranks that are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import alrao_fast as alrao
from alrao_fast.distributed import ClassesParallel, ClonesParallel
from benchmarks.networks import PlainModel, TransformerLM

Step = Callable[[], object]


class Case(NamedTuple):
    """A transformer with a classifier of its tokens: the sizes of the network and of a rank's batch."""

    features: int
    layers: int
    classes: int
    tokens: int
    sequences: int
    context: int

    def backbone(self) -> TransformerLM:
        return TransformerLM(self.tokens, self.features, self.layers, 4, self.context)

    def batch(self, rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        shape = self.sequences, self.context
        x = torch.randint(self.tokens, shape, generator=generator)
        return x, torch.randint(self.classes, shape, generator=generator)


# A head that is a small part of the network, and one that is most of it.
CASES = {
    "transformer": Case(192, 4, 10, 256, 8, 64),
    "vocabulary": Case(128, 2, 4096, 4096, 4, 64),
    "tiny": Case(16, 1, 10, 32, 2, 8),
}


def _plain(case: Case) -> nn.Module:
    return PlainModel(case.backbone(), case.features, case.classes)


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, foreach=True)


def _with_clones(case: Case, clones: int, mesh: DeviceMesh) -> alrao.AlraoModel:
    head = alrao.ClassifierClones(
        case.features, case.classes, clones, process_group=mesh.get_group()
    )
    return alrao.AlraoModel(case.backbone(), head)


def _alrao_sgd(net: nn.Module) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    return alrao.AlraoSGD(net, lr_range=(1e-5, 1e-3), momentum=0.9, generator=generator)


def _replicated(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(net, process_group=mesh.get_group())


def _sharded(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in getattr(net, "backbone").blocks:  # noqa: B009
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _by_clones(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net, mesh, {"head": ClonesParallel()})


def _by_classes(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net, mesh, {"head": ClassesParallel()})


class Scheme(NamedTuple):
    """One way of training: with clones or one head, how the network lies over the ranks, and the scheme of one head on
    the same ranks that its time is compared with."""

    clones: bool
    place: Callable[[nn.Module, DeviceMesh], nn.Module]
    beside: str
    # Whether all ranks have the same batch, which the others do not.
    one_batch: bool = False

    def prepare(self, case: Case, clones: int, mesh: DeviceMesh) -> Step:
        """A training step on the ranks of the mesh; all of them have to call."""
        torch.manual_seed(0)
        net = _with_clones(case, clones, mesh) if self.clones else _plain(case)
        module = self.place(net, mesh)
        optimizer = _alrao_sgd(net) if self.clones else _sgd(net)
        x, y = case.batch(0 if self.one_batch else mesh.get_local_rank())

        def step() -> None:
            optimizer.zero_grad()
            module(x, targets=y).backward()
            optimizer.step()

        return step


SCHEMES = {
    "torch, DDP": Scheme(False, _replicated, "torch, DDP"),
    "Alrao, DDP": Scheme(True, _replicated, "torch, DDP"),
    "torch, FSDP2": Scheme(False, _sharded, "torch, FSDP2"),
    "Alrao, FSDP2": Scheme(True, _sharded, "torch, FSDP2"),
    "Alrao, clones over ranks": Scheme(True, _by_clones, "torch, DDP", one_batch=True),
    "Alrao, classes over ranks": Scheme(True, _by_classes, "torch, DDP", one_batch=True),
}
