#!/bin/sh
# A live service from beginning to end: six experts arrive over HTTP, a picture is classified, one expert is removed, another time step is
# rolled back to, the service is verified, and it ends. `make serve-demo` runs it, in some minutes on two cores. A second time it begins
# with the experts that are there. Variables: OUT, PORT, STEPS (of training), EXPERTS (the train/ folder of a store instead of training).
set -eu
OUT=${OUT:-runs/serve_demo} PORT=${PORT:-8420} STEPS=${STEPS:-60}
TASKS="letters scripts photos_b icon_style emoji_group skin_tone"
say() { printf '\n== %s\n' "$*"; }

if [ -z "${EXPERTS:-}" ]; then
    say "six experts are trained by a study"
    temporal-merge run configs/demo.yaml --out "$OUT/study" --set 'grid.strategies=[offline_merging_replay]' \
        --set "budget.steps_per_task=$STEPS" --set evaluation.fraction=0.05
    EXPERTS=$OUT/study/store/train
fi

say "the service starts"
rm -rf "$OUT/service"
temporal-merge serve configs/service.yaml --out "$OUT/service" --set gates.fraction=0.1 --set serving.workers=1 \
    --set "listen.port=$PORT" &
SERVICE=$!
trap 'kill $SERVICE 2>/dev/null || true' EXIT INT TERM
KEY=$OUT/service/service/zoo/door/service.token
until [ -s "$KEY" ]; do
    kill -0 $SERVICE || exit 1
    sleep 0.5
done
TEMPORAL_MERGE_TOKEN=$(cat "$KEY") TEMPORAL_MERGE_URL=http://127.0.0.1:$PORT
export TEMPORAL_MERGE_TOKEN TEMPORAL_MERGE_URL

say "six experts arrive; code 3 says that a gate has stopped one"
for TASK in $TASKS; do
    for EXPERT in "$EXPERTS"/t?-"$TASK"-init_base-*; do :; done
    temporal-merge arrive "$EXPERT" --task "$TASK" --license MIT --owner demo --wait || [ $? -eq 3 ]
done
temporal-merge service arrivals
temporal-merge service status

say "a picture is classified"
python - <<'PICTURE'
import os, tarfile, pathlib
import temporal_merge as tm

shard = sorted(pathlib.Path("data/mini/letters/test").glob("*.tar"))[0]
with tarfile.open(shard) as tar:
    member = next(one for one in tar if one.name.rpartition(".")[2] in ("png", "jpg", "webp"))
    picture = tar.extractfile(member).read()
with tm.Service(os.environ["TEMPORAL_MERGE_URL"], os.environ["TEMPORAL_MERGE_TOKEN"]) as service:
    seen = service.classify([picture], ["the letter A", "the letter B", "a cat"])
print(f"t = {seen.model.t}:", ", ".join(f"{one.label} {one.probability:.2f}" for one in seen.results[0].top))
PICTURE

say "one expert is removed, and another time step is served"
FIRST=$(temporal-merge service arrivals | awk '$2 == "superseded" || $2 == "promoted" {print $1; exit}')
if [ -n "$FIRST" ]; then
    temporal-merge service remove "$FIRST" --reason "the demo takes it out" --force
fi
ACCEPTED=$(temporal-merge service status | sed -n 's/.* of \([0-9]*\) is served.*/\1/p')
temporal-merge service rollback $((ACCEPTED > 0 ? ACCEPTED - 1 : 0)) --reason "the demo goes back"
temporal-merge service status

say "the service ends, and is verified"
kill $SERVICE
wait $SERVICE || true
trap - EXIT
temporal-merge service verify "$OUT/service"
