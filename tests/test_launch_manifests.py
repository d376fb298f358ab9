"""The manifests of launch/ against the APIs' fields, and against themselves."""

import math
import re

import pytest

from tests import manifests
from tests.launching import LAUNCH, MAIN, MANIFESTS, container, job


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_restart_as_a_whole_and_preemptions_do_not_count(file):
    manifest = manifests.load_file(file)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    spec = job(file)["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    assert spec["completionMode"] == "Indexed"
    (policy,) = spec["podFailurePolicy"]["rules"]
    assert policy == {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # without it a podFailurePolicy is refused
    assert pod["terminationGracePeriodSeconds"] >= 60
    mounts = {mount["name"] for mount in container(file)["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert container(file)["command"] == MAIN


@pytest.mark.parametrize("name", ["jobset_v5p.yaml", "jobset_v5p_multislice.yaml"])
def test_tpu_pods_fill_their_topology(name):
    spec = job(LAUNCH / name)["template"]["spec"]
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert container(LAUNCH / name)["resources"]["limits"] == {"google.com/tpu": 4}  # a v5p host
    assert spec["parallelism"] * 4 == chips
    assert "env" not in container(LAUNCH / name)  # GKE sets it


def test_slices_differ_in_number_and_data_axis_alone():
    one = (LAUNCH / "jobset_v5p.yaml").read_text().partition("apiVersion")[2]
    two = (LAUNCH / "jobset_v5p_multislice.yaml").read_text().partition("apiVersion")[2]
    for before, after in [
        ("name: moepp-7b\n", "name: moepp-7b-2x\n"),
        ("replicas: 1 #", "replicas: 2 #"),
        ("runs/moepp_7b\n", "runs/moepp_7b_2x\n"),
        ("mesh.data=1", "mesh.data=2"),
    ]:
        assert one.count(before) == 1
        one = one.replace(before, after)
    assert one == two


def test_gpu_pods_find_their_coordinator():
    file = LAUNCH / "jobset_gpu.yaml"
    coordinator = manifests.load_file(file)["spec"]["coordinator"]
    assert coordinator == {"replicatedJob": job(file)["name"], "jobIndex": 0, "podIndex": 0}
    env = {
        entry["name"]: entry.get("value", entry.get("valueFrom"))
        for entry in container(file)["env"]
    }
    label = "metadata.labels['jobset.sigs.k8s.io/coordinator']"
    assert env["COORDINATOR"] == {"fieldRef": {"fieldPath": label}}
    assert list(env).index("COORDINATOR") < list(env).index("JAX_COORDINATOR_ADDRESS")
    assert re.fullmatch(r"\$\(COORDINATOR\):\d+", env["JAX_COORDINATOR_ADDRESS"])
    assert int(env["JAX_NUM_PROCESSES"]) == job(file)["template"]["spec"]["parallelism"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("completions: 16", "parallelism: 16", "parallelism comes twice"),
        ("completions: 16", 'completions: "16"', "completions = '16' must be of type int"),
        ("backoffLimit: 0", "backofLimit: 0", "backofLimit = 0 must be a known field"),
        ('status: "True"', "status: true", "status = True must be of type str"),
        ("google.com/tpu: 4", "google.com/tpu: four", "must be of type int"),
        ("[PodFailurePolicy]", "PodFailurePolicy", "must be a list"),
    ],
)
def test_the_reader_of_manifests_is_strict(before, after, said):
    text = (LAUNCH / "jobset_v5p.yaml").read_text()
    assert before in text
    with pytest.raises(ValueError, match=re.escape(said)):
        manifests.load(text.replace(before, after, 1))
