"""What a step on 8 H100s, 64 v5e or 256 v6e sends, and from which batch on its arithmetic hides that.

    python -m experiments.benchmark.scale_out --out=experiments/benchmark/results/scale_out.json
    python -m experiments.benchmark.scale_out --out=… --read=True      # the table of a report again

Compiles the hybrid's step for as many H100s as the machine has chips, in one or two blocks and for two
batches, with a whole state on each chip ("data") and with a state for each row of chips ("fsdp"), and reads
their collectives. How long those take is by the machine's own links; what a TPU's own program sends
differs by up to a seventh (docs/multihost.md). Needs the H100's compiler alone (requirements-bench.txt),
about half a minute a program. Programs that the report has are not compiled again.
"""

import json
from pathlib import Path

import jax
from absl import app, flags, logging

from dinotwins_jax.build import build
from dinotwins_jax.cli import exit_code
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from experiments.benchmark.ahead_of_time import measure
from experiments.benchmark.scaling import BATCH, HEADS, MODELS, predicted, rows, sent, table
from experiments.benchmark.settings import Settings, config_of, settings_of
from experiments.benchmark.targets.absent import prepare
from experiments.benchmark.targets.machines import MACHINES

_COMPILED_FOR = "h100"
_DEEP = 12


def programs(machine: str, mesh: str) -> list[Settings]:
    """Settings of the programs from which scaling.traffic reads: the first, with a block more, and with
    more images."""
    way = "plain" if mesh == "data" else f"fsdp{MACHINES[machine].row}"
    values = {"dtype": "bfloat16", "attention": "auto", "way": way} | HEADS
    first = settings_of("hybrid", "vit_small", depth=1, batch_size=16, **values)
    return [first, first._replace(depth=2), first._replace(batch_size=32)]


def checks(machine: str, mesh: str) -> list[Settings]:
    """Settings of programs that are compiled to compare them with what the others let expect."""
    first = programs(machine, mesh)[0]._replace(batch_size=BATCH)
    if MACHINES[machine].card == _COMPILED_FOR:
        return [first._replace(depth=_DEEP), first._replace(model="vit_base")]
    return [first]


def program(machine: str, mesh: str, settings: Settings) -> dict:
    """Compiles one program and reads its collectives, those of one kind, group and part as one."""
    chips = MACHINES[machine].chips
    facts = measure(_COMPILED_FOR, settings, chips, crops="given")
    found = {}
    for one in facts["collectives"]["all"]:
        key = (one["kind"], one["chips"], one["part"])
        names = ("kind", "chips", "part")
        of = found.setdefault(key, dict(zip(names, key, strict=True), count=0, bytes=0, sent=0.0))
        of["count"] += 1
        of["bytes"] += one["bytes"]
        of["sent"] += one["sent"]
    return {
        "machine": machine,
        "mesh": mesh,
        "settings": settings._asdict(),
        "parameters": parameters(settings),
        "compile_s": facts["compile_s"],
        "collectives": list(found.values()),
    }


def parameters(settings: Settings) -> int:
    """Parameters of the student with its heads."""
    config = config_of(settings._replace(way="plain"))
    state = jax.eval_shape(build(config, jax.devices("cpu")[:1]).fresh_state)
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("out", None, "The report (JSON)", required=True)
    flags.DEFINE_bool("read", False, "Only prints the table of the report")


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    path, read = Path(flags.FLAGS.out), flags.FLAGS.read
    return exit_code(lambda: print(text_of(json.loads(path.read_text()) if read else run(path))))


def run(path: Path) -> dict:
    """Compiles all programs that the report lacks and writes it after each."""
    prepare("gpu")
    report = json.loads(path.read_text()) if path.exists() else {"programs": [], "checks": []}
    report["jax"] = jax.__version__
    settings = [settings_of("hybrid", model, **HEADS) for model in MODELS]
    report["parameters"] = {of.model: parameters(of) for of in settings}
    for machine in MACHINES:
        for mesh in ("data", "fsdp"):
            for name, wanted in (
                ("programs", programs(machine, mesh)),
                ("checks", checks(machine, mesh)),
            ):
                done = [(x["machine"], x["mesh"], x["settings"]) for x in report[name]]
                for settings in wanted:
                    if (machine, mesh, settings._asdict()) not in done:
                        report[name].append(program(machine, mesh, settings))
                        replace_text(path, json.dumps(report, indent=1) + "\n")
    return report


def text_of(report: dict) -> str:
    """The table, and what was expected of the programs that check it."""
    lines = [["", "mesh", "compiled", "sent, MB", "expected, MB"]]
    for one in report["checks"]:
        compiled = sent(one, MACHINES[one["machine"]])
        settings = Settings(**one["settings"])
        lines.append(
            [
                *(one["machine"], one["mesh"], settings.text()),
                f"{compiled.bytes / 1e6:,.0f}",
                f"{predicted(one, report).bytes / 1e6:,.0f}",
            ]
        )
    return f"{markdown(table(rows(report)))}\n\n{markdown(lines)}\n"


if __name__ == "__main__":
    define_flags()
    app.run(main)
