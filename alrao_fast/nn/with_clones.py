"""WithClones: what any network with a head of clones can say of them, and the way back to an ordinary network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.nn.clones import LinearClones
from alrao_fast.nn.retiring import undone_on_error
from alrao_fast.sharding import whole


class WithClones(nn.Module):
    """A network whose last layer is a head of clones; a subclass says which, and which parameters lie before it."""

    def _clones(self) -> LinearClones:
        """The head."""
        raise NotImplementedError

    def _backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but the head's."""
        raise NotImplementedError

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; where it raises no clone has been retired."""
        with undone_on_error():
            return super().load_state_dict(state_dict, strict, assign)

    def posterior(self) -> Tensor:
        """Probabilities `[N]` of the clones, float64."""
        return self._clones().switch.posterior()

    def suggested_lr(self) -> float:
        """The clones' learning rates averaged under the posterior (geometrically): a hint for a later plain SGD run.

        The rates are `head.clone_lr`; clones with parameters that are not finite have no part in it. Raises
        RuntimeError before an optimizer has set the rates, while the switch has observed nothing, and where no living
        clone, no finite backbone or no finite posterior is left, or every clone was dead for the last loss.
        """
        head = self._clones()
        rates = head.clone_lr.double()
        if rates.isnan().any():
            raise RuntimeError(
                "the clones have no learning rates yet: make an AlraoSGD, AlraoAdam or AlraoMuon of this model first"
            )
        self._check_observed("suggested_lr")
        if not all(bool(whole(p.isfinite().all())) for p in self._backbone_parameters()):
            raise RuntimeError(
                "suggested_lr: the backbone has parameters that are not finite, so the posterior tells nothing of "
                "learning rates that train: go back to a checkpoint, and lower the upper end of lr_range"
            )
        if head.watch.dead:
            raise RuntimeError(
                f"suggested_lr: the last observed loss is not finite: {head.watch.dead}"
            )
        return float(torch.xlogy(head.living_posterior(), rates).sum().exp())

    def _check_observed(self, who: str) -> None:
        """Without an observation the clones are equal, and the first of them is not the best."""
        head = self._clones()
        if head.num_clones > 1 and not head.switch.knows_the_best():
            raise RuntimeError(
                f"{who}: the switch has made no observation, so it knows of no clone that it is better than "
                "another. It observes every net(x, targets=y) with a finite loss in training mode; in a loop that "
                "computes the loss, use the criterion MixtureLoss(net)"
            )

    def clone_metrics(self, reset: bool = False) -> dict[str, Tensor]:
        """The head's `clone_metrics`: per-clone running loss and accuracy (or squared error) in training."""
        return self._clones().clone_metrics(reset)
