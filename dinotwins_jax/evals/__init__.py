"""Evaluation of frozen features and attention, one file per task; this file names the tasks."""

LABEL_TASKS = (
    *("knn", "fewshot", "linear", "finetune", "finetune_all", "scratch", "clusters"),  # need labels
)
MASK_TASKS = ("attention", "segmentation")  # need masks for their scores
DRAWN_TASKS = ("pca", "map")  # pictures only
LONG_TASKS = ("finetune_all", "scratch")  # minutes to hours: only where they are named
TASKS = (
    *("knn", "fewshot", "linear", "finetune", *MASK_TASKS, "clusters", *LONG_TASKS),
    *DRAWN_TASKS,
)


def check_tasks(tasks) -> None:
    """Raises ValueError for a task that does not exist."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task '{task}': choose from {', '.join(TASKS)}")
