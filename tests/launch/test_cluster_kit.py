"""The files that bring a job onto Kubernetes, without a cluster: against Kubernetes' own schemas and KubeRay's fields."""

# ruff: noqa: N815  the fields are called as Kubernetes calls them

import re
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.config import load_config

ROOT = Path(__file__).parents[2]
KIT = ROOT / "configs" / "cluster"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Group(Strict):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    numOfHosts: int = 1


class Head(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"


class Autoscaler(Strict):
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"


class Auth(Strict):
    mode: Literal["token", "disabled"]


class Cluster(Strict):
    rayVersion: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: Autoscaler | None = None
    authOptions: Auth
    headGroupSpec: Head
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class Spec(Strict):
    entrypoint: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    backoffLimit: int = Field(ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    rayClusterSpec: Cluster


class Metadata(Strict):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)


class RayJob(Strict):
    """The fields of a ray.io/v1 RayJob that ours uses, with KubeRay's types."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: Spec


@pytest.fixture
def manifest() -> dict[str, Any]:
    return yaml.safe_load((KIT / "rayjob.yaml").read_text())


def pods(job: RayJob) -> list[dict[str, Any]]:
    cluster = job.spec.rayClusterSpec
    return [group.template for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]


def check_pod(template: dict[str, Any]) -> None:
    """Raise for a pod template that Kubernetes' schema refuses."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}) | {"name": "checked"}}
    kubernetes_validate.validate(pod | {"spec": template["spec"]}, "1.33", strict=True)


def test_the_rayjob_is_what_kuberay_takes(manifest: dict[str, Any]) -> None:
    job = RayJob.model_validate(manifest)
    for template in pods(job):
        check_pod(template)
    for group in job.spec.rayClusterSpec.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas
    assert job.spec.rayClusterSpec.authOptions.mode == "token"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["spec"].update(shutdownAfterJobFinished=True),
        lambda m: m["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplicas="16"),
        lambda m: m["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
)
def test_a_wrong_field_of_kuberay_is_found(manifest: dict[str, Any], spoil: Any) -> None:
    spoil(manifest)
    with pytest.raises(ValidationError):
        RayJob.model_validate(manifest)


def test_a_wrong_field_of_kubernetes_is_found(manifest: dict[str, Any]) -> None:
    template = pods(RayJob.model_validate(manifest))[0]
    template["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(template)


def test_the_versions_are_those_that_are_pinned(manifest: dict[str, Any]) -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]


def test_everything_that_the_image_copies_and_the_job_starts_is_there(manifest: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    home = re.findall(r"^WORKDIR (.+)$", dockerfile, re.M)[-1]
    script = manifest["spec"]["entrypoint"].split()[1].removeprefix(f"{home}/")
    assert (ROOT / script).exists()
    assert script.partition("/")[0] in copied
    assert "RAY_AUTH_MODE=token" in dockerfile
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not copied & set(ignored)


def test_the_billion_words_job_asks_for_what_the_kit_gives(manifest: dict[str, Any]) -> None:
    workers = load_config(str(KIT / "billion-words.yaml")).cluster.workers
    assert isinstance(workers, dict)
    assert workers["min"] <= manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
