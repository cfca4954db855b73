"""What a merge will read, write and need, before it begins: from headers alone, by the merge's own decisions.

`plan_merge` is of whole models, `plan_groups` of recipes whose tensors are not all made alike; both give a `MergePlan`.
"""
