"""Check this installation: Python, packages, CPU, INT8, settings, memory, folders; each finding with how to mend it."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it must run where ernie_kqat is not installed
from ernie_kqat import doctor
from ernie_kqat.errors import run_tool

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.in"
EPILOG = "Takes about 20 seconds. Exit code 0: nothing is bad (warnings may be). 1: something is."
COLUMN, WIDTH = 28, 110


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("-c", "--config", metavar="FILE", help="also check that this YAML config is valid")
    parser.add_argument("-o", "--override", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    parser.add_argument("--network", action="store_true", help="also check that PaddleNLP's model hub can be reached")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    arguments = parser.parse_args()
    found: list[doctor.Check] = []
    if arguments.config:
        from ernie_kqat import config  # needs PyYAML, which a broken installation may lack

        config.load(arguments.config, arguments.override)
    for name, check in doctor.checks(REQUIREMENTS, arguments.network):
        if sys.stderr.isatty():
            print(f"checking {name} …\033[K\r", end="", file=sys.stderr, flush=True)
        checked = doctor.examine(name, check)
        found += checked
        if not arguments.json:
            print("\n".join(line for one in checked for line in _lines(one)), flush=True)
    bad = sum(check.status == doctor.BAD for check in found)
    warnings = sum(check.status == doctor.WARN for check in found)
    if arguments.json:
        print(json.dumps({"bad": bad, "warnings": warnings, "checks": [asdict(check) for check in found]}))
    else:
        print(f"{bad} bad, {warnings} to be warned of, {len(found) - bad - warnings} ok")
    return 1 if bad else 0


def _lines(check: doctor.Check) -> list[str]:
    lines = [f"{check.status:<5}{check.name:<{COLUMN - 5}}{check.found}"]
    if check.status != doctor.OK and check.mend:
        lines += textwrap.wrap(check.mend, WIDTH, initial_indent=" " * 5 + "-> ", subsequent_indent=" " * 8)
    return lines


if __name__ == "__main__":
    run_tool(main)
