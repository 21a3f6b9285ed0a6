"""What a run tells of itself: metrics, phase times, pictures, and the rollouts it learned from."""
