"""The pins: one version a package, above the lower bound that each dependency states. ``make pins`` resolves them."""

import re
import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = dict(line.split("==") for line in LINES)
CHECK = runpy.run_path(str(ROOT / "tools" / "check_pins.py"))


def test_every_line_is_one_version_of_one_package() -> None:
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*", line) for line in LINES)
    assert sorted(LINES) == LINES
    assert len(PINS) == len(LINES)


@pytest.mark.parametrize("text", CHECK["requirements"]())
def test_a_dependency_has_a_lower_bound_and_a_pin_above_it(text: str) -> None:
    requirement = Requirement(text)
    assert any(part.operator == ">=" for part in requirement.specifier), f"{text} states no lower bound"
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"{text} excludes its pin {pin}"
