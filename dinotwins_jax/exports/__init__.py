"""What an export writes beside weights: files of other formats, code that loads them, a model card."""
