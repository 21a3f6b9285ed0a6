"""Life and death of mailboxes: they appear whole, survive readers, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.weights.mailbox import (
    NUM_SLOTS,
    MailboxLayout,
    OwnedMailbox,
    mailbox_path,
    open_mailbox,
    remove_orphans,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def layout() -> Iterator[MailboxLayout]:
    layout = MailboxLayout(f"test-{uuid.uuid4().hex}", 64, 2, 1)
    yield layout
    mailbox_path(layout.name).unlink(missing_ok=True)


def in_another_process(code: str, layout: MailboxLayout) -> "subprocess.Popen[str]":
    """Runs code that may use `layout`; its standard output is a pipe."""
    lines = [
        "import os, sys, json",
        "from megatron_coreward.weights.mailbox import MailboxLayout",
        "from megatron_coreward.weights.mailbox import OwnedMailbox, mailbox_path, open_mailbox",
        f"layout = MailboxLayout(*{astuple(layout)!r})",
        code,
    ]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_what_one_end_writes_the_other_reads(layout: MailboxLayout) -> None:
    owned = OwnedMailbox(layout)
    reader = open_mailbox(layout)
    start = owned.slot_start(0)
    owned.memory[start : start + 4] = b"data"
    assert reader.memory[start : start + 4] == b"data"
    owned.close()
    owned.close()
    assert not mailbox_path(layout.name).exists()


def test_every_rank_and_every_worker_has_a_counter_of_its_own_before_the_slots(layout: MailboxLayout) -> None:
    layout = replace(layout, num_ranks=600, num_workers=300)  # more than a page of counters
    box, other = OwnedMailbox(layout), open_mailbox(layout)
    for rank in range(600):
        box.has_written(rank, 1000 + rank)
    for worker in range(300):
        other.has_taken(worker, 5000 + worker)
    assert [other.written(rank) for rank in range(600)] == [1000 + rank for rank in range(600)]
    assert [box.taken(worker) for worker in range(300)] == [5000 + worker for worker in range(300)]
    assert box.memory[layout.header_bytes :] == bytes(NUM_SLOTS * layout.slot_bytes)
    box.close()


def test_buckets_take_turns_in_the_slots(layout: MailboxLayout) -> None:
    box = OwnedMailbox(layout)
    starts = [box.slot_start(number) for number in range(4)]
    assert starts == [starts[0], starts[0] + 64] * 2
    assert starts[1] + 64 == layout.nbytes
    box.close()


def test_a_process_that_attached_leaves_the_mailbox_to_its_owner(layout: MailboxLayout) -> None:
    owned = OwnedMailbox(layout)
    process = in_another_process("open_mailbox(layout).memory[4096:4100] = b'left'", layout)
    assert process.wait(timeout=60) == 0
    assert mailbox_path(layout.name).exists()
    assert owned.memory[4096:4100] == b"left"
    owned.close()


def test_the_mailbox_of_a_killed_process_is_replaced_and_one_of_a_living_process_is_not(layout: MailboxLayout) -> None:
    process = in_another_process("owned = OwnedMailbox(layout); print('ready', flush=True); sys.stdin.read()", layout)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RunError, match="still running"):
            OwnedMailbox(layout)
        remove_orphans()
        assert mailbox_path(layout.name).exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    former = os.stat(mailbox_path(layout.name)).st_ino
    owned = OwnedMailbox(layout)
    assert os.stat(mailbox_path(layout.name)).st_ino != former
    owned.close()


def test_orphans_of_other_names_go_when_a_mailbox_is_created(layout: MailboxLayout) -> None:
    other = replace(layout, name=layout.name + "-other")
    there = "print(mailbox_path(layout.name).exists(), flush=True)"
    process = in_another_process(f"owned = OwnedMailbox(layout); {there}; os.kill(os.getpid(), 9)", other)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGKILL, "True\n")  # tests beside this one may remove it from now on
    OwnedMailbox(layout).close()
    assert not mailbox_path(other.name).exists()


def test_a_full_shared_memory_is_one_clear_error(layout: MailboxLayout) -> None:
    huge = replace(layout, slot_bytes=2**44)
    with pytest.raises(RunError, match=r"needs .* bytes in /dev/shm"):
        OwnedMailbox(huge)
    assert not mailbox_path(layout.name).exists()


def test_a_mailbox_for_other_layouts_is_refused(layout: MailboxLayout) -> None:
    owned = OwnedMailbox(layout)
    with pytest.raises(RunError, match="other layouts"):
        open_mailbox(replace(layout, num_ranks=3))
    with pytest.raises(RunError, match="bytes, expected"):
        open_mailbox(replace(layout, slot_bytes=128))
    owned.close()
    with pytest.raises(RunError, match="does not exist"):
        open_mailbox(layout)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_name_must_be_a_plain_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="mailbox name"):
        mailbox_path(name)
