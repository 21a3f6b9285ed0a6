"""What a run records of itself: metrics, phase times, pictures, and the rollouts it learned from."""
