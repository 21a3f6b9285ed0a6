"""What `sync.transport` means, and what cannot reach the engines."""

from typing import Any

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.weights.spec import choose_transport


@pytest.mark.parametrize(
    ("wanted", "where", "transport"),
    [
        ("auto", {"gpus": True, "colocated": True, "num_hosts": 1}, "ipc"),
        ("auto", {"gpus": True, "colocated": True, "num_hosts": 4}, "ipc"),
        ("auto", {"gpus": True, "colocated": False, "num_hosts": 1}, "nccl"),
        ("auto", {"gpus": False, "colocated": True, "num_hosts": 1}, "shared_memory"),
        ("auto", {"gpus": False, "colocated": False, "num_hosts": 2}, "gloo"),
        ("gloo", {"gpus": True, "colocated": False, "num_hosts": 1}, "gloo"),
        ("shared_memory", {"gpus": True, "colocated": False, "num_hosts": 1}, "shared_memory"),
        ("ipc", {"gpus": True, "colocated": True, "num_hosts": 1}, "ipc"),
    ],
)
def test_the_transport_follows_from_placement_gpus_and_hosts(
    wanted: str, where: dict[str, Any], transport: str
) -> None:
    assert choose_transport(wanted, **where) == transport


@pytest.mark.parametrize(
    ("wanted", "where", "words"),
    [
        ("ipc", {"gpus": False, "colocated": True, "num_hosts": 1}, "ipc needs GPUs"),
        ("nccl", {"gpus": False, "colocated": False, "num_hosts": 1}, "nccl needs GPUs"),
        ("ipc", {"gpus": True, "colocated": False, "num_hosts": 1}, "ipc needs rollout.placement colocated"),
        ("shared_memory", {"gpus": True, "colocated": False, "num_hosts": 2}, "reaches one host, the cluster has 2"),
    ],
)
def test_a_transport_that_cannot_reach_the_engines_is_refused(wanted: str, where: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        choose_transport(wanted, **where)


@pytest.mark.parametrize("setting", ["expandable_segments:True", "garbage_collection:0.6, Expandable_Segments: true"])
def test_memory_that_another_process_cannot_map_is_refused_before_the_start(setting: str) -> None:
    where: dict[str, Any] = {"gpus": True, "num_hosts": 1, "allocator_settings": setting}
    with pytest.raises(InputError, match="expandable_segments:True gives memory that another process cannot map"):
        choose_transport("auto", colocated=True, **where)
    assert choose_transport("auto", colocated=False, **where) == "nccl"
    where["allocator_settings"] = "expandable_segments:False"
    assert choose_transport("auto", colocated=True, **where) == "ipc"
