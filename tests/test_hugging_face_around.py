"""wrap on Hugging Face's models that something else has changed: Accelerate's forwards and hooks, losses, sizes.

Protects against a forward or a loss that passes by the clones without an error, a collapsed model that does not run
after a training in mixed precision, and clones that no optimizer moves any more though they tell of learning rates.
"""

import pytest
import torch
from torch.nn import functional as F

import alrao_fast as alrao

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

TOKENS = torch.randint(2, 50, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_state():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def make():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_layer=1, n_embd=16, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def observed(net):
    opt = alrao.AlraoSGD(net, lr_range=(1e-3, 1.0), generator=torch.Generator().manual_seed(0))
    net.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    opt.step()
    opt.zero_grad()
    return net.eval()


def in_mixed_precision(net):
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(net)


def with_a_hook(net):
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    return accelerate.hooks.add_hook_to_module(net, hook)


@pytest.mark.parametrize("put_around", [in_mixed_precision, with_a_hook])
@pytest.mark.parametrize("which", ["best", "mixture"])
def test_a_model_collapses_with_what_is_around_its_forward(put_around, which):
    net = observed(put_around(alrao.wrap(make(), num_clones=3)))
    plain = net.collapse(which)
    got = plain(TOKENS).logits.log_softmax(-1)
    if which == "best":
        best = net.posterior().argmax()
        features = net.transformer(TOKENS).last_hidden_state
        expected = F.linear(features, net.clones.weight[best]).log_softmax(-1)
    else:
        expected = net(TOKENS).logits
    # bfloat16 under autocast.
    close = {"rtol": 0, "atol": 0.03 if put_around is in_mixed_precision else 1e-6}
    torch.testing.assert_close(got, expected, **close)
    assert plain.generate(TOKENS[:1], max_new_tokens=2).shape == (1, 11)


def test_without_accelerates_wrapper_the_clones_are_still_there():
    model = make()
    expected = model(TOKENS, labels=TOKENS)
    net = alrao.wrap(model, num_clones=3)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    bare = accelerator.unwrap_model(accelerator.prepare(net), keep_fp32_wrapper=False)
    out = bare(TOKENS, labels=TOKENS)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits.log_softmax(-1))


def test_hooks_of_a_device_map_stay_around_the_clones():
    model = make()
    expected = model(TOKENS, labels=TOKENS)
    net = alrao.wrap(with_a_hook(model), num_clones=3)
    out = net(TOKENS, labels=TOKENS)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits.log_softmax(-1))
    assert observed(net).collapse("best")(TOKENS).logits.shape == (4, 9, 50)


def with_a_forward_of_its_own(model):
    model.forward = model.forward
    return model


def with_a_loss_of_its_own(model):
    model.loss_function = lambda logits, labels, **options: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_mixed_precision, "a forward of its own in place of its class's"),
        (with_a_forward_of_its_own, "a forward of its own in place of its class's"),
        (
            lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
            "output layer is offloaded by a hook",
        ),
        (with_a_loss_of_its_own, "^loss_function: the GPT2LMHeadModel has <function"),
    ],
)
def test_models_whose_clones_would_be_passed_by(change, message):
    model = change(make())
    layer = model.lm_head
    with pytest.raises(ValueError, match=message):
        alrao.wrap(model)
    assert model.lm_head is layer and type(model) is transformers.GPT2LMHeadModel


def test_a_loss_that_is_assigned_later():
    net = with_a_loss_of_its_own(alrao.wrap(make(), num_clones=3))
    with pytest.raises(ValueError, match=r"^loss_function: the GPT2LMHeadModel has <function"):
        net(TOKENS, labels=TOKENS)
    assert net(TOKENS).logits.shape == (4, 9, 50)


def test_another_layer_in_the_clones_place():
    net = alrao.wrap(make(), num_clones=3)
    net.set_output_embeddings(torch.nn.Linear(16, 50))
    with pytest.raises(TypeError, match="output: got a Linear in the clones' place 'lm_head'"):
        net(TOKENS)


def test_embeddings_of_the_same_size_leave_the_clones_to_their_optimizer():
    net = alrao.wrap(make(), num_clones=3)
    opt = alrao.AlraoSGD(net, lr_range=(1e-3, 1.0))
    clones, weight, rates = net.clones, net.clones.weight, net.clones.clone_lr.clone()
    net.resize_token_embeddings(50)
    assert net.clones is clones and net.clones.weight is weight
    torch.testing.assert_close(net.clones.clone_lr, rates, rtol=0, atol=0)
    before = weight.detach().clone()
    net.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    opt.step()
    assert not torch.equal(weight, before)


def test_clones_of_another_size_have_no_rates_before_an_optimizer_has_them():
    net = observed(alrao.wrap(make(), num_clones=3))
    net.resize_token_embeddings(60)
    with pytest.raises(RuntimeError, match="the clones have no learning rates yet"):
        net.suggested_lr()
    assert 1e-3 <= observed(net).suggested_lr() <= 1.0


SIZES = {
    "vocab_size": 50,
    "pad_token_id": 0,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "final_logit_softcapping": 0.5,
}
IMAGES = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
CAPPED = {
    "Gemma2ForCausalLM": lambda: transformers.Gemma2Config(**SIZES),
    # The softcap is in the config of its text.
    "PaliGemmaForConditionalGeneration": lambda: transformers.PaliGemmaConfig(
        text_config={**SIZES, "model_type": "gemma2"},
        vision_config=IMAGES,
        projection_dim=16,
        hidden_size=16,
        image_token_index=49,
    ),
    # Another class that does not look at it.
    "Gemma3ForConditionalGeneration": lambda: transformers.Gemma3Config(
        text_config=SIZES, vision_config=IMAGES, mm_tokens_per_image=4, image_token_index=49
    ),
    # A classification's logits have none.
    "Gemma2ForSequenceClassification": lambda: transformers.Gemma2Config(**SIZES, num_labels=3),
}


def capped(name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("name", CAPPED)
def test_softcaps_of_logits(name, tmp_path):
    model = capped(name, CAPPED[name]())
    expected = model(TOKENS).logits
    net = alrao.wrap(model, num_clones=2)
    torch.testing.assert_close(net(TOKENS).logits, expected.log_softmax(-1))
    if "Classification" in name:
        net.train()(TOKENS, labels=TOKENS[:, 0] % 3)
    else:
        net.train()(TOKENS, labels=TOKENS)
    plain = net.eval().collapse("best")
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, expected)


def test_a_checkpoints_config_makes_the_model_that_its_clones_fit(tmp_path):
    net = alrao.wrap(capped("Gemma2ForCausalLM", CAPPED["Gemma2ForCausalLM"]()), num_clones=2)
    expected = net(TOKENS).logits
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(net(TOKENS).logits, expected, rtol=0, atol=0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = alrao.wrap(transformers.Gemma2ForCausalLM(config), num_clones=2).eval()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(TOKENS).logits, expected, rtol=0, atol=0)


def test_models_of_one_config():
    config = CAPPED["Gemma2ForCausalLM"]()
    one, other = (capped("Gemma2ForCausalLM", config) for _ in range(2))
    expected, settings = other(TOKENS).logits, config.to_dict()
    net = alrao.wrap(one, num_clones=2)
    torch.testing.assert_close(other(TOKENS).logits, expected, rtol=0, atol=0)
    assert other.config is config and config.to_dict() == settings
    # Its parts follow its config, as those of any model.
    net.config.use_cache = False
    assert net.model.config.use_cache is False and config.use_cache
