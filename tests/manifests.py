"""A strict reader of JobSet manifests: the fields that launch/ uses, as the APIs publish them.

Written after jobset.x-k8s.io/v1alpha2 (JobSetSpec), batch/v1 (JobSpec) and core/v1 (PodSpec).
"""

from pathlib import Path
from typing import Any

import yaml

# A type; a list of them; a dict of named fields; or {str: type}, a map with free names.
_METADATA = {"name": str, "labels": {str: str}, "annotations": {str: str}}
_CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [
        {"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}},
    ],
    "securityContext": {"runAsUser": int, "privileged": bool},
    "resources": {"limits": {str: int}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
_POD = {
    "serviceAccountName": str,
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str},
    "containers": [_CONTAINER],
    "volumes": [
        {
            "name": str,
            "csi": {"driver": str, "readOnly": bool, "volumeAttributes": {str: str}},
            "persistentVolumeClaim": {"claimName": str},
            "hostPath": {"path": str, "type": str},
        }
    ],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": str, "onPodConditions": [{"type": str, "status": str}]}]
    },
    "template": {"metadata": _METADATA, "spec": _POD},
}
_JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": _METADATA,
    "spec": {
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [
            {"name": str, "replicas": int, "template": {"metadata": _METADATA, "spec": _JOB}}
        ],
    },
}


class _Loader(yaml.SafeLoader):
    """YAML in which a key comes once in a mapping."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} comes twice {node.start_mark}")
        return super().construct_mapping(node, deep=deep)


def load(text: str) -> dict[str, Any]:
    """The one JobSet of a manifest.

    Raises:
      ValueError: a key comes twice, a field is unknown or of another type; its path is named.
    """
    manifest = yaml.load(text, Loader=_Loader)
    _check(manifest, _JOBSET, "manifest")
    return manifest


def load_file(file: Path) -> dict[str, Any]:
    return load(file.read_text(encoding="utf-8"))


def _check(value: Any, schema: Any, path: str) -> None:
    if isinstance(schema, list):
        _require(isinstance(value, list) and value, path, value, "a list that is not empty")
        for i, entry in enumerate(value):
            _check(entry, schema[0], f"{path}[{i}]")
    elif isinstance(schema, dict):
        _require(isinstance(value, dict) and value, path, value, "a mapping that is not empty")
        for key, entry in value.items():
            _require(isinstance(key, str), path, key, "a string as key")
            _require(key in schema or str in schema, f"{path}.{key}", entry, "a known field")
            _check(entry, schema.get(key, schema.get(str)), f"{path}.{key}")
    else:
        _require(type(value) is schema, path, value, f"of type {schema.__name__}")


def _require(holds: Any, path: str, value: Any, what: str) -> None:
    if not holds:
        raise ValueError(f"{path} = {value!r} must be {what}")
