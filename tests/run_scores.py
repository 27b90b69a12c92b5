"""Scores of a made-up run, as in scores.json."""

SCORES = {
    "teacher": {
        "linear": {
            "sgd 10%": {"protocol": "p1", "fraction": 0.1, "top1_mean": 78.44, "top1_std": 0.51,
                        "splits": []},
            "ridge 10%": {"protocol": "p2", "fraction": 0.1, "top1_mean": 80.0, "top1_std": 0.0},
        },
        "knn": {"protocol": "p3", "k20": {"top1": 83.9, "top5": 99.0}},
        "attention": {"protocol": "p4", "keep": 0.6, "images": 12, "pointing": 50.0, "pointing_sem": 5.0},
    },
    "raw <pixels>": {"knn": {"protocol": "p3", "k20": {"top1": 45.1, "top5": 80.3}}},
}  # fmt: skip
