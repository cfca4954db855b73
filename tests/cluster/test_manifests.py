"""The launch files, filled in with their own settings, checked against the schemas of the programs that read them; no network.

The autoscaler's file is checked by Ray's own schema, Kubernetes objects by the API's (strictly: an unknown key fails),
Ray's custom resources by ours, the Slurm script by a dry run with commands that only print their arguments.
"""

import configparser
import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from cluster.code import PACKAGES
from tests.world import ROOT

LAUNCH = ROOT / "cluster" / "launch"
KUBERNETES = sorted(path.name for path in (LAUNCH / "kubernetes").glob("*.yaml"))
API = "1.31"
NEEDED = {"EFS_HOST": "fs-1.efs.us-west-2.amazonaws.com", "AMI": "ami-1"}


def render(name: str, **settings: str) -> str:
    return subprocess.run(
        [LAUNCH / "render", name], cwd=ROOT, env=os.environ | NEEDED | settings, check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


def objects(name: str, **settings: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(f"kubernetes/{name}", **settings)))


def crd_schema() -> Any:
    return json.loads((ROOT / "tests" / "cluster" / "ray_crds.json").read_text())


def pods(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod template of an object, of any kind."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pods(value)


def check(thing: dict[str, Any]) -> None:
    if thing["apiVersion"].startswith("ray.io/"):
        jsonschema.validate(thing, crd_schema())
        for spec in pods(thing):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, API, strict=True)
    else:
        kubernetes_validate.validate(thing, API, strict=True)


@pytest.mark.parametrize("folder", ["kubernetes", "aws"])
def test_every_variable_is_declared_and_every_declared_one_is_used(folder: str) -> None:
    declared = set(re.findall(r"^([A-Z][A-Z0-9_]*)=", (LAUNCH / folder / "settings.env").read_text(), re.M))
    used = {
        name
        for path in (LAUNCH / folder).glob("*.yaml")
        for name in re.findall(r"\$\{([A-Z][A-Z0-9_]*)\}", path.read_text())
    }
    assert used == declared


def test_variable_that_nobody_gives_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.env").write_text("GIVEN=1\n")
    (tmp_path / "file.yaml").write_text("a: ${GIVEN}\nb: $SHELL_STAYS ${MISSING_ONE}\n")
    answer = subprocess.run([LAUNCH / "render", tmp_path / "file.yaml"], capture_output=True, text=True)
    assert answer.returncode == 1 and "line 2: the settings do not give MISSING_ONE" in answer.stderr
    (tmp_path / "settings.env").write_text("GIVEN='a b'\nMISSING_ONE=${GIVEN}\n")
    answer = subprocess.run([LAUNCH / "render", tmp_path / "file.yaml"], capture_output=True, text=True)
    assert answer.stdout == "a: a b\nb: $SHELL_STAYS a b\n"


def test_setting_without_a_default_must_be_given() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NEEDED}
    answer = subprocess.run(
        [LAUNCH / "render", "aws/cluster.yaml"], env=environment, capture_output=True, text=True
    )
    assert answer.returncode != 0 and "EFS_HOST: the DNS name" in answer.stderr


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_objects_fit_their_schemas(name: str) -> None:
    for thing in objects(name):
        check(thing)
        assert thing["kind"] == "Namespace" or thing["metadata"]["namespace"] == "temporal-merge"


def test_settings_reach_the_objects() -> None:
    (cluster,) = objects("ray-cluster.yaml", GPUS="0", WORKERS="7", IMAGE="mine:1", NAMESPACE="ours")
    check(cluster)
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (workers["replicas"], limits["nvidia.com/gpu"], cluster["metadata"]["namespace"]) == (
        7,
        "0",
        "ours",
    )
    assert all(container["image"] == "mine:1" for pod in pods(cluster) for container in pod["containers"])


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods_run_without_root_or_privileges_and_nothing_leaves_the_cluster(name: str) -> None:
    for thing in objects(name):
        assert thing["kind"] not in ("Ingress", "Gateway")
        if thing["kind"] == "Service":
            assert thing["spec"]["type"] == "ClusterIP"
        if thing["kind"] in ("RayCluster", "RayJob"):
            ray_spec = thing["spec"].get("rayClusterSpec", thing["spec"])
            assert ray_spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
            assert ray_spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        for pod in pods(thing):
            assert pod["securityContext"]["runAsNonRoot"] and not pod.get("hostNetwork")
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
                assert (
                    container["resources"]["requests"]["memory"]
                    and container["resources"]["limits"]["memory"]
                )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpecs"), {}),
        (("spec", "authOptions", "secret"), "x"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "volume"), []),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("spec", "workerGroupSpecs", 0, "minReplica"), 1),
    ],
)
def test_mistyped_field_of_a_ray_cluster_fails(path: tuple[Any, ...], value: Any) -> None:
    (cluster,) = objects("ray-cluster.yaml")
    wrong = copy.deepcopy(cluster)
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


@pytest.mark.fault("F27")
def test_autoscaler_file_fits_rays_own_schema_and_keeps_the_dashboard_to_itself() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load(render("aws/cluster.yaml", WORKERS="3", WORKERS_MAX="5"))
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert (cluster["max_workers"], cluster["available_node_types"]["worker"]["min_workers"]) == (5, 3)
    (start,) = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start and "$RAY_HEAD_IP" in cluster["worker_start_ray_commands"][1]
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    wrong = cluster | {"head_node_types": "head"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_images_base_is_pinned_its_sources_exist_and_its_user_is_not_root() -> None:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [
        line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")
    ]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in lines} <= known
    (base,) = [rest for word, rest in lines if word == "FROM"]
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?", base)
    allowed = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for _, rest in (line for line in lines if line[0] == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in allowed
    users = [rest for word, rest in lines if word == "USER"]
    assert users[-1] == "ray" and lines.index(["USER", "ray"]) > max(
        i for i, line in enumerate(lines) if line[0] == "RUN"
    )
    assert "ENTRYPOINT" in dict(lines) and "RAY_AUTH_MODE=token" in text and "AUTH_TOKEN=" not in text


def test_image_holds_every_package_and_module_that_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    modules = [f"{name}.py" for name in setup["options"]["py_modules"].split()]
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert {*modules, *PACKAGES} <= {source for line in copied for source in line.split()}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A Slurm of two nodes that only prints its arguments; `FAIL=word` makes commands with that word fail."""
    commands = tmp_path / "bin"
    commands.mkdir()
    srun = f"""#!/bin/bash
echo "srun $* TOKEN=$(cat "$RAY_AUTH_TOKEN_PATH" | wc -c) MODE=$RAY_AUTH_MODE" >> {tmp_path}/said
[[ $* == *"hostname --ip-address"* ]] && echo 10.0.0.1 10.9.9.9
case $* in # as with the real ones: a head is healthy once it has started, nodes have joined once they have
    *health-check*) grep -q "ray start --head" {tmp_path}/said || exit 1 ;;
    *cluster.joined*) until grep -q "ray start --address" {tmp_path}/said; do sleep 0.1; done ;;
esac
[[ -n ${{FAIL:-}} && $* == *"$FAIL"* ]] && exit ${{CODE:-1}}
exit 0
"""
    for name, text in {"srun": srun, "scontrol": "#!/bin/bash\nprintf 'n1\\nn2\\n'\n"}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path), "VENV": str(tmp_path / "venv"),
        "STUDY": "s.yaml", "OUT": str(tmp_path / "out dir"), "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip


def sbatch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    script = LAUNCH / "slurm" / "study.sbatch"
    return subprocess.run(
        ["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.fault("F27")
def test_slurm_job_starts_head_and_workers_runs_the_study_and_leaves_no_token(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    answer = sbatch(slurm, "--set", "grid.seed=[0, 1]")
    assert answer.returncode == 0, answer.stderr
    said = (tmp_path / "said").read_text().splitlines()
    (head,) = [line for line in said if "ray start --head" in line]
    (worker,) = [line for line in said if "ray start --address=10.0.0.1:21230" in line]
    assert (
        "--nodelist=n1" in head
        and "--node-ip-address=10.0.0.1 --port=21230" in head
        and "--dashboard-host=127.0.0.1" in head
    )
    assert "--nodelist=n2" in worker
    for line in (head, worker):
        assert "--num-cpus=16 --num-gpus=4" in line and line.endswith("TOKEN=64 MODE=token")
    assert any("cluster.joined 10.0.0.1:21230 2 300" in line for line in said)
    (run,) = [line for line in said if "temporal-merge run" in line]
    assert f"run s.yaml --address 10.0.0.1:21230 --out {tmp_path}/out dir --set grid.seed=[0, 1]" in run
    assert said.index(head) < said.index(run)
    assert not list((tmp_path / "out dir").iterdir())


@pytest.mark.parametrize(("word", "code"), [("temporal-merge run", 2), ("cluster.joined", 1)])
def test_slurm_job_ends_with_the_code_of_what_failed(
    slurm: dict[str, str], tmp_path: Path, word: str, code: int
) -> None:
    assert sbatch(slurm | {"FAIL": word, "CODE": str(code)}).returncode == code
    assert not list((tmp_path / "out dir").iterdir())


def test_slurm_job_without_a_head_or_a_study_says_so(slurm: dict[str, str]) -> None:
    answer = sbatch(slurm | {"FAIL": "health-check", "JOIN_SECONDS": "0"})
    assert answer.returncode == 1 and "no Ray head on n1" in answer.stderr
    del slurm["STUDY"]
    answer = sbatch(slurm)
    assert answer.returncode != 0 and "give STUDY=" in answer.stderr
