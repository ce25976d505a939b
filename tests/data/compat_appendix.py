"""The training loop of the paper's appendix and of the older tutorial, in the older names, written out."""

import torch
import torch.nn as nn
from alrao import AlraoModel, SGDAlrao
from alrao.learningratesgen import generator_randomlr_neurons, lr_sampler_generic

torch.manual_seed(0)
x = torch.randn(256, 10)
y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
preclassifier = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
nb_classifiers, nb_categories = 5, 3
net = AlraoModel(preclassifier, nb_categories, 20, nb_classifiers)
lr_sampler = lr_sampler_generic(1e-4, 1.0)
lr_preclassifier = generator_randomlr_neurons(net.preclassifier, lr_sampler)
classifiers_lr = [1e-4 * 1e4 ** (k / (nb_classifiers - 1)) for k in range(nb_classifiers)]
optimizer = SGDAlrao(
    net.parameters_preclassifier(),
    lr_preclassifier,
    net.classifiers_parameters_list(),
    classifiers_lr,
)
criterion = nn.NLLLoss()
for _ in range(20):
    net.switch.reset_cl_perf()
    for start in range(0, 256, 32):
        inputs, targets = x[start : start + 32], y[start : start + 32]
        optimizer.update_posterior(net.posterior())
        optimizer.zero_grad()
        loss = criterion(net(inputs), targets)
        loss.backward()
        optimizer.classifiers_zero_grad()
        newx = net.last_x.detach()
        for classifier in net.classifiers():
            criterion(classifier(newx), targets).backward()
        optimizer.step()
        net.update_switch(targets, catch_up=False)
print("accuracy", (net(x).argmax(1) == y).float().mean().item())
print([round(acc, 2) for _, acc in net.switch.get_cl_perf()], net.repr_posterior())
