"""The rates of modules of transformers, timm and peft: no entry of real models without a rule, and the right axis.

The axes are checked twice: against the formula, and by gradients, which know nothing of it: the entries that one output
depends on have one rate, those of another output another.
"""

import functools
import warnings

import pytest
import torch
from architectures import TIMM, TRANSFORMERS, build_timm, build_transformers, shares
from layout_harness import features, table
from torch import nn

import alrao_fast as alrao

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 9,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert shares(build_transformers(name)).default == 0


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    assert shares(build_timm(name)).default == 0


def from_config(name, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[name](**options)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    for param in model.parameters():
        nn.init.normal_(param)
    return model


laid_out = functools.cache(table)


def numbered(net, name):
    """The feature of each entry of a parameter, as the kernels read it, and its layout."""
    layout = laid_out(net)[name]
    return features(dict(net.named_parameters())[name], layout), layout


def arange(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


def check_by_gradients(outputs, param, found):
    """`outputs` [n]: the entries of `param` that output i depends on have one feature, and no two outputs the same."""
    seen = []
    for output in outputs.flatten():
        (grad,) = torch.autograd.grad(output, param, retain_graph=True)
        of_output = found[grad != 0].unique()
        assert of_output.numel() == 1
        seen.append(int(of_output))
    assert len(set(seen)) == len(seen)


def test_conv1d():
    net = from_config("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
    name = "h.0.attn.c_attn"
    weight, layout = numbered(net, f"{name}.weight")
    bias, of_bias = numbered(net, f"{name}.bias")
    assert torch.equal(weight, arange(1, 24).expand(8, 24)) and torch.equal(bias, arange(24))
    assert layout.vector is of_bias.vector
    module = net.get_submodule(name)
    check_by_gradients(module(torch.randn(8)), module.weight, weight)


EXPERTS = {
    "mixtral": {"intermediate_size": 6, "num_local_experts": 3},
    "qwen2_moe": {
        "moe_intermediate_size": 6,
        "num_experts": 3,
        "shared_expert_intermediate_size": 6,
    },
    "gpt_oss": {"intermediate_size": 6, "num_local_experts": 3, "head_dim": 4},
    "aria_text": {"intermediate_size": 6, "moe_num_experts": 3, "moe_num_shared_experts": 1},
}


def experts_of(name):
    """A small model, and the name of its fused experts."""
    net = from_config(name, **SMALL, **EXPERTS[name])
    (path,) = (
        n
        for n, m in net.named_modules()
        if hasattr(m, "gate_up_proj")
        and hasattr(m, "down_proj")
        and isinstance(m.down_proj, nn.Parameter)
    )
    return net, path


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    net, path = experts_of(name)
    module = net.get_submodule(path)
    transposed = name in ("gpt_oss", "aria_text")
    for own, units in (("gate_up_proj", 12), ("down_proj", 8)):
        found, layout = numbered(net, f"{path}.{own}")
        inputs = 8 if own == "gate_up_proj" else 6
        unit = arange(3, 1, units) if transposed else arange(3, units, 1)
        shape = (3, inputs, units) if transposed else (3, units, inputs)
        assert torch.equal(found, unit.expand(shape))
        if name == "gpt_oss":
            bias, of_bias = numbered(net, f"{path}.{own}_bias")
            assert torch.equal(bias, arange(3, units)) and of_bias.vector is layout.vector
    # One token, to expert 1; the grouped product wants strides of 16 bytes.
    module.config._experts_implementation = "eager"
    index, weight = torch.tensor([[1]]), torch.ones(1, 1)
    outputs = module(torch.randn(1, 8), index, weight)
    check_by_gradients(outputs, module.down_proj, numbered(net, f"{path}.down_proj")[0])


def test_experts_of_llama4():
    options = {
        "intermediate_size": 6,
        "intermediate_size_mlp": 6,
        "num_local_experts": 3,
        "head_dim": 4,
    }
    net = from_config("llama4_text", **SMALL, **options)
    module, path = net.layers[0].feed_forward.experts, "layers.0.feed_forward.experts"
    found, _ = numbered(net, f"{path}.gate_up_proj")
    assert torch.equal(found, arange(3, 1, 12).expand(3, 8, 12))
    # One token for every expert: outputs [experts, out].
    check_by_gradients(
        module(torch.randn(3, 8)), module.down_proj, numbered(net, f"{path}.down_proj")[0]
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_step_of_experts_is_sgd_with_a_rate_per_entry(name, backend):
    net, path = experts_of(name)
    with alrao.use_backend(backend):
        generator = torch.Generator().manual_seed(1)
        options = {"momentum": 0.9, "normalized_momentum": False, "generator": generator}
        optimizer = alrao.AlraoSGD(net, (1e-3, 1.0), **options)
        module = net.get_submodule(path)
        expected = {}
        for own in ("gate_up_proj", "down_proj"):
            param = getattr(module, own)
            index = numbered(net, f"{path}.{own}")[0]
            rate = optimizer.state[param]["rate"][index].double()
            expected[own] = param.detach().double(), torch.zeros_like(rate), rate
        for _ in range(3):
            for param in net.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
            for own, (value, momentum, rate) in expected.items():
                momentum.mul_(0.9).add_(getattr(module, own).grad.double())
                value.sub_(rate * momentum)
    for own, (value, _, rate) in expected.items():
        assert rate.unique().numel() == 3 * (12 if own == "gate_up_proj" else 8)
        torch.testing.assert_close(getattr(module, own).detach(), value.float())


def test_xlnet():
    net = from_config("xlnet", vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=6)
    attention, path = net.layer[0].rel_attn, "layer.0.rel_attn"
    q, layout = numbered(net, f"{path}.q")
    assert torch.equal(q, arange(1, 2, 4).expand(8, 2, 4))
    for name in ("k", "v", "r"):
        assert torch.equal(numbered(net, f"{path}.{name}")[0], q)
    check_by_gradients(torch.einsum("h,hnd->nd", torch.randn(8), attention.q), attention.q, q)
    bias, of_bias = numbered(net, f"{path}.r_w_bias")
    assert torch.equal(bias, arange(2, 4)) and of_bias.vector is layout.vector
    o, _ = numbered(net, f"{path}.o")
    assert torch.equal(o, arange(8, 1, 1).expand(8, 2, 4))
    # The normalisation would mix the outputs.
    attention.eval().layer_norm = nn.Identity()
    heads = torch.randn(1, 1, 2, 4)
    outputs = attention.post_attention(torch.zeros(1, 1, 8), heads, residual=False)
    check_by_gradients(outputs, attention.o, o)


def test_tokens_and_tables_of_timm():
    timm = pytest.importorskip("timm")
    net = timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=12, depth=1, num_heads=2, reg_tokens=4, init_values=0.1
    )
    for name, count in (("cls_token", 1), ("reg_token", 4), ("pos_embed", net.pos_embed.size(1))):
        assert torch.equal(numbered(net, name)[0], arange(1, 1, 12).expand(1, count, 12))
    assert numbered(net, "blocks.0.ls1.gamma")[1].rule == "built-in"
    block = timm.models.swin_transformer.WindowAttention(12, 3, window_size=(2, 2))
    found, layout = numbered(block, "relative_position_bias_table")
    assert torch.equal(found, arange(1, 3).expand(9, 3)) and layout.vector.length == 3
    # A single head has a single rate.
    block = timm.models.swin_transformer.WindowAttention(12, 1, window_size=(2, 2))
    assert laid_out(block)["relative_position_bias_table"].vector.length == 1


def test_position_biases_as_images_of_heads():
    timm = pytest.importorskip("timm")
    bias = timm.layers.RelPosBiasTf((2, 2), num_heads=3)
    found, layout = numbered(bias, "relative_position_bias_table")
    assert torch.equal(found, arange(3, 1, 1).expand(3, 3, 3)) and layout.vector.length == 3


def test_heads_of_zamba():
    options = {
        "hidden_size": 8,
        "mamba_expand": 1,
        "mamba_dt_rank": 3,
        "mamba_d_state": 5,
        "n_mamba_heads": 2,
    }
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.zamba.modeling_zamba")
    config = transformers.CONFIG_MAPPING["zamba"](**options)
    mixer = modeling.ZambaMambaMixer(config, layer_idx=0)
    # Per head [out, in]; 4 channels, a time step of rank 3, two inputs of 5 states.
    assert torch.equal(numbered(mixer, "x_proj_weight")[0], arange(2, 13, 1).expand(2, 13, 4))
    assert torch.equal(numbered(mixer, "dt_proj_weight")[0], arange(2, 4, 1).expand(2, 4, 3))
    assert torch.equal(numbered(mixer, "dt_proj_bias")[0], arange(2, 4))
    assert torch.equal(numbered(mixer, "A_log")[0], arange(2, 4, 1).expand(2, 4, 5))
    assert laid_out(mixer)["D"].vector is laid_out(mixer)["A_log"].vector


def test_channels_first_position_embedding():
    timm = pytest.importorskip("timm")
    net = timm.create_model("visformer_tiny")
    size = net.pos_embed1.shape
    assert torch.equal(numbered(net, "pos_embed1")[0], arange(1, size[1], 1, 1).expand(size))


def test_affine_and_gain_share_their_units():
    timm = pytest.importorskip("timm")
    affine = timm.models.mlp_mixer.Affine(5)
    alpha, layout = numbered(affine, "alpha")
    assert torch.equal(alpha, arange(1, 1, 5)) and layout.vector is laid_out(affine)["beta"].vector
    conv = timm.layers.ScaledStdConv2d(3, 4, 3)
    gain, layout = numbered(conv, "gain")
    assert (
        torch.equal(gain, arange(4, 1, 1, 1)) and layout.vector is laid_out(conv)["weight"].vector
    )


def test_biases_beside_a_packed_projection_share_its_units():
    timm = pytest.importorskip("timm")
    attention = timm.models.beit.Attention(6, num_heads=2, qkv_bias=True, window_size=(2, 2))
    weight, layout = numbered(attention, "qkv.weight")
    assert torch.equal(weight, arange(18, 1).expand(18, 6))
    for name, first in (("q_bias", 0), ("v_bias", 12)):
        bias, of_bias = numbered(attention, name)
        assert torch.equal(bias, first + arange(6)) and of_bias.vector is layout.vector


def test_condconv():
    timm = pytest.importorskip("timm")
    conv = timm.layers.CondConv2d(3, 4, 3, bias=True, num_experts=2)
    found, _ = numbered(conv, "weight")
    assert torch.equal(found, arange(2, 4, 1).expand(2, 4, 27).reshape(2, 108))
    assert torch.equal(numbered(conv, "bias")[0], arange(2, 4))


def test_dora_magnitude_shares_the_outputs_of_b():
    peft = pytest.importorskip("peft")
    net = from_config("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
    config = peft.LoraConfig(target_modules=["c_attn"], use_dora=True, r=2, fan_in_fan_out=True)
    layouts = table(peft.get_peft_model(net, config))
    path = "base_model.model.h.0.attn.c_attn"
    b = layouts[f"{path}.lora_B.default.weight"]
    assert layouts[f"{path}.lora_magnitude_vector.default.weight"].vector is b.vector
    assert b.vector.length == 24 and layouts[f"{path}.lora_A.default.weight"].vector.length == 2
    assert not any(layout.rule == "default" for layout in layouts.values())


def test_a_registered_rule_goes_before_the_package_s():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    alrao.register_feature_layout(Conv1D, lambda m: {"weight": alrao.Feature(dim=0)})
    try:
        layouts = table(Conv1D(6, 4))
    finally:
        alrao.register_feature_layout(Conv1D, None)
    assert layouts["weight"].rule == "registered" and layouts["weight"].vector.length == 4
    assert layouts["bias"].rule == "default"
    assert table(Conv1D(6, 4))["weight"].rule == "built-in"


def test_a_user_s_class_of_the_same_name_has_dimension_0():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))
            self.cls_token = nn.Parameter(torch.ones(1, 1, 3))

    assert {layout.rule for layout in table(Conv1D()).values()} <= {"default", "shape"}


def test_real_models_do_not_warn():
    net = from_config("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alrao.AlraoSGD(net)
