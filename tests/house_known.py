"""Where the house is not yet as its rules want it. Entries are only ever struck off."""

CIRCLES: dict[str, list[list[str]]] = {
    "pipeline": [
        ["pipeline/api.py", "pipeline/state_dicts.py"],
        ["pipeline/plan_file.py", "pipeline/steps.py"],
    ]
}
"""Modules that lead back to themselves, by room."""
STRAY = {
    "pipeline": "cli cli_files cli_options cli_studies cli_upkeep deadlines driver evaluation events expand facts gc jobs lanes lock merging opening "
    "others outbox output plan plan_file progress prompt_notes recording registry results schedule show signals state_dicts status steps "
    "submit timeline tracking tracking_client tracking_events tracking_experts tracking_export tracking_index tracking_lineage "
    "tracking_local tracking_names tracking_recorder tracking_rows tracking_sink tracking_ui ui_server workspace"
}
"""Modules that have yet to move into a folder."""
CROWDED = ["merge_service", "pipeline", "workers/data"]
LONG_LISTS = {
    "cluster": [],
    "pipeline": [
        "pipeline/api.py:merge",
        "pipeline/api.py:merge_files",
        "pipeline/expand.py:Steps.add",
        "pipeline/plan.py:Planner.add",
        "pipeline/report/page.py:page",
        "pipeline/tracking.py:Tracker.__init__",
        "pipeline/tracking_rows.py:Rows.run",
    ],
    "workers": ["workers/training/batch_norm.py:OverRanks._function"],
}
"""Functions with more parameters than a caller can keep apart. `api.merge` is public and keeps its form."""
VAGUE = [
    "pipeline/plan.py:Planner.add",
    "pipeline/plan.py:Planner.sources",
    "pipeline/plan.py:Planner.recipe",
    "pipeline/plan.py:Planner.engine",
    "pipeline/plan_file.py:encode",
    "pipeline/plan_file.py:decode",
    "pipeline/plan_file.py:Prefixes.add",
    "pipeline/plan_file.py:Values.of",
    "pipeline/plan_file.py:inputs_of",
    "pipeline/store/artifact.py:difference",
    "pipeline/store/local.py:StepLike.spec",
    "pipeline/store/local.py:Store.commit",
    "pipeline/workspace.py:Workspace.summary",
    "pipeline/workspace.py:Workspace.known",
    "pipeline/workspace.py:Workspace.keep",
    "pipeline/workspace.py:Workspace.write_results",
    "workers/scoring/evaluate.py:evaluate",
    "workers/scoring/evaluate.py:Encoder.images",
    "workers/scoring/stream_orders.py:measure",
    "workers/training/budget.py:has_batch_norm",
    "workers/training/budget.py:check_fit",
    "workers/training/checkpoints.py:Checkpoints.complete",
    "workers/training/checkpoints.py:Checkpoints.judged",
    "workers/training/expert.py:train_expert",
]
