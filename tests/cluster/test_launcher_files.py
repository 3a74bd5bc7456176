"""ray_cluster.yaml and cluster/kuberay/: Ray's and KubeRay's own checks, and Ray's own autoscaler on the examples."""

import copy
import gzip
import json
import re
import shlex
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from ray._private.runtime_env import packaging
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

from cluster.cli import app
from contracts import config as configuration
from contracts.config import Config, WorkerConfig

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "ray_cluster.yaml"
KUBERAY = ROOT / "cluster" / "kuberay"
CONTAINERFILE = (KUBERAY / "Containerfile").read_text(encoding="utf-8")
SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay_crds"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

Yaml = dict[str, Any]
Actor = dict[str, float]


def read(path: Path) -> Yaml:
    content: Yaml = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def of_kuberay(content: Yaml) -> Yaml:
    """What KubeRay's autoscaler makes of a RayCluster."""
    named = content | {"metadata": content["metadata"] | {"namespace": "default"}}
    derived: Yaml = _derive_autoscaling_config_from_ray_cr(named)
    return derived


CLUSTERS: dict[str, Callable[[], Yaml]] = {
    "ray_cluster.yaml": lambda: read(LAUNCHER),
    "raycluster.yaml": lambda: of_kuberay(read(KUBERAY / "raycluster.yaml")),
}
either_cluster = pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)


def actors_of(config: Config) -> list[tuple[str, Actor]]:
    """(section, what it reserves) of every actor that a run starts."""

    def one(workers: WorkerConfig, *, on_gpu: bool = True) -> Actor:
        asked = {"CPU": workers.num_cpus, "GPU": workers.num_gpus * on_gpu, **workers.resources}
        return {name: amount for name, amount in asked.items() if amount}

    scorers = [
        one(config.reward_workers, on_gpu=c.model is not None) for c in (*config.rewards, *config.evaluation.judges)
    ]
    return [
        *[("rollout", one(config.rollout))] * config.rollout.num_workers,
        *[("reward_workers", scorer) for scorer in scorers for _ in range(config.reward_workers.num_replicas)],
        *[("reference_workers", one(config.reference_workers))] * config.reference_workers.num_replicas,
        *[("learner", one(config.learner))] * config.learner.num_ranks,
    ]


def scaled(cluster: Yaml, actors: list[Actor], **availabilities: dict[str, float]) -> SchedulingReply:
    """What Ray's autoscaler launches for these actors, beginning with nothing but the head."""
    settings = AutoscalingConfig(copy.deepcopy(cluster), skip_content_hash=True)
    node_types = settings.get_node_type_configs()
    node_types.pop(settings.get_head_node_type())  # it runs already, and there is never a second one
    asked = [ResourceRequestUtil.make(dict(actor)) for actor in actors]
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=node_types,
            max_num_nodes=settings.get_max_num_worker_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(asked),
            **availabilities,
        )
    )


def launched(reply: SchedulingReply) -> Counter[str]:
    return Counter({request.instance_type: request.count for request in reply.to_launch})


def unplaced(reply: SchedulingReply) -> list[Actor]:
    return [dict(request.resources_bundle) for request in reply.infeasible_resource_requests]


# What Ray accepts


def test_ray_accepts_the_launcher_file() -> None:
    validate_config(prepare_config(read(LAUNCHER)))


def broken(change: Callable[[Yaml], Any]) -> Yaml:
    content = read(LAUNCHER)
    change(content)
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(head_node_type="heda"),
        lambda c: c.update(max_wrokers=3),
        lambda c: c.update(max_workers=1),  # fewer than the min_workers together
        lambda c: c["available_node_types"]["learner"].update(min_workers="one"),
        lambda c: c["available_node_types"]["rollout-spot"].update(idle_timeout="5m"),
        lambda c: c["available_node_types"]["reward"].pop("node_config"),
    ],
)
def test_ray_refuses_it_with_a_mistake(change: Callable[[Yaml], Any]) -> None:
    content = broken(change)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config(content))


def test_none_of_ray_s_own_set_up_is_left() -> None:
    """The launcher's defaults install a nightly Ray and open the dashboard to everybody."""
    prepared = prepare_config(read(LAUNCHER))
    commands = " ".join(command for key, value in prepared.items() if key.endswith("_commands") for command in value)
    assert "'.[gpu]'" in commands
    assert "anaconda" not in commands
    assert "0.0.0.0" not in commands
    starts = [c for c in (*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]) if "start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "/home/ubuntu/.ray/auth_token" in prepared["file_mounts"]


# What the autoscaler makes of the examples


@either_cluster
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_actor_of_the_examples_gets_a_node(cluster: Callable[[], Yaml], example: Path) -> None:
    content, actors = cluster(), actors_of(configuration.load(example))
    reply = scaled(content, [actor for _, actor in actors])
    assert unplaced(reply) == []
    assert launched(reply).total() <= content["max_workers"]
    for node_type, count in launched(reply).items():
        assert count <= content["available_node_types"][node_type]["max_workers"]


@either_cluster
def test_each_actor_lands_on_its_kind_of_node(cluster: Callable[[], Yaml]) -> None:
    nodes = cluster()["available_node_types"]
    kinds = {
        section: {
            name
            for name, node in nodes.items()
            if all(node["resources"].get(resource, 0) >= amount for resource, amount in actor.items())
        }
        for section, actor in actors_of(configuration.load(ROOT / "examples" / "cluster.yaml"))
    }
    assert kinds == {
        "rollout": {"rollout-spot", "rollout-on-demand"},
        "reward_workers": {"reward"},
        "reference_workers": {"reward"},
        "learner": {"learner"},
    }


@either_cluster
@pytest.mark.parametrize(("kinds", "lost"), [(["rollout-spot", "rollout-on-demand"], 4), (["learner"], 8)])
def test_an_actor_without_its_kind_of_node_is_found(cluster: Callable[[], Yaml], kinds: list[str], lost: int) -> None:
    content, actors = cluster(), actors_of(configuration.load(ROOT / "examples" / "cluster.yaml"))
    for kind in kinds:
        del content["available_node_types"][kind]["resources"][kind.partition("-")[0]]
    assert len(unplaced(scaled(content, [actor for _, actor in actors]))) == lost


@either_cluster
def test_more_than_the_cluster_may_ever_have_is_found(cluster: Callable[[], Yaml]) -> None:
    limit = 8 + 4
    example = ROOT / "examples" / "cluster.yaml"
    for wanted, lost in ((limit, 0), (limit + 2, 2)):
        config = configuration.load(example, [f"rollout.num_workers={wanted}"])
        assert len(unplaced(scaled(cluster(), [actor for _, actor in actors_of(config)]))) == lost


# Spot and on-demand


@pytest.fixture
def rollout() -> Actor:
    return dict(actors_of(configuration.load(ROOT / "examples" / "cluster.yaml")))["rollout"]


def beyond_the_minimum(cluster: Yaml, rollout: Actor, count: int, monitor: CloudResourceMonitor) -> Counter[str]:
    """What is launched for `count` rollout workers more than fit on the nodes that are always there."""
    floor = scaled(cluster, [])
    reply = scaled(
        cluster,
        [rollout] * (launched(floor)["rollout-on-demand"] + count),
        cloud_resource_availabilities=monitor.get_resource_availabilities(),
        recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
    )
    return launched(reply) - launched(floor)


@either_cluster
def test_spot_comes_first_and_on_demand_beyond_its_limit(cluster: Callable[[], Yaml], rollout: Actor) -> None:
    always = launched(scaled(cluster(), []))
    assert always == {"learner": 1, "rollout-on-demand": 1, "reward": 1}
    assert beyond_the_minimum(cluster(), rollout, 3, CloudResourceMonitor()) == {"rollout-spot": 3}
    many = beyond_the_minimum(cluster(), rollout, 10, CloudResourceMonitor())
    assert many == {"rollout-spot": 8, "rollout-on-demand": 2}


@either_cluster
def test_on_demand_takes_over_after_a_spot_node_that_never_came(cluster: Callable[[], Yaml], rollout: Actor) -> None:
    """What the comments and docs/cluster.md say of Ray: a pod that waits in vain counts, a refused request does not."""
    waited, refused = CloudResourceMonitor(), CloudResourceMonitor()
    waited.notify([event("rollout-spot", Instance.ALLOCATION_TIMEOUT)])
    refused.notify([event("rollout-spot", Instance.ALLOCATION_FAILED)])
    assert beyond_the_minimum(cluster(), rollout, 3, waited) == {"rollout-on-demand": 3}
    assert beyond_the_minimum(cluster(), rollout, 3, refused) == {"rollout-spot": 3}


def event(node_type: str, status: Any) -> Any:
    return InstanceUpdateEvent(instance_id="1", instance_type=node_type, new_instance_status=status)


@either_cluster
def test_only_the_learner_is_fixed_in_number(cluster: Callable[[], Yaml]) -> None:
    content = cluster()
    for name, node in content["available_node_types"].items():
        fixed = node.get("min_workers", 0) == node["max_workers"]
        assert fixed == (name in ("learner", content["head_node_type"]))
        assert ("idle_timeout_s" in node) != fixed
        assert name != content["head_node_type"] or node["resources"]["CPU"] == 0


# KubeRay's schemas


@pytest.fixture(scope="module")
def schemas() -> dict[str, Yaml]:
    """By kind. Unknown keys are refused, which Kubernetes would drop without a word."""
    if not SCHEMAS.exists():
        pytest.skip("KubeRay's schemas are not beside this checkout (shared/data/kuberay_crds)")
    kinds = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
    texts = {
        kind: gzip.decompress((SCHEMAS / f"{name}.v1.schema.json.gz").read_bytes()) for kind, name in kinds.items()
    }
    return {kind: strict(json.loads(text)) for kind, text in texts.items()}


def strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_accepts_the_manifests(schemas: dict[str, Yaml], name: str) -> None:
    manifest = read(KUBERAY / name)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.validate(manifest, schemas[manifest["kind"]])


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(enableInTreeAutoscalling=True),
        lambda spec: spec["autoscalerOptions"].update(version="v3"),
        lambda spec: spec["workerGroupSpecs"][1].update(idleTimeoutSeconds="5m"),
        lambda spec: spec["workerGroupSpecs"][1].pop("maxReplicas"),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagee="x"),
    ],
)
def test_kuberay_refuses_them_with_a_mistake(schemas: dict[str, Yaml], change: Callable[[Yaml], Any]) -> None:
    manifest = copy.deepcopy(read(KUBERAY / "raycluster.yaml"))
    change(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schemas["RayCluster"])


# What has to agree with each other


def groups() -> list[Yaml]:
    spec = read(KUBERAY / "raycluster.yaml")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> list[Yaml]:
    return [group["template"]["spec"] for group in groups()]


def test_all_pods_run_the_image_that_is_built() -> None:
    built = re.search(r"-t (\S+) \.", CONTAINERFILE)
    assert built
    assert {container["image"] for pod in pods() for container in pod["containers"]} == {built.group(1)}


def test_no_pod_is_root() -> None:
    users = {pod["securityContext"]["runAsUser"] for pod in pods()}
    assert re.findall(r"^USER (\d+)$", CONTAINERFILE, re.MULTILINE) == [str(user) for user in users] == ["1000"]
    assert re.search(r"useradd --uid 1000\b", CONTAINERFILE)
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all(not c["securityContext"]["allowPrivilegeEscalation"] for c in pod["containers"])


def test_a_group_offers_what_its_pod_has() -> None:
    for group in groups()[1:]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (group["resources"]["CPU"], group["resources"]["GPU"]) == (limits["cpu"], limits["nvidia.com/gpu"])


def test_all_run_the_same_ray() -> None:
    """A node with another version cannot join, and the constraints are what the tests ran with."""
    versions = {
        "constraints.txt": re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M),
        "Containerfile": re.findall(r"^ARG RAY_VERSION=(\S+)", CONTAINERFILE, re.M),
        "ray_cluster.yaml": re.findall(r"'ray==([^']+)'", LAUNCHER.read_text(encoding="utf-8")),
        "raycluster.yaml": [read(KUBERAY / "raycluster.yaml")["spec"]["rayVersion"]],
    }
    assert len({tuple(found) for found in versions.values()}) == 1, versions


def test_the_image_holds_every_room() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]["find"]["include"]
    copied = [line.split()[1:-1] for line in CONTAINERFILE.splitlines() if line.startswith("COPY")]
    sources = {source for line in copied for source in line}
    assert all((ROOT / source).exists() for source in sources)
    assert {name.rstrip("*") for name in packages} | {"examples"} <= sources


def test_the_job_is_a_command_that_there_is() -> None:
    manifest = read(KUBERAY / "rayjob.yaml")
    folder, command = manifest["spec"]["entrypoint"].split(" && ")
    workdirs = re.findall(r"^WORKDIR (\S+)$", CONTAINERFILE, re.M)
    assert folder == f"cd {workdirs[-1]}"
    assert runs(command).ray.address == "auto"
    assert manifest["spec"]["clusterSelector"] == {
        "ray.io/cluster": read(KUBERAY / "raycluster.yaml")["metadata"]["name"]
    }


def test_the_commands_of_the_docs_are_commands_that_there_are() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    commands = [
        line.partition(" -- ")[2] for line in text.splitlines() if re.match(r" {4}.*ray job submit .* -- ", line)
    ]
    assert len(commands) >= 2
    assert [runs(command).resume for command in commands].count(True) == 1


def runs(command: str) -> Config:
    """The configuration that `python -m cluster.cli train ...` runs; fails where the parser or the file refuses."""
    python, flag, module, subcommand, *arguments = shlex.split(command)
    assert (python, flag, module, subcommand) == ("python", "-m", "cluster.cli", "train")
    parser: Any = typer.main.get_command(app)
    values = parser.commands[subcommand].make_context(subcommand, arguments).params
    return configuration.load(ROOT / values["config"], values["overrides"] or ())


def test_what_is_shared_is_mounted_where_the_run_is_written() -> None:
    output_dir = configuration.load(ROOT / "examples" / "cluster.yaml").output_dir
    mounts = {mount["mountPath"] for pod in pods() for c in pod["containers"] for mount in c["volumeMounts"]}
    claims = {volume["persistentVolumeClaim"]["claimName"] for pod in pods() for volume in pod["volumes"]}
    assert mounts == {"/mnt/shared"}
    assert claims == {read(KUBERAY / "shared_storage.yaml")["metadata"]["name"]}
    assert output_dir.is_relative_to("/mnt/shared")
    assert "/mnt/shared" in " ".join(read(LAUNCHER)["setup_commands"])
    policy = read(KUBERAY / "network_policy.yaml")["spec"]["podSelector"]["matchLabels"]
    assert policy == {"ray.io/cluster": read(KUBERAY / "raycluster.yaml")["metadata"]["name"]}


@pytest.mark.parametrize("path", [LAUNCHER, *sorted(KUBERAY.iterdir())], ids=lambda path: path.name)
def test_what_a_person_fills_in_is_explained(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    used, explained = (
        {
            name
            for line in lines
            if line.lstrip().startswith("#") == comment
            for name in re.findall(r"FILL_IN_\w+", line)
        }
        for comment in (False, True)
    )
    assert used <= explained


# What a job takes along


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The working directory as `ray job submit --working-dir .` packs it."""
    target = tmp_path_factory.mktemp("upload") / "package.zip"
    packaging.create_package(str(ROOT), target, include_gitignore=True, excludes=[], logger=None)
    with zipfile.ZipFile(target) as package:
        yield package


def test_a_job_takes_along_what_a_run_needs_and_no_more(uploaded: zipfile.ZipFile) -> None:
    names = uploaded.namelist()
    for needed in ("cluster/cli.py", "cluster/report/report.html.j2", "examples/cluster.yaml", "examples/judges.py"):
        assert needed in names
    folders = {name.partition("/")[0] for name in names}
    assert not folders & {".git", ".venv", "runs", "tests", "docs", ".mypy_cache", "__pycache__"}
    assert sum(info.file_size for info in uploaded.infolist()) < 10 << 20
