"""Where the house is not yet as its rules want it. Entries are only ever struck off."""

CIRCLES: dict[str, list[list[str]]] = {
    "pipeline": [
        ["pipeline/api.py", "pipeline/state_dicts.py"],
        ["pipeline/plan/file.py", "pipeline/plan/steps.py"],
    ]
}
"""Modules that lead back to themselves, by room."""
STRAY = {
    "pipeline": "cli cli_files cli_options cli_studies cli_upkeep deadlines driver evaluation events jobs lanes merging others output progress schedule "
    "show signals state_dicts status submit timeline",
    "workers": "pretrain_page pretrain_recipe",
}
"""Modules that have yet to move into a folder."""
CROWDED = ["merge_service", "pipeline", "workers/data"]
LONG_LISTS = {
    "cluster": [],
    "pipeline": [
        "pipeline/api.py:merge",
        "pipeline/api.py:merge_files",
        "pipeline/plan/draft.py:Steps.add",
        "pipeline/plan/planner.py:Planner.add",
        "pipeline/report/page.py:page",
        "pipeline/tracking/rows/rows.py:Rows.run",
        "pipeline/tracking/tracker.py:Tracker.__init__",
    ],
    "workers": ["workers/training/batch_norm.py:OverRanks._function"],
}
"""Functions with more parameters than a caller can keep apart. `api.merge` is public and keeps its form."""
VAGUE = [
    "pipeline/plan/draft.py:Steps.add",
    "pipeline/plan/draft.py:Steps.sources",
    "pipeline/plan/draft.py:Steps.recipe",
    "pipeline/plan/draft.py:Steps.engine",
    "pipeline/plan/draft.py:effective_params",
    "pipeline/plan/facts.py:stated",
    "pipeline/plan/file.py:encode",
    "pipeline/plan/file.py:decode",
    "pipeline/plan/file.py:Prefixes.add",
    "pipeline/plan/file.py:Values.of",
    "pipeline/plan/file.py:inputs_of",
    "pipeline/plan/planner.py:Planner.add",
    "pipeline/plan/planner.py:Planner.sources",
    "pipeline/plan/planner.py:Planner.recipe",
    "pipeline/plan/planner.py:Planner.engine",
    "pipeline/plan/steps.py:Described.splits",
    "pipeline/plan/steps.py:Plan.summary",
    "pipeline/plan/steps.py:Plan.to_json",
    "pipeline/plan/steps.py:Plan.from_json",
    "pipeline/store/artifact.py:difference",
    "pipeline/store/local.py:StepLike.spec",
    "pipeline/store/local.py:Store.commit",
    "pipeline/workspace/gc.py:collect",
    "pipeline/workspace/gc.py:describe",
    "pipeline/workspace/lock.py:write_driver",
    "pipeline/workspace/lock.py:write_last",
    "pipeline/workspace/lock.py:read_driver",
    "pipeline/workspace/workspace.py:Workspace.summary",
    "pipeline/workspace/workspace.py:Workspace.known",
    "pipeline/workspace/workspace.py:Workspace.keep",
    "pipeline/workspace/workspace.py:Workspace.write_results",
    "workers/scoring/evaluate.py:evaluate",
    "workers/scoring/evaluate.py:Encoder.images",
    "workers/scoring/stream_orders.py:measure",
    "workers/training/budget.py:has_batch_norm",
    "workers/training/budget.py:check_fit",
    "workers/training/checkpoints.py:Checkpoints.complete",
    "workers/training/checkpoints.py:Checkpoints.judged",
    "workers/training/expert.py:train_expert",
]
