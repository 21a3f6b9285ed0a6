"""Co-rewarding at Megatron scale: reinforcement learning for LLM reasoning without labels (arXiv 2508.00410)."""

__version__ = "0.1.0"
