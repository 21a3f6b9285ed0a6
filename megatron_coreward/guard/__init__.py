"""Does training still improve the model, or only its certainty? Decided from label telemetry, without labels."""

from megatron_coreward.guard.guard import Decision, Guard, replay_rows

__all__ = ["Decision", "Guard", "replay_rows"]
