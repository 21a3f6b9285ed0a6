"""The vLLM room: engines that sample with published weights."""
