"""The files in docs/deploy: what can be checked without a container engine and without systemd running."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from broker.settings import ENVIRONMENT, load

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
INSTRUCTIONS = {
    "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
    "ENTRYPOINT", "CMD",
}  # fmt: skip
MOST_EXPOSED = 1.5
SYSTEMD = shutil.which("systemd-analyze")


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Containerfile, with those of the stage it is made from first."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line:
            word, _, rest = line.partition(" ")
            assert word in INSTRUCTIONS, line
            if word == "FROM":
                image, _, name = rest.partition(" AS ")
                found[name] = list(found.get(image, []))
            else:
                found[name].append((word, rest))
    return found


def last(stage: list[tuple[str, str]], word: str) -> str:
    return [rest for each, rest in stage if each == word][-1]


def environment_of(stage: list[tuple[str, str]]) -> dict[str, str]:
    return dict(pair.split("=", 1) for word, rest in stage if word == "ENV" for pair in rest.split())


def test_every_file_that_the_image_copies_is_there() -> None:
    copied = [rest.split()[:-1] for word, rest in stages()["build"] if word == "COPY"]
    names = {name for each in copied for name in each}

    assert {
        "requirements.lock",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "broker",
        "devices",
        "projections",
    } == names
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["ordain", "with-mosquitto", ""])
def test_the_image_runs_without_rights_checks_its_health_and_keeps_its_data_in_a_volume(name: str) -> None:
    stage = stages()[name]
    variables = environment_of(stage)
    known = {key: value for key, value in variables.items() if key in ENVIRONMENT.values()}
    settings = load({}, known, None)

    assert known.keys() == {key for key in variables if key.startswith("ORDAIN_")}
    assert last(stage, "USER") == "10001:10001"
    assert last(stage, "VOLUME") == settings.data == "/data"
    assert (json.loads(last(stage, "ENTRYPOINT")), json.loads(last(stage, "CMD"))) == (["ordain"], ["serve"])
    assert isinstance(settings.mqtt_listen, str)
    ports = {settings.http.partition(":")[2], settings.mqtt_listen.partition(":")[2]}
    assert set(last(stage, "EXPOSE").split()) == ports
    health = json.loads(last(stage, "HEALTHCHECK").partition("CMD ")[2])
    compile(health[2], "HEALTHCHECK", "exec")
    assert f":{settings.http.partition(':')[2]}/healthz" in health[2]
    assert settings.mqtt_server == ("mosquitto" if name == "with-mosquitto" else "embedded")


def composed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())["services"]["ordain"]
    return found


def test_the_compose_files_build_these_images_and_give_them_no_rights() -> None:
    service, with_mosquitto = composed("compose.yaml"), composed("compose.mosquitto.yaml")

    assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert {service["build"]["target"], with_mosquitto["build"]["target"]} <= stages().keys()
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["volumes"] == ["data:/data"]
    inside = {port.rpartition(":")[2] for port in service["ports"]}
    assert inside == set(last(stages()["ordain"], "EXPOSE").split())
    assert [port for port in service["ports"] if port.endswith(":8080")] == ["127.0.0.1:8080:8080"]


def test_the_nodes_of_the_compose_file_have_settings_that_ordain_knows_and_no_rights() -> None:
    found = yaml.safe_load((DEPLOY / "compose.nodes.yaml").read_text())
    nodes = {name: service for name, service in found["services"].items() if service.get("image") == "ordain"}
    assert len(nodes) == 3
    for name, service in nodes.items():
        assert service["environment"].keys() <= set(ENVIRONMENT.values())
        settings = load({}, service["environment"], None)
        assert (settings.node, settings.advertise) == (name, f"{name}:8080")
        assert (service["read_only"], service["cap_drop"], service["restart"]) == (True, ["ALL"], "always")
        places = {settings.cluster_secret_file, settings.key_pepper_file, settings.log_password_file}
        assert places == {f"/run/secrets/{each}" for each in service["secrets"]}
        assert set(service["secrets"]) == found["secrets"].keys()


def test_the_kubernetes_manifest_has_settings_that_ordain_knows_and_services_that_find_its_pods() -> None:
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    kinds = {each["kind"] for each in found}
    assert kinds == {"Service", "PodDisruptionBudget", "StatefulSet"}
    (nodes,) = (each["spec"] for each in found if each["kind"] == "StatefulSet")
    services = {each["metadata"]["name"]: each["spec"] for each in found if each["kind"] == "Service"}
    assert nodes["updateStrategy"] == {"type": "OnDelete"}  # nodes of two releases may not write one log
    labels = nodes["template"]["metadata"]["labels"]
    assert all(each["selector"] == labels for each in services.values())
    assert services[nodes["serviceName"]]["clusterIP"] == "None"
    (container,) = nodes["template"]["spec"]["containers"]
    given = {each["name"]: each.get("value", "ordain-0") for each in container["env"]}
    assert given.keys() <= set(ENVIRONMENT.values())
    given["ORDAIN_ADVERTISE"] = given["ORDAIN_ADVERTISE"].replace("$(ORDAIN_NODE)", given["ORDAIN_NODE"])
    settings = load({}, given, None)
    assert settings.advertise == f"ordain-0.{nodes['serviceName']}:8080"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert mounted == {settings.data, str(Path(settings.cluster_secret_file).parent)}


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there."""
    text = (DEPLOY / "ordain.service").read_text()
    shipped = "ExecStart=/opt/ordain/bin/ordain serve"
    assert text.count(shipped) == 1
    path = tmp_path / "ordain.service"
    path.write_text(text.replace(shipped, f"ExecStart={sys.executable} -m broker.cli.main"))
    return path


@pytest.mark.skipif(SYSTEMD is None, reason="systemd is not installed")
def test_systemd_finds_no_fault_in_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=400)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(SYSTEMD is None, reason="systemd is not installed")
def test_systemd_calls_the_exposure_of_the_unit_small(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    level = re.search(r"Overall exposure level for ordain.service: ([\d.]+)", done.stdout)

    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= MOST_EXPOSED


def test_the_unit_gives_settings_that_ordain_knows(unit: Path) -> None:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    service = parser["Service"]

    assert service["Environment"].partition("=")[0] in ENVIRONMENT.values()
    assert service["Environment"].partition("=")[2] == f"/var/lib/{service['StateDirectory']}"
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}"
    assert (service["User"], service["NoNewPrivileges"], service["ProtectSystem"]) == (
        "ordain",
        "yes",
        "strict",
    )
