"""Where results of an evaluation go: the run's own data by content, other data beside, keys of a run."""

import json
import shutil

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from shrunk import shrunk

from dinotwins_jax.cli import command, overrides_of_run
from dinotwins_jax.data import open_source
from dinotwins_jax.evals.content import content_checksum
from dinotwins_jax.results import results_folder
from dinotwins_jax.run_config import get_config


def pictures(root, classes=("ant", "bee"), count=6, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def section(root, **options):
    return {"source": "folder", "dir": str(root), "folder": {"test_fraction": 0.3, **options}}


def folder_of(workdir, own, data, **more):
    sources = tuple(open_source(data, split) for split in ("train", "test"))
    return results_folder(workdir, own and {"data": own}, data, sources, **more)


def test_the_runs_own_data_are_its_own_wherever_they_lie(tmp_path):
    run, here = tmp_path / "run", pictures(tmp_path / "here")
    own = section(here)
    assert folder_of(run, own, own) == run
    copy = shutil.copytree(here, tmp_path / "copy")  # with other times
    assert folder_of(run, own, section(copy)) == run
    link = tmp_path / "link"
    link.symlink_to(here)
    assert folder_of(run, own, section(link)) == run
    assert folder_of(run, own, own | {"num_workers": 3}) == run


def test_the_config_of_the_run_means_its_own_data_whatever_they_became(tmp_path):
    run, own = tmp_path / "run", section(pictures(tmp_path / "here")) | {"sizes": (1, 2)}
    run.mkdir()
    (run / "scores.json").write_text(json.dumps({"content": "of fewer pictures"}))
    assert folder_of(run, json.loads(json.dumps(own)), own) == run


def test_data_that_have_moved_are_known_by_what_the_scores_say(tmp_path):
    run, here = tmp_path / "run", pictures(tmp_path / "here")
    own = section(here)
    content = content_checksum([open_source(own, split) for split in ("train", "test")], "folder")
    here.rename(tmp_path / "there")
    moved = section(tmp_path / "there")
    assert (
        folder_of(run, own, moved) == run / "evals" / "folder-there"
    )  # nothing says what they were
    run.mkdir()
    (run / "scores.json").write_text(json.dumps({"content": content}))
    assert folder_of(run, own, moved) == run


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "bee" / "5.png").unlink(),
        lambda root: (root / "bee" / "5.png").rename(root / "bee" / "7.png"),
        lambda root: (root / "bee" / "5.png").rename(root / "ant" / "7.png"),
        lambda root: (root / "bee").rename(root / "wasp"),
        lambda root: Image.new("RGB", (90, 90)).save(root / "bee" / "5.png"),
    ],
    ids=["fewer", "renamed", "relabelled", "class renamed", "another picture"],
)
def test_other_data_go_beside(tmp_path, change):
    run, here = tmp_path / "run", pictures(tmp_path / "here")
    other = shutil.copytree(here, tmp_path / "my wasps")
    change(other)
    assert folder_of(run, section(here), section(other)) == run / "evals" / "folder-my_wasps"


def test_another_split_of_the_same_pictures_goes_beside(tmp_path):
    here = pictures(tmp_path / "here")
    found = folder_of(tmp_path / "run", section(here), section(here, test_fraction=0.5))
    assert found == tmp_path / "run" / "evals" / "folder-here"


def test_two_directories_of_one_name_do_not_share_a_folder(tmp_path):
    run, own = tmp_path / "run", section(pictures(tmp_path / "own"))
    first, second = (
        section(pictures(tmp_path / k / "set", seed=s)) for k, s in (("a", 1), ("b", 2))
    )
    one = folder_of(run, own, first)
    one.mkdir(parents=True)
    sources = [open_source(first, split) for split in ("train", "test")]
    (one / "scores.json").write_text(json.dumps({"content": content_checksum(sources, "folder")}))
    assert folder_of(run, own, first) == one == run / "evals" / "folder-set"
    two = folder_of(run, own, second)
    assert two.parent == one.parent and two.name.startswith("folder-set-") and two != one
    assert folder_of(run, own, second, name="second") == run / "evals" / "second"


def test_weights_of_a_file_do_not_replace_a_runs_scores(tmp_path):
    data = section(pictures(tmp_path / "here"))
    sources = tuple(open_source(data, split) for split in ("train", "test"))
    run = tmp_path / "run"
    found = results_folder(run, {"data": data}, data, sources, weights="w/dino_small.pth")
    assert found == run / "evals" / "dino_small"
    assert (
        results_folder(run, None, data, sources, weights="w/dino_small.pth") == run
    )  # no run there


@pytest.mark.parametrize("name", ["../out", "a/b", ".", "", " x"])
def test_a_name_is_no_path(tmp_path, name):
    data = section(pictures(tmp_path / "here"))
    if not name:
        assert folder_of(tmp_path, data, data, name=name) == tmp_path
        return
    with pytest.raises(ValueError, match="--name is "):
        folder_of(tmp_path, data, data, name=name)


# Keys of a run's own config on the command line


@pytest.fixture
def run(tmp_path):
    config = json.loads(json.dumps(shrunk().to_dict()))
    config["data"]["source"] = "received_code:source"
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def parsed(arguments, workdir):
    """What a command gets, and its exit code."""
    seen = []

    def define(values):
        flags.DEFINE_string("workdir", None, "", flag_values=values)

    def work(values):
        seen.append((values.config, overrides_of_run(values)))
        return 0

    argv = [f"--workdir={workdir}", *arguments]
    return command("name", "", define, work, argv, config_required=False), *(
        seen or [(None, None)]
    )[0]


def test_keys_alone_change_the_runs_own_config(run):
    code, config, overrides = parsed(
        ["--config.data.dir=/new place", "--config.evals.knn_k=(3,4)",
         "--config.model.layer_scale_init=0.5"], run,
    )  # fmt: skip
    assert code == 0 and config.data.dir == "/new place" and config.model.embed_dim == 48
    assert overrides == {
        "data.dir": "/new place", "evals.knn_k": (3, 4), "model.layer_scale_init": 0.5,
    }  # fmt: skip
    changed = ConfigDict(json.loads((run / "config.json").read_text()))
    changed.update_from_flattened_dict(overrides)
    assert changed.data.dir == "/new place" and tuple(changed.evals.knn_k) == (3, 4)


def test_the_workdir_may_be_a_word_of_its_own(run):
    code, config, overrides = parsed(["--config.seed=5", "--workdir", str(run)], "elsewhere")
    assert code == 0 and config.seed == 5 and overrides == {"seed": 5}


def test_a_config_given_is_that_one_and_no_key_is_none(run):
    code, config, overrides = parsed(["--config=dino:demo", "--config.data.dir=x"], run)
    assert code == 0 and overrides is None and config.data.source == "scenes"
    assert parsed([], run) == (0, None, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.dri=x", "--config.data.dri: config.data has no key 'dri'; did you mean 'dir'?"),
        ("dta.dir=x", "--config.dta.dir: config has no key 'dta'; did you mean 'data'?"),
        ("batch_size=many", "--config.batch_size=many"),
    ],
)
def test_a_wrong_key_is_one_line(run, capfd, key, message):
    assert parsed([f"--config.{key}"], run)[0] == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_keys_without_a_run_are_one_line(tmp_path, capfd):
    assert parsed(["--config.data.dir=x"], tmp_path)[0] == 2
    (tmp_path / "config.json").write_text("[]")
    assert parsed(["--config.data.dir=x"], tmp_path)[0] == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "has no config.json" in said[0] and "holds a list" in said[1]


def test_unset_keys_keep_their_types(run):
    config = get_config(str(run))
    assert config.model.get_type("layer_scale_init") is float and config.evals.knn_k == (5,)
