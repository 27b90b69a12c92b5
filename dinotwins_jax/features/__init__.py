"""Features of pictures from a trained model, and classifiers on them: what the public API does."""
