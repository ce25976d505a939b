"""Generated calls of the whole public API, good, bad and odd ones, each with a verdict.

RIGHT: the result is that of an oracle computed here, by torch.optim, plain torch or formulas in float64. CLEAR ERROR: a
TypeError, ValueError or RuntimeError that names the argument, what it got and what it expects, after which every
tensor, param group, state and buffer holds the bits it held. FAILURE is everything else: accepted and wrong or
ignored, an obscure error, a state changed by a call that raised, a good value refused.

    python tests/campaign --seed 0 --calls 600      counts of the verdicts, and every failure
    python tests/campaign --only 0:123              one generated call by its id
    python tests/campaign --only "A1 ..."           one of the fixed cases by its name

engine.py has the verdicts, values.py the kinds of values; the other modules make calls: what an area of the API takes,
and its oracle. cases_*.py hold fixed cases, whose right value is known beforehand.
"""
