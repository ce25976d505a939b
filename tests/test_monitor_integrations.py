"""Protects the callbacks: what Lightning's loggers and the Trainer's reporters get is `alrao.metrics` at that time."""

import csv

import pytest
import torch
from torch import nn

import alrao_fast as alrao


def model():
    torch.manual_seed(0)
    head = alrao.ClassifierClones(6, 4, 3)
    return alrao.AlraoModel(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), head)


def samples():
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(64, 8, generator=generator)
    return [(x, int(y)) for x, y in zip(xs, xs[:, :4].argmax(1))]


def expected(net, observations):
    """What the last log says: all but the losses, which began anew there."""
    posterior = net.posterior()
    best = int(posterior.argmax())
    return {
        "alrao/observations": float(observations),
        "alrao/best_clone": float(best),
        "alrao/best_posterior": posterior[best].item(),
        "alrao/best_lr": net.head.clone_lr[best].item(),
        "alrao/mean_lr": net.suggested_lr(),
        "alrao/posterior/2": posterior[2].item(),
    }


def lightning_module(pl, net):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, number):
            return self.net(batch[0], targets=batch[1])

        def configure_optimizers(self):
            opt = alrao.AlraoSGD(self.net, lr_range=(1e-3, 1.0), generator=torch.Generator())
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1)]

    return Module()


def fit(pl, net, monitor, logger):
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[monitor],
        logger=logger,
        log_every_n_steps=4,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(samples(), batch_size=8)
    trainer.fit(lightning_module(pl, net), loader)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "interval, times, multipliers",
    [("step", [4, 8, 12, 16], [1, 0.1, 0.1, 0.01]), ("epoch", [8, 16], [0.1, 0.01])],
)
def test_lightning(interval, times, multipliers, tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from alrao_fast.integrations.lightning import AlraoMonitor

    net = model()
    logger = CSVLogger(tmp_path)
    trainer = fit(pl, net, AlraoMonitor(interval), logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == times
    assert [float(row["alrao/observations"]) for row in rows] == times
    assert [float(row["alrao/lr"]) for row in rows] == pytest.approx(multipliers)
    last = {name: float(rows[-1][name]) for name in expected(net, 16)}
    assert last == pytest.approx(expected(net, 16))
    assert trainer.callback_metrics["alrao/best_clone"] == last["alrao/best_clone"]
    # A schedule by epochs has moved by the end of the last batch. The losses are of the batches since the log before.
    assert int(net.clone_metrics()["count"]) == 0 and float(rows[-1]["alrao/loss/2"]) > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_refusals():
    pl = pytest.importorskip("lightning.pytorch")
    from alrao_fast.integrations import lightning

    with pytest.raises(lightning.MisconfigurationException, match="no logger"):
        fit(pl, model(), lightning.AlraoMonitor(), False)
    with pytest.raises(ValueError, match="logging_interval: got 'batch', expected"):
        lightning.AlraoMonitor("batch")


class ForTrainer(nn.Module):
    """As the Trainer calls a model."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        if labels is None:
            return {"logits": self.net(x)}
        return {"loss": self.net(x, targets=labels), "logits": x}


def trainer_of(net, folder, callbacks=()):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    opt = alrao.AlraoSGD(net, lr_range=(1e-3, 1.0), generator=torch.Generator())
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=1,
        logging_steps=4,
        report_to=[],
        save_strategy="no",
        eval_strategy="epoch",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": x, "labels": y} for x, y in samples()]
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    return transformers.Trainer(
        ForTrainer(net),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        optimizers=(opt, schedule),
        callbacks=list(callbacks),
    )


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from alrao_fast.integrations.transformers import AlraoCallback

    class Reporter(transformers.TrainerCallback):
        """Passes on what it gets, as that of TensorBoard."""

        seen: list = []

        def on_log(self, args, state, control, logs=None, **others):
            self.seen.append(dict(logs))

    net = model()
    trainer = trainer_of(net, tmp_path, [Reporter])
    callback = AlraoCallback().add_to(trainer)
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["alrao/observations"] for entry in logged] == [4, 8]
    assert {k: logged[-1][k] for k in expected(net, 8)} == pytest.approx(expected(net, 8))
    assert logged[-1]["alrao/lr"] == 1 and logged[-1]["alrao/loss/0"] > 0
    assert [entry for entry in Reporter.seen if "alrao/lr" in entry] == [
        {k: v for k, v in entry.items() if k != "step"} for entry in logged
    ]
    # Evaluations, and the summary at the end, are as they were.
    assert not [entry for entry in history if "loss" not in entry and "alrao/lr" in entry]


@pytest.mark.filterwarnings("ignore")
def test_transformers_among_other_callbacks(tmp_path):
    pytest.importorskip("transformers")
    from alrao_fast.integrations.transformers import AlraoCallback

    trainer = trainer_of(model(), tmp_path, [AlraoCallback("a/", reset=False)])
    trainer.train()
    counts = [entry["a/observations"] for entry in trainer.state.log_history if "loss" in entry]
    assert counts == [4, 8] and int(trainer.model.net.clone_metrics()["count"]) == 64
