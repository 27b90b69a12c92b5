"""constraints.txt pins what requirements.txt and requirements-dev.txt name, within their bounds."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FILES = [path for path in sorted(ROOT.glob("requirements*.txt")) if "bench" not in path.name]


def requirements(path: Path) -> list[Requirement]:
    """Those that the file itself states, without comments and included files."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pins() -> dict[str, str]:
    """{canonical name: version} of constraints.txt."""
    found = {}
    for requirement in requirements(ROOT / "constraints.txt"):
        (pin,) = requirement.specifier
        assert pin.operator == "==" and not requirement.url, requirement
        found[canonicalize_name(requirement.name)] = pin.version
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_requirements_are_pinned_within_their_bounds(path):
    versions = pins()
    for requirement in requirements(path):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement}: {version}"
        )


def test_pre_commit_runs_the_pinned_ruff():
    assert f"rev: v{pins()['ruff']} " in (ROOT / ".pre-commit-config.yaml").read_text()
