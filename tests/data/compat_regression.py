"""A script as users of the authors' package write it: regression."""

import torch
import torch.nn as nn
from alrao import AdamAlrao, AlraoModel, alrao_step, generator_randomlr_weights, lr_sampler_generic
from alrao.custom_layers import L2LossAdditional, L2LossLog, LinearRegressor
from alrao.optim_spec import sample_best_candidate

torch.manual_seed(0)
x = torch.rand(256, 3) * 2 - 1
y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
net = AlraoModel(
    "regression", L2LossLog(), nn.Sequential(nn.Linear(3, 32), nn.Tanh()), 5, LinearRegressor, 32, 2
)
lr = generator_randomlr_weights(net.internal_nn, lr_sampler_generic(1e-4, 1e-2))
optimizer = AdamAlrao(
    net.parameters_internal_nn(),
    lr,
    net.last_layers_parameters_list(),
    [1e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    betas=(0.9, 0.99),
)
criterion, own = L2LossAdditional(), L2LossLog()
for _ in range(30):
    for start in range(0, 256, 32):
        optimizer.zero_grad()
        output = net(x[start : start + 32])
        loss = criterion(output, y[start : start + 32])
        loss.backward()
        alrao_step(net, optimizer, own, y[start : start + 32])
best = sample_best_candidate(net(x))
print("error", (best - y).square().mean().item(), net.switch.get_ll_perf())
