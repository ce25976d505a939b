"""The builds for the tests: built once, or skipped with the reason; and how many numbers hypothesis tries."""

import functools
import os

import pytest
from element_math import build
from hypothesis import HealthCheck, settings

any_numbers = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def builds():
    return build.build()


def load(name):
    """A build's module."""
    reason = build.obstacle()
    if reason is not None and "cpu" in os.environ.get("ALRAO_REQUIRE", "").split(","):
        raise AssertionError(f"ALRAO_REQUIRE names cpu: {reason}")
    reason = reason or build.cannot_run(name)
    if reason is not None:
        pytest.skip(reason)
    return build.load(builds()[name])
