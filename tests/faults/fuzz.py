"""How every fuzz test here draws its cases: the same ones each time, so that a failure is a failure for everybody."""

from hypothesis import HealthCheck, settings


def seeded(cases: int) -> settings:
    """So many cases, drawn without chance or memory."""
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
