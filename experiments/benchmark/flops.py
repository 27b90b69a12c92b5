"""Floating-point operations of a training step by formula: matrix products only, 2 per multiply-add.

Letters: T tokens, N patches, E width, K prototypes, D projection, B images, V views.
"""

from experiments.benchmark.settings import Settings, architecture

HIDDEN, BOTTLENECK = 2048, 256  # of DINO's head


def step_flops(settings: Settings) -> float:
    """FLOPs of one step: forward passes of teacher and student, and twice the student's for gradients.

    In the last block only the class token counts, the only output that these methods use: the PyTorch
    baseline computes the whole block, a twentieth more. Not counted: the gradient at the pixels, which is
    not needed; norms, softmaxes, activations and the optimiser; the second forward pass of remat or
    micro-batches, which is overhead.
    """
    images, views = settings.batch_size, 2 + settings.num_local
    globals_, locals_ = (
        _backbone(settings, size) for size in (settings.global_size, settings.local_size)
    )
    student = images * (2 * sum(globals_) + settings.num_local * sum(locals_))
    teacher = images * 2 * sum(globals_)
    no_pixel_gradient = images * (2 * globals_[0] + settings.num_local * locals_[0])
    total = teacher + 3 * student - no_pixel_gradient
    width = architecture(settings)["embed_dim"]
    if settings.method != "barlow_twins":
        rows = images * views
        layers = width * HIDDEN + HIDDEN**2 + HIDDEN * BOTTLENECK + BOTTLENECK * settings.prototypes
        total += 2 * layers * (3 * rows + images * 2)
        total += (
            3 * 2 * rows * 2 * settings.prototypes
        )  # every teacher view with every student view
    if settings.method != "dino":
        layers = width * settings.projector + 2 * settings.projector**2
        total += 3 * 2 * layers * images * 2 + 3 * 2 * images * settings.projector**2
    return float(total)


def _backbone(settings: Settings, size: int) -> tuple[int, int]:
    """FLOPs (patch embedding, blocks) of one image; in the last block only the class token's."""
    model = architecture(settings)
    E, N = model["embed_dim"], (size // settings.patch_size) ** 2
    T = N + 1
    block = 2 * T * 12 * E * E + 4 * T * T * E
    last = 2 * (T * 2 + 10) * E * E + 4 * T * E  # keys and values of all tokens
    return 2 * N * 3 * settings.patch_size**2 * E, (model["depth"] - 1) * block + last
