"""The Dockerfile names what exists, and llms.txt leads to pages that exist."""

from __future__ import annotations

import re
import tomllib

from tests.conftest import ROOT

FILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_what_is_copied_is_there_and_is_the_whole_package():
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", FILE, re.MULTILINE)
              for name in line.split()}  # fmt: skip
    assert all((ROOT / name).exists() for name in copied)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*wheel, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == copied


def test_extras_python_and_the_entry_point_exist():
    extras = re.search(r'"\.\[(.*?)\]"', FILE)[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    python = re.search(r"^ARG PYTHON=(.*)$", FILE, re.MULTILINE)[1]
    assert [int(n) for n in python.split(".")] >= [int(n) for n in least.split(".")]
    assert re.search(r'ENTRYPOINT \["(.*?)"\]', FILE)[1] in PROJECT["project"]["scripts"]


def test_it_does_not_run_as_root_and_leaves_no_package_lists():
    instructions = re.sub(r"\\\n", " ", FILE)
    assert re.search(r"^USER (?!root)\w+$", instructions, re.MULTILINE)
    for line in instructions.splitlines():
        if "apt-get install" in line:
            assert "--no-install-recommends" in line
            assert "rm -rf /var/lib/apt/lists" in line
        assert "pip install" not in line or "--no-cache-dir" in line or line.startswith("#")
    declared = set(re.findall(r"^ARG (\w+)", FILE, re.MULTILINE)) | {"PWD"}
    used = set(re.findall(r"\$\{?(\w+)", instructions)) - {"id"}
    assert used <= declared


def test_llms_txt_leads_to_pages():
    text = (ROOT / "llms.txt").read_text("utf-8")
    assert text.startswith("# Graft\n\n> ")
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) > 10
    assert all((ROOT / link).is_file() for link in links)
