"""Options that several commands share, each written once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from hf_sparse.config import Policy as ReadPolicy
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.config import files as policy_files
from hf_sparse.engines import AUTO
from hf_sparse.errors import UserError
from hf_sparse.measure.data import Document, load_documents
from hf_sparse.results import check_folder, default_folder, is_main_process, process_state
from hf_sparse.schema import shown
from hf_sparse.selectors import parse_selector
from hf_sparse.share.source import check_device, check_loading

Model = Annotated[
    str, typer.Argument(help="Hub id, folder or .gguf file, of a model or a sparse_config.json.", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]

Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.")]

Policy = Annotated[
    str | None,
    typer.Option(help="sparse_config.json, or a folder with one; options that are given go before it."),
]

Documents = Annotated[
    int, typer.Option(min=1, help="Documents taken from a data set, parquet file or the default text.")
]

# The largest number in a list: more tokens than any model reads at once.
_MOST = 1 << 24
# More threads than this for each CPU only wait for one another, and far more of them end the process.
_THREADS_PER_CPU = 4


@dataclass(frozen=True)
class RunOptions:
    """How a command runs.

    Raises:
        UserError: for a device that is not there, or more threads than are of use here.
    """

    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = "auto"
    device: Annotated[
        str | None,
        typer.Option("--device", "--device-map", help="cpu, cuda:0, ...; auto spreads the model.", show_default="best"),
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's")] = None
    seed: Seed = 0
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of records, summary, plots.", show_default="results/MODEL-COMMAND; results/theory"),
    ] = None
    revision: Revision = None
    as_json: Json = False

    def __post_init__(self) -> None:
        check_device(self.device)
        cpus = os.cpu_count() or 1
        if self.threads is not None and self.threads > _THREADS_PER_CPU * cpus:
            raise UserError(
                f"threads must be at most {_THREADS_PER_CPU * cpus}, {_THREADS_PER_CPU} for each of the {cpus} CPUs "
                f"here; got {self.threads}"
            )

    @property
    def place(self) -> str:
        """The device for the model: the best there is, unless one is given."""
        return self.device or str(process_state().device)

    def prepare(self) -> None:
        """Set the number of threads, and refuse a dtype that no model is loaded in."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        check_loading(self.dtype, self.place)

    def folder(self, info: Mapping[str, Any], command: str, parts: Sequence[str] = ()) -> Path:
        """The folder for the results of a model, its parts or the whole checked by `check_folder`."""
        folder = self.output or default_folder(info["name"], command)
        # Processes that try to write into the same folder at once would be in each other's way.
        if is_main_process():
            for place, part in [(folder / part, part) for part in parts] or [(folder, command)]:
                check_folder(place, part, info)
        return folder


@dataclass(frozen=True)
class TextOptions:
    """Which texts a command reads."""

    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, folder of .txt and .md, .parquet file, or Hub data set id[:config][@split], such as "
            "emozilla/pg19 or Salesforce/wikitext:wikitext-103-raw-v1@test. May be repeated.",
            show_default="the language reference in Python's standard library",
        ),
    ] = None
    documents: Documents = 4
    column: Annotated[str, typer.Option(help="Column of a data set that holds the text.")] = "text"

    def load(self, tokens: int) -> list[Document]:
        """The documents, long enough for that many tokens where there is a choice; see `load_documents`."""
        return load_documents(self.text or [], count=self.documents, column=self.column, tokens=tokens)


@dataclass(frozen=True)
class DataOptions(TextOptions):
    """Which tokens are evaluated."""

    lengths: Annotated[str, typer.Option(help="Input lengths in tokens, rising.")] = "512,1024,2048,4096"
    offset: Annotated[int, typer.Option(min=0, help="Tokens to leave out at the start of each document.")] = 0

    def parsed_lengths(self) -> list[int]:
        """The lengths as numbers; what they must satisfy is checked by `check_lengths`."""
        return parse_integers("--lengths", self.lengths)


@dataclass(frozen=True)
class RetrievalData(DataOptions):
    """The same for prompts with questions, which take longer: fewer of them by default."""

    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, rising.")] = "1024,4096"
    documents: Documents = 2


@dataclass(frozen=True)
class KeyOptions:
    """Keys and layers that no law decides: fields of `SparseAttentionConfig`, under the same names."""

    min_keys: Annotated[int, typer.Option(help="Fewest keys of a query.")] = SparseAttentionConfig.min_keys
    sink_keys: Annotated[int, typer.Option(help="First keys, always kept.")] = SparseAttentionConfig.sink_keys
    recent_keys: Annotated[int, typer.Option(help="Last keys, always kept.")] = SparseAttentionConfig.recent_keys
    dense_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers left dense, such as 0,1; none for no layer.", show_default="the first and all sliding-window"
        ),
    ] = None
    dense_below: Annotated[int, typer.Option(help="Queries that see fewer keys stay dense.")] = (
        SparseAttentionConfig.dense_below
    )

    def config(self, policy: SparseAttentionConfig | None = None) -> SparseAttentionConfig:
        """The configuration: `policy` if there is one, but for the options that are not at their defaults."""
        defaults = SparseAttentionConfig()
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if name in vars(defaults)}
        if self.dense_layers is not None:
            none = self.dense_layers == "none"
            values["dense_layers"] = [] if none else parse_integers("--dense-layers", self.dense_layers)
        if "selector" in values:
            values["selector"] = parse_selector(values["selector"])
        changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
        try:
            # How a calibration came about decides no figure, and is long.
            start = defaults if policy is None else replace(policy, calibration=None)
            return replace(start, **changed)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True)
class SparseOptions(KeyOptions):
    """Fields of `SparseAttentionConfig`, under the same names."""

    law: Annotated[str, typer.Option(help="power, fixed, fraction or log.")] = "power"
    alpha: Annotated[float, typer.Option(help="k(n) = alpha * n ** exponent.")] = SparseAttentionConfig.alpha
    exponent: Annotated[float, typer.Option(help="C of the power law, 0 to 1.")] = SparseAttentionConfig.exponent
    keys: Annotated[int | None, typer.Option(help="Keys of law fixed.")] = None
    fraction: Annotated[float | None, typer.Option(help="Share of law fraction.")] = None
    max_keys: Annotated[int | None, typer.Option(help="Most keys of a query.")] = None
    engine: Annotated[str, typer.Option(help="auto or the name of an engine.")] = AUTO


def read_policy(name: str | None, own: ReadPolicy | None) -> SparseAttentionConfig | None:
    """The configuration of the policy called `name`, or else of the model's `own`; `None` if there is neither."""
    try:
        policy = own if name is None else policy_files.load(name)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    return None if policy is None else policy.config


def share_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: a parameter that is one of these dataclasses becomes its fields.

    Typer reads options from a function's signature, so the function gets the signature that it would have had if
    the options had been written out.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        members = list(inspect.signature(groups[name]).parameters.values()) if name in groups else [parameter]
        own = get_type_hints(groups[name], include_extras=True) if name in groups else hints
        parameters += [
            member.replace(annotation=own[member.name], kind=inspect.Parameter.KEYWORD_ONLY) for member in members
        ]

    @wraps(command)
    def grouped(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    grouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    grouped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return grouped


def parse_integers(option: str, text: str) -> list[int]:
    """The whole numbers in `text`, separated by commas; if there are none, an error names `option`."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or max(numbers) > _MOST:
        raise UserError(f"{option} takes whole numbers separated by commas, up to {_MOST:,}; got {shown(text)}")
    return numbers


def parse_shares(option: str, text: str | None) -> list[float]:
    """The shares in `text`, separated by commas; none if `None`."""
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas; got {shown(text)}") from error
