"""CONTRIBUTING.md, the hooks and the workflows name commands, files and versions that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
yaml = pytest.importorskip("yaml")


def test_links_and_paths_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    quoted = re.findall(r"`((?:bench|csrc|deberta_fast|docs|tests|setup\.py)[\w/.-]*)`", PAGE)
    quoted += [f"deberta_fast/{path}" for path in re.findall(r"`((?:backends|checkpoint|hf|models|op)/[\w/.]*)`", PAGE)]
    quoted = [path.replace("deberta_fast/backends", "deberta_fast/op/backends") for path in quoted]
    dotted = {path for path in quoted if re.fullmatch(r"deberta_fast\.[\w.]+", path)}
    assert len(linked) > 2 and len(quoted) > 15 and dotted
    assert [path for path in {*linked, *quoted} - dotted if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", [ROOT / "CONTRIBUTING.md", *WORKFLOWS], ids=lambda path: path.name)
def test_make_targets_exist(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|[`;]|run: )\s*make ([a-z-]+)", path.read_text(), re.M)) <= set(targets)


def test_hooks_are_of_the_pinned_versions():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = {
        Path(repo["repo"]).name: repo
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    }
    assert hooks["ruff-pre-commit"]["rev"] == f"v{pins['ruff']}"
    assert hooks["mirrors-clang-format"]["rev"] == f"v{pins['clang-format']}"


def test_workflows_cover_the_oldest_and_the_newest_versions():
    project = (ROOT / "pyproject.toml").read_text()
    jobs = {path.stem: yaml.safe_load(path.read_text())["jobs"] for path in WORKFLOWS}
    assert jobs.keys() == {"test", "wheels"}
    matrix = jobs["test"]["versions"]["strategy"]["matrix"]["include"]
    oldest = {name: re.search(rf'"{name}>=([\d.]+)', project)[1] for name in ("torch", "transformers")}
    for name, version in oldest.items():
        assert {entry[name] == f"{name}=={version}.*" for entry in matrix} == {True, False}
    assert f'requires-python = ">={min(entry["python"] for entry in matrix)}"' in project
    commands = "\n".join(step.get("run", "") for job in jobs["test"].values() for step in job["steps"])
    extras = re.search(r'"\.\[([\w,]+)\]"', commands)[1].split(",")
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)
    tests = re.findall(r"tests/[\w/.]+", commands)
    assert tests and all((ROOT / path).exists() for path in tests)


def test_forms_are_well_formed():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"] and all("label" in item["attributes"] for item in form["body"])
