"""The command line. Each command imports what it needs when it runs: help must not wait for torch."""

from __future__ import annotations

import errno
import json
import os
import sys

import typer

from evolm import __version__
from evolm.cli import looking, models, replaying, searching, spaces, steering
from search_spaces.errors import EvolmError, SpaceError

app = typer.Typer(
    name="evolm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, in half the time
    help="Search for the language model worth training, then train it.",
    epilog="Start here: evolm search search_spaces/demo.yaml",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evolm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


NAMED_WRONG = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""Failures of a path that was named wrongly; all others are the storage's."""

spaces.register(app)
searching.register(app)
looking.register(app)
steering.register(app)
replaying.register(app)
models.register(app)


def _error_json(error: EvolmError) -> str:
    """An error as one JSON object, every problem of a file by itself."""
    problems = [problem.as_dict() for problem in error.problems] if isinstance(error, SpaceError) else []
    told = {"schema_version": 1, "error": type(error).__name__, "message": str(error), "problems": problems}
    return json.dumps({**told, "exit_code": error.exit_code}, indent=2, ensure_ascii=False)


def main() -> None:
    """Run a command; errors of evolm end with their own exit code and one message, without a traceback."""
    from evolm.packages import foreign_packages

    if foreign := foreign_packages():
        print("error: " + "\n".join(foreign), file=sys.stderr)
        sys.exit(1)
    try:
        app()
    except EvolmError as error:
        if "EVOLM_DEBUG" in os.environ:
            raise
        if "--json" in sys.argv:
            print(_error_json(error))
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # so that the interpreter's last flush has somewhere to go
        sys.exit(1)
    except OSError as error:  # a file or disk that the command was pointed at
        if "EVOLM_DEBUG" in os.environ:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2 if error.errno in NAMED_WRONG else 5)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
