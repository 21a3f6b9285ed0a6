"""What holds for every test: one OpenMP thread a process, and property tests that do not fail on a slow machine."""

import os

# Before torch is imported anywhere: threads that spin make processes that share cores many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
