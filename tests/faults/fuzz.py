"""Settings of all fuzz tests: the same cases in every run, so that a failure is reproducible."""

from hypothesis import HealthCheck, settings


def seeded(cases: int) -> settings:
    """Draw so many cases, without chance and without a database of examples."""
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
