"""A script as users of the authors' package write it: an LSTM language model on text, hidden states forwarded."""

import sys

import alrao
import torch
import torch.nn as nn
from alrao.custom_layers import LinearClassifierRNN
from alrao.learningratesgen import generator_randomlr_neurons, lr_sampler_generic
from alrao.optim_spec import SGDAlrao, alrao_step

print("arguments", sys.argv[1:])
text = "the quick brown fox jumps over the lazy dog. " * 60
chars = sorted(set(text))
data = torch.tensor([chars.index(c) for c in text]).view(10, -1).t().contiguous()


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid):
        super().__init__()
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid)
        self.nhid = nhid

    def forward(self, input, hidden):
        output, hidden = self.rnn(self.encoder(input), hidden)
        return output, hidden

    def init_hidden(self, bsz):
        return torch.zeros(1, bsz, self.nhid), torch.zeros(1, bsz, self.nhid)


torch.manual_seed(0)
net = alrao.AlraoModel(
    "classification",
    nn.NLLLoss(),
    RNNModel(len(chars), 16, 32),
    6,
    LinearClassifierRNN,
    32,
    len(chars),
)
net.method_fwd_internal_nn("init_hidden")
net.method_fwd_last_layers("init_weights")
net.init_weights()
lr = generator_randomlr_neurons(net.internal_nn, lr_sampler_generic(1e-2, 10.0))
rates = [1e-2 * 1000 ** (k / 5) for k in range(6)]
optimizer = SGDAlrao(
    net.parameters_internal_nn(), lr, net.last_layers_parameters_list(), rates, momentum=0.0
)
criterion = nn.NLLLoss()
bptt = 20
for epoch in range(3):
    hidden = net.init_hidden(10)
    losses = []
    for i in range(0, len(data) - 1 - bptt, bptt):
        hidden = tuple(h.detach() for h in hidden)
        optimizer.zero_grad()
        output, hidden = net(data[i : i + bptt], hidden)
        targets = data[i + 1 : i + 1 + bptt].reshape(-1)
        loss = criterion(output, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters_internal_nn(), 0.25)
        alrao_step(net, optimizer, criterion, targets)
        losses.append(loss.item())
    print("epoch", epoch, "loss", sum(losses) / len(losses))
