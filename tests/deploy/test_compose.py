"""The compose file: what it mounts is there, and its services find each other by the names in the configurations.

Docker runs nothing here; where ``docker compose`` is installed, it parses the file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from steersman.server.settings import Settings, variable
from tests.deploy.prometheus import DEPLOY

COMPOSE = DEPLOY / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
GIVEN = {"MODEL": "/model", "ADMIN_KEY": "k", "GRAFANA_PASSWORD": "p"}


def has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


def mounts(service: str) -> dict[str, str]:
    """Where each of our folders and files is seen inside, by its path from the compose file's folder."""
    parts = (volume.split(":") for volume in SERVICES[service]["volumes"] if volume.startswith("./"))
    return {source: inside for source, inside, *_ in parts}


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
def test_docker_accepts_it() -> None:
    command = ["docker", "compose", "-f", str(COMPOSE), "config", "--quiet"]
    done = subprocess.run(
        command, env={"PATH": "/usr/local/bin:/usr/bin:/bin", **GIVEN}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_what_it_mounts_is_there(service: str) -> None:
    for source in mounts(service):
        assert (DEPLOY / source).is_dir(), source


def test_prometheus_reads_the_mounted_configuration_and_scrapes_the_server() -> None:
    inside = mounts("prometheus")["./prometheus"]
    assert f"--config.file={inside}/prometheus.yml" in SERVICES["prometheus"]["command"]
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "steersman")
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    command = SERVICES[host]["command"]
    assert command[command.index("--port") + 1] == port


def test_grafana_asks_prometheus_and_reads_the_mounted_dashboards() -> None:
    inside = mounts("grafana")
    folder = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    url = urlsplit(source["url"])
    assert url.hostname in SERVICES
    assert any(port.endswith(f":{url.port}") for port in SERVICES[url.hostname]["ports"])
    (provider,) = yaml.safe_load((folder / "dashboards/steersman.yaml").read_text())["providers"]
    assert provider["options"]["path"] == inside["./grafana/dashboards"]
    assert inside["./grafana/provisioning"] == "/etc/grafana/provisioning"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana/dashboards" / home.removeprefix(inside["./grafana/dashboards"] + "/")).is_file()


def test_the_servers_settings_exist() -> None:
    ours = {name for name in SERVICES["server"]["environment"] if name.startswith("STEERSMAN_")}
    assert ours <= {variable(name) for name in Settings.__dataclass_fields__}


def test_nothing_is_open_to_the_network_and_no_secret_has_a_default() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name


def test_the_image_is_built_from_what_is_there() -> None:
    """Each source of a COPY exists, and the ignore file lets it in."""
    build = SERVICES["server"]["build"]
    root = (DEPLOY / build["context"]).resolve()
    dockerfile = root / build["dockerfile"]
    copied = [
        name for line in re.findall(r"^COPY (.+) \S+$", dockerfile.read_text(), re.MULTILINE) for name in line.split()
    ]
    allowed = dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().splitlines()
    assert copied
    for name in copied:
        assert (root / name).exists(), name
        assert f"!{name}" in allowed, name
