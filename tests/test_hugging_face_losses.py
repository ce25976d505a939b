"""wrap on Hugging Face's models whose loss is not that of their kind: before training it is the model's own.

Protects against labels that are shifted where the model compares them as they are, a router's loss that is left out,
decoder inputs that are not made of labels, and logits that the model changes behind its output layer.
"""

import pytest
import torch

import alrao_fast as alrao

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))
TOKENS[:, -1] = 2
SPECIAL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    **SPECIAL,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
BART = {
    **SPECIAL,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
}
SPEECH = {"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 16}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}

# The model, its configuration, its inputs, its labels.
WORDS = {"input_ids": TOKENS}
CASES = {
    "XLNetLMHeadModel": ("XLNetConfig", XLNET, WORDS, TOKENS),
    "BartForCausalLM": ("BartConfig", BART, WORDS, TOKENS),
    "BertForNextSentencePrediction": ("BertConfig", BERT, WORDS, torch.tensor([0, 1, 1, 0])),
    "MixtralForCausalLM": ("MixtralConfig", {**BERT, **EXPERTS}, WORDS, TOKENS),
    "M2M100ForConditionalGeneration": ("M2M100Config", BART, WORDS, TOKENS),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**BART, **SPEECH},
        {"input_features": torch.randn(4, 4, 8)},
        TOKENS,
    ),
    "BartForSequenceClassification": (
        "BartConfig",
        {**BART, "num_labels": 3},
        WORDS,
        torch.tensor([0, 1, 2, 1]),
    ),
}


def make(name, config, options):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_models_own(name):
    config, options, inputs, labels = CASES[name]
    model = make(name, config, options)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
    net = alrao.wrap(model, num_clones=3)
    out = net(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    logits = expected.logits.log_softmax(-1)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    net.train()(**inputs, labels=labels).loss.backward()
    assert net.clones.switch.posterior().shape == (3,)


def test_the_routers_loss_has_a_gradient():
    config, options, inputs, labels = CASES["MixtralForCausalLM"]
    gradients = []
    for weight in (0.0, 1.0):
        net = alrao.wrap(
            make("MixtralForCausalLM", config, {**options, "router_aux_loss_coef": weight})
        )
        net.train()(**inputs, labels=labels).loss.backward()
        gradients.append(
            next(p.grad for n, p in net.named_parameters() if n.endswith("gate.weight"))
        )
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        ("EsmForMaskedLM", "EsmConfig", {**BERT, "mask_token_id": 3}, "adds a bias of its own"),
        (
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            {**BERT, "lru_width": 16},
            "bends by a function of its own",
        ),
    ],
)
def test_logits_that_are_not_the_layers(name, config, options, message):
    model = make(name, config, options)
    layer = model.get_output_embeddings()
    with pytest.raises(ValueError, match=message):
        alrao.wrap(model)
    assert model.get_output_embeddings() is layer


def test_a_model_with_two_outputs():
    net = alrao.wrap(make("BertForPreTraining", "BertConfig", BERT))
    with pytest.raises(TypeError, match="BertForPreTrainingOutput has no logits"):
        net(input_ids=TOKENS)
