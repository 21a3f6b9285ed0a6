"""A run over several nodes is the run on one: same rows, same weights, whatever crosses between them."""

import os
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from megatron_coreward.cluster.placement import ReservedPlacement, living_nodes
from megatron_coreward.cluster.ray_start import start_ray, stop_ray
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.planner.placement import ResourceRequest
from megatron_coreward.trainer.run import train
from tests.e2e.conftest import Task
from tools.soak import comparable_rows, digest

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def make_config(task: Task, name: str, *changes: str) -> RunConfig:
    """Two pipeline stages and two engines: with two nodes, one of each on either."""
    layout = ["actor.tensor_parallel=1", "actor.pipeline_parallel=2", "rollout.num_engines=2", "steps=2"]
    return task.config("co_rewarding_ii", f"run_dir={task.folder / name}", *layout, "sync.bucket_mib=0.1", *changes)


@pytest.fixture(scope="module")
def on_one_node(task: Task) -> Path:
    return train(make_config(task, "one_node"))


@pytest.fixture(scope="module")
def three_nodes(on_one_node: Path) -> Iterator[None]:
    """A Ray cluster of three nodes on this machine, joined through `RAY_ADDRESS`, once the run on one node is over."""
    from ray.cluster_utils import Cluster

    stop_ray()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield
    finally:
        stop_ray()
        del os.environ["RAY_ADDRESS"]
        cluster.shutdown()


def node_of_this_process() -> str:
    return str(ray.get_runtime_context().get_node_id())


def test_processes_run_on_the_nodes_that_were_planned(three_nodes: None) -> None:
    start_ray()
    assert len(living_nodes()) == 3
    resource_request = ResourceRequest(ranks=6, rank_group=2, engines=3, engine_size=1)
    with ReservedPlacement(resource_request, limit_s=60) as room:
        canary = ray.remote(node_of_this_process)
        ranks = ray.get([canary.options(num_cpus=0, **room.for_rank(i)).remote() for i in range(6)], timeout=120)
        engines = ray.get([canary.options(num_cpus=0, **room.for_engine(i)).remote() for i in range(3)], timeout=120)
        assert (tuple(ranks), tuple(engines)) == (room.placement.ranks, room.placement.engines)
        assert Counter(ranks) == dict.fromkeys(set(engines), 2)
        assert ranks[0] == ranks[1] == node_of_this_process()
        assert room.num_hosts == 1


def test_a_run_over_several_nodes_is_the_run_on_one(three_nodes: None, on_one_node: Path, task: Task) -> None:
    run_dir = train(make_config(task, "three_nodes"))
    assert digest(run_dir) == digest(on_one_node)
    assert comparable_rows(run_dir) == comparable_rows(on_one_node)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "coreward-try"], capture_output=True, timeout=20).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "coreward-try"], check=True, timeout=20)
    return made


class TwoHosts:
    """Two network namespaces that reach each other through a pair of interfaces, a Ray node in each."""

    NAMES, ADDRESSES, PORT = ("coreward-a", "coreward-b"), ("10.213.7.1", "10.213.7.2"), 6399

    def __init__(self) -> None:
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        for name in self.NAMES:
            self._ip("netns", "add", name)
        self._ip("link", "add", "coreward-va", "netns", "coreward-a", "type", "veth", "peer", "coreward-vb")
        self._ip("link", "set", "coreward-vb", "netns", "coreward-b")
        for name, interface, address in zip(self.NAMES, ("coreward-va", "coreward-vb"), self.ADDRESSES, strict=True):
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            self._ip("-n", name, "link", "set", interface, "up")
            self._ip("-n", name, "link", "set", "lo", "up")
        head, other = self.ADDRESSES
        ray_program = str(Path(sys.executable).with_name("ray"))
        common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=300000000"]
        self.run(0, ray_program, "start", "--head", f"--node-ip-address={head}", f"--port={self.PORT}", *common)
        self.run(1, ray_program, "start", f"--address={head}:{self.PORT}", f"--node-ip-address={other}", *common)

    def run(self, host: int, *command: str, timeout: float = 120) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.NAMES[host], *command],
            env=self.environment,
            cwd=ROOT,
            text=True,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def end(self) -> None:
        for name in self.NAMES:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=20).stdout
            if pids.split():
                subprocess.run(["kill", "-9", *pids.split()], timeout=20, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=20)


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    if not can_make_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    stop_ray()
    hosts = TwoHosts()
    hosts.end()
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.end()


@pytest.mark.slow
def test_a_run_over_two_hosts_is_the_run_on_one(two_hosts: TwoHosts, on_one_node: Path, task: Task) -> None:
    config = make_config(task, "two_hosts", "sync.checksums=true")
    recipe = task.folder / "two_hosts.yaml"
    recipe.write_text(dump_config(config))
    two_hosts.environment["RAY_ADDRESS"] = f"{two_hosts.ADDRESSES[0]}:{two_hosts.PORT}"
    canary = (
        "from megatron_coreward.cluster.placement import living_nodes; "
        "from megatron_coreward.cluster.ray_start import start_ray; "
    )
    canary += "start_ray(); print(sorted(node.address for node in living_nodes()))"
    assert str(list(two_hosts.ADDRESSES)) in two_hosts.run(0, sys.executable, "-c", canary)
    two_hosts.run(0, sys.executable, "-m", "megatron_coreward", "train", str(recipe), timeout=600)
    assert digest(config.run_dir) == digest(on_one_node)
    assert comparable_rows(config.run_dir) == comparable_rows(on_one_node)
