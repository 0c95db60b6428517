"""What ``pip install .`` installs: the source archive and the wheel built from it hold every file that is needed."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Run where the checkout is out of reach: every package, the pages' templates, and the published numbers.
USE = """
import importlib, pathlib, pkgutil
import cmacc
folder = pathlib.Path(cmacc.__file__).parent
for module in pkgutil.walk_packages(cmacc.__path__, "cmacc."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from cmacc.transfer import published_results
assert published_results()
print(folder)
print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix not in (".pyc", "")))
"""


@pytest.mark.slow
def test_a_wheel_built_from_the_source_archive_works_in_an_empty_environment(tmp_path: Path) -> None:
    # Offline: the build backend is that of the development tools, and dependencies come from this environment.
    build = [sys.executable, "-m", "uv", "build", "--no-build-isolation", "--offline", "--quiet", "--out-dir"]
    subprocess.run([*build, str(tmp_path), str(ROOT)], check=True)
    [wheel], [archive] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"README.md", "LICENSE", "Makefile", "constraints.txt", "docs/published.csv", "tests/conftest.py"} <= names

    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--offline", "--quiet", "--no-deps", "--python"]
    subprocess.run([*install, str(python), str(wheel)], check=True)
    [site] = (tmp_path / "empty").glob("lib/python*/site-packages")
    # A path line does not execute the .pth files of that folder, so the editable install stays out of reach.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    used = subprocess.run(
        [python, "-c", USE], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, check=True, capture_output=True, text=True
    )
    folder, installed = used.stdout.splitlines()
    assert folder == str(site / "cmacc")
    wanted = {str(path.relative_to(ROOT / "src/cmacc")) for path in (ROOT / "src/cmacc").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.endswith(".pyc")} | {"transfer/published.csv"}
    assert set(installed.split()) == wanted
    helped = subprocess.run([python.with_name("cmacc"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "pretrain" in helped.stdout
