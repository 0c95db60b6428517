"""Whether ``constraints.txt`` resolves with every extra, those that are to come included: ``make pins``.

A resolver that cannot take the pinned version of a package that nobody pins falls back to an old release of it without
a word: with pillow 13, which gradio 6 excludes, it took gradio 3. So the coming extras are pinned before they are used,
with the majors that they will be written for, and this asks uv for a dry run on every supported Python. It needs the
package index; what can be checked without it is in tests/test_pins.py.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Extras that later versions add, by name.
COMING = {
    "app": ["gradio>=6"],
}


def requirements() -> list[str]:
    """All that cmacc and its extras, present and coming, ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    present = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    return sorted({*present, *(name for extra in COMING.values() for name in extra)})


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
