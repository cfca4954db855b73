"""temporal-merge from Python: load, plan and run studies, read what came out, merge files or state dicts.

    import temporal_merge as tm

Invariant: importing this costs nothing; a name is looked up when it is first used (PEP 562), in `pipeline.api` or where it is.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_service.errors import UserError
    from merge_service.techniques import Param, Technique, register, technique
    from pipeline.api import (
        Arrivals,
        Run,
        Study,
        evaluate,
        import_data,
        init,
        learn,
        load_study,
        measure,
        merge,
        merge_recipe,
        open_run,
        plan,
        run,
        techniques,
        trajectory,
    )
    from pipeline.service.client import AsyncService, Service
    from pipeline.service.client.delivery import Delivery

CLIENT = "pipeline.service.client"
ELSEWHERE = {"AsyncService": CLIENT, "Delivery": f"{CLIENT}.delivery", "Service": CLIENT}
"""The clients of a live service, whose libraries a program of merges does without."""

__all__ = [
    "Arrivals",
    "AsyncService",
    "Delivery",
    "Param",
    "Run",
    "Service",
    "Study",
    "Technique",
    "UserError",
    "evaluate",
    "import_data",
    "init",
    "learn",
    "load_study",
    "measure",
    "merge",
    "merge_recipe",
    "open_run",
    "plan",
    "register",
    "run",
    "technique",
    "techniques",
    "trajectory",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_packages()
    from importlib import import_module

    value = globals()[name] = getattr(import_module(ELSEWHERE.get(name, "pipeline.api")), name)
    return value


def _check_packages() -> None:
    """Raise ImportError, which names the file, if a program has something else by the name of a package of ours."""
    from importlib.util import find_spec
    from pathlib import Path

    for package in ("pipeline", "workers", "merge_service", "cluster"):
        ours = (Path(__file__).parent / package).resolve()
        spec = find_spec(package)
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), str(spec.origin)]
        if not places or Path(places[0]).resolve() != ours:
            found = places[0] if places else "nothing"
            raise ImportError(
                f"temporal-merge has a package {package}, but Python finds {found} by that name; rename it, or take its directory off "
                "the import path (PYTHONPATH, the directory of your program)"
            )


def __dir__() -> list[str]:
    return __all__
