"""Cost of the demo's compiled step by XLA's analyses, independent of the machine's load.

    python -m experiments.benchmark.step_cost            # compare with the committed figures
    python -m experiments.benchmark.step_cost --write    # replace them; give the reason in the commit

tests/test_step_cost.py fails if a figure has grown by more than a tenth.
"""

import json
import re
from pathlib import Path

import jax
from absl import app, flags

from configs import hybrid
from dinotwins_jax.build import build
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from dinotwins_jax.memory import abstract_batch, compiled_step

COMMITTED = Path(__file__).parent / "results" / "step_cost.json"


def measure() -> dict[str, float]:
    """ "flops", "temporary_bytes" and "fusions" (loops and calls of library products) on one CPU device."""
    config = hybrid.get_config("demo")
    run = build(config, jax.devices("cpu")[:1])
    state = run.placement.abstract(jax.eval_shape(run.fresh_state))
    compiled = compiled_step(run, state, abstract_batch(run, config.batch_size))
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "fusions": len(re.findall(r" fusion\(", compiled.as_text())),
    }


def version() -> str:
    """Version of the compiler, on which fusions depend: jax's first two numbers."""
    return ".".join(jax.__version__.split(".")[:2])


def committed() -> dict[str, dict[str, float]]:
    """The committed figures, version -> figures."""
    return json.loads(COMMITTED.read_text())


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_boolean("write", False, "Replace the committed figures of this version of jax")


def main(argv) -> None:
    del argv
    found, known = measure(), committed() if COMMITTED.exists() else {}
    before = known.get(version(), {})
    rows = [[f"demo step, jax {version()}", "now", "committed"]]
    rows += [[name, f"{x:,.0f}", f"{before.get(name, 0):,.0f}"] for name, x in found.items()]
    print(markdown(rows))
    if flags.FLAGS.write:
        replace_text(COMMITTED, json.dumps(known | {version(): found}, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
