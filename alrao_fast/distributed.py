"""Training by many processes: uneven numbers of batches under DistributedDataParallel (`join`); heads over ranks, for
`parallelize_module`, where each rank has some of the clones, or of the classes; what flat partitions of other engines
hold.

    from torch.distributed.tensor.parallel import parallelize_module
    from alrao_fast.distributed import ClonesParallel

    parallelize_module(net, mesh["tp"], {"head": ClonesParallel()})
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from alrao_fast.flat_shards import FlatSlice, register_flat_slices
from alrao_fast.nn.adaptive import AdaptiveClassifierClones
from alrao_fast.nn.classes_over_ranks import ClassesOverRanks
from alrao_fast.nn.clones import ClassifierClones, LinearClones
from alrao_fast.nn.clones_over_ranks import ClonesOverRanks
from alrao_fast.nn.joining import join
from alrao_fast.nn.over_ranks import OverRanks

__all__ = ["ClassesParallel", "ClonesParallel", "FlatSlice", "join", "register_flat_slices"]


class _HeadParallel(ParallelStyle):
    """A head whose parameters are cut along one of their dimensions."""

    _over_ranks: type[OverRanks]
    _head: type[LinearClones] = LinearClones
    _heads = "ClassifierClones or RegressorClones"

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if not isinstance(module, self._head) or isinstance(module, AdaptiveClassifierClones):
            raise TypeError(f"{name}: got a {type(module).__name__}, expected {self._heads}")
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{name}: got a mesh of {device_mesh.ndim} dimensions, expected one: mesh[<name>]"
            )
        over_ranks = self._over_ranks()
        for key, param in list(module.named_parameters(recurse=False)):
            if isinstance(param, DTensor):
                raise ValueError(f"{name}: {key} is a DTensor, expected a whole parameter")
        for key, param in list(module.named_parameters(recurse=False)):
            cut = distribute_tensor(
                param, device_mesh, [Shard(over_ranks.dim)], src_data_rank=self.src_data_rank
            )
            module.register_parameter(key, nn.Parameter(cut, requires_grad=param.requires_grad))
        module.over_ranks = over_ranks
        if self.input_layouts is not None:
            self._take(module, device_mesh, self.input_layouts)
        return module

    @staticmethod
    def _take(module: nn.Module, mesh: DeviceMesh, layout: Placement) -> None:
        """Have the module take features of this layout."""

        def place(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            features, *rest = inputs
            if not isinstance(features, DTensor):
                features = DTensor.from_local(features, mesh, [layout], run_check=False)
            return features, *rest

        module.register_forward_pre_hook(place)


class ClonesParallel(_HeadParallel):
    """The clones of a head over the ranks of a mesh's dimension (paper, appendix D), for `parallelize_module`.

    Args:
        input_layouts: how the features `[..., D]` that the head is called with lie over the ranks, as `Shard(1)` where
            a sequence is cut; None: they are whole on every rank, or a DTensor that says it.

    All ranks of the dimension have to see the same batch, other batches go over another dimension of the mesh; whole
    targets everywhere. Loss, statistics, posterior and predictions are those of the whole head, the same on all of
    these ranks to the bit, the features' gradient is the mixture's, each clone's its own. N need not be divisible by
    the number of ranks. TypeError for what is no head, and for `AdaptiveClassifierClones`; ValueError for a mesh of
    several dimensions and for a head whose parameters are DTensors.
    """

    _over_ranks = ClonesOverRanks


class ClassesParallel(_HeadParallel):
    """The classes of a head over the ranks of a mesh's dimension (vocabulary-parallel), for `parallelize_module`.

    As `ClonesParallel`, for `ClassifierClones`: every rank has some classes of each clone, C need not be divisible by
    the number of ranks, targets are classes of the whole. Log-probabilities are gathered, `[..., C]` on every rank.
    The computation is plain PyTorch, in chunks of the head's `memory_budget`.
    """

    _over_ranks = ClassesOverRanks
    _head = ClassifierClones
    _heads = "ClassifierClones"
