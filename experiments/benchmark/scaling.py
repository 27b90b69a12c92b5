"""Time of the collectives of a step against that of its arithmetic, for machines that are absent.

What a step sends is read from its programs for one or two blocks and two batches (scale_out.py) and is
linear in parameters and images: gradients, and under fsdp the parameters themselves, do not depend on the
batch; the features that the cross-correlation gathers do.
"""

import math
from typing import Any, NamedTuple

from experiments.benchmark.flops import step_flops
from experiments.benchmark.settings import settings_of
from experiments.benchmark.targets.cards import CARDS
from experiments.benchmark.targets.machines import MACHINES, Machine

UTILISATION = 0.4  # of the card's peak by the rest of the step
BATCH = 64  # images a chip of the table's figures
MODELS = ("vit_small", "vit_base", "vit_large")
HEADS = {"prototypes": 131072, "projector": 8192}


class Cost(NamedTuple):
    """Of something that is sent: bytes through each chip in one direction, and the seconds that takes."""

    bytes: float
    seconds: float

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """This and `times` the other."""
        return Cost(self.bytes + times * other.bytes, self.seconds + times * other.seconds)

    def less(self, other: "Cost", divisor: float) -> "Cost":
        """The difference to the other over a number."""
        difference = self.plus(other, -1)
        return Cost(difference.bytes / divisor, difference.seconds / divisor)


def sent(program: dict, machine: Machine) -> Cost:
    """All collectives of a program."""
    found = program["collectives"]
    seconds = sum(one["sent"] / machine.rate(one["chips"]) for one in found)
    return Cost(sum(one["sent"] for one in found), seconds)


class Traffic(NamedTuple):
    """What a step sends: fixed: with `parameters` parameters (of the student), whatever the batch; by
    parameter; by image of a chip; largest: images a chip above which it does not grow, because the
    cross-correlation is no more split by columns."""

    fixed: Cost
    parameters: int
    by_parameter: Cost
    by_image: Cost
    largest: float

    def of(self, parameters: int, images: float) -> Cost:
        """Of a model with so many parameters and so many images a chip."""
        fixed = self.fixed.plus(self.by_parameter, parameters - self.parameters)
        return fixed.plus(self.by_image, min(images, self.largest))


def traffic(programs: list[dict], machine: Machine) -> Traffic:
    """Reads what depends on what from three programs of a mesh: the first one, one with more blocks and one
    with more images."""
    first, deeper, wider = programs[:3]
    one, with_blocks, with_images = (sent(x, machine) for x in programs[:3])
    images = first["settings"]["batch_size"]
    by_parameter = with_blocks.less(one, deeper["parameters"] - first["parameters"])
    by_image = with_images.less(one, wider["settings"]["batch_size"] - images)
    return Traffic(
        fixed=one.plus(by_image, -images),
        parameters=first["parameters"],
        by_parameter=by_parameter,
        by_image=by_image,
        largest=HEADS["projector"] / machine.chips,
    )


def image_seconds(model: str, card: str) -> float:
    """Seconds of the arithmetic of one image at UTILISATION; that of a step is linear in images."""
    settings = settings_of("hybrid", model, batch_size=1, **HEADS)
    return step_flops(settings) / (CARDS[card].flops * UTILISATION)


def hiding_batch(found: Traffic, parameters: int, image_s: float) -> float:
    """Images a chip from which on the collectives take no longer than the arithmetic."""
    growth = image_s - found.by_image.seconds
    batch = found.of(parameters, 0).seconds / growth if growth > 0 else math.inf
    if batch <= found.largest:
        return batch
    return found.of(parameters, found.largest).seconds / image_s


def predicted(program: dict, report: dict) -> Cost:
    """What the other programs of its machine and mesh let expect of one."""
    found = _traffic(program["machine"], program["mesh"], report)
    return found.of(program["parameters"], program["settings"]["batch_size"])


def _traffic(machine: str, mesh: str, report: dict) -> Traffic:
    here = [x for x in report["programs"] if (x["machine"], x["mesh"]) == (machine, mesh)]
    return traffic(here, MACHINES[machine])


def row(machine_name: str, mesh: str, model: str, report: dict) -> dict[str, Any]:
    """The figures of one mesh and model, from a report of scale_out.py.

    Returns:
      fixed_bytes, image_bytes: sent by a chip in a step whatever the batch, and for each of its images;
      collectives_s, compute_s: of a step of BATCH images a chip; hiding_batch: images a chip from which on
      the arithmetic takes at least as long as the collectives.
    """
    machine, parameters = MACHINES[machine_name], report["parameters"][model]
    found, image_s = _traffic(machine_name, mesh, report), image_seconds(model, machine.card)
    step = found.of(parameters, BATCH)
    batch = hiding_batch(found, parameters, image_s)
    return {
        "machine": machine_name,
        "mesh": mesh,
        "model": model,
        "fixed_bytes": found.of(parameters, 0).bytes,
        "image_bytes": found.by_image.bytes,
        "collectives_s": step.seconds,
        "compute_s": image_s * BATCH,
        "hiding_batch": math.ceil(batch),
    }


def rows(report: dict) -> list[dict[str, Any]]:
    """The figures of every machine, mesh and model of a report."""
    meshes = dict.fromkeys((one["machine"], one["mesh"]) for one in report["programs"])
    return [row(machine, mesh, model, report) for machine, mesh in meshes for model in MODELS]


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the table of docs/multihost.md, the first one its head."""
    head = ["", "mesh", "model", "MB, any batch", "MB an image", f"collectives, ms, {BATCH} images"]
    return [
        [*head, f"arithmetic, ms, {BATCH} images", "hides from images a chip"],
        *(
            [
                *(of["machine"], of["mesh"], of["model"]),
                f"{of['fixed_bytes'] / 1e6:,.0f}",
                f"{of['image_bytes'] / 1e6:.2f}",
                f"{of['collectives_s'] * 1e3:.1f}",
                f"{of['compute_s'] * 1e3:.1f}",
                f"{of['hiding_batch']}",
            ]
            for of in found
        ),
    ]
