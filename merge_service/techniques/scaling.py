"""The factor of the combined task vector: one for all tensors. `families/lines.py` has one that grows with depth.

Invariant: a factor depends on parameters and tensor names, never on the tensors' numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_service.techniques.place import View


@dataclass(frozen=True)
class Factor:
    """The value of the parameter `name`, 1 for a technique without it. Base of other ways to scale.

    `by_name`: the factor depends on what tensor names mean, so a report shows how they were read.
    """

    name: str = "scale"
    by_name = False

    def factors(self, view: View) -> Mapping[str, float]:
        """The factor of every merged tensor. Raises TechniqueError if names do not tell what it depends on."""
        return dict.fromkeys((tensor for tensor, _ in view.merged), view.params.get(self.name, 1.0))

    def largest(self, params: Mapping[str, Any]) -> tuple[float, str]:
        """The largest magnitude of a factor, and the formula for it in the names of parameters."""
        return abs(params.get(self.name, 1.0)), self.name

    def remarks(self, view: View) -> Iterator[str]:
        """What the user should know about how tensor names were read."""
        return iter(())


BY_SCALE = Factor("scale")
