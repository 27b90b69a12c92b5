"""The console command: dinotwins train | evaluate | embed | …, or python -m dinotwins_jax …"""

import importlib
import os
import sys

from dinotwins_jax import __version__
from dinotwins_jax.cli import fail
from dinotwins_jax.devices.huge_pages import restart_with_huge_pages

COMMANDS = {
    "train": ("main", "train and evaluate a run"),
    "evaluate": ("evaluate", "score the teacher of a run"),
    "prepare": ("prepare", "convert images to shards for training"),
    "export": ("export", "write the weights of a run for other code"),
    "embed": ("embed", "write the features of pictures"),
    "probe": ("probe", "fit a classifier to labels of embedded pictures"),
    "search": ("search", "find the pictures most similar to others"),
    "duplicates": ("duplicates", "find near-duplicates"),
    "clusters": ("clusters", "group pictures, draw a map of them"),
}


def run() -> int:
    """Calls the command that the first argument names; returns the exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"dinotwins_jax {__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
        print(
            "usage: dinotwins COMMAND [flags]; dinotwins COMMAND --help lists its flags",
            *lines,
            sep="\n",
        )
        return 0
    if name not in COMMANDS:
        return fail(f"unknown command '{name}': choose {', '.join(COMMANDS)}")
    if name == "train":
        restart_with_huge_pages()
    if os.getcwd() not in sys.path:  # as with python -m: finds custom losses and sources
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(f"dinotwins_jax.{COMMANDS[name][0]}")
    return module.run(arguments, f"dinotwins {name}")


if __name__ == "__main__":
    sys.exit(run())
