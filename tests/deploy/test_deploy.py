"""The files in cluster/deploy: forms by the schemas that there are, commands by the command line itself.

Kubernetes' objects, and the pods in KubeRay's, are held against Kubernetes' own schemas (of `kubernetes-validate`). Of
KubeRay's objects, whose schemas no package has, the names of fields are held against its types
(ray-operator/apis/ray/v1/*_types.go; RayCronJob:
https://docs.ray.io/en/master/cluster/kubernetes/getting-started/raycronjob-quick-start.html); so a misspelt or
misplaced field is found, a wrong value of a right field need not be. The schemas below say besides what we hold our
pods to.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines.cli.main import main
from pipelines.config.load import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
MANIFESTS = ["protect-rayjob.yaml", "gallery-raycronjob.yaml", "gallery-cronjob.yaml"]
KUBERNETES = "1.37"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


# ---- schemas ---------------------------------------------------------------------------------------------------------


def closed(required: dict, **optional) -> dict:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def listed(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


ANY: dict = {}
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
META = closed({"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}}, labels=WORDS)
SECURITY = closed(
    {"allowPrivilegeEscalation": {"const": False}, "capabilities": closed({"drop": {"const": ["ALL"]}})},
    readOnlyRootFilesystem={"type": "boolean"},
)
CONTAINER = closed(
    {"name": TEXT, "image": {"type": "string", "pattern": ":[^:/]+$"}, "securityContext": SECURITY},
    command=listed(TEXT),
    args=listed(TEXT),
    envFrom=listed(closed({"secretRef": closed({"name": TEXT})})),
    resources=closed({"requests": QUANTITIES, "limits": QUANTITIES}),
    ports=listed(closed({"name": TEXT, "containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}})),
    volumeMounts=listed(closed({"name": TEXT, "mountPath": {"type": "string", "pattern": "^/"}})),
)
EMPTY_DIR = closed({"sizeLimit": QUANTITY}, medium={"const": "Memory"})
POD = closed(
    {
        "containers": listed(CONTAINER),
        "securityContext": closed(
            {"runAsNonRoot": {"const": True}, "runAsUser": {"type": "integer", "minimum": 1}},
            runAsGroup=COUNT,
            fsGroup=COUNT,
            seccompProfile=closed({"type": {"const": "RuntimeDefault"}}),
        ),
    },
    volumes=listed(closed({"name": TEXT}, emptyDir=EMPTY_DIR, configMap=closed({"name": TEXT}))),
    serviceAccountName=TEXT,
    restartPolicy={"enum": ["Never", "OnFailure"]},
)
TEMPLATE = closed({"spec": POD}, metadata=closed({}, annotations=WORDS, labels=WORDS))
RAY_CLUSTER = closed(
    {
        "headGroupSpec": closed({"rayStartParams": WORDS, "template": TEMPLATE}),
        "workerGroupSpecs": listed(
            closed(
                {
                    "groupName": TEXT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": WORDS,
                    "template": TEMPLATE,
                },
                replicas=COUNT,
                numOfHosts=COUNT,
            )
        ),
    },
    rayVersion=TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
)
RAY_JOB = closed(
    {"entrypoint": TEXT, "rayClusterSpec": RAY_CLUSTER},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    suspend={"type": "boolean"},
)
CRON = {"type": "string", "pattern": r"^(\S+ ){4}\S+$"}
CRON_JOB = closed(
    {"schedule": CRON, "jobTemplate": closed({"spec": closed({"template": TEMPLATE}, backoffLimit=COUNT)})},
    timeZone=TEXT,
    concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
    successfulJobsHistoryLimit=COUNT,
    failedJobsHistoryLimit=COUNT,
    suspend={"type": "boolean"},
)


def document(version: str, metadata: dict = META, **fields) -> dict:
    return closed({"apiVersion": {"const": version}, "kind": TEXT, "metadata": metadata, **fields})


RBAC = "rbac.authorization.k8s.io"
KINDS = {
    "RayJob": document("ray.io/v1", spec=RAY_JOB),
    "RayCronJob": document("ray.io/v1", spec=closed({"schedule": CRON, "jobTemplate": RAY_JOB})),
    "CronJob": document("batch/v1", spec=CRON_JOB),
    "ConfigMap": document("v1", data=WORDS),
    "ServiceAccount": document("v1"),
    "Role": document(
        f"{RBAC}/v1",
        rules=listed(closed({"apiGroups": listed(TEXT), "resources": listed(TEXT), "verbs": listed(TEXT)})),
    ),
    "RoleBinding": document(
        f"{RBAC}/v1",
        roleRef=closed({"apiGroup": {"const": RBAC}, "kind": TEXT, "name": TEXT}),
        subjects=listed(closed({"kind": TEXT, "name": TEXT})),
    ),
}


def job_of_cron_job() -> dict:
    (config,) = (d for d in documents("gallery-cronjob.yaml") if d["kind"] == "ConfigMap")
    return yaml.safe_load(config["data"]["rayjob.yaml"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_objects_have_the_fields_of_their_kinds(name):
    for found in documents(name):
        jsonschema.validate(found, KINDS[found["kind"]])


def kubernetes_objects(found: dict) -> Iterator[dict]:
    """What Kubernetes itself knows of an object: all of its own kinds, the pods of KubeRay's."""
    if not found["apiVersion"].startswith("ray.io/"):
        yield found
        return
    job = found["spec"].get("jobTemplate", found["spec"])
    for group in (job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_own_schemas_accept_the_objects(name):
    objects = documents(name)
    if name == "gallery-cronjob.yaml":
        objects.append(job_of_cron_job())
    assert sum(1 for found in objects for _ in kubernetes_objects(found)) >= 2
    for found in objects:
        for known in kubernetes_objects(found):
            kubernetes_validate.validate(known, KUBERNETES, strict=True)
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(known | {"no-such-field": 1}, KUBERNETES, strict=True)


def test_kubernetes_own_schemas_find_a_wrong_value():
    (found,) = documents("protect-rayjob.yaml")
    template = next(kubernetes_objects(found))
    template["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "http"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def test_the_schemas_find_a_misspelt_field():
    (found,) = documents("protect-rayjob.yaml")
    found["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, KINDS["RayJob"])
    (found,) = documents("protect-rayjob.yaml")
    found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] = False
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, KINDS["RayJob"])


def test_the_cron_job_makes_the_job_that_kuberay_would():
    found = job_of_cron_job()
    jsonschema.validate(
        found, document("ray.io/v1", closed({"generateName": {"type": "string", "pattern": "-$"}}), spec=RAY_JOB)
    )
    (cron,) = documents("gallery-raycronjob.yaml")
    assert found["spec"] == cron["spec"]["jobTemplate"]
    by_kind = {d["kind"]: d for d in documents("gallery-cronjob.yaml")}
    pod = by_kind["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == by_kind["ServiceAccount"]["metadata"]["name"]
    assert pod["volumes"][0]["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
    assert pod["containers"][0]["command"][-1] == f"{pod['containers'][0]['volumeMounts'][0]['mountPath']}/rayjob.yaml"
    assert by_kind["RoleBinding"]["roleRef"]["name"] == by_kind["Role"]["metadata"]["name"]


def ray_jobs() -> list[dict]:
    return [
        documents("protect-rayjob.yaml")[0]["spec"],
        documents("gallery-raycronjob.yaml")[0]["spec"]["jobTemplate"],
    ]


def test_jobs_on_kubernetes_fit_the_image_and_themselves():
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    images = set()
    for job in ray_jobs():
        cluster = job["rayClusterSpec"]
        assert cluster["rayVersion"] == versions["ray"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            pod = group["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            (container,) = pod["containers"]
            images.add(container["image"])
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            port = group["rayStartParams"]["metrics-export-port"]
            assert int(port) in [p["containerPort"] for p in container["ports"]]
            assert group["template"]["metadata"]["annotations"]["prometheus.io/port"] == port
            gpus = container["resources"]["limits"].get("nvidia.com/gpu")
            assert (gpus is not None) == (group.get("groupName") == "gpu")
    images.add(yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())["docker"]["image"])
    assert len(images) == 1, "one image for all"


def test_the_cluster_file_has_rays_own_schema():
    import ray
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(fillout_defaults(config))
    assert config["head_node_type"] in config["available_node_types"]
    assert sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values()) <= config["max_workers"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"head_node_typo": "head"}, schema)


# ---- commands and files ----------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """Every `scol ...` in the files, in comments too: where, and its words."""
    found = []
    for file in sorted(DEPLOY.iterdir()):
        text = file.read_text()
        if file.suffix == ".yaml":  # the whole of folded texts, and comments
            for job in re.findall(r"entrypoint: >-\n((?: +\S.*\n)+?)(?= *submissionMode)", text):
                found.append((file.name, " ".join(job.split())))
            found += [(file.name, words) for words in re.findall(r"#.*'(scol .*?)'", text)]
            found += [(file.name, words) for words in re.findall(r"^#\s+(scol [^\n]*)$", text, re.M)]
        elif file.name == "Dockerfile":
            found += [(file.name, words) for words in re.findall(r"&& (scol .*)", text)]
            found += [(file.name, " ".join(json.loads(words))) for words in re.findall(r"^CMD (\[.*\])", text, re.M)]
    return [(name, shlex.split(re.split(r" \|\| | && ", words)[0])) for name, words in found]


def accepted(arguments: list[str]) -> dict:
    """Options and arguments as `scol` would take them; raises click.UsageError where it would not."""
    command, context = main, None
    with click.Context(main, info_name="scol") as context:
        while isinstance(command, click.Group) and (arguments or not command.invoke_without_command):
            _, command, arguments = command.resolve_command(context, arguments)
            context = click.Context(command, parent=context)
    with command.make_context(command.name, list(arguments), parent=context.parent) as made:
        return made.params


def test_every_command_in_the_files_is_one_of_scols():
    found = commands()
    assert len(found) == 7, found
    assert {name for name, _ in found} == {*MANIFESTS, "Dockerfile", "ray-cluster.yaml"}
    for name, (program, *arguments) in found:
        assert program == "scol", name
        params = accepted(arguments)
        load_config(params.get("profile"), None, params.get("sets") or ())
    with pytest.raises(click.UsageError):
        accepted(["protect", "x", "--out", "y", "--no-such-option"])
    jobs = [words for name, words in found if "protect" in words or "build" in words]
    assert jobs and all(words[words.index("--ray-address") + 1] == "auto" for words in jobs)


def test_every_file_named_is_there():
    for file in DEPLOY.iterdir():
        for name in re.findall(r"cluster/deploy/[\w./-]+\w", file.read_text()):
            assert (ROOT / name).exists(), f"{file.name} names {name}"
        for name in re.findall(r"\b([\w-]+\.yaml)\b", file.read_text()):
            assert name in ("rayjob.yaml", "ray_bootstrap_config.yaml") or (DEPLOY / name).exists(), name
    for name in re.findall(r"`?(cluster/deploy/[\w./-]+\w)`?", (ROOT / "docs" / "operate.md").read_text()):
        assert (ROOT / name).exists(), name


def test_the_image_gets_all_that_it_copies_and_runs_as_nobody_special():
    text = (DEPLOY / "Dockerfile").read_text()
    allowed = set(re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M))
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source in allowed, source
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= allowed, "a package of ours would be missing"
    assert re.findall(r"^USER (.*)$", text, re.M) == ["1000"] and "-c constraints.txt" in text
    (base,) = re.findall(r"^FROM (\S+)$", text, re.M)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
