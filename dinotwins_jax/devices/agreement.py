"""Agreement of several processes on a failure, so that all of them go on in the same way."""

import jax
import numpy as np
from jax.experimental import multihost_utils

_BYTES = 512  # of a message; equal in all processes and calls


class FailedTogether(ValueError):
    """An error that all processes raise, since one of them had it."""


def agree(error: Exception | None) -> None:
    """Raises in every process if `error` is one in any of them; a single process raises its own.

    All processes have to call it, once for each part of their work that exchanges data, before the
    exchange. One that fails earlier calls it where it handles its error: all calls look alike, so it
    meets the others' next one.

    Raises:
      FailedTogether: in several processes; the message names the process if not all had the same.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    text = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    sent = np.zeros(_BYTES, np.uint8)
    data = np.frombuffer(text.encode(errors="backslashreplace")[:_BYTES], np.uint8)
    sent[: len(data)] = data
    gathered = np.asarray(multihost_utils.process_allgather(sent))
    texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gathered]
    failed = [k for k, text in enumerate(texts) if text]
    if not failed:
        return
    alike = len(set(texts)) == 1
    raise FailedTogether(
        texts[0] if alike else f"process {failed[0]}: {texts[failed[0]]}"
    ) from error
