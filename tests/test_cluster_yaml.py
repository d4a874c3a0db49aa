import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.version import Version

# Ray 2.60's autoscaler opens files and sockets only when machines are started, not in a check.
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parent.parent / "cluster.yaml"
TOKEN = "RAY_AUTH_TOKEN_PATH=~/bigseg_auth/token"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def check(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does to a file before it calls the cloud."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def start_command(config: dict[str, Any], who: str) -> str:
    (command,) = [c for c in config[f"{who}_start_ray_commands"] if "ray start" in c]
    return command


def test_ray_accepts_the_file(config: dict[str, Any]):
    prepared = check(config)
    assert list(prepared["available_node_types"]) == ["head", "gpu_worker"]
    assert prepared["head_node_type"] == "head"
    assert prepared["file_mounts"] == config["file_mounts"]


@pytest.mark.parametrize(
    ("where", "right", "wrong"),
    [
        ([], "setup_commands", "setup_comands"),
        (["docker"], "run_options", "run_option"),
        (["auth"], "ssh_user", "shh_user"),
        (["available_node_types", "gpu_worker"], "min_workers", "min_worker"),
    ],
)
def test_ray_refuses_a_misspelt_key(
    config: dict[str, Any], where: list[str], right: str, wrong: str
):
    section = config
    for key in where:
        section = section[key]
    section[wrong] = section.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        check(config)


@pytest.mark.parametrize("who", ["head", "worker"])
def test_every_node_asks_for_the_token(config: dict[str, Any], who: str):
    command = start_command(config, who)
    before_start = command[: command.index("ray start")]
    assert f"export RAY_AUTH_MODE=token {TOKEN} &&" in before_start
    assert "chmod 600 ~/bigseg_auth/token &&" in before_start
    assert "~/bigseg_auth" in config["file_mounts"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "disabled" not in FILE.read_text()


def test_the_token_itself_is_not_in_the_file():
    assert not re.search(r"[0-9a-f]{16}|RAY_AUTH_TOKEN=", FILE.read_text())


def test_the_dashboard_listens_on_loopback_only(config: dict[str, Any]):
    command = start_command(config, "head")
    assert re.findall(r"--dashboard-host=(\S+)", command) == ["127.0.0.1"]
    assert "0.0.0.0" not in FILE.read_text()


def test_no_port_is_opened_to_the_world(config: dict[str, Any]):
    assert "security_group" not in config["provider"]
    assert "ray-client-server-port" not in FILE.read_text()


def test_gpus_are_there_from_the_start_and_may_be_taken_away(config: dict[str, Any]):
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == worker["max_workers"] == config["max_workers"] > 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    head = config["available_node_types"]["head"]["node_config"]
    assert "InstanceMarketOptions" not in head


def test_image_and_packages_agree_on_the_versions(config: dict[str, Any]):
    tag = config["docker"]["image"].partition("rayproject/ray:")[2]
    version, python, platform = tag.split("-")
    assert (python, platform) == ("py311", "gpu")
    (install,) = config["setup_commands"]
    assert f'"ray[default,train]=={version}"' in install
    assert install.startswith("pip install ~/bigseg_dist/bigseg-*.whl ")
    assert config["file_mounts"]["~/bigseg_dist"] == "dist"
    assert "pip wheel --no-deps --wheel-dir dist ." in FILE.read_text()
    assert f'"ray[default]=={version}"' in FILE.read_text()
    project = (FILE.parent / "pyproject.toml").read_text()
    (lowest,) = re.findall(r'"ray\[default,train\]>=([0-9.]+)"', project)
    assert Version(version) >= Version(lowest)
