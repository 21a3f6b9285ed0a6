"""Rollout groups for tests, of as many words as a test has something to say about."""

from collections.abc import Sequence

import numpy as np

from megatron_coreward.types import Completion, Prompt, Role, RolloutGroup, View


def group(
    answers: Sequence[str | None],
    uid: str = "q",
    view: View = "original",
    role: Role = "policy",
    lengths: Sequence[int] | None = None,
) -> RolloutGroup:
    """A group with the given answers; responses of 2 tokens, or of the given lengths."""
    completions = tuple(
        Completion(
            token_ids=np.zeros(length, dtype=np.int32),
            logprobs=np.zeros(length, dtype=np.float32),
            text=f"\\boxed{{{answer}}}" if answer else "",
            answer=answer,
            finish_reason="stop",
            weight_version=1,
        )
        for answer, length in zip(answers, lengths or [2] * len(answers), strict=True)
    )
    return RolloutGroup(uid, view, role, Prompt("?", np.zeros(3, dtype=np.int32)), completions)
