"""Metrics of a run: averages, files, experiment trackers and the progress display."""
