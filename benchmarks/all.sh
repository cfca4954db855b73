#!/bin/bash
# Every file of benchmarks/results/ that is not there yet, then the pages that state them.
#   benchmarks/all.sh CLIP_BENCHMARK_PYTHON MERGEKIT_PYTHON FUSIONBENCH_PYTHON
# WORK is a folder on a disk (10 GB), MEMORY one in memory, ROOT the mini suite's, RUN a command to put before each (such as nice).
set -u
cd "$(dirname "$0")/.."
clip=$1 mergekit=$2 fusionbench=$3
work=${WORK:-/tmp/temporal-merge-bench} memory=${MEMORY:-/dev/shm/temporal-merge-bench} root=${ROOT:-data/mini}
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD

make() { # NAME SCRIPT ARGUMENTS...
    local json=benchmarks/results/$1.json
    [ -e "$json" ] || ${RUN:-} .venv/bin/python "benchmarks/$2.py" "${@:3}" --json "$json" || echo "$1 failed" >&2
}

for technique in $(cd benchmarks && ../.venv/bin/python -c 'from arrivals import streaming; print(*streaming())'); do
    make arrivals-$technique arrivals --techniques $technique --work "$memory"
done
make evaluate-vit-b-16 evaluate --clip-benchmark "$clip" --model vit-b-16 --checkpoints 1 --datasets photos_b,letters --images 8 \
    --batch-size 16 --root "$root" --work "$work"
make evaluate-tiny evaluate --clip-benchmark "$clip" --checkpoints 4 --root "$root" --work "$work"
make tracker-down tracker_down configs/demo.yaml --set data.root="$root" --set 'stream.tasks=[letters,scripts]' \
    --set 'grid.strategies=[offline_merging,best_in_time]'
make fomo-costs costs
make plan-tasks plan --tasks 1000
make plan-trajectories plan --tasks 3 --trajectories 10000
make merge-limit merge --size vit-b-16 --experts 4 --no-cli --work "$work" \
    --techniques average,ema_fold,slerp_fold,task_arithmetic,magmax,lines_task_arithmetic,ties_kept,dare_ties,ties
for experts in 2 8; do
    make merge-memory-$experts merge --size vit-b-16 --experts $experts --repeats 1 --no-cli --work "$work" \
        --techniques average,task_arithmetic,dare_ties,ties
done
make merge-start-up merge --start-up --techniques average --experts 2 --work "$work"
make merge-peers merge --size small --experts 4 --memory 8 --mergekit "$mergekit" --fusionbench "$fusionbench" --work "$work" \
    --techniques average,task_arithmetic,magmax,dare_ties,ties,iso_c
make merge-agreement merge --experts 4 --repeats 1 --compare --mergekit "$mergekit" --fusionbench "$fusionbench" --work "$work" \
    --techniques average
make merge-folders folders --repeats 2 --mergekit "${mergekit%/*}/mergekit-yaml" --work "$work"
make feed feed --work "$memory/feed"
make pool pool --work "$work/pool"
make train train --steps 60 --stages 0 --rounds 3 --root "$root" --work "$work"
make orchestration-overhead orchestration overhead configs/demo.yaml --runs 2 --set data.root="$root" \
    --set 'grid.strategies=[offline_merging,best_in_time]'
make orchestration-scale orchestration scale --png docs/orchestration.png
make serving serving --rounds 3 --swaps 33
make adapters adapters --root "$root"
[ -e benchmarks/results/pack.json ] || ${RUN:-} .venv/bin/python -m pipeline.cli run configs/demo.yaml --out "$work/demo" --set data.root="$root"
make pack pack "$work/demo"
make study-report study_report configs/sweep.yaml --out "$work/report"
make tracking tracking --trajectories 288 ${STEPS:+--steps "$STEPS"}
make merge-limit-8 merge --size vit-b-16 --experts 8 --no-cli --work "$work" \
    --techniques average,task_arithmetic,magmax,lines_task_arithmetic,slerp_fold,ties_kept,dare_ties,breadcrumbs_ties_kept
make storage-sweep storage configs/sweep.yaml --work "$work" --set 'grid.seed=[0]' --set 'grid.budget.multiplier=[1]' \
    --set 'stream.tasks=[letters,scripts]'
make statistics-arrivals arrivals --techniques regmean,lot,fisher,mats,tatr --experts 200 --span 10 --work "$memory"
make evidence-vit-b-32 evidence --size vit-b-32 --images 32 --experts 1 --only "gram,published gram,fisher,published fisher" --work "$work"
make regmean-vit-b-16 regmean --size vit-b-16 --experts 8 --rounds 3 --fusionbench "$fusionbench" --work "$work"
make storage-small-disk storage --small-disk 3 --work "$work"
.venv/bin/python benchmarks/page.py
