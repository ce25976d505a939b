"""What this file protects: addresses beyond 2^31, in tensors that only a GPU's memory and speed allow to fill.

Each check computes a few rows by hand, the last ones among them; tests/test_gpu.py runs the checks on small tensors."""

import pytest
import torch

from alrao_fast import backends, functional, testing

# 32771 * 65537 > 2^31, and odd: no chunk of any size ends with a row.
ROWS, INNER = 32771, 65537


def _rows(rows):
    return [0, 1, rows // 2, rows - 2, rows - 1]


def check_sgd(device, small=False):
    rows, inner = (37, 131) if small else (ROWS, INNER)
    generator = torch.Generator(device).manual_seed(0)
    param, grad = (
        torch.randn(rows, inner, device=device, generator=generator, dtype=torch.float32)
        for _ in range(2)
    )
    rate = torch.linspace(0.1, 1.0, rows, device=device)
    buffer = torch.zeros_like(param)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    before = {k: param[k].clone() for k in _rows(rows)}
    for _ in range(2):
        functional.feature_sgd_(
            [param], [grad], [rate], momentum_buffers=[buffer], steps=steps, momentum=0.9
        )
    for k, start in before.items():
        # g, then 0.9 g + g.
        expected = start.double() - rate[k].double() * 2.9 * grad[k].double()
        torch.testing.assert_close(param[k].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffer[k].double(), 1.9 * grad[k].double(), rtol=1e-5, atol=1e-5)


def check_adam(device, small=False):
    rows, inner = (37, 131) if small else (ROWS, INNER)
    generator = torch.Generator(device).manual_seed(0)
    param, grad = (
        torch.randn(rows, inner, device=device, generator=generator, dtype=torch.float32)
        for _ in range(2)
    )
    rate = torch.linspace(0.1, 1.0, rows, device=device)
    first, second = torch.zeros_like(param), torch.zeros_like(param)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    before = {k: param[k].clone() for k in _rows(rows)}
    functional.feature_adam_([param], [grad], [first], [second], [rate], steps=steps)
    for k, start in before.items():
        g = grad[k].double()
        expected = start.double() - rate[k].double() * g / (g.abs() + 1e-8)
        torch.testing.assert_close(param[k].double(), expected, rtol=1e-4, atol=1e-5)


def check_mixture(device, small=False):
    batch, features, classes, clones = (3, 16, 70, 2) if small else (3, 16384, 70001, 2)
    dtype = torch.float32 if small else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator, dtype=dtype)

    x = normal(batch, features).requires_grad_()
    weight = normal(clones, classes, features).mul_(features**-0.5).requires_grad_()
    bias = torch.zeros(clones, classes, device=device, dtype=dtype).requires_grad_()
    target = torch.tensor([0, classes // 2, classes - 1], device=device)
    log_posterior = torch.tensor([0.5, 0.5], device=device, dtype=torch.float64).log()
    loss, clone_nll = functional.switch_mixture_nll(x, weight, bias, log_posterior, target)
    # Not x's: the last clone's gradient has the largest addresses.
    (dweight,) = torch.autograd.grad(loss, (weight,))
    logits = x.detach().float() @ weight.detach()[-1].float().t()
    log_prob = logits.log_softmax(1)
    nll = -log_prob.gather(1, target[:, None]).mean()
    torch.testing.assert_close(clone_nll[-1].float(), nll.float(), rtol=2e-3, atol=2e-3)
    residual = log_prob.exp()
    residual[torch.arange(batch), target] -= 1
    last = slice(classes - 5, classes)
    expected = residual[:, last].t() @ x.detach().float() / batch
    error = testing.relative_error(dweight[-1, last], expected)
    assert error <= (1e-5 if small else 2e-2), error


CHECKS = {"sgd": check_sgd, "adam": check_adam, "mixture": check_mixture}
# Parameter, gradient and states, or weight, its gradient and the check's own copies.
GIBIBYTES = {"sgd": 28, "adam": 37, "mixture": 32}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("check", CHECKS)
def test_more_than_2_31_elements(backend, check):
    if backends.INTERPRETED:
        pytest.skip("Triton's kernels are interpreted in this process")
    op = {"sgd": "feature_sgd", "adam": "feature_adam", "mixture": "switch_mixture"}[check]
    reason = testing.require(op, backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    # Filling fresh memory with NaN would double the time.
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < GIBIBYTES[check] << 30:
        pytest.skip(f"needs {GIBIBYTES[check]} GiB of free GPU memory, {free >> 30} are left")
    with backends.use_backend(backend):
        CHECKS[check](torch.device("cuda"))
    torch.cuda.empty_cache()
