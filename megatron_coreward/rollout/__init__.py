"""The vLLM room: engines that sample with the weights that they were sent."""
