"""Training of one expert: from its initial weights, by its recipe and within its budget, to a validated weights directory.

Used from outside: `expert` (`train_expert`), `recipe` (`Recipe`), `budget` (the cost of a sample; `check_fit`), `engines.groups`
(`join_group`, the rendezvous of ranks).
"""
