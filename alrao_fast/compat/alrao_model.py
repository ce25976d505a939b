"""The network with N last layers, averaged by a switch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.arguments import COUNT
from alrao_fast.compat._choice import Runner, choose, loop_over, signature
from alrao_fast.compat._evaluation import Evaluation
from alrao_fast.compat._losses import Criterion
from alrao_fast.compat._stack import stack
from alrao_fast.compat.custom_layers import LinearClassifier
from alrao_fast.compat.switch import Switch

_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_RUNNERS = 32


def _parse(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Criterion, nn.Module, int, Callable[..., nn.Module], tuple, dict[str, Any]]:
    """(task, loss, internal_nn, n_last_layers, last_layer_gen, its arguments) of any of the three signatures."""
    names: tuple[str, ...] = ("task", "loss", "internal_nn", "n_last_layers", "last_layer_gen")
    older = "preclassifier" in kwargs or (args and isinstance(args[0], nn.Module))
    paper = older and ("nb_categories" in kwargs or (len(args) > 2 and isinstance(args[2], int)))
    if paper:
        names = ("preclassifier", "nb_categories", "input_dim", "nb_classifiers")
    elif older:
        names = ("preclassifier", "nb_classifiers", "Classifier")
    values = dict(zip(names, args))
    for name in names[len(args) :]:
        if name not in kwargs:
            raise TypeError(f"AlraoModel({', '.join(names)}, ...): argument {name!r} is missing")
        values[name] = kwargs.pop(name)
    rest = args[len(names) :]
    if paper:
        if rest or kwargs:
            raise TypeError(f"AlraoModel({', '.join(names)}): too many arguments, {rest or kwargs}")
        rest = (values["input_dim"], values["nb_categories"])
        values["Classifier"] = LinearClassifier
    if older:
        return (
            "classification",
            nn.NLLLoss(),
            values["preclassifier"],
            values["nb_classifiers"],
            values["Classifier"],
            rest,
            kwargs,
        )
    return (*(values[name] for name in names), rest, kwargs)


class AlraoModel(nn.Module):
    """`AlraoModel(task, loss, internal_nn, n_last_layers, last_layer_gen, *args, **kwargs)`.

    task: "classification" or "regression".
    loss: a criterion `loss(output, target)`, mean over the batch, of a single last layer.
    internal_nn: the network below; returns features, or a tuple whose first element is them.
    last_layer_gen: called with `*args, **kwargs` for each of the `n_last_layers` layers `last_layer_0`, ...

    Also `AlraoModel(preclassifier, nb_classifiers, Classifier, *args)` and the paper's
    `AlraoModel(preclassifier, nb_categories, input_dim, nb_classifiers)`, both for classification.

    Each last layer is a module with parameters of its own; together they lie in one tensor and are evaluated at once
    (`_choice.py`). ValueError for an unknown task or fewer than one last layer, and from `forward` for features that
    are not finite.
    """

    switch: Switch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        task, loss, internal_nn, n, last_layer_gen, rest, options = _parse(args, dict(kwargs))
        n = COUNT.check("n_last_layers", n)
        self.task = task
        self.loss = loss
        self.switch = Switch(n, save_ll_perf=True, task=task, loss=loss)
        self.internal_nn = internal_nn
        self.n_last_layers = n
        for k in range(n):
            setattr(self, f"last_layer_{k}", last_layer_gen(*rest, **options))
        self._layer_names = [f"last_layer_{k}" for k in range(n)]
        self._forwarded: dict[str, tuple[str, str]] = {}
        self._runners: dict[Any, Runner] = {}
        self._last: Evaluation | None = None
        self._log_evidence: Tensor | None = None

    # The evaluation.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The average of the last layers, followed by the other elements of internal_nn's tuple, if it returns one.

        Classification: the mixture's log-probabilities. Regression: `(the outputs stacked along a last dimension,
        their posterior probabilities)`.
        """
        out = self.internal_nn(*args, **kwargs)
        x = out[0] if isinstance(out, tuple) else out
        last = self._evaluate(x)
        if self.task == "classification" and last.clone_pass.mixes:
            average = last.clone_pass.mixture(x, self.switch.log_probabilities())
        else:
            average = self.switch.average(last.outputs(), last.clone_pass.alive)
        return (average, *out[1:]) if isinstance(out, tuple) else average

    def _evaluate(self, x: Tensor) -> Evaluation:
        """All last layers on the features `x`, kept as the last evaluation."""
        # Past nn.Module.__setattr__, which looks for parameters and modules each time.
        own = self.__dict__
        own["_last"] = None
        modules = self._modules
        layers: list[Any] = [modules[name] for name in self._layer_names]
        key = signature(layers, x)
        runner = self._runners.get(key)
        if runner is None:
            # Layers that are new every time are only called: to try something else would cost more.
            known = len(self._runners) < _MOST_RUNNERS
            runner = choose(layers, x) if known else loop_over(layers)
            if known:
                self._runners[key] = runner
        clone_pass = runner(x)
        clone_pass.check_finite(x)
        own["_last"] = last = Evaluation(x, clone_pass)
        return last

    def last_evaluation(self) -> Evaluation:
        """What the last forward left behind; RuntimeError if there was none."""
        if self._last is None:
            raise RuntimeError("no forward has been run yet: call the model, or pass x")
        return self._last

    @property
    def last_x(self) -> Tensor | None:
        """The features of the last forward."""
        return None if self._last is None else self._last.x

    @property
    def last_lst_ll_out(self) -> list[Tensor]:
        """The last layers' outputs of the last forward, one per layer."""
        return [] if self._last is None else list(self._last.outputs().unbind(0))

    @property
    def last_lst_logpx(self) -> list[Tensor]:
        """The last layers' log-likelihoods of the last update of the switch, one per layer."""
        return [] if self._log_evidence is None else list(self._log_evidence.unbind(0))

    def last_layers_predictions(self, x: Any = None) -> list[Tensor]:
        """The outputs of the last layers on internal_nn(x), or those of the last evaluation."""
        if x is not None:
            out = self.internal_nn(x)
            self._evaluate(out[0] if isinstance(out, tuple) else out)
        return list(self.last_evaluation().outputs().unbind(0))

    # What a training step does with it.

    def update_switch(self, y: Any, x: Any = None, catch_up: bool = False) -> None:
        """One observation of the switch: the last evaluation, or the last layers applied to the features `x`.

        A layer whose loss is not finite has the likelihood 0. catch_up: call `hard_catch_up()` afterwards.
        """
        if x is not None:
            with torch.no_grad():
                self._evaluate(x)
        last = self.last_evaluation()
        losses = last.losses(self.loss, y)
        correct = last.correct(y) if self.task == "classification" else None
        self.switch.observe(losses, correct, y)
        self.__dict__["_log_evidence"] = -losses
        if catch_up:
            self.hard_catch_up()

    @torch.no_grad()
    def hard_catch_up(self, threshold: float = -20) -> None:
        """Give the last layers whose log-posterior is below `threshold` the posterior mean of all their parameters.

        Layers with parameters that are not finite have no part in the mean.
        """
        lists = [list(layer.parameters()) for layer in self.last_layers()]
        if any([p.shape for p in own] != [p.shape for p in lists[0]] for own in lists):
            raise ValueError("the last layers differ in shape: they have no mean")
        log_posterior = self.switch.log_probabilities()
        behind = log_posterior < threshold
        flat = [stack(params).flatten(1) for params in zip(*lists)]
        finite = torch.stack([params.isfinite().all(1) for params in flat]).all(0)
        # With no finite layer nothing is copied; NaN stands for "keep".
        weight = torch.softmax(torch.where(finite, log_posterior, -torch.inf), 0)
        for params, together in zip(zip(*lists), flat):
            own = torch.where(finite.unsqueeze(1), together, 0)
            mean = (weight.to(own.dtype).unsqueeze(0) @ own).squeeze(0)
            good = behind & mean.isfinite().all()
            for param, replace in zip(params, good.unbind(0)):
                param.copy_(torch.where(replace, mean.view_as(param), param))

    def posterior(self) -> Tensor:
        """The posterior probabilities [N] of the last layers, in the dtype of their parameters."""
        ps = self.switch.posterior()
        if self._last is None:
            return ps.to(next(self.last_layer(0).parameters(), ps).dtype)
        return ps.to(self._last.clone_pass.params[0].dtype) if self._last.clone_pass.params else ps

    def repr_posterior(self) -> str:
        """The posterior as a row of bars, scaled to the largest."""
        ps = self.switch.posterior()
        heights = (ps / ps.max() * (len(_BLOCKS) - 1)).int().tolist()
        return "|" + "".join(_BLOCKS[height] for height in heights) + "|"

    # Parts and methods.

    def last_layer(self, k: int) -> nn.Module:
        """The k-th last layer."""
        return self._modules[f"last_layer_{k}"]  # type: ignore[return-value]

    def last_layers(self) -> Iterator[nn.Module]:
        """The last layers, in order."""
        return (self.last_layer(k) for k in range(self.n_last_layers))

    def parameters_internal_nn(self) -> Iterator[nn.Parameter]:
        """The parameters of the internal network."""
        return self.internal_nn.parameters()

    def last_layers_parameters_list(self) -> list[Iterator[nn.Parameter]]:
        """The parameters of each last layer."""
        return [layer.parameters() for layer in self.last_layers()]

    def reset_parameters(self) -> None:
        """Draw the parameters anew, by the modules' own `reset_parameters`, and forget what the switch has seen."""
        for module in (self.internal_nn, *self.last_layers()):
            _reset(module)
        self.switch.reset()
        self._last = None

    def method_fwd_internal_nn(self, src: str, dst: str | None = None) -> None:
        """Make the internal network's method `src` callable on the model, as `dst` (default: the same name)."""
        self._forward_method("internal_nn", src, dst)

    def method_fwd_last_layers(self, src: str, dst: str | None = None) -> None:
        """Make the method `src` of the last layers callable on the model; it returns the list of their results."""
        self._forward_method("last_layers", src, dst)

    def _forward_method(self, part: str, src: str, dst: str | None) -> None:
        dst = src if dst is None else dst
        if hasattr(self, dst):
            raise AssertionError(
                f"dst is {dst!r}; expected a name that the model does not have yet"
            )
        self._forwarded[dst] = (part, src)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_modules"]:
            return self._modules[name]
        part, src = self.__dict__.get("_forwarded", {}).get(name, (None, None))
        if part == "internal_nn":
            return getattr(self.internal_nn, src)
        if part == "last_layers":
            methods = [getattr(layer, src) for layer in self.last_layers()]
            return lambda *args, **kwargs: [method(*args, **kwargs) for method in methods]
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has no last forward: its graph cannot travel.
        return {**self.__dict__, "_runners": {}, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_layer_names" not in state:
            raise RuntimeError(
                "this AlraoModel was pickled whole by the package alrao: save its state_dict there, and load that here"
            )
        super().__setstate__(state)

    # The older names.

    @property
    def preclassifier(self) -> nn.Module:
        return self.internal_nn

    @property
    def nb_classifiers(self) -> int:
        return self.n_last_layers

    parameters_preclassifier = parameters_internal_nn
    classifiers = last_layers
    classifiers_parameters_list = last_layers_parameters_list
    classifiers_predictions = last_layers_predictions
    method_fwd_preclassifier = method_fwd_internal_nn
    method_fwd_classifiers = method_fwd_last_layers


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "init_weights", None)
    if callable(reset):
        reset()
        return
    for child in module.children():
        _reset(child)
