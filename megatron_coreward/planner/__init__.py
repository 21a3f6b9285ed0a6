"""What a recipe will need before it is queued: bytes on every GPU, seconds a step, and layouts that fit. Pure."""
