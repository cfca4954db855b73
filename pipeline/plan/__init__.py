"""A study as a graph of steps: from facts about the world, purely, each step once and named by what bears on its result.

Used from outside: `planner` (`make_plan`, `base_step`), `steps` (`Plan`, `Step`, `Facts`), `facts` (`gather`, `base_of`, `cache_of`),
`file` (plan.json), `prompt_notes` (classes that a model reads as one).
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.plan.planner")
