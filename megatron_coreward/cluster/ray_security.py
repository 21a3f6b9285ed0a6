"""Ray, which runs whatever it is sent, for this user and this host alone.

A Ray of this machine's own (no `RAY_ADDRESS`) listens on loopback and asks for a token that exists only in the
environment of this run's processes. A cluster that is joined is its administrator's: `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`
and `RAY_AUTH_TOKEN_PATH` are taken as they are, there and here.
"""

import os
import secrets

from ray._private import ray_constants
from ray._raylet import (  # type: ignore[attr-defined]  # compiled, its stub is incomplete
    AuthenticationMode,
    get_authentication_mode,
)

from megatron_coreward.errors import RunError


def keep_to_this_host() -> None:
    """To be called before `ray.init(address="local", _node_ip_address="127.0.0.1")`."""
    # Cause: Ray 2.60 replaces the address 127.0.0.1 by that of a network interface and then listens on all of them. On
    # macOS and Windows it stays on loopback, which this constant decides. It can go when Ray takes 127.0.0.1 as it is.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray would make ~/.ray/auth_token, which everyone on the host can read under a usual umask.
    if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_token_needed() -> None:
    """To be called after `ray.init`. Raises RunError if Ray asks for no token although nobody turned that off."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode == "token" and get_authentication_mode() != AuthenticationMode.TOKEN:
        raise RunError("Ray has started without token authentication; set RAY_AUTH_MODE=token before this command")
