"""Protects a trained model in other hands: torch.export, ONNX, torch.jit and torch.fx.

- ONNX of predictions, by both exporters and from an exported program, run by onnxruntime: any batch, clones that are
  dead for a sample, features of three dimensions, extras; equal to torch within 1e-5.
- torch.export keeps the op, whose decomposition is the op, both results; dynamic shapes.
- torch.jit.trace works; torch.jit.script and torch.fx.symbolic_trace of clones are errors that name the cure, and the
  cure works.
"""

import io
import warnings

import pytest
import torch
from clones_harness import C, D, classifier, concentrate, regressor
from torch import nn

from alrao_fast.nn import AlraoModel

BATCH = torch.export.Dim("batch")
CURE = r"net\.collapse\(\) makes a torch\.fx\.GraphModule"
every_head = pytest.mark.parametrize("make", [classifier, regressor])


class WithState(nn.Linear):
    """Features and something else of a sequence, as a recurrent backbone has."""

    def forward(self, x):
        hidden = super().forward(x)
        return hidden.tanh(), hidden


def model(make, backbone=nn.Linear):
    """A model whose second clone overflows on features that are not small."""
    torch.manual_seed(3)
    net = AlraoModel(backbone(5, D), make())
    concentrate(net.head, -1, -4, -2)
    with torch.no_grad():
        net.backbone.weight.abs_()
        net.backbone.bias.zero_()
        net.head.weight[1, 0] = 1e38
    return net.eval()


def batch(n, *more):
    """Inputs that are small for the first half and large for the others, all positive."""
    x = torch.rand(n, *more, 5)
    return torch.cat([0.02 * x[: n // 2], 20 + x[n // 2 :]])


def onnx_by_dynamo(net, x, path):
    shapes = {"dynamic_shapes": ({0: BATCH},)} if isinstance(net, AlraoModel) else {}
    torch.onnx.export(net, (x,), path, dynamo=True, verbose=False, external_data=False, **shapes)


def onnx_of_program(net, x, path):
    program = torch.export.export(net, (x,), dynamic_shapes=({0: BATCH},))
    torch.onnx.export(program, (), path, dynamo=True, verbose=False, external_data=False)


def onnx_by_torchscript(net, x, path):
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(net, (x,), path, dynamo=False, **names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "export, more", [(onnx_by_dynamo, (3,)), (onnx_of_program, ()), (onnx_by_torchscript, (3,))]
)
@every_head
def test_onnx(make, export, more, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = model(make, WithState if more else nn.Linear)
    path = str(tmp_path / "net.onnx")
    export(net, batch(4, *more), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 4, 7):
        x = batch(n, *more)
        results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = net(x) if more else (net(x),)
        assert len(results) == len(expected)
        for result, other in zip(results, expected):
            torch.testing.assert_close(torch.from_numpy(result), other, rtol=1e-5, atol=1e-5)
    alive = net.head.clone_outputs(expected[-1] if more else net.backbone(x)).isfinite().all(-1)
    assert alive.any() and not alive.all()


@every_head
def test_exported_program(make):
    net = model(make)
    x = batch(4)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: BATCH},))
    ops = {str(node.target) for node in program.graph.nodes}
    assert ("alrao_fast.switch_mixture_log_prob.default" in ops) == (make is classifier)
    # What is decomposed for all is torch's own operations.
    for exported in (program, program.run_decompositions()):
        for n in (2, 9):
            x = batch(n)
            torch.testing.assert_close(exported.module()(x), net(x), rtol=0, atol=0)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    torch.testing.assert_close(torch.export.load(stored).module()(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["switch_mixture_log_prob", "switch_mixture_log_prob__triton"])
def test_decomposition(name):
    """Both results of the op, where a clone is dead, too."""
    net = model(classifier)
    own = torch._decomp.decomposition_table[getattr(torch.ops.alrao_fast, name).default]
    inputs = (
        net.backbone(batch(6)),
        net.head.weight,
        net.head.bias,
        net.head.switch.log_posterior,
        1 << 20,
    )
    expected = torch.ops.alrao_fast.switch_mixture_log_prob(*inputs)
    assert expected[1].unique().numel() == 2
    for result, other in zip(own(*inputs), expected, strict=True):
        torch.testing.assert_close(result, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_head
def test_jit_trace(make):
    net = model(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (batch(4),))
    x = batch(7)
    torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_head
def test_refusals_name_the_cure(make):
    net = model(make)
    for module in (net, nn.Sequential(net.backbone, net.head), nn.Sequential(net)):
        with pytest.raises(RuntimeError, match=rf"torch\.jit\.script cannot compile .*: {CURE}"):
            torch.jit.script(module)
        with pytest.raises(TypeError, match=rf"Proxy.*symbolically: {CURE}"):
            torch.fx.symbolic_trace(module)
    x = batch(4)
    expected = net(x)
    plain = net.collapse("mixture")
    cured = torch.jit.script(plain), torch.jit.trace(plain, (x,)), torch.fx.symbolic_trace(plain)
    for module in cured:
        torch.testing.assert_close(module(x), expected)
    assert expected.shape == (4, C)
