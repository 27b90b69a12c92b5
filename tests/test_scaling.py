"""What a step sends on machines that are absent, against its arithmetic: formulas, report and table."""

import json
from pathlib import Path

import pytest

from dinotwins_jax.evals.table import markdown
from experiments.benchmark.scale_out import parameters
from experiments.benchmark.scaling import (
    HEADS,
    Cost,
    Traffic,
    hiding_batch,
    image_seconds,
    predicted,
    rows,
    sent,
    table,
    traffic,
)
from experiments.benchmark.settings import Settings
from experiments.benchmark.targets.cards import CARDS
from experiments.benchmark.targets.machines import MACHINES

ROOT = Path(__file__).parent.parent
REPORT = json.loads((ROOT / "experiments" / "benchmark" / "results" / "scale_out.json").read_text())
MESHES = [(machine, mesh) for machine in MACHINES for mesh in ("data", "fsdp")]


@pytest.mark.parametrize(
    ("name", "row", "all_chips"),
    [
        ("8 x H100", 450e9, 450e9),  # one switch
        ("v5e-64", 50e9, 100e9),  # 8 x 8 without wrapping: one link of a row, two of a corner
        ("v6e-256", 200e9, 400e9),  # 16 x 16, a torus: all links
    ],
)
def test_a_group_of_chips_uses_the_links_of_its_axes(name, row, all_chips):
    machine = MACHINES[name]
    assert machine.rate(machine.row) == row
    assert machine.rate(machine.chips) == all_chips
    assert all_chips <= CARDS[machine.card].link_rate


def programs_of(fixed: float, by_parameter: float, by_image: float) -> list[dict]:
    """Programs that send this over all 64 chips, beside 1,000 bytes within a row."""
    return [
        {
            "settings": {"depth": depth, "batch_size": batch},
            "parameters": 100 + 50 * depth,
            "collectives": [
                {"chips": 8, "sent": 1000.0},
                {
                    "chips": 64,
                    "sent": fixed + by_parameter * (100 + 50 * depth) + by_image * batch,
                },
            ],
        }
        for depth, batch in ((1, 16), (2, 16), (1, 32))
    ]


def test_what_is_sent_is_read_from_three_programs_as_linear_in_parameters_and_images():
    machine = MACHINES["v5e-64"]
    found = traffic(programs_of(fixed=7e6, by_parameter=8.0, by_image=3e5), machine)
    cost = found.of(parameters=1000, images=24)
    assert cost.bytes == pytest.approx(1000 + 7e6 + 8.0 * 1000 + 3e5 * 24)
    assert cost.seconds == pytest.approx(1000 / 50e9 + (7e6 + 8.0 * 1000 + 3e5 * 24) / 100e9)
    # 64 chips with more than 128 images have more rows than features.
    assert found.of(1000, 128) == found.of(1000, 500) != found.of(1000, 100)


@pytest.mark.parametrize("image_s", [3e-3, 3e-4], ids=["within", "above"])
def test_at_the_hiding_batch_collectives_and_arithmetic_take_the_same_time(image_s):
    """Within and above the batches for which the cross-correlation is split by columns."""
    found = Traffic(Cost(1e9, 0.05), 100, Cost(8, 1e-9), Cost(1e6, 1e-5), largest=128)
    batch = hiding_batch(found, 200, image_s)
    assert (batch <= found.largest) == (image_s == 3e-3)
    assert found.of(200, batch).seconds == pytest.approx(image_s * batch)


def test_an_image_that_sends_longer_than_it_computes_hides_where_sending_stops_to_grow():
    found = Traffic(Cost(1e9, 0.05), 100, Cost(8, 1e-9), Cost(1e9, 1e-2), largest=128)
    batch = hiding_batch(found, 100, 1e-3)
    assert batch == pytest.approx((0.05 + 1e-2 * 128) / 1e-3)


def test_arithmetic_is_slower_on_a_slower_card_and_for_a_larger_model():
    assert image_seconds("vit_small", "v5e") > image_seconds("vit_small", "v6e")
    assert image_seconds("vit_base", "h100") > 2.5 * image_seconds("vit_small", "h100")


def test_the_report_is_of_todays_model():
    first = REPORT["programs"][0]
    assert parameters(Settings(**first["settings"])) == first["parameters"]


@pytest.mark.parametrize("machine", MACHINES)
def test_with_whole_states_a_parameter_sends_its_float32_gradient(machine):
    """The compiled programs and the formula: an all-reduce of 4 bytes passes 2 (n - 1) / n of them."""
    here = [x for x in REPORT["programs"] if (x["machine"], x["mesh"]) == (machine, "data")]
    n = MACHINES[machine].chips
    found = traffic(here, MACHINES[machine])
    assert found.by_parameter.bytes == pytest.approx(4 * 2 * (n - 1) / n, rel=0.01)
    gradients = 4 * here[0]["parameters"] * 2 * (n - 1) / n
    assert found.of(here[0]["parameters"], 0).bytes == pytest.approx(gradients, rel=0.01)


@pytest.mark.parametrize("machine", MACHINES)
def test_an_image_sends_its_projections_of_both_views(machine):
    """The compiled programs and the formula: one view's are gathered by all, and their gradients summed
    and scattered; of the other view every chip gets its columns, and returns their gradient."""
    here = [x for x in REPORT["programs"] if (x["machine"], x["mesh"]) == (machine, "data")]
    n, D = MACHINES[machine].chips, HEADS["projector"]
    gathered, exchanged = 2 * n * D * 4 * (n - 1) / n, 2 * D * 4 * (n - 1) / n
    by_image = traffic(here, MACHINES[machine]).by_image.bytes
    assert by_image == pytest.approx(gathered + exchanged, rel=0.01)


@pytest.mark.parametrize(("machine", "mesh"), MESHES)
def test_other_depths_models_and_batches_were_compiled_and_send_what_is_expected(machine, mesh):
    found = [x for x in REPORT["checks"] if (x["machine"], x["mesh"]) == (machine, mesh)]
    assert found
    for one in found:
        compiled = sent(one, MACHINES[machine])
        assert predicted(one, REPORT).bytes == pytest.approx(compiled.bytes, rel=0.02)


def test_the_documented_table_is_that_of_the_report():
    lines = markdown(table(rows(REPORT))).splitlines()
    documented = (ROOT / "docs" / "multihost.md").read_text().splitlines()
    assert [line for line in lines if line] == [line for line in documented if line in lines]
