"""What the tools share: `-c FILE` and `-o key.sub=value`, in Paddle's two forms."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import config
from .errors import UserError

ARTIFACT = "inference"  # the artifact's folder within a run


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the two config options."""
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("-c", "--config", metavar="FILE", help="YAML config (configs/*.yaml)")
    made.add_argument(
        "-o",
        "--override",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="config values, as -o Train.epochs=3 seed=1 or -o … -o …; values are YAML",
    )
    return made


def settings(arguments: argparse.Namespace) -> config.Config:
    """The config that the options say; without -c, the defaults."""
    if arguments.config:
        return config.load(arguments.config, arguments.override)
    return config.from_overrides(arguments.override)


def artifact_of(arguments: argparse.Namespace) -> str:
    """The artifact that `--model` names, or else the one of -c's run."""
    if arguments.model:
        return arguments.model
    if not arguments.config:
        raise UserError("which model? --model ARTIFACT, or -c CONFIG for the artifact of its run")
    return str(Path(settings(arguments).Global.output_dir, ARTIFACT))
