"""Reads a run's event files with TensorBoard's own reader."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata


def read_events(workdir):
    """Loads all of WORKDIR/tensorboard with TensorBoard's reader."""
    keep_all = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance=keep_all)
    events.Reload()
    return events


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def hyperparameters(events):
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}
