"""The paper's language model: an embedding and a two-layer LSTM, 100 features each."""

from torch import Tensor, nn

from benchmarks.networks.layers import scaled

State = tuple[Tensor, Tensor]


class LSTMBackbone(nn.Module):
    """Embedding and LSTM: tokens [T, B] -> features [T, B, hidden width], and the LSTM's state.

    `dropout` is applied to the embedding and to each layer's output, in training.
    """

    def __init__(
        self,
        num_tokens: int,
        hidden: int = 100,
        layers: int = 2,
        *,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_features = scaled(hidden, width)
        self.embedding = nn.Embedding(num_tokens, self.out_features)
        self.lstm = nn.LSTM(
            self.out_features, self.out_features, layers, dropout=dropout if layers > 1 else 0.0
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        features, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.dropout(features), state
