"""Shipped configs, reduced to run in seconds."""

from configs import hybrid

SHRUNK = {
    "batch_size": 8,
    "total_steps": 4,
    "mesh.data": 1,  # of the eight; 0: all, which takes twice as long to compile
    "model.embed_dim": 48,
    "model.depth": 2,
    "model.num_heads": 3,
    "model.patch_size": 8,
    "views.global_size": 16,
    "views.local_size": 8,
    "data.scenes.num_train": 60,
    "data.scenes.num_test": 20,
    "data.scenes.size": 24,
    "log.every_steps": 2,
    "checkpoint.every_epochs": 7.0,  # half of the demo's epochs: after steps 2 and 4
    "evals.tasks": ("linear", "knn"),
    "evals.n_last_blocks": 1,
    "evals.batch_size": 16,
    "evals.resize": 16,
    "evals.split_seeds": (0,),
    "evals.label_fractions": (0.5,),
    "evals.knn_k": (5,),
    "evals.attention_size": 16,
    "evals.monitor_every_epochs": 7.0,
    "evals.monitor_images": 40,
    "evals.pictures": 2,
}


def shrunk(module=hybrid, preset="demo", **options):
    """A shipped config, small; options as "section__key"."""
    config = module.get_config(preset)
    options = {name.replace("__", "."): value for name, value in options.items()}
    config.update_from_flattened_dict(SHRUNK | options)
    for term in config.loss.values():
        for key, size in {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16}.items():
            if key in term:
                term[key] = size
        if "hidden_dims" in term:
            term.hidden_dims = (32,) * len(term.hidden_dims)
    return config
