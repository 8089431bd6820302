"""The command `hf-sparse`: results on stdout, progress on stderr, exit code 2 and one line for a user's mistake."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from hf_sparse.cli.bench import bench
from hf_sparse.cli.calibrate import calibrate
from hf_sparse.cli.demo import demo
from hf_sparse.cli.inspect import inspect
from hf_sparse.cli.measure import attention_error, perplexity, retrieval
from hf_sparse.cli.memory import memory
from hf_sparse.cli.options import share_options
from hf_sparse.cli.publish import card, publish
from hf_sparse.cli.report import report
from hf_sparse.cli.theory import theory
from hf_sparse.errors import UserError

COMMANDS: tuple[Callable[..., Any], ...] = (
    inspect,
    perplexity,
    attention_error,
    retrieval,
    calibrate,
    memory,
    bench,
    card,
    publish,
    theory,
    report,
    demo,
)
"""All commands, in the order in which `--help` lists them."""

app = typer.Typer(
    name="hf-sparse",
    help="Sparse attention for Hugging Face causal language models, and what it costs.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(share_options(command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for a negative answer, 2 for a user's mistake.

    Args:
        arguments: What follows the name of the program; `sys.argv[1:]` if `None`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and cards may hold what the encoding of a terminal or a pipe does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    # A Hub out of reach is one line, not one for every retry.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # Bad options: Typer's own exceptions, whose classes moved between releases.
        describe = getattr(error, "format_message", None)
        if isinstance(error, OSError) and error.filename is not None:
            # Nobody foresaw it, but it is a path of the user's: not readable, or with too long a name.
            message = f"{error.filename}: {error.strerror}"
        elif isinstance(error, UserError) or describe is not None:
            message = str(error) if describe is None else describe()
        else:
            raise
        print("hf-sparse:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
