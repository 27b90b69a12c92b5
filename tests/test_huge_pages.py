"""Restart of CPU training with huge pages: once, the same process id, the same command."""

import os
import subprocess
import sys

import pytest

from dinotwins_jax.devices import huge_pages

_SCRIPT = """
import os, sys
from dinotwins_jax.devices.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.dont_write_bytecode)
"""


def test_the_process_starts_anew_once(tmp_path):
    wanted = huge_pages.environment()
    if not wanted:
        pytest.skip(
            "nothing to gain here: tunables set, an accelerator, or another kernel's setting"
        )
    command = [sys.executable, "-B", "-c", _SCRIPT, "--config=a b", "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.split(maxsplit=2) == [
        str(process.pid), "glibc.malloc.hugetlb=1", "['--config=a b', 'x'] 1\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "tunables", "accelerator", "helps"),
    [
        ("always [madvise] never", None, False, True),
        ("[always] madvise never", None, False, False),
        ("always madvise [never]", None, False, False),
        (None, None, False, False),
        ("always [madvise] never", "glibc.malloc.arena_max=1", False, False),
        ("always [madvise] never", None, True, False),
    ],
)
def test_where_they_help(monkeypatch, tmp_path, kernel, tunables, accelerator, helps):
    setting = tmp_path / "enabled"
    if kernel is not None:
        setting.write_text(f"{kernel}\n")
    monkeypatch.setattr(huge_pages, "_KERNEL", setting)
    monkeypatch.setattr(huge_pages, "_has_accelerator", lambda: accelerator)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert bool(huge_pages.environment()) == helps
    assert os.environ.get("GLIBC_TUNABLES") == tunables


@pytest.mark.parametrize(("plugins", "libtpu"), [([], None), (["cuda"], None), ([], object())])
def test_no_plugin_of_jax_no_accelerator(monkeypatch, plugins, libtpu):
    monkeypatch.setattr(huge_pages.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(huge_pages.util, "find_spec", lambda name: libtpu)
    assert huge_pages._has_accelerator() == bool(plugins or libtpu)


_MAIN = """
import os, runpy, sys
from dinotwins_jax.devices import huge_pages

def execve(path, arguments, environment):
    sys.exit(f"{path} {arguments[1:]} {environment['GLIBC_TUNABLES']}")

huge_pages.environment = lambda: {"GLIBC_TUNABLES": "wanted"}
os.execve = execve
sys.orig_argv = ["python", "-m", "dinotwins_jax.main", "--config=none.py"]
runpy.run_module("dinotwins_jax.main", run_name="__main__")
"""


def test_a_training_starts_anew_before_it_does_anything():
    process = subprocess.run([sys.executable, "-c", _MAIN], capture_output=True, text=True)
    command = "['-m', 'dinotwins_jax.main', '--config=none.py'] wanted"
    assert process.stderr.strip() == f"{sys.executable} {command}"


def test_not_twice_not_in_a_notebook_and_not_at_any_price(monkeypatch):
    calls = []
    monkeypatch.setattr(huge_pages, "environment", lambda: {"GLIBC_TUNABLES": "x"})
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("DINOTWINS_HUGE_PAGES", "1")
    huge_pages.restart_with_huge_pages()
    assert calls == [] and "DINOTWINS_HUGE_PAGES" not in os.environ
    monkeypatch.setitem(sys.modules, "IPython", object())
    huge_pages.restart_with_huge_pages()
    assert calls == []
    monkeypatch.delitem(sys.modules, "IPython")
    huge_pages.restart_with_huge_pages()
    assert len(calls) == 1

    def refuse(*_):
        raise OSError("Argument list too long")

    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart_with_huge_pages()  # goes on, with small pages
