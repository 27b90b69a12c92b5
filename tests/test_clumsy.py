"""What people get wrong at the start of a command: each is one line that names it, or works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from shrunk import shrunk

from dinotwins_jax.checkpoint import Checkpoints, chosen_step
from dinotwins_jax.cli import command
from dinotwins_jax.data import make_source
from dinotwins_jax.settings.ranges import check_ranges

ROOT = Path(__file__).parent.parent

CONFIGS = {
    "def get_config(:\n": "SyntaxError: ",
    "import no_such_module\n": "ModuleNotFoundError: No module named 'no_such_module'",
    "get_config = 1 / 0\n": "ZeroDivisionError: division by zero",
    "x = 1\n": "it has no function get_config()",
    "def get_config():\n    return 3\n": "get_config() gives a value of type int, not a ConfigDict",
    "def get_config():\n    raise OSError('no disk')\n": "no disk",
    "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'model': {}})\n":
        "its config has no section 'views': start from dinotwins_jax.configs.base",
}  # fmt: skip


def start(*arguments):
    """Exit code of a command that would work."""

    def define(values):
        for name in ("workdir", "out"):
            flags.DEFINE_string(name, None, "", flag_values=values)

    return command("name", "", define, lambda _: 0, arguments)


def one_line(capfd):
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("text", CONFIGS)
def test_a_config_file_that_is_none_is_one_line(tmp_path, capfd, text, monkeypatch):
    monkeypatch.delenv("DINOTWINS_DEBUG", raising=False)
    (tmp_path / "mine.py").write_text(text)
    assert start(f"--config={tmp_path / 'mine.py'}") == 2
    assert CONFIGS[text] in (said := one_line(capfd)) and "mine.py" in said


@pytest.mark.parametrize("flag", ["workdir", "out"])
def test_a_directory_that_is_a_file_is_one_line(tmp_path, capfd, flag):
    (tmp_path / "file").write_text("")
    assert start("--config=dino:demo", f"--{flag}={tmp_path / 'file'}") == 2
    assert f"--{flag} is '{tmp_path / 'file'}', a file: give a directory" in one_line(capfd)
    assert start("--config=dino:demo", f"--{flag}={tmp_path / 'läufe 🐜'}") == 0


NUMBERS = {
    ("optim.lr", float("nan")): "be a finite number",
    ("optim.lr", float("inf")): "be a finite number",
    ("model.mlp_ratio", float("nan")): "be a finite number",
    ("total_steps", 10**20): "be at most 2,147,483,647",
    ("model.depth", 10**400): "be at most 2,147,483,647",
    ("batch_size", 99_999_999_999): "lie in [1, 1000000]",
    ("batch_size", 0): "lie in [1, 1000000]",
    ("seed", 10**20): "lie in [0, 4294967295]",
    ("seed", -1): "lie in [0, 4294967295]",
    ("evals.split_seeds", (2**32,)): "lie in [0, 4294967295]",
}


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_numbers_that_no_machine_can_use_are_named_with_their_range(key, value):
    config = shrunk(**{key.replace(".", "__"): value})
    with pytest.raises(ValueError, match=rf"^config\.{key} (is|has) ") as error:
        check_ranges(config)
    assert str(error.value).endswith(f": it must {NUMBERS[key, value]}")


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 2**32 - 1), ("data.max_pixels", 3 * 10**9), ("batch_size", 4096)]
)
def test_large_numbers_that_make_sense_pass(key, value):
    check_ranges(shrunk(**{key.replace(".", "__"): value}))


@pytest.mark.parametrize("which", ["²", "../4", "-1", "99999999999999999999", ""])
def test_a_checkpoint_that_is_no_step_is_one_line(tmp_path, which):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="--checkpoint is "):
        chosen_step(checkpoints, which)


def test_links_in_a_circle_end(tmp_path):
    from test_folder_files import write

    for name in ("ant", "bee"):
        write(tmp_path / "data" / name, 3)
    (tmp_path / "data" / "ant" / "up").symlink_to("../..")
    (tmp_path / "data" / "bee" / "itself").symlink_to(".")
    (tmp_path / "data" / "ant" / "lost.png").symlink_to("nowhere.png")
    (tmp_path / "data" / "bee" / "eye.png").symlink_to("eye.png")
    source = make_source("folder", "pretrain", dir=str(tmp_path / "data"))
    assert source.class_names == ("ant", "bee")
    names = [Path(source.name(i)).name for i in range(len(source))]
    assert {name for name in names if name not in ("lost.png", "eye.png")} <= {
        f"{k}.png" for k in range(3)
    }


@pytest.mark.slow
@pytest.mark.parametrize("section", ["loss", "data", "evals", "optim", "model"])
def test_a_command_in_a_config_that_came_with_a_workdir_is_not_run(tmp_path, section):
    """The real commands, on a config.json that names os:system wherever a name may stand."""
    mark = tmp_path / "executed"
    config = json.loads(json.dumps(shrunk().to_dict()))
    evil = {
        "loss": {"evil": {"fn": "os:system", "command": f"touch {mark}"}},
        "data": {"source": "os:system", "dir": f"touch {mark}"},
        "evals": {"tasks": ["os:system"], "bank_solver": "os:system"},
        "optim": {"name": "os:system"},
        "model": {"name": "os:system"},
    }
    config[section] |= evil[section]
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = [sys.executable, "-m", "dinotwins_jax"]
    for arguments in (["evaluate", "--tasks=knn"], ["export", "--to=timm"]):
        done = subprocess.run(
            [*start, *arguments, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ")
    assert not mark.exists()
