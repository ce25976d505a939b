"""The authors' package `alrao`, name for name, on this package's kernels: `import alrao_fast.compat as alrao`.

`python -m alrao_fast.compat SCRIPT [ARGS]` runs a script that imports `alrao` itself; `install()` does the same for
the running interpreter. docs/migration.md maps the names to those of `alrao_fast`.
"""

from alrao_fast.compat import (
    alrao_model,
    custom_layers,
    earlystopping,
    gen_hyper,
    learningratesgen,
    optim_spec,
    switch,
    utils,
)
from alrao_fast.compat._install import install
from alrao_fast.compat.alrao_model import AlraoModel
from alrao_fast.compat.custom_layers import (
    L2LossAdditional,
    L2LossLog,
    LinearClassifier,
    LinearClassifierRNN,
    LinearRegressor,
)
from alrao_fast.compat.earlystopping import EarlyStopping
from alrao_fast.compat.gen_hyper import (
    fdet_lr_log,
    fdet_lr_unif,
    fdet_mom_id,
    fdet_mom_unif,
    frand_lr_log,
)
from alrao_fast.compat.learningratesgen import (
    generator_randomlr_neurons,
    generator_randomlr_weights,
    lr_sampler_generic,
)
from alrao_fast.compat.optim_spec import (
    AdamAlrao,
    SGDAlrao,
    alrao_step,
    init_alrao_optimizer,
    sample_best_candidate,
)
from alrao_fast.compat.switch import Switch

__all__ = [
    "AdamAlrao",
    "AlraoModel",
    "EarlyStopping",
    "L2LossAdditional",
    "L2LossLog",
    "LinearClassifier",
    "LinearClassifierRNN",
    "LinearRegressor",
    "SGDAlrao",
    "Switch",
    "alrao_model",
    "alrao_step",
    "custom_layers",
    "earlystopping",
    "fdet_lr_log",
    "fdet_lr_unif",
    "fdet_mom_id",
    "fdet_mom_unif",
    "frand_lr_log",
    "gen_hyper",
    "generator_randomlr_neurons",
    "generator_randomlr_weights",
    "init_alrao_optimizer",
    "install",
    "learningratesgen",
    "lr_sampler_generic",
    "optim_spec",
    "sample_best_candidate",
    "switch",
    "utils",
]
