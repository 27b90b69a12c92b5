"""One pure training step: images to features, features to losses, gradients to a new state."""
