"""The Bayesian average over the last layers."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alrao_fast.arguments import COUNT
from alrao_fast.compat._losses import Criterion, correct_predictions, known_losses, nll_ignoring
from alrao_fast.functional import switch_update_
from alrao_fast.nn.switch import FixedDtypeBuffers, normalized
from alrao_fast.ops.switch_update import THETA
from alrao_fast.reference.switch_update import initial_state

TASKS = ("classification", "regression")


def log_sum_exp(tensor: Tensor, dim: int | None = None) -> Tensor:
    """The logarithm of the sum of exponentials along `dim`, or over all entries."""
    return torch.logsumexp(tensor.flatten(), 0) if dim is None else torch.logsumexp(tensor, dim)


class Switch(FixedDtypeBuffers):
    """The switch posterior over `nb_models` models (van Erven, Grunwald, de Rooij, NIPS 2007).

    `logw [2, N]` and `logposterior [N]` are buffers in float64, whatever the dtype of the network, so that a model of
    tiny posterior keeps one. The number `t` of the next observation travels in the state_dict's metadata: the keys
    are those of the authors' package.

    task: "classification": the models give log-probabilities [B, C]; "regression": means [B, K], needs `loss`.
    loss: `loss(output, target)`, mean over the batch; the evidence of a model is minus its loss. Default: the
        negative log-likelihood.
    save_ll_perf: keep the sums behind `get_ll_perf()`.
    alpha: accepted as there, without effect.
    """

    logw: Tensor
    logposterior: Tensor
    _t: Tensor
    ll_loss: Tensor
    ll_correct: Tensor
    ll_total: int

    def __init__(
        self,
        nb_models: int,
        theta: float = 0.9999,
        alpha: float = 0.001,
        save_ll_perf: bool = False,
        task: str = "classification",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        nb_models = COUNT.check("nb_models", nb_models)
        theta = THETA.check("theta", theta)
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
        if task == "regression" and loss is None:
            raise ValueError("loss is None; expected a criterion for task 'regression'")
        self.nb_models = nb_models
        self.theta = theta
        self.alpha = alpha
        self.save_ll_perf = save_ll_perf
        self.task = task
        self.loss = F.nll_loss if loss is None else loss
        logw, logposterior, t = initial_state(nb_models, theta)
        self.register_buffer("logw", logw)
        self.register_buffer("logposterior", logposterior)
        self.register_buffer("_t", t, persistent=False)
        self.reset_ll_perf()

    @property
    def t(self) -> int:
        """The number of the next observation, 1 at the start."""
        return int(self._t)

    @t.setter
    def t(self, value: int) -> None:
        self._t.fill_(int(value))

    def piT(self, t: float) -> float:
        """The probability of a switch at observation t."""
        return 1.0 / (t + 1)

    def reset(self) -> None:
        """Back to the state before any observation."""
        state = initial_state(self.nb_models, self.theta, self._t.device)
        for buffer, value in zip((self.logw, self.logposterior, self._t), state):
            buffer.copy_(value)
        self.reset_ll_perf()

    def posterior(self) -> Tensor:
        """The probabilities [N] of the models, float64."""
        return self.log_probabilities().exp()

    def log_probabilities(self) -> Tensor:
        """`logposterior`, normalised: averages of models may average it, and what they get does not sum to 1."""
        return normalized(self.logposterior)

    def forward(self, lst_ll_out: Sequence[Tensor]) -> Any:
        """The average of the models' outputs.

        Classification: the mixture's log-probabilities. Regression: the outputs stacked along a last dimension, and
        the posterior probabilities [N].
        """
        return self.average(torch.stack(list(lst_ll_out)), None)

    def average(self, outputs: Tensor, alive: Tensor | None) -> Any:
        """`forward` for outputs [N, ...]; `alive` is None or where a model counts, `[N, ..., 1]`."""
        if self.task == "regression":
            return self._average_means(outputs, alive)
        prior = self.log_probabilities().to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
        if alive is None:
            return torch.logsumexp(outputs + prior, 0)
        joint = torch.where(alive, outputs + prior, -torch.inf)
        # Where every model is dead the probability is 0, and no gradient comes back.
        possible = (joint.detach() > -torch.inf).any(0)
        mixture = torch.logsumexp(torch.where(possible, joint, 0), 0)
        return torch.where(possible, mixture, -torch.inf)

    def _average_means(self, outputs: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
        ps = self.posterior().to(outputs.dtype)
        if alive is not None:
            whole = alive.flatten(1).all(1)
            if not bool(whole.any()):
                raise ValueError("every last layer has an output that is not finite: all diverged")
            # What is left of the others' posterior; softmax, because it may be below the smallest float.
            left = torch.where(whole, self.log_probabilities(), -torch.inf)
            ps = torch.softmax(left, 0).to(outputs.dtype)
            outputs = torch.where(whole.view(-1, *[1] * (outputs.dim() - 1)), outputs, 0)
        return outputs.movedim(0, -1), ps

    def Supdate(self, lst_ll_out: Sequence[Tensor], y: Tensor) -> None:
        """One observation: the models' outputs on a batch, and its targets. ValueError if a loss is NaN."""
        outputs = torch.stack([out.detach() for out in lst_ll_out])
        samples = outputs.size(1) if outputs.dim() == 3 else None
        ignored = nll_ignoring(self.loss, samples, y, normalised=False)
        losses = known_losses(self.loss, outputs, y, ignored)
        if bool(losses.isnan().any()):
            raise ValueError(f"the losses of the models are {losses.tolist()}; expected no NaN")
        perf = self.save_ll_perf and self.task == "classification"
        self.observe(losses, correct_predictions(outputs, y) if perf else None, y)

    @torch.no_grad()
    def observe(self, losses: Tensor, correct: Tensor | None, y: Any) -> None:
        """One observation: the models' losses [N] on the batch with targets `y`, and their correct predictions [N].

        A model whose loss is not finite counts as impossible.
        """
        losses = losses.to(self.logw.dtype)
        if self.nb_models > 1:
            switch_update_(self.logw, self.logposterior, self._t, -losses, theta=self.theta)
        if not self.save_ll_perf:
            return
        count = y.numel() if self.task == "classification" else len(y)
        self.ll_total += count
        if self.ll_loss.device != losses.device:
            self.ll_loss, self.ll_correct = (
                s.to(losses.device) for s in (self.ll_loss, self.ll_correct)
            )
        self.ll_loss.add_(losses, alpha=count)
        if correct is not None:
            self.ll_correct.add_(correct)

    def reset_ll_perf(self) -> None:
        """Start the sums of `get_ll_perf()` anew."""
        self.ll_loss, self.ll_correct = self.logw.new_zeros(2, self.nb_models).unbind()
        self.ll_total = 0

    def get_ll_perf(self) -> list[Any]:
        """Per model its mean loss and mean accuracy over the observations since the reset; for regression its mean
        loss."""
        total = max(self.ll_total, 1)
        losses = (self.ll_loss / total).tolist()
        if self.task == "regression":
            return losses
        return list(zip(losses, (self.ll_correct / total).tolist()))

    # The older names.
    reset_cl_perf = reset_ll_perf
    get_cl_perf = get_ll_perf

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})["t"] = self.t

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if "t" in local_metadata:
            self.t = local_metadata["t"]
        elif prefix + "logw" in state_dict and bool((self.logw[0] != self.logw[0, 0]).any()):
            warnings.warn(
                "this state_dict has a posterior but not the number of its observations, which travels in _metadata "
                f"and is lost in a plain dict: switch.t stays {self.t}; set it to that number + 1",
                stacklevel=2,
            )
