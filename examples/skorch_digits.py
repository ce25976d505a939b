"""Digits as a scikit-learn estimator, by skorch: cross-validation of a network whose learning rate nobody chose.

python examples/skorch_digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

import alrao_fast as alrao


class Network(alrao.AlraoModel):
    def __init__(self, width: int = 256, num_clones: int = 10) -> None:
        backbone = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        super().__init__(backbone, alrao.ClassifierClones(width, 10, num_clones))


class AlraoClassifier(NeuralNetClassifier):
    # The criterion knows the network that made its predictions: it is made with it, not by keywords.
    def initialize_criterion(self):
        self.criterion_ = alrao.MixtureLoss(self.module_)
        return self

    # skorch takes the logarithm of probabilities where the criterion is torch's NLLLoss; ours takes log-probabilities.
    def get_loss(self, y_pred, y_true, *args, **kwargs):
        return self.criterion_(y_pred, y_true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folds", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    classifier = AlraoClassifier(
        Network,
        criterion=alrao.MixtureLoss,
        optimizer=alrao.AlraoSGD,
        optimizer__lr=1.0,
        max_epochs=args.epochs,
        batch_size=32,
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        predict_nonlinearity=torch.exp,
        verbose=0,
    )
    images, labels = load_digits(return_X_y=True)
    scores = cross_val_score(
        make_pipeline(StandardScaler(), classifier),
        images.astype("float32"),
        labels,
        cv=args.folds,
    )
    print(f"accuracy in {args.folds} folds: {', '.join(f'{s:.1%}' for s in scores)}")


if __name__ == "__main__":
    main()
