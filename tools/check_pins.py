"""Whether ``constraints.txt`` resolves with every extra: ``make pins``.

It asks uv for a dry run on every supported Python, which needs the package index. What can be checked without it is in
tests/test_pins.py.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# 3.11.5: pymdown-extensions, of the documentation, refuses older ones.
PYTHONS = ("3.11.5", "3.12", "3.13", "3.14")


def requirements() -> list[str]:
    """All that cmacc and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return sorted({*project["dependencies"], *(name for extra in extras for name in extra)})


def main() -> int:
    """Resolve for every Python; 1 where one does not."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(requirements()) + "\n")
        for python in PYTHONS:
            done = subprocess.run(
                [
                    str(Path(sys.executable).with_name("uv")), "pip", "install", "--dry-run", "--quiet",
                    "--python-version", python, "--constraints", str(ROOT / "constraints.txt"),
                    "--target", folder, "--only-binary", ":all:", "--requirements", str(wanted),
                ],
                capture_output=True,
                text=True,
                check=False,
            )  # fmt: skip
            print(f"Python {python}: {'resolves' if done.returncode == 0 else done.stderr.strip()}", flush=True)
            if done.returncode != 0:
                failed.append(python)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
