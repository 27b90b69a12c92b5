"""Published augmentations, as arguments of make_multi_crop.

Each sets everything except the crop sizes in pixels, which depend on the model: 224 and 96, or 98 for
DINOv2's patches of 14. So a preset fully replaces another one.

Source:
  dino: facebookresearch/dino main_dino.py, DataAugmentationDINO.
  barlow_twins: facebookresearch/barlowtwins main.py, Transform. Two views and no local ones.
  dinov2: facebookresearch/dinov2 dinov2/data/augmentations.py, dinov2/data/transforms.py and
    dinov2/configs/ssl_default_config.yaml.
"""

DINO = {
    "global_scale": (0.4, 1.0),
    "local_scale": (0.05, 0.4),
    "num_local": 8,
    "local_overlap": 0.0,
    "ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "vertical_flip": 0.0,
    "rotate90": 0.0,
    "jitter_prob": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale_prob": 0.2,
    "blur_prob": (1.0, 0.1, 0.5),
    "blur_radius": (0.1, 2.0),
    "blur_kernel": 0,
    "solarize_prob": (0.0, 0.2, 0.0),
}

BARLOW_TWINS = DINO | {"global_scale": (0.08, 1.0), "num_local": 0}

# As intended by augmentations.py.
DINOV2_AS_WRITTEN = DINO | {
    "global_scale": (0.32, 1.0),
    "local_scale": (0.05, 0.32),
    "blur_kernel": 9,
}

# As run, for the released weights too: GaussianBlur in transforms.py passes 1 - p to torchvision's
# RandomApply, which expects the probability of blurring.
DINOV2_AS_TRAINED = DINOV2_AS_WRITTEN | {"blur_prob": (0.0, 0.9, 0.5)}

PRESETS = {
    "dino": DINO,
    "barlow_twins": BARLOW_TWINS,
    "dinov2_as_written": DINOV2_AS_WRITTEN,
    "dinov2_as_trained": DINOV2_AS_TRAINED,
}
