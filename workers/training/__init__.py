"""One expert: from its initial weights, by its recipe and within its budget, to a checked weights directory.

Used from outside: `expert` (`train_expert`), `recipe` (`Recipe`), `budget` (what a sample costs; `check_fit`), `engines.groups`
(`join_group`, where ranks meet).
"""
