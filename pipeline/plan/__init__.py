"""The plan of a study: a graph of steps, computed from facts by a pure function. Each step occurs once, named by its spec.

Used from outside: `planner` (`make_plan`, `base_step`), `steps` (`Plan`, `Step`, `Facts`), `facts` (`gather`,
`base_of`, `cache_of`), `file` (plan.json), `prompt_notes` (classes that a model cannot distinguish).
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.plan.planner")
