"""Fits a classifier: python -m dinotwins_jax.probe --features=features.npz --labels=labels.csv --out=a.npz

--labels is a table with the columns path and label; without it the labels in the features are taken, as
embed --split writes them. Prints the accuracies on held-out labels, and those on --test. Then
python -m dinotwins_jax.embed --classifier=a.npz predicts.
"""

import sys

from absl import flags

from dinotwins_jax.callable_module import call_as_function
from dinotwins_jax.cli import command, exit_code, fail


def api(features, labels=None, **options):
    """See `classifier.probe`."""
    from dinotwins_jax.features.classifier import probe

    return probe(features, labels, **options)


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("features", None, "what embed wrote", **options)
    flags.DEFINE_string("labels", None, "a table .csv or .jsonl: path, label", **options)
    flags.DEFINE_string("out", None, "file of the classifier, .npz", **options)
    flags.DEFINE_enum("kind", "ridge", ["ridge", "logistic", "mean"], "of classifier", **options)
    flags.DEFINE_list("tokens", ["cls"], "of the features: cls, mean_patch", **options)
    flags.DEFINE_boolean("balanced", False, "every class counts alike", **options)
    flags.DEFINE_string("test", None, "labelled features to score it on", **options)
    flags.DEFINE_string("test_labels", None, "their table, if they hold no labels", **options)


def _probe(values: flags.FlagValues) -> int:
    if not values.features or not values.out:
        return fail(
            "--features and --out are required, such as --features=features.npz --out=probe.npz"
        )

    def work():
        from dinotwins_jax.features.classifier import probe

        choice = {"kind": values.kind, "tokens": tuple(values.tokens), "balanced": values.balanced}
        found = probe(values.features, values.labels, **choice, out=values.out)
        about = found.about
        print(
            f"{values.out}: {values.kind}, {len(found.class_names)} classes, "
            f"{about['num_train']:,} labelled images"
        )
        if about["holdout_top1"] is None:
            print(
                "no class has two images: nothing was held out, the probabilities are not calibrated"
            )
        else:
            print(_line("on a held-out fifth", about["holdout_top1"], about["holdout_balanced"]))
        if values.test:
            scores = found.score(values.test, values.test_labels)
            print(_line(f"on {scores['images']:,} images", scores["top1"], scores["balanced"]))

    return exit_code(work)


def _line(where: str, top1: float, balanced: float) -> str:
    return f"{where}: top-1 {top1:.1f}%, balanced accuracy {balanced:.1f}%"


def run(argv=None, program="python -m dinotwins_jax.probe") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    options = {"takes_config": False, "directories": ()}
    return command(program, __doc__, _define, _probe, argv, **options)


call_as_function(__name__)

if __name__ == "__main__":
    sys.exit(run())
