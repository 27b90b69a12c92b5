"""Facts read from the text of compiled programs, on programs of a few lines whose facts are known."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark.hlo.attention import materialised_weights
from experiments.benchmark.hlo.collectives import collectives
from experiments.benchmark.hlo.kernels import kernels
from experiments.benchmark.hlo.parts import Parts, part_of, short
from experiments.benchmark.hlo.products import convolution_flops, products
from experiments.benchmark.hlo.reductions import low_precision
from experiments.benchmark.hlo.report import report
from experiments.benchmark.hlo.text import Array, arrays, parse
from experiments.benchmark.targets.cards import CARDS

TABLES = """
    FileNames
    1 "/src/dinotwins_jax/training/step.py"
    2 "/src/dinotwins_jax/training/optim.py"
    3 "/lib/optax/_src/update.py"

    FunctionNames
    1 "make_train_step.<locals>.train_step"
    2 "adamw.<locals>.update"
    3 "apply_updates"

    FileLocations
    1 {file_name_id=1 function_name_id=1 line=60 end_line=60 column=1 end_column=2}
    2 {file_name_id=2 function_name_id=2 line=90 end_line=90 column=1 end_column=2}
    3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=1 end_column=2}

    StackFrames
    1 {file_location_id=1 parent_frame_id=1}
    2 {file_location_id=2 parent_frame_id=2}
    3 {file_location_id=3 parent_frame_id=3}
"""

STEP = """
    HloModule jit_train_step, is_scheduled=true
    {tables}
    %sum (a: bf16[], b: bf16[]) -> bf16[] {{
      %a = bf16[] parameter(0)
      %b = bf16[] parameter(1)
      ROOT %add.1 = bf16[] add(%a, %b)
    }}

    %fused_slice (p0: f32[100,8], p1: f32[10,8]) -> f32[10,8] {{
      %p0 = f32[100,8]{{1,0}} parameter(0)
      %p1 = f32[10,8]{{1,0}} parameter(1)
      %view = f32[100,8]{{1,0}} bitcast(%p0)
      %slice.1 = f32[10,8]{{1,0}} slice(%view), slice={{[0:10], [0:8]}}
      ROOT %add.2 = f32[10,8]{{1,0}} add(%slice.1, %p1), metadata={{op_name="jit(train_step)/VisionTransformer/blocks_3/mlp/fc1/add"}}
    }}

    %fused_update (p0: f32[100,8], p1: f32[10,8], p2: s32[]) -> f32[100,8] {{
      %p0.1 = f32[100,8]{{1,0}} parameter(0)
      %p1.1 = f32[10,8]{{1,0}} parameter(1)
      %p2.1 = s32[] parameter(2)
      ROOT %update.1 = f32[100,8]{{1,0}} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %p2.1)
    }}

    %fused_product (p0: bf16[4,16], p1: bf16[16,32]) -> (bf16[4,32], bf16[32]) {{
      %p0.2 = bf16[4,16]{{1,0}} parameter(0)
      %p1.2 = bf16[16,32]{{1,0}} parameter(1)
      %dot.1 = bf16[4,32]{{1,0}} dot(%p0.2, %p1.2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, metadata={{op_name="jit(train_step)/jvp(VisionTransformer)/blocks_0/attn/qkv/dot_general"}}
      %zero = bf16[] constant(0)
      %reduce.1 = bf16[32]{{0}} reduce(%dot.1, %zero), dimensions={{0}}, to_apply=%sum, metadata={{op_name="jit(train_step)/jvp(VisionTransformer)/blocks_0/attn/qkv/reduce_sum"}}
      ROOT %both = (bf16[4,32]{{1,0}}, bf16[32]{{0}}) tuple(%dot.1, %reduce.1)
    }}

    %body (state: (s32[], f32[10,8])) -> (s32[], f32[10,8]) {{
      %state = (s32[], f32[10,8]{{1,0}}) parameter(0)
      %x = f32[10,8]{{1,0}} get-tuple-element(%state), index=1
      %twice = f32[10,8]{{1,0}} add(%x, %x), metadata={{op_name="jit(train_step)/mul" stack_frame_id=3}}
      %i = s32[] get-tuple-element(%state), index=0
      ROOT %next = (s32[], f32[10,8]{{1,0}}) tuple(%i, %twice)
    }}

    ENTRY %main (q: f32[100,8], r: f32[10,8], i: s32[], x: bf16[4,16], w: bf16[16,32], z: f32[64,6]) -> f32[6,6] {{
      %q = f32[100,8]{{1,0}} parameter(0), metadata={{op_name="state.params[\\'q\\']"}}
      %r = f32[10,8]{{1,0}} parameter(1)
      %i.1 = s32[] parameter(2)
      %x.1 = bf16[4,16]{{1,0}} parameter(3)
      %w = bf16[16,32]{{1,0}} parameter(4)
      %z = f32[64,6]{{1,0}} parameter(5)
      %part = f32[10,8]{{1,0}} fusion(%q, %r), kind=kLoop, calls=%fused_slice
      %stored = f32[100,8]{{1,0}} fusion(%q, %part, %i.1), kind=kLoop, calls=%fused_update
      %start = (s32[], f32[10,8]{{1,0}}) tuple(%i.1, %part)
      %loop = (s32[], f32[10,8]{{1,0}}) while(%start), condition=%sum, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
      %product = (bf16[4,32]{{1,0}}, bf16[32]{{0}}) fusion(%x.1, %w), kind=kCustom, calls=%fused_product, backend_config={{"fusion_backend_config":{{"kind":"__triton_nested_gemm_fusion"}}}}
      ROOT %gram = f32[6,6]{{1,0}} custom-call(%z, %z), custom_call_target="__cublas$gemm", metadata={{op_name="jit(train_step)/jvp(bi,bj->ij)/dot_general"}}, backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["0"]}},"precision_config":{{"operand_precision":["HIGHEST","HIGHEST"]}}}}}}
    }}
"""  # noqa: E501


@pytest.fixture(scope="module")
def module():
    return parse(textwrap.dedent(STEP).format(tables=textwrap.dedent(TABLES)))


@pytest.fixture(scope="module")
def launched(module):
    return {kernel.instruction.name: kernel for kernel in kernels(module)}


def test_kernels_are_what_is_launched_as_often_as_it_runs(launched):
    assert {name: kernel.runs for name, kernel in launched.items()} == {
        "part": 1,
        "stored": 1,
        "twice": 5,  # the trip count of the loop
        "product": 1,
        "gram": 1,
    }


def test_a_loop_of_a_tpu_runs_until_its_counter_reaches_the_constant():
    """Its program states no trip count."""
    text = """
        HloModule jit_f

        %body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
          %state = (s32[], f32[8]{0}) parameter(0)
          %count = s32[] get-tuple-element(%state), index=0
          %x = f32[8]{0} get-tuple-element(%state), index=1
          %twice = f32[8]{0} add(%x, %x)
          ROOT %next = (s32[], f32[8]{0}) tuple(%count, %twice)
        }

        %condition (state.1: (s32[], f32[8])) -> pred[] {
          %limit = s32[]{:T(128)} constant(11)
          %state.1 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
          %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
          ROOT %below = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
        }

        ENTRY %main (start: (s32[], f32[8])) -> (s32[], f32[8]) {
          %start = (s32[], f32[8]{0}) parameter(0)
          ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
        }
    """
    found = {one.instruction.name: one.runs for one in kernels(parse(textwrap.dedent(text)))}
    assert found == {"twice": 11}


def test_a_kernel_moves_what_it_reads_of_its_operands_and_its_results(launched):
    moved = {name: (kernel.read, kernel.written) for name, kernel in launched.items()}
    row = 10 * 8 * 4
    assert moved["part"] == (2 * row, row)  # of the sliced operand, only the slice
    assert moved["stored"] == (row + 4, row)  # an update in place: the update and its place
    assert moved["twice"] == (row, row)  # an operand that occurs twice is read once
    assert launched["twice"].bytes == 5 * 2 * row
    assert moved["product"] == (4 * 16 * 2 + 16 * 32 * 2, 4 * 32 * 2 + 32 * 2)
    assert moved["gram"] == (64 * 6 * 4, 6 * 6 * 4)


def test_products_have_flops_dtypes_and_precision(module, launched):
    (fused,), (library,) = (products(module, launched[name]) for name in ("product", "gram"))
    assert (fused.flops, fused.dtypes, fused.precision) == (
        2 * 4 * 32 * 16,
        ("bf16", "bf16"),
        "default",
    )
    assert (library.flops, library.dtypes, library.precision) == (
        2 * 6 * 6 * 64,
        ("f32", "f32"),
        "highest",
    )
    assert products(module, launched["part"]) == []


def test_cudnn_attention_counts_its_products():
    text = """
        ENTRY %main (q: bf16[2,10,3,8], k: bf16[2,12,3,8]) -> bf16[2,10,3,8] {
          %q = bf16[2,10,3,8]{3,2,1,0} parameter(0)
          %k = bf16[2,12,3,8]{3,2,1,0} parameter(1)
          %forward = bf16[2,10,3,8]{3,2,1,0} custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmax"
          ROOT %back = bf16[2,10,3,8]{3,2,1,0} custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward"
        }
    """  # noqa: E501
    module = parse(textwrap.dedent(text))
    forward, back = (products(module, kernel)[0].flops for kernel in kernels(module))
    assert forward == 2 * 2 * (2 * 10 * 3 * 8) * 12  # q k^T and weights v
    assert back == forward / 2 * 5


def test_a_convolution_counts_the_taps_inside_the_image():
    text = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    inside = (3 * 3 - 2) ** 2  # of 3 x 3 pixels and taps, less one at each edge of both axes
    assert convolution_flops(text, (5, 3, 3, 7), (5, 3, 3, 2), (3, 3, 2, 7)) == (
        2 * inside * 5 * 7 * 2
    )
    plain = "dim_labels=bf_io->bf"  # a matrix product
    assert convolution_flops(plain, (4, 32), (4, 16), (16, 32)) == 2 * 4 * 32 * 16


def test_parts_come_from_names_from_sources_and_from_what_is_inside(module, launched):
    assert {name: Parts(module).of(kernel) for name, kernel in launched.items()} == {
        "part": "MLP",  # without a name: its root's
        "stored": "MLP",  # nor inside: of what it stores
        "twice": "optimiser",  # a function of optim.py, called from the step
        "product": "qkv",
        "gram": "unnamed",
    }


FORWARD = ("jvp(VisionTransformer)", "transpose(jvp(VisionTransformer))", "VisionTransformer")


@pytest.mark.parametrize("scope", FORWARD)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks_0/attn/qkv/dot_general", "qkv"),
        ("blocks_11/attn/proj/reduce_sum", "attention projection"),
        ("blocks_0/attn/bhts,bhsd->bhtd/dot_general", "attention core"),
        ("blocks_2/mlp/fc2/add", "MLP"),
        ("blocks_2/add", "residuals"),
        ("VisionTransformer._embed/patch_embed/dot_general", "patch embedding"),
        ("VisionTransformer._embed/concatenate", "tokens and positions"),
    ],
)
def test_parts_of_the_backbone(scope, name, expected):
    assert part_of(f"jit(train_step)/{scope}/{name}", ()) == expected


def package(file: str, function: str = "f") -> tuple[str, str]:
    return f"/src/dinotwins_jax/{file}", function


@pytest.mark.parametrize(
    ("op_name", "frames", "expected"),
    [
        ("jit(train_step)/jvp(DINOHead)/mlp_0/dot_general", (), "head DINOHead"),
        ("jit(train_step)/DINOHead/last_layer/mul", (), "head DINOHead, prototypes"),
        ("jit(train_step)/jvp(MyProjector)/add", (), "head MyProjector"),
        ("jit(train_step)/jvp()/reduce_max", (package("losses/dino.py"),), "loss dino"),
        (
            "jit(train_step)/transpose(jvp())/sub",
            (package("models/heads.py", "batch_moments"), package("losses/barlow_twins.py")),
            "loss barlow_twins",
        ),
        (
            "jit(train_step)/VisionTransformer/blocks_0/attn/qkv/checkpoint/mul",
            (package("models/layers.py", "LayerNorm.__call__.<locals>.<lambda>"),),
            "norms",
        ),
        ("jit(train_step)/mul", (package("training/state.py", "ema_update"),), "EMA"),
        (
            "jit(train_step)/jit(_where)/select_n",
            (package("training/step.py", "_keep"), package("training/step.py", "apply_gradients")),
            "optimiser",
        ),
        (
            "jit(train_step)/reduce_sum",
            (("/lib/optax/_src/linear_algebra.py", "norm"),),
            "optimiser",
        ),
        ("jit(train_step)/dot_general", (package("augment/ops.py"),), "augmentation"),
        ("jit(train_step)/cos", (package("schedules.py"),), "rest of the step"),
        ("", (), "unnamed"),
    ],
)
def test_parts_outside_the_backbone(op_name, frames, expected):
    assert part_of(op_name, frames) == expected


def test_names_of_blocks_are_one_name():
    name = "jit(train_step)/jvp(VisionTransformer)/blocks_7/mlp/fc1/add"
    assert short(name) == "jvp(VisionTransformer)/blocks_i/mlp/fc1/add"


def test_sums_below_float32_are_found_inside_fusions(module):
    (found,) = low_precision(module, Parts(module))
    assert (found.result, found.terms, found.part) == ("bf16[32]", 4, "qkv")


def test_a_maximum_is_no_sum():
    text = """
        %largest (a: bf16[], b: bf16[]) -> bf16[] {
          %a = bf16[] parameter(0)
          %b = bf16[] parameter(1)
          ROOT %maximum.1 = bf16[] maximum(%a, %b)
        }

        ENTRY %main (x: bf16[4,8], least: bf16[]) -> bf16[8] {
          %x = bf16[4,8]{1,0} parameter(0)
          %least = bf16[] parameter(1)
          ROOT %reduce.1 = bf16[8]{0} reduce(%x, %least), dimensions={0}, to_apply=%largest
        }
    """
    module = parse(textwrap.dedent(text))
    assert low_precision(module, Parts(module)) == []


@pytest.mark.parametrize(
    ("text", "size", "on_chip"),
    [
        ("f32[3,5]{1,0}", 60, False),
        ("bf16[64,37]{1,0:T(8,128)(2,1)}", 64 * 128 * 2, False),  # lanes of 128
        ("bf16[64,37]{0,1:T(8,128)(2,1)}", 40 * 128 * 2, False),  # the first axis is the minor one
        ("f32[300]{0:T(256)}", 512 * 4, False),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096, True),
        ("pred[7]{0}", 7, False),
        ("s4[6]{0}", 3, False),
        ("f32[]", 4, False),
    ],
)
def test_an_array_takes_the_bytes_of_its_layout(text, size, on_chip):
    (array,) = arrays(text)
    assert (array.bytes, array.on_chip) == (size, on_chip)


def test_arrays_on_the_chip_are_no_traffic_but_their_transfers_are():
    text = """
        ENTRY %main (x: f32[8,128], n: s32[]) -> f32[8,128] {
          %x = f32[8,128]{1,0:T(8,128)} parameter(0)
          %n = s32[] parameter(1)
          %next = s32[] add(%n, %n)
          %half = ((f32[8,128]{1,0:T(8,128)}), f32[4,128]{1,0:T(4,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:128]}
          %cut = f32[4,128]{1,0:T(4,128)S(1)} slice-done(%half)
          %seen = f32[4,128]{1,0:T(4,128)S(1)} custom-call(%cut), custom_call_target="ConcatBitcast"
          %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
          %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
          ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%done, %done)
        }
    """  # noqa: E501
    found = {kernel.instruction.name: kernel for kernel in kernels(parse(textwrap.dedent(text)))}
    assert {name: (kernel.read, kernel.written) for name, kernel in found.items()} == {
        "half": (2048, 0),
        "start": (4096, 0),
        "add.1": (0, 4096),
    }  # neither the scalar nor the view of neighbours is a kernel
    assert [name for name, kernel in found.items() if kernel.is_transfer] == ["half", "start"]


COLLECTIVES = """
    %sum (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %add.1 = f32[] add(%a, %b)
    }

    ENTRY %main (c: f32[8192,8192], g: f32[10], z: bf16[64,32]) -> f32[10] {
      %c = f32[8192,8192]{1,0} parameter(0)
      %g = f32[10]{0} parameter(1)
      %z = bf16[64,32]{1,0} parameter(2)
      %both = (f32[8192,8192]{1,0}, f32[10]{0}) all-reduce-start(%c, %g), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum, metadata={op_name="jit(train_step)/jvp(VisionTransformer)/blocks_0/mlp/add"}
      %reduced = (f32[8192,8192]{1,0}, f32[10]{0}) all-reduce-done(%both)
      %gather = (bf16[64,32]{1,0}, bf16[128,32]{1,0}) all-gather-start(%z), replica_groups={{0,1},{2,3}}, dimensions={0}
      %whole = bf16[128,32]{1,0} all-gather-done(%gather)
      ROOT %out = f32[10]{0} get-tuple-element(%reduced), index=1
    }
"""  # noqa: E501


def test_collectives_have_sizes_groups_and_bytes_that_cross_the_links():
    reduce, gather = collectives(parse(textwrap.dedent(COLLECTIVES)), chips=4)
    whole = 4 * (8192**2 + 10)
    assert (reduce.kind, reduce.bytes, reduce.chips, reduce.part) == ("all-reduce", whole, 4, "MLP")
    assert reduce.sent == whole * 2 * 3 / 4 and reduce.arrays == "f32[8192, 8192] and 1 more"
    assert (gather.kind, gather.bytes, gather.chips) == ("all-gather", 128 * 32 * 2, 2)
    assert gather.sent == 128 * 32 * 2 / 2


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,2},{1,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['axis_0'=16,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=8] {'axis_0','axis_2'}", 16),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
    ],
)
def test_the_chips_of_a_group_are_read_however_the_compiler_writes_them(groups, chips):
    text = f"""
        ENTRY %main (g: f32[10]) -> f32[10] {{
          %g = f32[10]{{0}} parameter(0)
          ROOT %sum = f32[10]{{0}} all-reduce(%g), channel_id=1, replica_groups={groups}, use_global_device_ids=true
        }}
    """  # noqa: E501
    (found,) = collectives(parse(textwrap.dedent(text)), chips=64)
    assert found.chips == chips


def test_a_collective_that_runs_beside_several_kernels_is_one():
    """A TPU's compiler repeats it, with its channel, in each of them."""
    text = """
        ENTRY %main (z: f32[2,8]) -> f32[8,8] {
          %z = f32[2,8]{1,0} parameter(0)
          %one = f32[8,8]{1,0} all-gather(%z), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
          %again = f32[8,8]{1,0} all-gather(%z), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
          ROOT %other = f32[8,8]{1,0} all-gather(%z), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
        }
    """  # noqa: E501
    assert len(collectives(parse(textwrap.dedent(text)), chips=4)) == 2


def test_the_kernel_by_which_a_tpu_reduces_and_scatters_is_read_as_such():
    text = """
        %all-reduce-scatter.1 (g: f32[8,8]) -> f32[2,8] {
          %g = f32[8,8]{1,0} parameter(0)
          %sum = f32[8,8]{1,0} all-reduce(%g), channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true
          %place = u32[] constant(0)
          ROOT %own = f32[2,8]{1,0} dynamic-slice(%sum, %place, %place), dynamic_slice_sizes={2,8}
        }

        ENTRY %main (x: f32[8,8]) -> f32[2,8] {
          %x = f32[8,8]{1,0} parameter(0)
          ROOT %scattered = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
        }
    """  # noqa: E501
    (found,) = collectives(parse(textwrap.dedent(text)), chips=4)
    assert (found.kind, found.bytes, found.sent) == ("reduce-scatter", 256, 256 * 3 / 4)


def test_collectives_of_the_installed_jax_are_read():
    """Over a mesh of 2 x 4 devices: weights gathered in groups of 4, a sum over all 8."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    over = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in ((("data", "fsdp"),), (None, "fsdp"), ())
    ]

    def mean_square(x, w):
        return jnp.mean(jnp.square(x @ jax.lax.with_sharding_constraint(w, over[2])))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 64), (64, 32))]
    program = jax.jit(mean_square, in_shardings=over[:2]).lower(*shapes).compile()
    gather, total = collectives(parse(program.as_text()), chips=8)
    assert (gather.kind, gather.bytes, gather.chips) == ("all-gather", 4 * 64 * 32, 4)
    assert gather.sent == 4 * 64 * 32 * 3 / 4
    assert (total.kind, total.bytes, total.chips) == ("all-reduce", 4, 8)


def test_attention_weights_in_memory_are_found_by_their_lengths():
    name = 'metadata={op_name="jit(f)/VisionTransformer/blocks_0/attn/exp"}'
    text = f"""
        ENTRY %main (q: bf16[2,6,37,64]) -> bf16[2,6,37,37] {{
          %q = bf16[2,6,37,64]{{3,2,1,0}} parameter(0)
          %same = bf16[2,6,37,64]{{3,2,1,0}} negate(%q), {name}
          %padded = f32[2,6,40,40]{{3,2,1,0}} custom-call(%q), custom_call_target="a", {name}
          ROOT %weights = bf16[37,2,6,37]{{3,2,1,0}} custom-call(%q), custom_call_target="b", {name}
        }}
    """
    module = parse(textwrap.dedent(text))
    found = materialised_weights(Parts(module), kernels(module), tokens=[197, 37])
    assert [kernel.instruction.name for kernel, _ in found] == ["padded", "weights"]


def test_the_report_adds_up(module):
    card = CARDS["h100"]
    found = report(module, card, chips=1, tokens=[37])
    parts, kinds = found["traffic"]["by_part"], found["kernels"]["by_kind"]
    assert sum(of["bytes"] for of in parts.values()) == found["traffic"]["bytes"]
    assert sum(of["kernels"] for of in parts.values()) == found["kernels"]["count"] == 9
    assert kinds["add"] == 5 and kinds["fusion __triton_nested_gemm_fusion"] == 1
    assert parts["qkv"]["flops"] == 2 * 4 * 32 * 16
    (wide,) = found["products"]["float32"]
    assert (wide["op_name"], wide["precision"]) == ("jvp(bi,bj->ij)/dot_general", "highest")
    assert wide["share"] == pytest.approx(2 * 6 * 6 * 64 / found["products"]["flops"])
    roofline = found["roofline"]
    assert roofline["memory_s"] == pytest.approx(found["traffic"]["bytes"] / card.memory_rate)
    assert roofline["memory_s"] <= roofline["seconds"]
    assert found["reductions_below_float32"]["count"] == 1
    assert found["collectives"]["count"] == 0 and "estimate" not in found


def test_float32_products_take_longer_than_those_of_bfloat16():
    for card in CARDS.values():
        half = card.product_seconds(1e12, ("bf16", "bf16"), "default")
        times = [
            card.product_seconds(1e12, ("f32", "f32"), precision)
            for precision in ("default", "high", "highest")
        ]
        assert half == 1e12 / card.flops <= times[0] <= times[1] < times[2]


def test_an_array_of_an_unknown_layout_has_its_own_bytes():
    assert Array("f32", (2, 3)).bytes == 24


def test_programs_of_the_installed_jax_are_read():
    """The tables of source positions, the layouts and the attributes are those that XLA prints today."""

    def gram_of_features(x, w):
        return jnp.tanh(x @ w)

    shapes = (
        jax.ShapeDtypeStruct((16, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 32), jnp.float32),
    )
    module = parse(jax.jit(gram_of_features).lower(*shapes).compile().as_text())
    found = [product for kernel in kernels(module) for product in products(module, kernel)]
    assert [product.flops for product in found] == [2 * 16 * 64 * 32]
    everything = [x for computation in module.computations.values() for x in computation.values()]
    (product,) = (x for x in everything if x.opcode == "dot")
    file, function = product.frames[0]
    assert file == __file__ and function.endswith("gram_of_features")
    assert sum(kernel.bytes for kernel in kernels(module)) >= 4 * (16 * 64 + 64 * 32 + 16 * 32)
