"""ray_cluster.yaml, the Dockerfile and the Kubernetes manifests, checked without a cluster."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import autoscaling
import deployment
import kuberay
import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import ValidationError
from servers import ROOT

from parallelmind.cluster_nodes import all_nodes
from parallelmind.config import TrainConfig
from serving.config import AppConfig
from workloads.common.read_config import read_config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
INSTALLED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quantize"]]
DOCKERFILE = (kuberay.DEPLOY / "Dockerfile").read_text(encoding="utf-8")
DEVICES = ("cpu", "gpu")
CLUSTERS = {
    "rayjob.yaml": lambda: kuberay.job().cluster,
    "rayservice.yaml": lambda: kuberay.service().cluster,
}


@pytest.fixture(scope="module")
def launch_config() -> dict[str, Any]:
    return autoscaling.prepared_config()


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> kuberay.Cluster:
    return CLUSTERS[request.param]()


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile as (name, arguments)."""
    lines = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    parts = [line.partition(" ") for line in lines if line.strip()]
    return [(name, rest.strip()) for name, _, rest in parts]


def base_images() -> set[str]:
    """The images that those of the Dockerfile are built from, one for each kind of pod."""
    (base,) = [rest for name, rest in instructions() if name == "FROM"]
    return {base.replace("${DEVICE}", device) for device in DEVICES}


def images(launch_config: dict[str, Any]) -> set[str]:
    node_images = {
        node_type["docker"]["worker_image"]
        for node_type in launch_config["available_node_types"].values()
        if "docker" in node_type
    }
    return node_images | {launch_config["docker"]["image"]} | base_images()


def test_ray_up_accepts_the_cluster(launch_config: dict[str, Any]) -> None:
    """The schema and the checks of `ray up`."""
    from ray.autoscaler._private.util import validate_config

    validate_config(launch_config)
    assert launch_config["provider"]["type"] == "aws"


def test_ray_up_refuses_an_unknown_field(launch_config: dict[str, Any]) -> None:
    from jsonschema import ValidationError as SchemaError
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(SchemaError):
        validate_config({**launch_config, "max_worker": 3})


def test_the_head_runs_no_tasks_and_spot_workers_start_from_zero(launch_config: dict[str, Any]) -> None:
    types = dict(launch_config["available_node_types"])
    assert types.pop(launch_config["head_node_type"])["resources"] == {"CPU": 0}
    assert sorted("GPU" in node_type["resources"] for node_type in types.values()) == [False, True]
    for node_type in types.values():
        assert node_type["min_workers"] == 0
        assert node_type["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(node_type["max_workers"] for node_type in types.values()) == launch_config["max_workers"]


def test_jobs_know_the_nodes_that_the_cluster_may_start(
    launch_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(autoscaling.GROWS_TO, autoscaling.grows_to(launch_config))
    types = dict(launch_config["available_node_types"])
    del types[launch_config["head_node_type"]]
    resources = [
        node_type["resources"] for node_type in types.values() for _ in range(node_type["max_workers"])
    ]
    assert all_nodes([]) == resources


def test_every_node_requires_the_token_and_has_it(launch_config: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in launch_config["docker"]["run_options"]
    assert launch_config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    head = " ".join(launch_config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in autoscaling.CLUSTER.read_text(encoding="utf-8")


def constraints(device: str) -> dict[str, str]:
    """The versions that nodes of this kind install besides those of constraints.txt."""
    lines = (ROOT / f"constraints-{device}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith(("#", "--")))


def setup_commands(launch_config: dict[str, Any], node_type: str) -> list[str]:
    """The commands that Ray runs in the container of a new node."""
    if node_type == launch_config["head_node_type"]:
        return list(launch_config["head_setup_commands"])
    settings = launch_config["available_node_types"][node_type]
    return list(settings.get("worker_setup_commands", launch_config["worker_setup_commands"]))


@pytest.mark.parametrize(
    ("node_type", "device"), [("head", "cpu"), ("data_worker", "cpu"), ("gpu_worker", "gpu")]
)
def test_setup_installs_the_dependencies_of_a_node_and_not_the_project(
    launch_config: dict[str, Any], tmp_path: Path, node_type: str, device: str
) -> None:
    """The setup commands run with the files that `ray up` copies, and a pip that records its arguments."""
    (tmp_path / "bin").mkdir()
    installed = tmp_path / "pip-arguments"
    deployment.write_command(tmp_path / "bin" / "pip", f'echo "$@" >> {installed}')
    deployment.write_command(
        tmp_path / "bin" / "python", f'case "$2" in *cuda*) exit 0;; *) exec {sys.executable} "$@";; esac'
    )
    deployment.run_setup(setup_commands(launch_config, node_type), launch_config, tmp_path, tmp_path / "bin")
    extra = ["install -q -c constraints.txt boto3"] if node_type == "head" else []
    expected = f"install -q -c constraints.txt -c constraints-{device}.txt -r requirements.txt"
    assert installed.read_text().splitlines() == [expected, *extra]
    assert (tmp_path / "dependencies" / "requirements.txt").read_text().splitlines() == INSTALLED
    assert {Requirement(line).name for line in INSTALLED} <= set(PINNED)
    assert {"boto3"} <= set(PINNED)


def test_a_node_without_a_gpu_gets_no_packages_of_cuda(launch_config: dict[str, Any]) -> None:
    cpu, gpu = constraints("cpu"), constraints("gpu")
    assert cpu == {"torch": f"{PINNED['torch']}+cpu"}
    assert gpu["torch"] == PINNED["torch"]
    assert {name for name in gpu if name.startswith("nvidia-")} >= {"nvidia-cudnn-cu13", "nvidia-nccl-cu13"}
    for node_type in launch_config["available_node_types"]:
        has_gpu = "GPU" in launch_config["available_node_types"][node_type]["resources"]
        commands = " ".join(setup_commands(launch_config, node_type))
        assert ("constraints-gpu.txt" in commands, "constraints-cpu.txt" in commands) == (
            has_gpu,
            not has_gpu,
        )
        assert ("torch.ones" in commands) == has_gpu  # fails with a driver that is too old


def test_every_node_has_the_rights_that_s3_needs(launch_config: dict[str, Any]) -> None:
    for name, node_type in launch_config["available_node_types"].items():
        role = "head" if name == launch_config["head_node_type"] else "worker"
        assert node_type["node_config"]["IamInstanceProfile"] == {"Name": f"parallelmind-{role}"}


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("node_type", ["head", "data_worker", "gpu_worker"])
def test_setup_commands_run_in_an_empty_environment(
    launch_config: dict[str, Any], tmp_path: Path, node_type: str
) -> None:
    """All but the downloads runs: pip resolves what it would install, which needs PyPI and takes minutes."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python, binaries = tmp_path / "venv" / "bin" / "python", tmp_path / "bin"
    binaries.mkdir()
    report = tmp_path / "report.json"
    deployment.write_command(
        binaries / "pip", f'exec {python} -m pip "$@" --dry-run --report {report}-$(date +%s%N)'
    )
    deployment.write_command(
        binaries / "python", f'case "$2" in *cuda*) exit 0;; *) exec {python} "$@";; esac'
    )
    deployment.run_setup(setup_commands(launch_config, node_type), launch_config, tmp_path, binaries)
    resolved = {
        package["metadata"]["name"].lower(): package["metadata"]["version"]
        for file in tmp_path.glob("report.json-*")
        for package in json.loads(file.read_text())["install"]
    }
    device = "gpu" if node_type == "gpu_worker" else "cpu"
    pins = {name.lower(): version for name, version in (PINNED | constraints(device)).items()}
    assert {name: version for name, version in resolved.items() if pins.get(name) != version} == {}
    assert ("nvidia-nccl-cu13" in resolved) == (device == "gpu")


def test_images_have_the_pinned_ray_and_a_supported_python(launch_config: dict[str, Any]) -> None:
    for image in images(launch_config):
        match = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)-(cpu|gpu)", image)
        assert match, image
        assert match[1] == PINNED["ray"]
        assert f"3.{match[2]}" in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_the_image_is_built_from_existing_files_and_runs_unprivileged() -> None:
    lines = instructions()
    ignored = (kuberay.DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    sources = {source for name, rest in lines if name == "COPY" for source in rest.split()[1:-1]}
    assert all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    assert [rest for name, rest in lines if name == "USER"] == ["ray"]
    assert {name for name, _ in lines} == {"ARG", "FROM", "USER", "WORKDIR", "COPY", "RUN"}


def test_the_image_has_the_same_dependencies_as_a_launched_node(launch_config: dict[str, Any]) -> None:
    (run,) = [" ".join(rest.split()) for name, rest in instructions() if name == "RUN"]
    list_dependencies = re.compile(r"python -c '.*?'")
    assert list_dependencies.findall(run) == list_dependencies.findall(launch_config["setup_commands"][0])
    options = "-c constraints.txt -c constraints-${DEVICE}.txt -r /tmp/requirements.txt"
    assert f"pip install --no-cache-dir {options}" in run


def test_kubernetes_accepts_the_pods(cluster: kuberay.Cluster) -> None:
    for spec in kuberay.pods(cluster):
        kuberay.validate("Pod", metadata={"name": "any"}, spec=spec)
    broken = {**kuberay.pods(cluster)[0], "volume": []}
    with pytest.raises(Exception, match="volume"):
        kuberay.validate("Pod", metadata={"name": "any"}, spec=broken)


def test_pods_have_no_privileges_and_request_resources(cluster: kuberay.Cluster) -> None:
    unprivileged = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert cluster.autoscaler_options.security_context == unprivileged
    for spec in kuberay.pods(cluster):
        assert spec["securityContext"]["runAsNonRoot"]
        (container,) = spec["containers"]
        assert container["securityContext"] == unprivileged
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]


def test_pods_share_the_claimed_volume(cluster: kuberay.Cluster) -> None:
    claim = kuberay.read("storage.yaml")
    kuberay.validate(claim["kind"], metadata=claim["metadata"], spec=claim["spec"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for spec in kuberay.pods(cluster):
        claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]}
        assert set(claims.values()) == {claim["metadata"]["name"]}
        assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == set(claims)


def test_pods_have_the_image_of_their_device_and_know_the_pods_that_may_start(
    cluster: kuberay.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in kuberay.pods(cluster):
        (container,) = spec["containers"]
        device = "gpu" if "nvidia.com/gpu" in container["resources"]["requests"] else "cpu"
        assert container["image"].endswith(f"-{device}")
    variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    monkeypatch.setenv(autoscaling.GROWS_TO, variables[autoscaling.GROWS_TO])
    expected = []
    for group in cluster.worker_group_specs:
        requested = group.template["spec"]["containers"][0]["resources"]["requests"]
        names = {"CPU": "cpu", "GPU": "nvidia.com/gpu"}
        resources = {name: float(requested[key]) for name, key in names.items() if key in requested}
        expected += [resources] * group.max_replicas
    assert all_nodes([]) == expected


def test_the_head_runs_no_tasks_and_groups_can_grow(cluster: kuberay.Cluster) -> None:
    assert cluster.head_group_spec.ray_start_params == {"num-cpus": "0"}
    assert cluster.ray_version == PINNED["ray"]
    for group in cluster.worker_group_specs:
        assert group.min_replicas <= group.replicas <= group.max_replicas


@pytest.mark.parametrize(
    ("kind", "name"), [(kuberay.Job, "rayjob.yaml"), (kuberay.Service, "rayservice.yaml")]
)
def test_an_unknown_field_of_a_manifest_is_refused(kind: type[kuberay.StrictModel], name: str) -> None:
    manifest = kuberay.read(name)
    with pytest.raises(ValidationError):
        kind.model_validate({**manifest, "spec": {**manifest["spec"], "sped": 1}})


def test_the_job_is_a_command_of_this_project() -> None:
    job = kuberay.job()
    environment = {
        variable["name"]: variable["value"]
        for variable in kuberay.pods(job.cluster)[0]["containers"][0]["env"]
    }
    shell, option, line = shlex.split(job.entrypoint)
    assert [shell, option] == ["sh", "-c"]
    expanded = re.sub(r"\$(\w+)", lambda match: environment[match[1]], line)
    python, option, module, *arguments = expanded.split()
    assert [python, option, module] == ["python", "-m", "workloads.train"]
    config = read_config(TrainConfig, arguments)
    assert config.services.mlflow_uri == environment["MLFLOW_TRACKING_URI"]
    assert config.run.output_dir.startswith(
        kuberay.pods(job.cluster)[0]["containers"][0]["volumeMounts"][0]["mountPath"]
    )
    gpu = next(group for group in job.cluster.worker_group_specs if group.group_name == "gpu")
    assert config.workers.num_workers <= gpu.replicas  # the job counts the replicas when it starts


def test_job_and_service_find_the_project_in_the_image() -> None:
    from ray.runtime_env import RuntimeEnv
    from ray.serve.schema import ServeDeploySchema

    (home,) = [rest for name, rest in instructions() if name == "WORKDIR"]
    serve_config = ServeDeploySchema.model_validate(yaml.safe_load(kuberay.service().serve_config))
    (application,) = serve_config.applications
    for runtime_env in (RuntimeEnv(**yaml.safe_load(kuberay.job().runtime_env)), application.runtime_env):
        assert runtime_env["env_vars"] == {"PYTHONPATH": f"{home}/platform:{home}"}
    assert application.import_path == "serving.app:build"


def test_the_service_fits_its_pods_and_requires_keys() -> None:
    service = kuberay.service()
    serve_config = yaml.safe_load(service.serve_config)
    config = AppConfig.of(serve_config["applications"][0]["args"])
    (gpu,) = service.cluster.worker_group_specs
    assert (gpu.min_replicas, gpu.max_replicas) == (
        config.replicas.min_replicas,
        config.replicas.max_replicas,
    )
    requested = gpu.template["spec"]["containers"][0]["resources"]["requests"]
    assert config.replicas.num_gpus == float(requested["nvidia.com/gpu"])
    assert config.replicas.num_cpus < float(requested["cpu"])
    for spec in kuberay.pods(service.cluster):
        (container,) = spec["containers"]
        (keys,) = [variable for variable in container["env"] if variable["name"] == "PARALLELMIND_API_KEYS"]
        assert not keys["valueFrom"]["secretKeyRef"].get("optional")
        assert serve_config["http_options"]["port"] in [port["containerPort"] for port in container["ports"]]


def test_every_file_that_the_guide_links_exists() -> None:
    guide = (kuberay.DEPLOY / "README.md").read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", guide) if "://" not in target]
    assert links
    for target in links:
        assert (kuberay.DEPLOY / target).exists(), target
