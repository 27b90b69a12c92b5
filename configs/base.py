"""Every config key with its default: the official DINO ViT-S/16 at 224 (arXiv:2104.14294) on COCO.

Not a config to train by itself: the other files start from it and take presets after a colon (demo, coco,
cifar10). Any key can be set on the command line: --config.optim.lr=0.001
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of initial weights, data order, crops and drop path
    # Pretrained backbone weights for student and teacher: a file of DINO, DINOv2, DINOv3, timm or
    # transformers (.safetensors, .npz, .pth), a folder with one, such as an export or a snapshot of the
    # hub, or another run's workdir; "": random. A checkpoint of this run comes first.
    c.init_from = ""
    c.parallel = "jit"  # jit: global arrays over a mesh of all devices | pmap: local devices
    # Devices: data x fsdp; the batch is split over all. Each group of fsdp devices shares one copy of
    # parameters, teacher, optimiser state and prototypes (sharding.py); 1: a copy each. data 0: all / fsdp.
    c.mesh = ConfigDict({"data": 0, "fsdp": 1})
    c.batch_size = 256  # global; must divide by the number of devices
    # Number of parts in which the batch passes through the backbone, one after the other: less memory, a
    # third more compute, the same numbers; the loss still sees the whole batch.
    c.micro_batches = 1
    # Stop at the operation that produces the first NaN; slow, and needs more memory.
    c.debug_nans = False
    c.total_epochs = 100.0  # all durations below are in the same unit and at most this
    # Length of the run in steps, to which all durations scale; 0: total_epochs decides.
    c.total_steps = 0

    c.model = ConfigDict()
    c.model.name = "vit_small"  # vit_tiny | vit_small | vit_base | vit_large
    c.model.embed_dim = config_dict.placeholder(int)  # unset: these three follow from model.name
    c.model.depth = config_dict.placeholder(int)
    c.model.num_heads = config_dict.placeholder(int)
    c.model.patch_size = 16  # pixels
    # linear: one map of each patch | conv: 3 x 3 convolutions of stride 2 before the blocks
    # (arXiv:2106.14881), better features in short trainings, for a patch size of 2, 4, 8, 16 | conv4: the
    # same with channels that grow fourfold instead of twofold, for 2, 4, 8.
    c.model.stem = "linear"
    # Channels that are read of a picture: 3 colours, 1 grey (colours by their luma), or as many bands or
    # grey pages as a picture has.
    c.model.in_channels = 3
    c.model.drop_path_rate = 0.1  # student only, of the last block: linear over the blocks from 0
    c.model.drop_path_uniform = False  # the same rate in every block (DINOv2)
    c.model.num_register_tokens = 0  # 4: no high-norm artefacts in attention (arXiv:2309.16588)
    c.model.layer_scale_init = config_dict.placeholder(float)  # e.g. 1e-5; unset: no LayerScale
    # mlp | swiglu: gated, with as many weights (DINOv2's and DINOv3's largest models).
    c.model.ffn = "mlp"
    c.model.positions = "learned"  # learned | rope: rotary, any grid without interpolation (DINOv3)
    # How learned positions are resampled to another grid: dino | antialias (DINOv2 with registers, timm) |
    # size (transformers' ViT and DINOv2); unset: that of the init_from weights, else dino.
    c.model.position_interpolation = config_dict.placeholder(str)
    # Augmentation of rope's coordinates, in training only; unset: none. DINOv3 rescales by up to 2.
    c.model.rope_shift = config_dict.placeholder(
        float
    )  # shift of both axes, in halves of the image
    c.model.rope_jitter = config_dict.placeholder(float)  # largest stretch of each axis, at least 1
    c.model.rope_rescale = config_dict.placeholder(float)  # largest factor on both axes, at least 1
    c.model.norm_eps = 1e-6  # of all LayerNorms; DINO and DINOv2 1e-6, DINOv3 1e-5
    # Std of initial weights, official; narrow networks (width ~100) start better at 1 / sqrt(width).
    c.model.init_std = 0.02
    # Compute dtype: float32 | bfloat16; parameters, norms, softmax and losses stay float32.
    c.model.dtype = "float32"
    # auto | xla | cudnn: flash attention, on NVIDIA GPUs of compute capability 8.0 or newer in bfloat16;
    # auto: cudnn there, else xla.
    c.model.attention = "auto"
    c.model.remat = (
        False  # recompute blocks in the backward pass instead of storing their activations
    )
    # Blocks as a loop over stacked parameters: a deep model compiles in the time of two blocks.
    c.model.scan_blocks = False
    # JAX's own gradients instead of hand-written ones: slower, and jax.jvp works (Hessian-vector products).
    c.model.plain_gradients = False

    c.data = ConfigDict()
    # scenes | coco | folder | cifar10 | array_record (prepared data) | tfds | "pkg.module:factory"
    c.data.source = "coco"
    c.data.dir = ""  # of the images; not needed by scenes; folder also takes "/data/**/*.jpg"
    # Side in pixels of the square that holds an image on the device; 0: the source's choice.
    c.data.canvas_size = 0
    # Pixels of the largest image that is read, a JPEG's after its reduction; 0: Pillow's limit, 89 million.
    c.data.max_pixels = 0
    # Samples that are not unsigned 8-bit, to 0..255. mode "": the full range of their type, such as
    # 0..65535 | fixed: range | picture: percentiles of each picture | set: of a sample of the training
    # pictures, computed at the start and kept as range.
    c.data.window = ConfigDict({"mode": "", "range": (), "percentiles": (0.5, 99.5)})
    # Percentiles of each band, not of all together; range is then a pair for each: ((0, 4095), (0, 900)).
    c.data.window.per_band = False
    # Of each channel, for values in 0..1; (): ImageNet's for 3 channels, their mean for every other number.
    c.data.mean = ()
    c.data.std = ()
    c.data.num_workers = 0  # decoding processes; 0: threads of this process, cheaper per image
    # Arguments by source; only those of data.source are used.
    c.data.scenes = ConfigDict({"num_train": 8000, "num_test": 2000, "size": 64, "seed": 0})
    c.data.coco = ConfigDict(
        {"pretrain_splits": ("train2017",), "train_split": "train2017", "test_split": "val2017"}
    )
    # JSON file of train_split, absolute or in data.dir; "": annotations/instances_<split>.json, or
    # <split>/_annotations.coco.json.
    c.data.coco.train_annotations = ""
    c.data.coco.test_annotations = ""  # the same of test_split
    # Fraction held out for testing where there is no val/ or test/.
    c.data.folder = ConfigDict({"test_fraction": 0.2, "seed": 0})
    # Table of labels, absolute or in data.dir, CSV or JSON lines; "": class folders are the labels.
    c.data.folder.labels = ""
    # Built beforehand with --file_format=array_record; dir "": TFDS's default directory.
    c.data.tfds = ConfigDict({"name": "coco/2017", "pretrain_splits": ("train",)})
    c.data.tfds.train_split = "train"
    c.data.tfds.test_split = "validation"
    # A part of any labelled source, for pretrain and train; drawn once, whatever the run's seed. The test
    # split only loses the classes that are left out.
    c.data.subset = ConfigDict({"classes": 0})  # number of classes, the first ones; 0: all
    c.data.subset.images = 0  # of the largest class; 0: all
    # Images of the first class over those of the last, an exponential curve between: 100 for a long
    # tail; 1: equal numbers.
    c.data.subset.long_tail = 1.0
    c.data.subset.seed = 0
    # Other data for evaluation and the monitor, "train" and "test" of another source, which has sections
    # like those above: data.probe.folder, …; source "": the same data.
    c.data.probe = ConfigDict({"source": "", "dir": "", "canvas_size": 0})
    for name in ("scenes", "coco", "folder", "tfds", "subset"):
        c.data.probe[name] = ConfigDict(c.data[name].to_dict())

    # Multi-crop on the device, DINO's recipe; triples are (global 0, global 1, each local). Other recipes
    # are presets, such as configs/hybrid.py:coco+dinov2_as_trained.
    c.views = ConfigDict()
    c.views.global_size = 224  # pixels; also the size of the position embedding
    c.views.global_scale = (0.4, 1.0)  # area of the crop / area of the image
    c.views.local_size = 96
    c.views.local_scale = (0.05, 0.4)
    c.views.num_local = 8  # 0: only two views; then widen global_scale: (0.14, 1.0) for DINO
    # Least share of each local crop's area inside one of the two global crops; 0: no constraint.
    c.views.local_overlap = 0.0
    c.views.ratio = (3 / 4, 4 / 3)  # width of the crop / height
    c.views.flip = 0.5
    # Probability of a mirror image top to bottom; for pictures from above or of a microscope.
    c.views.vertical_flip = 0.0
    # Probability of a turn by 90, 180 or 270 degrees; 0.75: all four orientations equally often.
    c.views.rotate90 = 0.0  # Square crops only.
    c.views.jitter_prob = 0.8
    c.views.brightness = 0.4
    c.views.contrast = 0.4
    c.views.saturation = 0.2
    c.views.hue = 0.1
    c.views.grayscale_prob = 0.2
    c.views.blur_prob = (1.0, 0.1, 0.5)
    c.views.blur_radius = (0.1, 2.0)  # pixels of the crop
    c.views.blur_kernel = 0  # taps, odd: torchvision's blur (DINOv2: 9); 0: Pillow's, not truncated
    c.views.solarize_prob = (0.0, 0.2, 0.0)

    # Terms of the loss: name -> {fn: name or "module:factory" (default: the term's name), weight,
    # and the factory's own arguments, listed in losses/<name>.py}. The loss is their weighted sum.
    # weight can follow a schedule: linear from 0 over weight_warmup_epochs, then a cosine to final_weight.
    c.loss = ConfigDict()
    # A term, such as "dino": the gradient of every other term at the class tokens is scaled to its weight
    # times this term's. "": plain weights; the metrics "balance/…" compare the terms' gradients.
    c.match_gradients_to = ""

    c.teacher = ConfigDict()
    # EMA momentum at the start; follows a cosine to final_momentum.
    c.teacher.momentum = 0.996
    c.teacher.final_momentum = 1.0
    # 0.04 to 0.07: higher, the teacher becomes uniform; lower, training becomes unstable.
    c.teacher.temp = 0.04
    c.teacher.warmup_temp = 0.04
    c.teacher.warmup_temp_epochs = 0.0

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | lars (the official one of Barlow Twins)
    # Decay rates of AdamW's two moments.
    c.optim.betas = (0.9, 0.999)
    c.optim.lr = 5e-4  # for the batch of lr_scaling
    # linear_256: the peak is lr * batch_size / 256 (DINO) | sqrt_1024: lr * root of batch_size / 1024
    # (DINOv2).
    c.optim.lr_scaling = "linear_256"
    c.optim.final_lr = 1e-6  # not scaled
    # Final rate over the peak, in place of final_lr; 1: constant after the warm-up (DINOv3).
    c.optim.final_lr_ratio = config_dict.placeholder(float)
    c.optim.warmup_epochs = 10.0
    # Not on biases and 1-D tensors; follows a cosine to final_weight_decay.
    c.optim.weight_decay = 0.04
    c.optim.final_weight_decay = 0.4
    c.optim.clip = 3.0  # largest gradient norm; 0: none
    # per_parameter (DINO) | per_module: backbone and each head (DINOv2) | global
    c.optim.clip_mode = "per_parameter"
    c.optim.freeze_last_layer_epochs = 1.0  # prototypes stay fixed; stabilises DINO's start
    # skipped: their moments stay 0 (DINO) | zero_rate: their moments advance (DINOv2)
    c.optim.frozen_last_layer = "skipped"
    # The backbone stays fixed while new heads adapt to its init_from weights.
    c.optim.freeze_backbone_epochs = 0.0
    # Layer-wise decay: learning rate of a block over that of the next one, 1.0: none (DINOv2 0.9);
    # and an additional factor for the patch embedding (DINOv2 0.2).
    c.optim.layer_decay = 1.0
    c.optim.patch_embed_lr_mult = 1.0
    # Learning rate of heads named "<head>_predictor" (BYOL's) over that of the rest. A predictor has to
    # learn faster than its input (arXiv:2102.06810), or features collapse to a line; 30 for 1,000 steps.
    c.optim.predictor_lr_mult = 1.0

    c.log = ConfigDict()
    c.log.every_steps = 50
    # In addition to metrics.jsonl, any of tensorboard (WORKDIR/tensorboard), wandb, mlflow.
    c.log.writers = ("jsonl",)
    c.log.project = "dinotwins_jax"  # W&B's project, MLflow's experiment
    c.log.collapse_warnings = True  # warn once when the diagnostics show a collapse

    c.checkpoint = ConfigDict()
    c.checkpoint.every_epochs = 5.0
    c.checkpoint.keep = 2  # number of latest checkpoints to keep
    # Metric by which the best checkpoint is kept too; "": none. Without labels there is no monitor.
    c.checkpoint.best_metric = "monitor/knn_top1"
    c.checkpoint.best_mode = "max"  # max | min

    c.evals = ConfigDict()  # on the frozen teacher; evaluate.py takes them from the run's config
    # Tasks after training; evaluate.py --tasks=… adds others: linear, knn, fewshot, finetune, attention,
    # segmentation, pca, clusters, map; and, up to hours, finetune_all and scratch. Tasks whose labels or
    # masks the data lacks are left out.
    c.evals.tasks = ("knn", "fewshot", "linear", "attention", "segmentation", "pca", "map")
    # k-NN and ridge probe of the teacher during training, on so many training images, a third of them
    # held out; 0: never.
    c.evals.monitor_every_epochs = 1.0
    c.evals.monitor_images = 1500
    c.evals.batch_size = 256
    c.evals.resize = 256  # short side, then a central crop of views.global_size
    c.evals.n_last_blocks = 4  # class tokens that are concatenated (DINO: 4 for ViT-S, 1 for ViT-B)
    c.evals.mean_patch = False  # append the mean patch token of the last block (DINO: for ViT-B)
    c.evals.label_fractions = (0.01, 0.1, 1.0)  # of the training labels, stratified
    c.evals.split_seeds = (0, 1, 2, 3, 4)  # one draw of the labels each
    c.evals.bank_solver = "ridge"  # ridge (closed form) | logistic (L-BFGS)
    c.evals.knn_k = (10, 20, 100, 200)
    c.evals.knn_temp = 0.07
    c.evals.shots = (1, 5, 10)  # images a class
    c.evals.finetune_fraction = 0.1  # of the training labels
    c.evals.finetune_blocks = 1  # the last ones
    c.evals.finetune_epochs = 20  # over the labelled images, at most 1,000 steps
    # Longest training of scratch, in steps of 128 images; a quarter of it is tried too, and finetune_all
    # always has that quarter.
    c.evals.supervised_steps = 1000
    c.evals.supervised_draws = 1  # of the labels: the first so many of split_seeds
    c.evals.attention_size = 448  # side in pixels of the images for attention maps
    c.evals.attention_keep = 0.6  # share of the attention that a mask keeps
    c.evals.mask_images = 1000  # test images whose attention is scored against masks; 0: all
    c.evals.pictures = 8  # images in attention.png and the other pictures; 0: no pictures
    return c


def dino_terms(
    out_dim: int = 65536, hidden_dim: int = 2048, bottleneck_dim: int = 256
) -> ConfigDict:
    """The DINO term with the official head; all its arguments are in losses/dino.py."""
    return ConfigDict(
        {
            **_weights(1.0),
            "out_dim": out_dim,  # prototypes K
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "norm_last_layer": True,  # the prototypes' norms stay 1; False: they are learned (DINOv2)
            "weight_norm": True,  # False: a plain linear last layer (DINOv3)
            "use_bn": False,  # batch norm in the head: helps short runs of small models to start
            "student_temp": 0.1,
            "centering": "ema",  # ema | sinkhorn_knopp (DINOv2): prototypes get equal shares of a batch
            "center_momentum": 0.9,  # of ema
        }
    )


def barlow_twins_terms(dim: int = 8192, weight: float = 1.0) -> ConfigDict:
    """The Barlow Twins term; all its arguments are in losses/barlow_twins.py."""
    return ConfigDict(
        {
            **_weights(weight),
            "hidden_dims": (dim, dim, dim),
            "lambd": 0.0051,
            "pair": "student_student",
            "views": "global",
        }
    )


def ibot_terms(
    out_dim: int = 65536, hidden_dim: int = 2048, bottleneck_dim: int = 256
) -> ConfigDict:
    """The iBOT term with a head of its own (DINOv2's long recipes); its arguments: losses/ibot.py."""
    return ConfigDict(
        {
            **_weights(1.0),
            "out_dim": out_dim,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "norm_last_layer": True,
            "weight_norm": True,
            "shared_head": "",  # dino: use that term's head; out_dim must be equal
            "student_temp": 0.1,
            "centering": "sinkhorn_knopp",  # ema | sinkhorn_knopp
            "center_momentum": 0.9,
            "image_fraction": 0.5,  # share of the global crops that are masked
            "mask_ratio": (0.1, 0.5),  # share of their patches
            "min_patches": 4,  # smallest block, in patches
        }
    )


def koleo_terms(weight: float = 0.1) -> ConfigDict:
    """The KoLeo term."""
    return ConfigDict(_weights(weight))


def gram_terms(weight: float = 2.0) -> ConfigDict:
    """The Gram term; its arguments are in losses/gram.py."""
    return ConfigDict(
        {
            **_weights(weight),
            "start_epochs": 75.0,  # no loss before; then the anchor is the teacher of that step
            "refresh_epochs": 5.0,  # interval at which the anchor is reset to the teacher; 0: never
            "max_refreshes": 3,
            "level": "image",  # pairs of patches of one image | batch: of all images
            "normalise": True,
            "remove_negatives": False,
        }
    )


def byol_terms(hidden_dim: int = 4096, out_dim: int = 256) -> ConfigDict:
    """The BYOL term."""
    return ConfigDict(
        {
            **_weights(1.0),
            "hidden_dim": hidden_dim,
            "out_dim": out_dim,
            # Batch norm after projector and predictor too, as in MoCo v3.
            "norm_output": False,
        }
    )


def simclr_terms(dim: int = 2048, out_dim: int = 128) -> ConfigDict:
    """The SimCLR term."""
    return ConfigDict({**_weights(1.0), "hidden_dims": (dim, dim, out_dim), "temp": 0.1})


def vicreg_terms(dim: int = 8192) -> ConfigDict:
    """The VICReg term."""
    return ConfigDict(
        {
            **_weights(1.0),
            "hidden_dims": (dim, dim, dim),
            "similarity": 25.0,
            "variance": 25.0,
            "covariance": 1.0,
        }
    )


def _weights(weight: float) -> dict:
    return {
        "weight": weight,
        "final_weight": config_dict.placeholder(float),
        "weight_warmup_epochs": 0.0,
    }
