"""Photographs of COCO with attention and patch features of a comparison, only such as may be shown.

python -m experiments.docs.coco_pictures runs/photographs-coco --data=/data/coco_sample --out=docs/coco.png

Test images whose record names a licence that allows it (Attribution, or no restrictions), spread over
the classes. Columns: the picture, the mean attention of the class token's heads for each method of the
first seed, and the principal components of --pca's patch features over all pictures. Prints a line of
attribution for each, to stand beside the picture.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags

from dinotwins_jax.build import build_for_evaluation
from dinotwins_jax.cli import exit_code, fail
from dinotwins_jax.configuration import config_of
from dinotwins_jax.evals.dense import patch_tokens
from dinotwins_jax.evals.localisation import attention_maps
from dinotwins_jax.evals.pca import patch_pca
from dinotwins_jax.evals.pictures import component_colours, panel_grid, show, show_map
from dinotwins_jax.evaluation import picture_images
from dinotwins_jax.weights import from_checkpoint

# Ids of COCO's licences that allow showing a changed picture with its attribution.
FREE = {4: "CC BY 2.0", 7: "no known copyright restrictions", 8: "US government work"}
TITLES = {"dino": "DINO", "barlow_twins": "Barlow Twins", "hybrid": "hybrid"}


def licences(annotations: Path) -> dict[str, dict]:
    """{file name: its record} of the images that may be shown."""
    records = json.loads(annotations.read_text())["images"]
    return {record["file_name"]: record for record in records if record.get("license") in FREE}


def attribution(record: dict) -> str:
    """Where a picture comes from and under which licence, as Markdown."""
    photo = record["flickr_url"].rsplit("/", 1)[1].split("_")[0]
    page = f"https://www.flickr.com/photo.gne?id={photo}"
    return f"[{int(record['id'])}]({page}), {FREE[record['license']]}"


def draw(out: Path, workdirs: dict[str, Path], data: Path, count: int, pca: str) -> list[str]:
    """Writes the picture; returns the attributions of its rows. The arguments are those of the command."""
    rows: list[list] = []
    for method, workdir in workdirs.items():
        config = config_of(workdir)
        config.data.source, config.data.dir = "coco", str(data)
        run, split = build_for_evaluation(config), config.data.coco.test_split
        free = licences(data / "annotations" / f"instances_{split}.json")
        names = [Path(path).name for path in run.probe_sources[1].paths]
        among = np.array([i for i, name in enumerate(names) if name in free])
        images = picture_images(run, config, count, among)
        teacher = from_checkpoint(run, config, workdir).teacher
        rows = rows or [[show(pixels)] for pixels in images.pixels]
        maps, _ = images.map(partial(attention_maps, run.backbone, teacher))
        for row, of in zip(rows, maps, strict=True):
            row.append(show_map(of.mean(axis=0)))
        if method == pca:
            found, _ = patch_pca(images.map(partial(patch_tokens, run.backbone, teacher)))
            colours = component_colours(found, maps.shape[2:])
    for row, of in zip(rows, colours, strict=True):
        row.append(show(of))
    titles = [TITLES.get(method, method) for method in (*workdirs, pca)]
    panel_grid(out, rows, ["image", *titles[:-1], f"patches, {titles[-1]}"], aspect=1.0)
    return [attribution(free[names[i]]) for i in images.indices]


def main(argv) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    given = flags.FLAGS
    if len(argv) != 2:
        return fail("give one directory, the --out of a comparison on COCO")
    if given.pca not in given.methods:
        return fail(f"--pca={given.pca} is not among --methods={','.join(given.methods)}")

    def work():
        workdirs = {method: Path(argv[1]) / f"{method}-seed0" for method in given.methods}
        lines = draw(Path(given.out), workdirs, Path(given.data), given.pictures, given.pca)
        print(*lines, sep="\n")

    return exit_code(work)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "COCO's directory", required=True)
    flags.DEFINE_string("out", "coco.png", "File to write")
    flags.DEFINE_list("methods", list(TITLES), "Runs of the comparison")
    flags.DEFINE_string("pca", "hybrid", "The method whose patch features are shown")
    flags.DEFINE_integer("pictures", 6, "Number of pictures", lower_bound=1)
    app.run(main)
