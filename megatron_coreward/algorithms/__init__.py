"""Numbers in, numbers out: advantages, losses, weights and schedules.

Nothing here knows a config, a process group or a file. Only `policy_loss`, `kl` and `mismatch` import torch.
"""
