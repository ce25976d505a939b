"""AlraoModel: a backbone and its clones, and the way back to an ordinary network."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.arguments import Instance, shown
from alrao_fast.nn.clones import LinearClones
from alrao_fast.nn.collapse import WHICH, collapse
from alrao_fast.tracing import backbone_arguments, hint, refuse_script

_BACKBONE = Instance(nn.Module, "a torch.nn.Module")


class AlraoModel(nn.Module):
    """A network to be trained by Alrao: any backbone, and N clones in place of its last layer.

    Args:
        backbone: any module that returns features `[..., D]`, or a tuple (features, *extras) as recurrent ones do.
        head: `ClassifierClones` or `RegressorClones` for D features.

    `net(x, targets=y)` returns the mixture's loss and, in training mode, updates the switch; `net(x)` returns the
    mixture's log-probabilities (regression: its mean). With extras the result is a tuple, (loss or prediction,
    *extras). All other arguments go to the backbone. TypeError for a backbone or head of another type, and for a
    backbone that returns something else.
    """

    def __init__(self, backbone: nn.Module, head: LinearClones) -> None:
        super().__init__()
        _BACKBONE.check("backbone", backbone)
        if not isinstance(head, LinearClones):
            raise TypeError(
                f"head: got {type(head).__name__}, expected ClassifierClones or RegressorClones"
            )
        self.backbone = backbone
        self.head = head
        self._num_extras: int | None = None
        live.models.enter(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        live.models.enter(self)

    def forward(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if type(args) is not tuple or torch.jit.is_tracing():
            args = backbone_arguments(args)
        out = self.backbone(*args, **kwargs)
        # What the attribute is set by goes past nn.Module's __setattr__, which costs microseconds.
        if isinstance(out, Tensor):
            self.__dict__["_num_extras"] = 0
            return self.head(out, targets)
        if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
            self.__dict__["_num_extras"] = len(out) - 1
            return (self.head(out[0], targets), *out[1:])
        got = f"a tuple of {shown(out[0])}, ..." if isinstance(out, tuple) and out else shown(out)
        raise TypeError(
            f"backbone: the {type(self.backbone).__name__} returned {got}, expected features [..., D] or a tuple "
            f"(features, *extras){hint(out)}"
        )

    __prepare_scriptable__ = refuse_script

    def posterior(self) -> Tensor:
        """Probabilities `[N]` of the clones, float64."""
        return self.head.switch.posterior()

    def suggested_lr(self) -> float:
        """The clones' learning rates averaged under the posterior (geometrically): a hint for a later plain SGD run.

        The rates are `head.clone_lr`; clones with parameters that are not finite have no part in it. Raises
        RuntimeError before an optimizer has set the rates, while the switch has observed nothing, and where no living
        clone, no finite backbone or no finite posterior is left, or every clone was dead for the last loss.
        """
        rates = self.head.clone_lr.double()
        if rates.isnan().any():
            raise RuntimeError(
                "the clones have no learning rates yet: make an AlraoSGD or AlraoAdam of this model first"
            )
        self._check_observed("suggested_lr")
        if not all(bool(p.isfinite().all()) for p in self.backbone.parameters()):
            raise RuntimeError(
                "suggested_lr: the backbone has parameters that are not finite, so the posterior tells nothing of "
                "learning rates that train: go back to a checkpoint, and lower the upper end of lr_range"
            )
        if self.head.watch.dead:
            raise RuntimeError(
                f"suggested_lr: the last observed loss is not finite: {self.head.watch.dead}"
            )
        return float(torch.xlogy(self.head.living_posterior(), rates).sum().exp())

    def _check_observed(self, who: str) -> None:
        """Without an observation the clones are equal, and the first of them is not the best."""
        if self.head.num_clones > 1 and not self.head.switch.knows_the_best():
            raise RuntimeError(
                f"{who}: the switch has made no observation, so it knows of no clone that it is better than "
                "another. It observes every net(x, targets=y) with a finite loss in training mode; in a loop that "
                "computes the loss, use the criterion MixtureLoss(net)"
            )

    def clone_metrics(self, reset: bool = False) -> dict[str, Tensor]:
        """The head's `clone_metrics`: per-clone running loss and accuracy (or squared error) in training."""
        return self.head.clone_metrics(reset)

    def collapse(
        self, which: Literal["best", "mixture"] = "best", *, num_extras: int | None = None
    ) -> torch.fx.GraphModule:
        """An ordinary module, without a trace of this package, that computes what `net.eval()(x)` does.

        Args:
            which: "mixture" gives the same output as this model in eval mode, for samples on which clones overflow,
                too, at the cost of all last layers; "best" has only the clone of largest posterior, at the cost of one.
                RuntimeError while the switch has observed nothing.
            num_extras: how many values the backbone returns beside the features; None takes it from the last call
                of this model.

        The result holds copies (this model stays as it is), is in eval mode, and takes the arguments that the
        backbone's forward names. Clones with non-finite weights are left out, and "best" is not one that overflows on
        features between -1 and 1. ValueError if no clone is finite.
        """
        WHICH.check("which", which)
        num_extras = self._num_extras if num_extras is None else num_extras
        if num_extras is None:
            raise RuntimeError(
                "collapse has not seen yet whether the backbone returns features or (features, *extras): run one "
                "batch through the model first, or pass num_extras (0 for features alone)"
            )
        if which == "best":
            self._check_observed("collapse('best')")
        return collapse(self.backbone, self.head, which, num_extras)
