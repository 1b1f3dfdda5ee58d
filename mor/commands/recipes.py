"""List the runs that `mor train` knows by name, with what they cost."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="RECIPE", help="print this recipe's options as YAML")


def run(arguments: argparse.Namespace) -> None:
    from mor.recipes import recipe, summaries
    from mor.show.tables import recipe_table
    from mor.show.terminal import make_console

    if arguments.name:
        import yaml

        from mor.config import to_dict

        print(yaml.safe_dump(to_dict(recipe(arguments.name)), sort_keys=False), end="")
        return
    make_console().print(recipe_table(summaries()))
