"""Digits under Lightning: training, validation, a learning-rate schedule, a checkpoint that resumes.

python examples/lightning_digits.py
"""

import argparse
import warnings

import lightning as L
import torch
from digits import data
from torch import Tensor, nn
from torch.utils.data import DataLoader

import alrao_fast as alrao

# Lightning's advice on the number of workers; the data are in memory.
warnings.filterwarnings("ignore", ".*does not have many workers.*")


class Digits(L.LightningModule):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        backbone = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.net = alrao.AlraoModel(backbone, alrao.ClassifierClones(width, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = self.net(x, targets=y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(-1) == y).double().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = alrao.AlraoSGD(self.net, generator=torch.Generator().manual_seed(0))
        # What a scheduler moves is the multiplier of all rates.
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", default="results/lightning", help="folder of the checkpoints")
    args = parser.parse_args()

    L.seed_everything(0)
    train, test = data(torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_epochs=args.epochs, default_root_dir=args.out, logger=False, accelerator="auto"
    )
    module = Digits()
    trainer.fit(
        module,
        DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=360),
    )
    print(f"test accuracy {trainer.callback_metrics['accuracy']:.1%}")
    print(f"learning rate for a later SGD run: {module.net.suggested_lr():.2g}")


if __name__ == "__main__":
    main()
