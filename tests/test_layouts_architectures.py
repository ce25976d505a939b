"""Rates along the right axis in models of transformers and timm, by their configurations.

Protects against rates by input, one rate for a whole expert or token, and modules that new versions bring without a
rule.
"""

import architectures
import pytest
import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast.optim.layouts import resolve_all


def layouts(net):
    return {layout.name: (layout, param) for param, layout in resolve_all([net]).items()}


def axis(net, ending):
    """dims and number of rates of the first parameter whose name ends so."""
    layout, param = next(v for name, v in layouts(net).items() if name.endswith(ending))
    return layout.dims, layout.length(param), layout.rule


@pytest.mark.parametrize("name", architectures.TRANSFORMERS)
def test_transformers(name):
    pytest.importorskip("transformers")
    assert architectures.shares(architectures.of_transformers(name)).get("default", 0) < 0.001


@pytest.mark.parametrize("name", architectures.TIMM)
def test_timm(name):
    pytest.importorskip("timm")
    assert architectures.shares(architectures.of_timm(name)).get("default", 0) < 0.0001


# The model, the end of a parameter's name, the dimensions of its features and their number.
AXES = [
    ("gpt2", "c_attn.weight", (1,), 3 * 768),
    ("gpt2", "c_attn.bias", (0,), 3 * 768),
    ("mixtral", "experts.gate_up_proj", (0, 1), 8 * 2 * 14336),
    ("mixtral", "experts.down_proj", (0, 1), 8 * 4096),
    ("gpt_oss", "experts.gate_up_proj", (2,), 2 * 2880),
    ("gpt_oss", "experts.gate_up_proj_bias", (1,), 2 * 2880),
    ("llama4_text", "experts.gate_up_proj", (2,), 2 * 8192),
    ("llama4_text", "experts.down_proj", (2,), 5120),
    ("xlnet", "rel_attn.q", (1, 2), 1024),
    ("xlnet", "rel_attn.o", (0,), 1024),
    ("vit", "cls_token", (2,), 768),
    ("vit", "position_embeddings", (2,), 768),
    ("rwkv", "time_mix_key", (2,), 4096),
    ("mamba", "A_log", (0,), 1536),
]


@pytest.mark.parametrize(("name", "ending", "dims", "count"), AXES, ids=lambda v: str(v))
def test_axes(name, ending, dims, count):
    pytest.importorskip("transformers")
    found, length, rule = axis(architectures.of_transformers(name), ending)
    assert (found, length) == (dims, count)
    assert rule in ("built-in", "shape")


@pytest.mark.parametrize(
    ("name", "ending", "dims", "count"),
    [
        ("swin_tiny_patch4_window7_224", "relative_position_bias_table", (1,), 3),
        ("resmlp_12_224", "norm1.alpha", (2,), 384),
        ("volo_d1_224", "pos_embed", (3,), 384),
        ("nfnet_f0", "conv1.gain", (0,), 16),
        ("halonet26t", "height_rel", (1,), 32),
    ],
    ids=lambda v: str(v),
)
def test_axes_of_timm(name, ending, dims, count):
    pytest.importorskip("timm")
    assert axis(architectures.of_timm(name), ending)[:2] == (dims, count)


def test_biases_belong_to_their_projection():
    pytest.importorskip("timm")
    of = layouts(architectures.of_timm("beitv2_base_patch16_224"))
    projection, _ = of["blocks.0.attn.qkv.weight"]
    for name, first in (("q_bias", 0), ("v_bias", 2 * 768)):
        layout, _ = of[f"blocks.0.attn.{name}"]
        assert layout.vector is projection.vector
        assert layout.feature_of.tolist() == list(range(first, first + 768))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 4))


# As if it were of the library.
Experts.__module__ = "transformers.models.made_up"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_of_experts_is_sgd_with_a_rate_per_unit(transposed, fused):
    torch.manual_seed(0)
    net = Experts()
    net.is_transposed = transposed
    opt = alrao.AlraoSGD(net, (1e-3, 1.0), fused=fused)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    expected = []
    for p in net.parameters():
        rate = opt.state[p]["rate"]
        assert len(rate.unique()) == len(rate)
        spread = rate.view(1, 1, -1) if transposed else rate.view(p.shape[0], p.shape[1], 1)
        expected.append(p.detach() - spread * p.grad)
    opt.step()
    torch.testing.assert_close(list(net.parameters()), expected)


def test_the_page_is_of_this_table():
    page = architectures.PAGE.read_text()
    for name in (*architectures.TRANSFORMERS, *architectures.TIMM):
        assert f"| {name} |" in page


def test_construction_is_quick():
    import time

    net = nn.ModuleList([nn.Linear(4, 4) for _ in range(2500)])
    start = time.perf_counter()
    opt = alrao.AlraoSGD(net)
    seconds = time.perf_counter() - start
    assert len(opt.state) == 5000
    # A tenth of this where nothing else runs.
    assert seconds < 5
