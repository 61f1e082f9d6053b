"""What starts a cluster: each file read by the schema or the client that will read it, and the promises that all of them make."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLOUDS = ("cluster.yaml", "deploy/gcp.yaml", "deploy/azure.yaml")
LAUNCHED = (*CLOUDS, "deploy/local.yaml")
SCRIPTS = ("deploy/setup.sh", "deploy/slurm.sh")
[RAY] = [pin.partition("==")[2] for pin in PROJECT["dependencies"] if pin.startswith("ray[")]


def read(name: str) -> dict[str, Any]:
    text = (ROOT / name).read_text()
    if name.endswith("local.yaml"):  # addresses are needed for Ray to count its machines
        text = text.replace("head_ip: CHANGE-ME", "head_ip: 10.0.0.1").replace("[CHANGE-ME, CHANGE-ME]", "[10.0.0.2, 10.0.0.3]")
    return yaml.safe_load(text)


def image_of(name: str) -> str:
    found = re.search(r"^FROM (\S+)$" if name == "Dockerfile" else r"^\s+image: (rayproject\S+)", (ROOT / name).read_text(), re.MULTILINE)
    assert found, f"{name} names no image"
    return found[1]


# --- one source of versions -----------------------------------------------------------------------------------------------------


def test_what_a_node_installs_is_what_the_project_pins():
    told = subprocess.run(["bash", "deploy/setup.sh", "--list"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.splitlines() == PROJECT["dependencies"]


def test_a_node_reads_the_pins_from_the_copy_beside_the_script(tmp_path: Path):
    """On a node the two files lie in one directory; another pin there is another installation."""
    (tmp_path / "setup.sh").write_text((ROOT / "deploy/setup.sh").read_text())
    (tmp_path / "pyproject.toml").write_text('[project]\nrequires-python = ">=3.11"\ndependencies = ["torch==9.9", "x>=1,<2; extra"]\n')
    told = subprocess.run(["bash", tmp_path / "setup.sh", "--list"], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.splitlines() == ["torch==9.9", "x>=1,<2; extra"]


def test_too_old_a_python_is_refused_before_anything_is_installed(tmp_path: Path):
    (tmp_path / "setup.sh").write_text((ROOT / "deploy/setup.sh").read_text())
    (tmp_path / "pyproject.toml").write_text('[project]\nrequires-python = ">=3.99"\ndependencies = ["torch==9.9"]\n')
    told = subprocess.run(["bash", tmp_path / "setup.sh"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 1 and "Python 3.99 or newer is needed" in told.stderr


@pytest.mark.parametrize("name", [*CLOUDS, "Dockerfile"])
def test_the_image_has_the_pinned_ray_and_a_python_that_will_do(name: str):
    image = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)", image_of(name))
    assert image and image[1] == RAY
    assert int(image[2]) >= int(PROJECT["requires-python"].removeprefix(">=3."))


@pytest.mark.parametrize("name", LAUNCHED)
def test_no_version_is_written_a_second_time(name: str):
    """Setup is one script; packages beside it are what Ray's launcher itself needs on the head."""
    config = read(name)
    installs = [c for key in ("setup_commands", "worker_setup_commands") for c in config.get(key, []) if "pip install" in c]
    assert not installs
    assert sum("setup.sh" in command for command in config["setup_commands"]) == 1
    pinned = {re.split(r"[\[=<>]", pin)[0] for pin in PROJECT["dependencies"]}
    assert not pinned & {re.split(r"[\"=<>]", word.strip('"'))[0] for c in config.get("head_setup_commands", []) for word in c.split()}


# --- Ray's launcher -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_takes_the_file(name: str):
    """Filled out and checked by the code that `ray up` runs before it calls a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(name))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_trains_nothing_and_the_workers_are_spot_machines_that_come_and_go(name: str):
    config = read(name)
    types = config["available_node_types"]
    assert set(types) == {"head", "train", "read"} and config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0} and "--num-cpus=0" in config["head_start_ray_commands"][1]
    spot = re.compile("spot", re.IGNORECASE)
    assert not spot.search(json.dumps(types["head"]))
    for worker in (types["train"], types["read"]):
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        assert spot.search(json.dumps(worker))
    assert types["train"]["max_workers"] + types["read"]["max_workers"] <= config["max_workers"]
    assert not types["read"]["resources"].get("GPU")


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_request_needs_the_token_and_the_dashboard_is_the_heads_own(name: str):
    config, text = read(name), (ROOT / name).read_text()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in text and "RAY_AUTH_MODE=disabled" not in text
    for command in config["head_start_ray_commands"][1:]:
        assert "--dashboard-host=127.0.0.1" in command
    assert "0.0.0.0" not in text
    if name in CLOUDS:
        starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        assert all("RAY_AUTH_MODE=token ray start" in command for command in starts if "ray start" in command)


@pytest.mark.parametrize("name", LAUNCHED)
def test_only_files_that_exist_and_no_secret_but_the_token_are_sent(name: str):
    mounts = read(name)["file_mounts"]
    ours = {remote: local for remote, local in mounts.items() if local != "~/.ray/auth_token"}
    assert ours and all((ROOT / local).is_file() for local in ours.values())
    assert sum((ROOT / local).stat().st_size for local in ours.values()) < 100_000


# --- clouds' own schemas --------------------------------------------------------------------------------------------------------


def test_gcp_knows_every_field_of_a_node():
    """Against the discovery document that Google's client ships: a misspelt field would be ignored, or refused after minutes."""
    from googleapiclient.discovery_cache import get_static_doc

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    for name, node in read("deploy/gcp.yaml")["available_node_types"].items():
        assert list(strangers(node["node_config"], {"$ref": "Instance"}, schemas, name)) == []
    wrong = {"scheduling": {"provisioningModel": "CHEAP"}, "diskz": []}
    assert list(strangers(wrong, {"$ref": "Instance"}, schemas, "x")) == ["x.scheduling.provisioningModel=CHEAP", "x.diskz"]


def strangers(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str) -> Any:
    """Paths of what a discovery schema does not know."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        for key, inner in value.items():
            known = schema["properties"].get(key)
            yield from [f"{at}.{key}"] if known is None else strangers(inner, known, schemas, f"{at}.{key}")
    elif kind == "array":
        for inner in value:
            yield from strangers(inner, schema["items"], schemas, at)
    elif not isinstance(value, {"string": str, "boolean": bool, "integer": int}.get(str(kind), object)):
        yield f"{at}: a {type(value).__name__}, not a {kind}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{at}={value}"


def test_azure_knows_every_parameter_of_a_node():
    """Against the template that Ray deploys."""
    from ray.autoscaler._private import _azure

    template = json.loads((Path(_azure.__file__).parent / "azure-vm-template.json").read_text())
    kinds = {"string": str, "int": int, "object": dict, "array": list, "bool": bool}
    for node in read("deploy/azure.yaml")["available_node_types"].values():
        for name, value in node["node_config"]["azure_arm_parameters"].items():
            assert isinstance(value, kinds[template["parameters"][name]["type"]])


def test_cloudformation_takes_the_stack():
    from cfnlint.api import lint_all

    found = lint_all((ROOT / "deploy/aws.yaml").read_text())
    assert [str(match) for match in found if match.rule.severity != "informational"] == []
    names = set(re.findall(r"InstanceProfileName: ([\w-]+)", (ROOT / "deploy/aws.yaml").read_text()))
    assert names == set(re.findall(r"IamInstanceProfile: { Name: ([\w-]+) }", (ROOT / "cluster.yaml").read_text()))


@pytest.mark.ray
def test_ray_up_starts_these_machines_on_an_aws_of_this_process(tmp_path: Path):
    """Ray's AWS launcher against moto: keys, security group, roles, machine types, spot requests. In a process with a home of its own."""
    code = """
import json, sys, boto3, yaml
from moto import mock_aws
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

with mock_aws():
    iam, ec2 = boto3.client("iam"), boto3.client("ec2")
    for name in ("antidote-head", "antidote-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    config = prepare_config(yaml.safe_load(open("cluster.yaml").read().replace("ami-CHANGE-ME", image)))
    config = _bootstrap_config(config, no_config_cache=True)
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider, made = AWSNodeProvider(config["provider"], "antidote"), {}
    for name, kind in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "head" if name == "head" else "worker", TAG_RAY_USER_NODE_TYPE: name}
        [node] = provider.create_node(kind["node_config"], tags, 1).values()
        made[name] = {"type": node.instance_type, "spot": node.instance_lifecycle == "spot", "profile": node.iam_instance_profile["Arn"],
                      "resources": {k: v for k, v in kind["resources"].items() if k in ("CPU", "GPU")}}
    [group] = [g for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"] == "ray-autoscaler-antidote"]
    open_ports = [p.get("FromPort") for p in group["IpPermissions"] if p["IpRanges"]]
json.dump({"nodes": made, "open": open_ports}, open(sys.argv[1], "w"))
"""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-west-2", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "made.json")],
        cwd=ROOT,
        env={**os.environ, **keys},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["open"] == [22]  # to the outside; Ray's own ports are the group's
    nodes = made["nodes"]
    assert {name: node["resources"] for name, node in nodes.items()} == {
        "head": {"CPU": 0},
        "train": {"CPU": 48, "GPU": 4},
        "read": {"CPU": 32},
    }
    assert {name: node["spot"] for name, node in nodes.items()} == {"head": False, "train": True, "read": True}
    assert [nodes[n]["profile"].rpartition("/")[2] for n in ("head", "train", "read")] == ["antidote-head"] + 2 * ["antidote-worker"]


# --- Kubernetes -----------------------------------------------------------------------------------------------------------------


def groups() -> list[dict[str, Any]]:
    cluster = read("deploy/kuberay.yaml")["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_rayjob_has_kuberays_fields():
    schema = json.loads((ROOT / "tests/deploy/rayjob.schema.json").read_text())
    job = read("deploy/kuberay.yaml")
    jsonschema.validate(job, schema)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == RAY
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    job["spec"]["rayClusterSpec"]["workerGroupSpec"] = []
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate(job, schema)


def test_kubernetes_takes_the_pods():
    import kubernetes_validate

    for group in groups():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)


def test_rays_autoscaler_reads_the_groups():
    """The converter that runs beside the head on Kubernetes."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = read("deploy/kuberay.yaml")["spec"]["rayClusterSpec"]
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "antidote", "namespace": "default"}, "spec": spec})
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert (types["train"]["resources"]["CPU"], types["train"]["resources"]["GPU"]) == (32, 4)
    assert "GPU" not in types["read"]["resources"]
    assert [(t["min_workers"], t["max_workers"]) for t in types.values()] == [(0, 0), (0, 4), (0, 8)]


def test_the_command_of_the_job_is_one_and_fits_its_cluster():
    from orchestrate import capacity
    from orchestrate.cli import resolved

    words = read("deploy/kuberay.yaml")["spec"]["entrypoint"].split()
    assert words[:2] == ["antidote", "run"]
    [one] = resolved(words[2], words[3:])
    top = {"CPU": 4 * 32.0 + 8 * 16.0, "GPU": 16.0}
    capacity.preflight(one.recipe.cluster, True, False, top)


# --- scripts and the image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str):
    subprocess.run(["bash", "-n", name], cwd=ROOT, check=True, timeout=60)
    done = subprocess.run([sys.prefix + "/bin/shellcheck", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LAUNCHED)
def test_shellcheck_finds_nothing_in_the_commands_of_nodes(name: str):
    config = read(name)
    keys = ("initialization_commands", "setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    script = "#!/bin/bash\n" + "\n".join(command for key in keys for command in config.get(key, []))
    ignored = "SC2016,SC2086,SC1090,SC1091,SC2154,SC3045"  # quotes that the node shall expand, $RAY_HEAD_IP that Ray sets
    done = subprocess.run(
        [sys.prefix + "/bin/shellcheck", "--exclude", ignored, "-"], input=script, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing():
    done = subprocess.run([sys.prefix + "/bin/hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_gets_what_it_copies_and_nothing_else():
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {word for line in copied for word in line.split()}
    assert all((ROOT / source).exists() for source in sources)
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert (ROOT / ".dockerignore").read_text().startswith("*\n") and sources == allowed
    assert {"attacks", "defenses", "models", "orchestrate"} <= sources
