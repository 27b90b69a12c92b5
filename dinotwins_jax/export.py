"""Entry point: python -m dinotwins_jax.export --workdir=RUN --to=timm|dino|hf [--out=DIR]

Writes DIR/model.safetensors and DIR/config.json: the teacher's backbone for timm, for the official code of
DINO, DINOv2 or DINOv3, or for Hugging Face transformers.
"""

from pathlib import Path

from absl import app, flags, logging

from dinotwins_jax.cli import config_of, exit_code, fail, parse_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "A run")
_TO = flags.DEFINE_enum("to", None, ["timm", "dino", "hf"], "Who shall load it")
_OUT = flags.DEFINE_string("out", None, "Directory to write; default WORKDIR/export_TO")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")


def main(argv) -> int:
    """Exports what the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    if _WORKDIR.value is None or _TO.value is None:
        return fail("which run, for whom? e.g. --workdir=runs/hybrid --to=timm")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it only reads
    workdir = Path(_WORKDIR.value)
    out = Path(_OUT.value) if _OUT.value else workdir / f"export_{_TO.value}"
    return exit_code(lambda: _export(workdir, out))


def _export(workdir: Path, out: Path) -> None:
    from dinotwins_jax.exporting import export_run

    print(export_run(workdir, config_of(workdir), _TO.value, out, _CHECKPOINT.value))


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=lambda argv: parse_flags(argv, config_required=False))


if __name__ == "__main__":
    run()
