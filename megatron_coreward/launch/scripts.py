"""The shell around an attempt: Ray on every node, the training on the first one. Everything here is text.

A job's directory, seen by all nodes:
    config.yaml    the resolved recipe
    driver.sh      one attempt; node.sh or the executor's template runs it where the Ray head is
    node.sh        (without containers) one task a node: starts Ray, and the attempt on the first node
    train.log      what all attempts print
    exit_status    how the last attempt ended
    ray_token      what Ray's processes prove themselves with; made at submission, in no script
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from megatron_coreward.launch.settings import SecretFile

CONFIG, DRIVER, NODE, LOG, STATUS, TOKEN = (
    "config.yaml",
    "driver.sh",
    "node.sh",
    "train.log",
    "exit_status",
    "ray_token",
)
# Where an attempt finds the Ray head. Not RAY_ADDRESS, which `ray start` would read too.
RAY_HEAD = "COREWARD_RAY_HEAD"
CONFIG_VARIABLE = "MEGATRON_COREWARD_CONFIG"  # the recipe's text, for an attempt without a file

# For Ray's own processes, as the training sets them for a Ray that it starts itself.
RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}


def exports(variables: Mapping[str, str]) -> list[str]:
    """Lines that export variables, quoted."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def attempt_command(
    python: str, config: PurePosixPath | None, secrets: Mapping[str, SecretFile], status: PurePosixPath | None
) -> list[str]:
    """The words that start an attempt."""
    words = [python, "-m", "megatron_coreward.attempt"]
    words += [] if config is None else [str(config)]
    for name, secret in secrets.items():
        words += ["--secret", f"{name}={secret.file}"]
    return words + ([] if status is None else ["--status-file", str(status)])


def driver_script(
    directory: PurePosixPath,
    python: str,
    workdir: PurePosixPath,
    secrets: Mapping[str, SecretFile],
    setup: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> str:
    """One attempt, its output at the end of `train.log`."""
    command = shlex.join(attempt_command(python, directory / CONFIG, secrets, directory / STATUS))
    lines = [
        "#!/bin/bash",
        "# One attempt at the training.",
        "set -eu",
        *setup,
        *exports(env or {}),
        f'[ -z "${{{RAY_HEAD}:-}}" ] || export RAY_ADDRESS="${RAY_HEAD}"',
        f"cd {_path(workdir)}",
        f"exec {command} >> {_path(directory / LOG)} 2>&1",
    ]
    return "\n".join(lines) + "\n"


# Longer than 60 lines: it is the text of one shell script, which is read from top to bottom.
def node_script(
    directory: PurePosixPath,
    python: str,
    nodes: int,
    gpus_per_node: int,
    setup: Sequence[str],
    object_store_gib: float | None,
    start_timeout_s: int = 600,
) -> str:
    """One task a node: Ray everywhere, the attempt on node 0, whose exit status is the task's.

    Ray and the training run in sessions of their own: a signal that a scheduler sends to all processes of a step then
    reaches this script alone, which passes it on to the training and to nothing else.
    """
    ray = f"{shlex.quote(python)} -m ray.scripts.scripts"
    options = f"--num-gpus={gpus_per_node} --disable-usage-stats --block"
    if object_store_gib is not None:
        options += f" --object-store-memory={int(object_store_gib * 2**30)}"
    here = _path(directory)
    setup_lines = "\n".join([*setup, *exports(RAY_ENVIRONMENT)])
    return f"""#!/bin/bash
# One task a node: Ray everywhere, the training on the first one.
set -euo pipefail
{setup_lines}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={here}/{TOKEN}
rank=${{SLURM_NODEID:-${{SKYPILOT_NODE_RANK:?neither Slurm nor SkyPilot has said which node this is}}}}
attempt=${{SLURM_JOB_ID:-${{SKYPILOT_TASK_ID//\//-}}}}-${{SLURM_RESTART_COUNT:-0}}
ended={here}/.ended-$attempt
scratch=/tmp/coreward-ray-$UID-$attempt-$rank
ray_log={here}/ray-$attempt-$rank.log
ray= driver= interrupted=

fail() {{ echo "$1" >&2; exit 1; }}
leave() {{
    [ "$rank" != 0 ] || touch "$ended"
    [ -z "$ray" ] || {{ kill -TERM "$ray" 2>/dev/null || true; wait "$ray" || true; }}
    rm -rf "$scratch"
}}
trap leave EXIT
pass_on() {{  # the other nodes' Ray is needed until the training has saved
    interrupted=1
    if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; elif [ "$rank" = 0 ]; then exit 143; fi
}}
trap pass_on TERM USR1

if [ "$rank" != 0 ]; then
    # The head may not be up yet; ray start gives up early, so it is asked again.
    for _ in $(seq {start_timeout_s // 5}); do
        setsid {ray} start --address="${RAY_HEAD}" {options} > "$ray_log" 2>&1 &
        ray=$!
        while kill -0 "$ray" 2>/dev/null && [ ! -e "$ended" ]; do sleep 2 & wait $! || true; done
        if [ -e "$ended" ] || grep -q "Ray runtime started" "$ray_log"; then exit 0; fi
        sleep 5
    done
    fail "node $rank: Ray did not start; see $ray_log"
fi

case ${RAY_HEAD} in
    127.*) [ {nodes} = 1 ] || fail "this host's name is ${RAY_HEAD} to itself; other nodes cannot reach it" ;;
esac
setsid {ray} start --head --node-ip-address="${{{RAY_HEAD}%:*}}" --port="${{{RAY_HEAD}##*:}}" \\
    --include-dashboard=false --temp-dir="$scratch" {options} > "$ray_log" 2>&1 &
ray=$!
up() {{ {ray} status --address "${RAY_HEAD}" 2>/dev/null | grep -c "^ *[0-9]* node_" || true; }}
begin=$SECONDS
until [ "$(up)" -ge {nodes} ]; do
    kill -0 "$ray" 2>/dev/null || fail "Ray ended at its start; see $ray_log"
    [ $((SECONDS - begin)) -lt {start_timeout_s} ] || fail "{nodes} nodes were not up in {start_timeout_s} s"
    sleep 2
done
setsid bash {_path(directory / DRIVER)} &
driver=$!
status=0 interrupted=1
while [ -n "$interrupted" ]; do  # a signal ends wait before the training has ended
    interrupted= code=0
    wait "$driver" || code=$?
    [ "$code" = 127 ] || status=$code  # 127: what it was is known already
done
exit "$status"
"""


def _path(path: PurePosixPath) -> str:
    """Quoted, and yet a leading ~ stays what it is."""
    text = str(path)
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)
