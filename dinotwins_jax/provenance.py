"""Where results come from: command, date, versions, commit and devices."""

import contextlib
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np

from dinotwins_jax import __version__

_GIT_S = 10  # longest wait for git, seconds


def provenance() -> dict:
    """{"command", "date" (UTC, ISO 8601), "versions", "commit" (None outside a checkout), "devices"}.

    The commit ends in "+changes" where tracked files differ from it.
    """
    return {
        "command": " ".join(map(_quoted, ["python", *sys.orig_argv[1:]])),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "dinotwins_jax": __version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(Path(__file__).parent.parent),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def _quoted(argument: str) -> str:
    """As shlex.quote, but tuples of strings stay readable: "--config.evals.tasks=('knn',)"."""
    plain = "'" in argument and not set(argument) & set('"$`\\!')
    return f'"{argument}"' if plain else shlex.quote(argument)


def commit(checkout: Path) -> str | None:
    """The commit of a git checkout; None if `checkout` is not the top of one, or there is no git."""
    if not (
        checkout / ".git"
    ).exists():  # an installed package may lie in the checkout of something else
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
        return head + "+changes" * bool(changed)
    return None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_S)
    return done.stdout.strip()


def described(found: dict) -> list[str]:
    """Lines for a report of what `provenance` returned."""
    devices, commit = found["devices"], found["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    several = f" of {devices['processes']} processes" if devices["processes"] > 1 else ""
    return [
        f"Evaluated {found['date']} by: {found['command']}",
        f"{versions}{f', commit {commit}' if commit else ''}; "
        f"{devices['count']} x {devices['kind']}{several}.",
    ]
