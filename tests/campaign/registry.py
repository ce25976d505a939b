"""All areas and fixed cases, and a call by its id."""

from campaign import (
    cases_arguments,
    cases_heads,
    cases_optimizer,
    cases_states,
    heads,
    models,
    modes,
    ops,
    options,
    rates,
    training,
    twins,
)
from campaign.engine import AREAS, CASES, Outcome, run_case, run_generated

MODULES = [cases_arguments, cases_heads, cases_optimizer, cases_states]
MODULES += [heads, models, modes, ops, options, rates, training, twins]
__all__ = ["AREAS", "CASES", "MODULES", "run"]


def run(id: str) -> Outcome:
    if id in CASES:
        return run_case(id)
    seed, number = id.split(":")
    return run_generated(int(seed), int(number))
