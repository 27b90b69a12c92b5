"""Initial weights of a run from a file or folder of other code, or the teacher of another run."""

import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.buckets import at_hand, is_remote
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.damage import paths
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.files import read_config
from dinotwins_jax.models import VARIANTS
from dinotwins_jax.models.channels import CONVERTED, channels_of, with_channels
from dinotwins_jax.models.torch_files import read_state_dict, stated_beside, vit_fields
from dinotwins_jax.models.torch_folder import weights_file
from dinotwins_jax.models.torch_weights import vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer, as_pair, interpolate_pos_embed
from dinotwins_jax.training.state import TrainState, init_backbone

# Parameters that the weights may lack; their random start disturbs the rest little.
_FRESH = ("register_tokens", "mask_token")


def read_backbone(path: str, backbone: VisionTransformer, key: jax.Array) -> dict:
    """Reads parameters of `backbone` from pretrained weights.

    Positions are interpolated to the backbone's grid by its rule, and a patch embedding of other channels
    is converted (models/channels.py), with a warning; registers and a mask token that the weights lack are
    initialised at random, with a warning. An unneeded mask token is dropped. All other tensors must
    match.

    Args:
      path: the workdir of a run, a directory or gs://BUCKET/RUN, whose last teacher is used; or a file,
        or a folder with one, of DINO, DINOv2, DINOv3, timm or transformers, such as an export: see
        `models.torch_folder.weights_file`.
      key: for randomly initialised parameters.
    Raises:
      ValueError: no such weights, or another architecture; the message names the first tensor that
        differs and both shapes.
    """
    try:
        if is_remote(path):
            with at_hand(path) as workdir:
                found, grid = _read_run(workdir, backbone)
        elif _is_run(Path(path)):
            found, grid = _read_run(Path(path), backbone)
        else:
            found, grid = _read_file(path, backbone)
        there, wanted = channels_of(found), backbone.in_channels
        if there != wanted:
            warn(f"{path} has {there} channels, this model {wanted}: {CONVERTED}")
            found = with_channels(found, wanted)
        if "pos_embed" in found:
            found = found | {"pos_embed": _positions(found["pos_embed"], grid, backbone)}
        shapes = jax.eval_shape(lambda: init_backbone(backbone, key))
        if "mask_token" not in shapes:  # as from files: unused without masking
            found = {name: part for name, part in found.items() if name != "mask_token"}
        fresh = [name for name in _FRESH if name in shapes and name not in found]
        if fresh:
            warn(f"{path} has no {' and no '.join(fresh)}: these start fresh")
            random = init_backbone(backbone, key)
            found = found | {name: np.asarray(random[name]) for name in fresh}
        _check_shapes(found, shapes)
        return found
    except (ValueError, OSError) as error:
        text = str(error) if path in str(error) else f"{path}: {error}"
        raise ValueError(f"config.init_from: {text}") from None


def with_position_interpolation(config):
    """The config with model.position_interpolation: as given, or that of its init_from weights, or "dino".

    Raises:
      ValueError: no such weights.
    """
    if config.model.get("position_interpolation", "dino"):
        return config
    config = copy.deepcopy(config)
    path, rule = config.init_from, "dino"
    try:
        if is_remote(path):
            with at_hand(path) as workdir:
                rule = _rule_of_run(workdir)
        elif path:
            rule = _rule_of_run(Path(path)) if _is_run(Path(path)) else _rule_of_file(path)
    except (ValueError, OSError) as error:
        text = str(error) if path in str(error) else f"{path}: {error}"
        raise ValueError(f"config.init_from: {text}") from None
    config.model.position_interpolation = rule
    return config


def _rule_of_run(workdir: Path) -> str:
    model = read_config(workdir / "config.json", ("model",))["model"]
    return model.get("position_interpolation") or "dino"


def _rule_of_file(path: str) -> str:
    file = _file_of(path)
    fields = vit_fields(read_state_dict(file))
    fields |= stated_beside(file, fields["embed_dim"])
    return fields.get("position_interpolation", "dino")


def start_from(state: TrainState, backbone: dict) -> TrainState:
    """Replaces the backbones of student, teacher and anchor, keeping the state's placement and dtypes."""

    def instead(of):
        # A copy each: the step donates the student's.
        def place(new, old):
            return jax.device_put(jnp.array(new, old.dtype), old.sharding)

        return jax.tree.map(place, backbone, of)

    def part(network):
        return network | {"backbone": instead(network["backbone"])}

    return state.replace(
        params=part(state.params),
        teacher_params=part(state.teacher_params),
        anchor_params=state.anchor_params and instead(state.anchor_params),
    )


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's workdir; raises ValueError if it holds weights of other code too."""
    if not (path / "checkpoints").is_dir():
        return False
    try:
        file = weights_file(path)
    except (ValueError, OSError):
        return True
    raise ValueError(f"it is a run with checkpoints, and holds {file.name} too: give that file")


def _file_of(path: str) -> Path:
    try:
        return weights_file(path)
    except FileNotFoundError as error:
        nor = (
            "; and it is not a run: config.json or checkpoints are missing"
            if Path(path).is_dir()
            else ""
        )
        raise FileNotFoundError(f"{error}{nor}") from None


def _read_file(path: str, backbone: VisionTransformer) -> tuple[dict, None]:
    file = _file_of(path)
    found = vit_from_torch(read_state_dict(file))
    width = found["cls_token"].shape[-1]
    stated = stated_beside(file, width).get("num_heads")
    if stated:
        _check_heads(stated, backbone)
        return found, None
    usual, left = divmod(width, 64)
    if not left and usual != backbone.num_heads:
        warn(
            f"{path} does not state its number of attention heads: assuming config.model's "
            f"{backbone.num_heads}; DINO's, DINOv2's and timm's models of this width have {usual}"
        )
    return found, None


def _read_run(workdir: Path, backbone: VisionTransformer) -> tuple[dict, tuple[int, int]]:
    """Reads the teacher of a run and its position grid."""
    if not (workdir / "config.json").is_file():
        raise ValueError("it has checkpoints but no config.json: it is no whole run")
    config = read_config(workdir / "config.json", ("model", "views"))
    try:
        model = config["model"]
        num_heads = model["num_heads"] or VARIANTS[model["name"]]["num_heads"]  # in no tensor
        height, width = as_pair(config["views"]["global_size"])
        grid = height // model["patch_size"], width // model["patch_size"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error!r})") from None
    _check_heads(num_heads, backbone)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        found, _ = checkpoints.restore_teacher()
    return found, grid


def _check_heads(num_heads: int, backbone: VisionTransformer) -> None:
    if num_heads != backbone.num_heads:
        raise ValueError(
            f"it has {num_heads} attention heads, this model {backbone.num_heads}: change "
            "config.model.num_heads"
        )


def _positions(positions, grid, backbone: VisionTransformer) -> np.ndarray:
    """Interpolates positions from `grid` (None: square) to the backbone's grid."""
    tokens = positions.shape[1] - 1
    side = round(tokens**0.5)
    grid = grid or (side, side)
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"pos_embed {positions.shape}: not a class token and a square grid")
    target = backbone.grid(as_pair(backbone.image_size))
    rule = backbone.position_interpolation
    return np.asarray(interpolate_pos_embed(jnp.asarray(positions), grid, target, rule))


def _check_shapes(found: dict, wanted: dict) -> None:
    """Raises ValueError for the first tensor that is missing on one side or differs in shape."""

    theirs, ours = ({p: np.shape(x) for p, x in paths(tree)} for tree in (found, wanted))
    differ = [name for name in ours | theirs if theirs.get(name) != ours.get(name)]
    if differ:
        name = differ[0]
        more = f" ({len(differ)} tensors differ)" if len(differ) > 1 else ""
        raise ValueError(
            f"{name} has shape {theirs.get(name, 'none')} there and {ours.get(name, 'none')} in this "
            f"model{more}: change config.model"
        )
