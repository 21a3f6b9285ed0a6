"""A Ray of this machine's own is reachable from this machine alone, and only with a token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = """
import os, psutil, ray
from megatron_coreward.cluster.ray_security import check_token_needed, keep_to_this_host
keep_to_this_host()
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=1,
         _node_ip_address="127.0.0.1", object_store_memory=2**28)
check_token_needed()

@ray.remote(num_cpus=0)
class Worker:
    def pid(self):
        return os.getpid()

worker = Worker.remote()
family = {os.getpid(), ray.get(worker.pid.remote(), timeout=60)}
session = ray._private.worker._global_node.get_session_dir_path()
for process in psutil.process_iter():
    try:
        if session in " ".join(process.cmdline()) or process.pid in family:
            for connection in process.net_connections():
                if connection.status == "LISTEN":
                    print("listens", connection.laddr.ip, flush=True)
    except psutil.Error:
        pass
token = os.environ["RAY_AUTH_TOKEN"]
for folder, _, files in os.walk(session):
    for name in files:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and token in open(path, errors="replace").read():
            print("written", path, flush=True)
print("token", token, flush=True)
print("address", ray.get_runtime_context().gcs_address, flush=True)
input()
ray.shutdown()
"""
CLIENT = """
import ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False
ray.init(address={!r}, log_to_driver=False, logging_level="ERROR")
print("joined")
"""


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    root = Path(__file__).parents[2]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(root), "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", **variables}


def joins(address: str, token: str, home: Path) -> bool:
    """Whether a program with this token becomes a driver of the cluster."""
    client = subprocess.run(
        [sys.executable, "-c", CLIENT.format(address)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
        check=False,
    )
    return client.returncode == 0 and "joined" in client.stdout


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_it_listens_on_loopback_asks_for_a_token_and_leaves_none_on_disk(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(tmp_path),
    )
    try:
        assert server.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("address"):
            line = server.stdout.readline()
            assert line, "the server ended early"
            lines.append(line.strip())
        addresses = {line.split()[1].removeprefix("::ffff:") for line in lines if line.startswith("listens")}
        assert addresses == {"127.0.0.1"}
        assert [line for line in lines if line.startswith("written")] == []
        assert not (tmp_path / ".ray").exists()
        address, token = lines[-1].split()[1], lines[-2].split()[1]
        assert joins(address, token, tmp_path)
        assert not joins(address, "0" * 64, tmp_path)
    finally:
        try:
            server.communicate("\n", timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_what_the_user_has_configured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants

    from megatron_coreward.cluster.ray_security import keep_to_this_host

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    keep_to_this_host()
    assert "RAY_AUTH_TOKEN" not in os.environ
