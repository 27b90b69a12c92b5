"""Entry point: python -m dinotwins_jax.main --config=configs/hybrid.py --workdir=runs/hybrid"""

from pathlib import Path

from absl import app, flags, logging

from dinotwins_jax.cli import CONFIG, NON_FINITE, exit_code, fail, parse_flags

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything goes; default runs/<config>-<preset>"
)


def main(argv) -> int:
    """Trains the run that the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    from dinotwins_jax.metrics import NonFiniteError
    from dinotwins_jax.train import train

    logging.set_verbosity(logging.WARNING)
    workdir = _WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)
    try:
        return exit_code(lambda: train(CONFIG.value, workdir))
    except NonFiniteError as error:
        return fail(str(error), NON_FINITE)


def default_workdir(config_file: str) -> Path:
    """runs/hybrid-demo for configs/hybrid.py or configs/hybrid.py:demo."""
    path, _, preset = config_file.partition(":")
    return Path("runs") / f"{Path(path).stem}-{preset or 'demo'}"


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
