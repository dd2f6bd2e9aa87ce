"""The README's commands and code run as written."""

import re
import shlex
from pathlib import Path

import pytest

from zoo.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_shell_blocks_run_in_one_folder_in_order(tmp_path):
    ran = 0
    for block in blocks("sh"):
        for line in block.splitlines():
            command = shlex.split(line, comments=True)
            if command[0] == "zoo":
                assert main(command[1:]) == 0, line
                ran += 1
    assert ran >= 8
    assert (tmp_path / "report" / "report.html").is_file()


def test_python_blocks_run(capsys):
    said = []
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
        said.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert said[0] in "0123"
    assert "boxes" in said[1]


def test_each_journey_takes_less_than_ten_lines():
    journeys = blocks("sh") + blocks("python")
    assert len(journeys) == 4
    assert all(len(journey.splitlines()) < 10 for journey in journeys)


def test_every_other_command_names_a_recipe_and_overlays_that_exist():
    from zoo import recipes

    for line in re.findall(r"^    (zoo fit .*)$", README, re.MULTILINE):
        command = shlex.split(line, comments=True)
        if command[2] != "my_recipe.yaml":
            assert recipes.find(command[2]).is_file()
        for name in re.findall(r"--config (\S+)", line):
            assert recipes.find(name, recipes.OVERLAYS).is_file()
