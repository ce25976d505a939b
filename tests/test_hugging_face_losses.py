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


def classifier(problem_type):
    return make(
        "BertForSequenceClassification",
        "BertConfig",
        {**BERT, "num_labels": 3, "problem_type": problem_type},
    )


def test_labels_that_transformers_takes_for_several_per_sample():
    labels = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    net = alrao.wrap(classifier(None))
    with pytest.raises(TypeError, match=r"labels: got torch\.float32, expected classes"):
        net(input_ids=TOKENS, labels=labels)
    assert net.clones.switch.t == 1
    soft = alrao.wrap(classifier("single_label_classification"))
    one_hot = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    loss = soft.eval()(input_ids=TOKENS, labels=one_hot).loss
    expected = soft(input_ids=TOKENS, labels=one_hot.argmax(-1)).loss
    torch.testing.assert_close(loss, expected)


def test_labels_shifted_by_the_caller():
    llama = {**BERT, "num_key_value_heads": 2}
    net = alrao.wrap(make("LlamaForCausalLM", "LlamaConfig", llama)).eval()
    shifted = torch.nn.functional.pad(TOKENS[:, 1:], (0, 1), value=-100)
    loss = net(input_ids=TOKENS, labels=TOKENS, shift_labels=shifted).loss
    torch.testing.assert_close(loss, net(input_ids=TOKENS, labels=TOKENS).loss)
    others = shifted.clone()
    others[0, 0] = 7
    plain = make("LlamaForCausalLM", "LlamaConfig", llama)
    loss = net(input_ids=TOKENS, labels=TOKENS, shift_labels=others).loss
    expected = plain(input_ids=TOKENS, labels=TOKENS, shift_labels=others).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_class_of_a_wrapped_model_makes_none(tmp_path):
    net = alrao.wrap(classifier(None))
    net.save_pretrained(tmp_path)
    for make_another in (
        lambda: type(net).from_pretrained(tmp_path),
        lambda: type(net)(net.config),
    ):
        with pytest.raises(TypeError, match="wrap it, then load_state_dict"):
            make_another()


def test_a_lora_model_is_seen_by_its_active_clones():
    peft = pytest.importorskip("peft")
    net = alrao.wrap(classifier(None), num_clones=3)
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(net, lora).train()
    opt = alrao.AlraoSGD([p for p in adapted.parameters() if p.requires_grad])
    adapted(input_ids=TOKENS, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    opt.step()
    history = alrao.History(adapted)
    history.record()
    assert alrao.posterior_line(adapted)
    metrics = alrao.metrics(adapted, opt)
    assert metrics["alrao/observations"] == 1
    posterior = torch.tensor([metrics[f"alrao/posterior/{n}"] for n in range(3)]).double()
    torch.testing.assert_close(posterior, adapted.posterior(), rtol=1e-6, atol=0)
    assert [norms.shape for norms in alrao.grad_norms(adapted).clones] == [(3,)]
