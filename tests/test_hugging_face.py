"""wrap on Hugging Face's models: loss, logits, generation, embeddings, Trainer, PEFT.

Protects against a loss that is not the model's own before training, labels that are not shifted, clones tied to the
embedding, a training that does not resume to the bit, and anything of the model's own that the wrapping takes away.
"""

import copy
import inspect
import pickle

import pytest
import torch

import alrao_fast as alrao

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BERT = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
LLAMA = {**BERT, "num_key_value_heads": 2}
GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
T5 = {
    "num_layers": 1,
    "d_model": 16,
    "d_ff": 24,
    "num_heads": 2,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
VIT = {**BERT, "image_size": 8, "patch_size": 4}
DISTIL = {"n_layers": 1, "dim": 16, "hidden_dim": 24, "n_heads": 2}

TOKENS = torch.randint(2, 50, (4, 9), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 1])
IGNORED = torch.where(TOKENS < 10, -100, TOKENS)

# The model, its configuration, its inputs and labels.
LANGUAGE = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2, TOKENS),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, IGNORED),
    "Gemma2ForCausalLM": ("Gemma2Config", {**LLAMA, "head_dim": 8}, TOKENS),
    "BertForMaskedLM": ("BertConfig", BERT, IGNORED),
    "T5ForConditionalGeneration": ("T5Config", T5, IGNORED),
}
CLASSIFYING = {
    "BertForSequenceClassification": ("BertConfig", BERT, CLASSES),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT, CLASSES),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL, CLASSES),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2, CLASSES),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA, CLASSES),
    "BertForTokenClassification": ("BertConfig", BERT, TOKENS % 3),
    "ViTForImageClassification": ("ViTConfig", VIT, CLASSES),
}
MODELS = {**LANGUAGE, **CLASSIFYING}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(name, **options):
    config, sizes, labels = MODELS[name]
    sizes = {**(SMALL if config != "ViTConfig" else {}), **sizes, **options}
    if name in CLASSIFYING:
        sizes.setdefault("num_labels", 3)
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    if config == "ViTConfig":
        return model, {"pixel_values": torch.randn(4, 3, 8, 8), "labels": labels}
    return model, {"input_ids": TOKENS, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_untrained_clones_are_the_layer(name):
    model, inputs = make(name)
    signature = inspect.signature(model.forward)
    with torch.no_grad():
        expected = model(**inputs)
    net = alrao.wrap(model, num_clones=3)
    assert net is model and isinstance(net, getattr(transformers, name))
    with torch.no_grad():
        out = net(**inputs)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits.log_softmax(-1))
    torch.testing.assert_close(net(**inputs, return_dict=False)[1], out.logits)
    assert inspect.signature(net.forward) == signature


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_collapses_to_the_class_that_it_was(name, tmp_path):
    model, inputs = make(name)
    embedding = model.get_input_embeddings()
    net = alrao.wrap(model.train(), num_clones=4)
    opt = alrao.AlraoAdam(net, lr_range=(1e-4, 1e-1), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        opt.zero_grad()
        out = net(**inputs)
        out.loss.backward()
        opt.step()
        losses.append(out.loss.item())
    assert out.logits is None
    assert losses[-1] < losses[0]
    assert net.posterior().max() > 0.25 + 1e-6
    assert net.get_input_embeddings() is embedding
    assert 1e-4 <= net.suggested_lr() <= 0.1
    assert net.clone_metrics()["loss"].shape == (4,)

    net.eval()
    plain = net.collapse("best")
    assert type(plain) is getattr(transformers, name)
    plain.save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path)
    best = net.posterior().argmax()
    with torch.no_grad():
        got, logits = loaded(**inputs), plain(**inputs).logits
        torch.testing.assert_close(got.logits, logits, rtol=0, atol=0)
        mixture = net.collapse("mixture")(
            **{k: v for k, v in inputs.items() if k != "labels"} | decoder(net, inputs)
        )
        torch.testing.assert_close(mixture.logits, net(**inputs).logits)
    head = net.clones
    weight = loaded.get_submodule(net._alrao["output"]).weight
    torch.testing.assert_close(weight, head.weight[best], rtol=0, atol=0)


def decoder(net, inputs):
    if not net.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": net.prepare_decoder_input_ids_from_labels(inputs["labels"])}


@pytest.mark.parametrize("name", LANGUAGE)
def test_embeddings_are_untied_and_stay_so(name):
    model, _ = make(name)
    before = model.get_input_embeddings().weight.detach().clone()
    net = alrao.wrap(model, num_clones=3)
    weight = net.clones.weight
    net.tie_weights()
    assert net.clones.weight is weight and weight.shape == (3, 50, 16)
    assert not net.config.tie_word_embeddings
    torch.testing.assert_close(net.get_input_embeddings().weight, before, rtol=0, atol=0)
    pointers = {p.data_ptr() for n, p in net.named_parameters() if "clones" not in n}
    assert weight.data_ptr() not in pointers


@pytest.mark.parametrize("size", [60, 40])
def test_resized_embeddings(size):
    net = alrao.wrap(make("LlamaForCausalLM")[0], num_clones=3)
    old, posterior = net.clones.weight.detach().clone(), net.posterior()
    net.resize_token_embeddings(size)
    assert net.clones.weight.shape == (3, size, 16) and net.clones.num_classes == size
    kept = min(size, 50)
    torch.testing.assert_close(net.clones.weight[:, :kept], old[:, :kept], rtol=0, atol=0)
    torch.testing.assert_close(net.posterior(), posterior, rtol=0, atol=0)
    assert net(input_ids=TOKENS % kept).logits.shape == (4, 9, size)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_generation_is_the_mixtures(name):
    model, _ = make(name)
    expected = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    net = alrao.wrap(model, num_clones=3)
    got = net.generate(TOKENS, max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(again):
    model, inputs = make("GPT2LMHeadModel")
    net = alrao.wrap(model, num_clones=3)
    new = again(net)
    assert type(new) is type(net)
    torch.testing.assert_close(new(**inputs).loss, net(**inputs).loss, rtol=0, atol=0)
    opt = alrao.AlraoSGD(new.parameters())
    assert not new.clones.clone_lr.isnan().any()
    assert {r.rule for r in alrao.describe_rates(opt) if "clones" in r.parameter} == {"built-in"}


def test_regression():
    model, inputs = make("BertForSequenceClassification", num_labels=1, problem_type="regression")
    inputs["labels"] = torch.randn(4)
    mse = model(**inputs).loss
    net = alrao.wrap(model, num_clones=3)
    loss = net(**inputs).loss
    # The Gaussian likelihood of variance 1.
    torch.testing.assert_close(loss, mse / 2 + 0.5 * torch.log(torch.tensor(2 * torch.pi)))


def test_options_of_the_loss():
    model, inputs = make("BertForSequenceClassification")
    logits = model(**inputs).logits
    net = alrao.wrap(model, num_clones=3, label_smoothing=0.1)
    expected = torch.nn.functional.cross_entropy(logits, CLASSES, label_smoothing=0.1)
    torch.testing.assert_close(net(**inputs).loss, expected)
    total = net(**inputs, num_items_in_batch=8).loss
    torch.testing.assert_close(total, expected * 4 / 8)


def test_logits_in_training_when_asked_for():
    model, inputs = make("BertForSequenceClassification")
    net = alrao.wrap(model.train(), num_clones=3, training_logits=True)
    assert net(**inputs).logits.shape == (4, 3)


def test_a_model_with_a_bias_of_its_own_behind_the_layer():
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="adds a bias of its own to what its output layer gives"):
        alrao.wrap(transformers.BartForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("BertForQuestionAnswering", {}, "does not give a distribution over classes"),
        ("BertForMultipleChoice", {}, "does not give a distribution over classes"),
        (
            "BertForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            "expected one label per sample",
        ),
        ("BertModel", {}, "^output: the BertModel has none as linear layers"),
    ],
)
def test_tasks_without_a_mixture(name, options, message):
    model = getattr(transformers, name)(transformers.BertConfig(**BERT, **SMALL, **options))
    state = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        alrao.wrap(model)
    assert set(model.state_dict()) == state


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, k):
        # A column that no model takes, as datasets have them.
        return {
            "input_ids": TOKENS[k % 4].roll(k),
            "labels": TOKENS[k % 4].roll(k),
            "text": "unused",
        }


def train(net, folder, steps=4, resume=None, optimizer=None, **options):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        weight_decay=0.01,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rates = {"lr_range": (1e-4, 1e-1), "generator": torch.Generator().manual_seed(1)}
    trainer = transformers.Trainer(
        net,
        arguments,
        train_dataset=Dataset(),
        eval_dataset=Dataset(),
        data_collator=lambda batch: {
            k: torch.stack([e[k] for e in batch]) for k in ("input_ids", "labels")
        },
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=None if optimizer else (alrao.AlraoAdam, rates),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def wrapped(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**GPT2, **SMALL, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return alrao.wrap(transformers.GPT2LMHeadModel(config), num_clones=3)


def test_trainer_trains_evaluates_and_resumes_to_the_bit(tmp_path):
    net = wrapped()
    before = net(input_ids=TOKENS, labels=TOKENS).loss.item()
    trainer = train(net, tmp_path / "a")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < before and 0 <= metrics["eval_accuracy"] <= 1
    assert net.clones.switch.has_observed
    # Trainer's groups, with and without weight decay, have the rates of their features.
    assert [g["weight_decay"] for g in trainer.optimizer.optimizer.param_groups] == [0.01, 0]
    assert not net.clones.clone_lr.isnan().any()

    other = wrapped(seed=5)
    train(other, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_trainer_with_an_optimizer(tmp_path):
    net = wrapped()
    opt = alrao.AlraoSGD(net, lr_range=(1e-3, 1.0))
    trainer = train(net, tmp_path, optimizer=opt)
    assert trainer.optimizer.optimizer is opt
    assert net.clones.switch.has_observed


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"max_grad_norm": 0.5},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda o: next(iter(o)),
)
def test_trainer_with(options, tmp_path):
    net = wrapped()
    train(net, tmp_path, **options)
    assert net(input_ids=TOKENS, labels=TOKENS).loss.isfinite()


def test_accumulated_batches_are_one_large_one():
    small, large = wrapped(), wrapped()
    x = torch.cat([TOKENS, TOKENS.flip(0)])
    # Seven of the first half are ignored.
    y = x.clone()
    y[0, 2:] = -100
    items = (y[:, 1:] != -100).sum()
    for part in (slice(4), slice(4, 8)):
        small(input_ids=x[part], labels=y[part], num_items_in_batch=items).loss.backward()
    large(input_ids=x, labels=y).loss.backward()
    for p, q in zip(small.parameters(), large.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def with_backbone(seed=0):
    torch.manual_seed(seed)
    backbone = transformers.GPT2Model(transformers.GPT2Config(**GPT2, **SMALL))
    return alrao.AlraoModel(backbone, alrao.ClassifierClones(16, 50, 3))


def test_trainer_with_an_alrao_model(tmp_path):
    net, other = with_backbone(), with_backbone(seed=5)
    trainer = train(net, tmp_path / "a")
    assert trainer.evaluate()["eval_loss"] > 0
    assert net.head.switch.has_observed
    train(other, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_the_trainers_label_smoothing_is_not_observed_and_says_so(tmp_path):
    net = wrapped()
    with pytest.warns(UserWarning, match="is trained without any observation by its switch"):
        train(net, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match="the switch has made no observation"):
        net.suggested_lr()


@pytest.mark.parametrize("features", [None, "last_hidden_state"])
def test_a_backbone_of_transformers_collapses(features):
    bert = transformers.BertModel(transformers.BertConfig(**BERT, **SMALL))
    net = alrao.AlraoModel(bert, alrao.ClassifierClones(16, 3, 3), features=features)
    net(input_ids=TOKENS, targets=CLASSES if features is None else TOKENS % 3)
    net.eval()
    inputs = {"input_ids": TOKENS, "attention_mask": (TOKENS > 5).long()}
    torch.testing.assert_close(net.collapse("mixture")(**inputs), net(**inputs))
    assert net.collapse("best")(TOKENS, inputs["attention_mask"]).shape[-1] == 3


def test_lora():
    peft = pytest.importorskip("peft")
    net = wrapped()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(net, config)
    opt = alrao.AlraoAdam(
        [p for p in adapted.parameters() if p.requires_grad], lr_range=(1e-4, 1e-1)
    )
    frozen = net.transformer.wte.weight.detach().clone()
    losses = []
    for _ in range(8):
        opt.zero_grad()
        loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert adapted.posterior().max() > 1 / 3 + 1e-6
    torch.testing.assert_close(net.transformer.wte.weight, frozen, rtol=0, atol=0)
    # The copy is what trains: the head that it was copied from stays as it was.
    copies = adapted.base_model.model.lm_head
    assert copies.original_module.clones.switch.t == 1
    assert copies.modules_to_save["default"].clones.switch.t == 9
    assert 1e-4 <= adapted.suggested_lr() <= 0.1
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(
        merged.eval()(TOKENS).logits, adapted.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5
    )
    assert type(merged.collapse("best")) is transformers.GPT2LMHeadModel
    saved = peft.get_peft_model_state_dict(adapted)
    assert any("clones.weight" in name for name in saved)
    assert any("clones.switch.logw" in name for name in saved)
    with pytest.raises(TypeError, match="expected the model without PEFT"):
        alrao.wrap(peft.get_peft_model(transformers.GPT2LMHeadModel(net.config), config))
