"""The wheel holds what an installation needs, and works in an empty folder."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the built wheel installed into it, without its dependencies, which this environment has."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__", ".*cache", ".sweep")
    shutil.copytree(ROOT, source, ignore=ignore)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, timeout=300)
    return folder / "site", names


@pytest.mark.slow
def test_the_wheel_has_the_packages_and_every_recipe_and_nothing_else(installed):
    _, names = installed
    found = [path for kind in ("*.yaml", "*.safetensors") for path in (ROOT / "recipes").rglob(kind)]
    recipes = {str(path.relative_to(ROOT)) for path in found}
    sources = {str(path.relative_to(ROOT)) for room in ("zoo", "datamodules") for path in (ROOT / room).rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == recipes | sources


@pytest.mark.slow
def test_list_and_a_recipe_run_from_an_empty_folder(installed, tmp_path):
    site, _ = installed
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}

    def zoo(*arguments):
        command = [sys.executable, str(site / "bin" / "zoo"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    listed = zoo("list")
    assert listed.returncode == 0, listed.stderr
    assert "lenet/mnist" in listed.stdout
    small = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8", "--trainer.max_epochs", "1"]
    ran = zoo("reproduce", "lenet/embedded", *small)
    assert ran.returncode == 1, ran.stderr  # one epoch misses the claim
    assert "missed" in ran.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import zoo; print(zoo.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site)), "the checkout was tested, not the wheel"


def test_the_oldest_versions_that_are_tested_are_those_that_are_admitted():
    pins = dict(line.split("==") for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if "==" in line)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], *(extras[name] for name in extras if name != "lint")]
    needs = [Requirement(line) for line in "\n".join(lines).splitlines() if ">=" in line and not line.startswith("#")]
    bounds = {need.name: next(s.version for s in need.specifier if s.operator == ">=") for need in needs}
    assert set(pins) == set(bounds)
    for name, bound in bounds.items():
        release = Version(bound).release
        assert Version(pins[name]).release[: len(release)] == release, f"{name}: {pins[name]}, and from {bound} on"
