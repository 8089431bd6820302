"""`hf-sparse card` and `hf-sparse publish`: policy, card and plots from results, in a folder or on the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi

import hf_sparse
from hf_sparse.config import DENSE_BELOW
from hf_sparse.errors import OutOfReachError, UserError
from hf_sparse.files import inside
from hf_sparse.measure.plots import plot_attention_error, plot_perplexity
from hf_sparse.policy import Policy
from hf_sparse.policy import files as policy_files
from hf_sparse.policy.origin import Origin
from hf_sparse.policy.suitability import check_calibration
from hf_sparse.share.bundle import CARD, CONFIG, Bundle, card_in, make_bundle
from hf_sparse.share.measured import Results, results_beside
from hf_sparse.share.publish import check_publishable
from hf_sparse.share.remote import Remote
from hf_sparse.share.source import ModelSource

_PLOTS: dict[str, tuple[str, Any]] = {
    "perplexity": ("perplexity.png", plot_perplexity),
    "attention-error": ("attention_error.png", plot_attention_error),
}


@dataclass(frozen=True)
class BundleOptions:
    """What goes beside a policy."""

    policy: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="sparse_config.json, or its folder.", show_default="that of MODEL, or the default law"
        ),
    ] = None
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that perplexity, attention-error or bench wrote. May be repeated.",
            show_default="those in MODEL, if it is a folder",
        ),
    ] = None
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base model.", show_default="that of MODEL")] = (
        None
    )
    base_revision: Annotated[str | None, typer.Option(help="Its commit.", show_default="that of MODEL")] = None
    license: Annotated[
        str | None, typer.Option(help="Its licence.", show_default="what the card of MODEL or of its base says")
    ] = None


@dataclass(frozen=True)
class Target:
    """Where to publish, and how; see `push_to_hub`."""

    repo_id: str
    private: bool | None
    revision: str | None
    create_pr: bool
    message: str


def run_card(model: str, options: BundleOptions, output: Path | None, as_json: bool) -> None:
    """Write policy, card and plots into a folder.

    Args:
        model: The model, or the folder of a policy.
        options: What goes beside the policy.
        output: The folder; `model` itself if `None`.
        as_json: Print what was written as JSON.

    Raises:
        UserError: for whatever is wrong.
    """
    given = Path(model)
    if output is None and not _is_policy_folder(model):
        raise UserError(f"{model or repr(model)} is not a folder with a {policy_files.NAME}: pass --output")
    folder = given if output is None else output
    bundle = _bundle(model, options)
    name, text = folder.resolve().name, card_in(folder)
    bundle.check(folder, name, text)
    results_beside(folder, without={result.kind for result in bundle.results})
    for result in bundle.results:
        result.copy_to(folder)
    results = results_beside(folder) if bundle.results else []
    for result in results:
        _draw(result)
    bundle = replace(bundle, results=results)
    bundle.write(folder, name, text)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(folder), "files": files}) if as_json else "\n".join([f"{folder}:", *files]))


def run_publish(
    model: str, options: BundleOptions, target: Target, *, weights: bool, dry_run: bool, as_json: bool
) -> None:
    """Publish, or show what would be.

    Args:
        model: The model, or the folder or repository of a policy.
        options: What goes beside the policy.
        target: Where to publish.
        weights: Whether to publish weights and tokenizer.
        dry_run: Show everything and upload nothing; the Hub is looked at if it is in reach.
        as_json: Print JSON.

    Raises:
        UserError: for whatever is wrong.
    """
    bundle = _bundle(model, options, weights=weights)
    check_publishable(bundle.policy)
    remote = _look(target, dry_run=dry_run)
    mine = card_in(Path(model)) if _is_policy_folder(model) else None
    with TemporaryDirectory() as made:
        folder = Path(made)
        bundle.write(folder, remote.repo_id, remote.card if remote.card is not None else mine)
        files = [{"path": name, "bytes": path.stat().st_size} for name, path in remote.additions(folder)]
        if dry_run:
            _show(remote, files, (folder / CARD).read_text(encoding="utf-8"), as_json=as_json)
            return
        url = remote.commit(folder, target.message, private=target.private)
    said = {"repo_id": remote.repo_id, "url": url, "files": files}
    print(json.dumps(said) if as_json else f"published {remote.repo_id}: {url}")


def _draw(results: Results) -> None:
    if results.kind in _PLOTS and find_spec("matplotlib") is not None:
        name, draw = _PLOTS[results.kind]
        draw(results.summary, results.folder / name)


def _look(target: Target, *, dry_run: bool) -> Remote:
    try:
        return Remote.look(
            target.repo_id,
            revision=target.revision,
            create_pr=target.create_pr,
            private=target.private,
            anonymous=dry_run,
        )
    except OutOfReachError as error:
        if not dry_run:
            raise
        print(f"{error}; shown as for a new repository", file=sys.stderr)
        return Remote(target.repo_id, HfApi(), target.revision, target.create_pr)


def _show(remote: Remote, files: list[dict[str, Any]], card: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"repo_id": remote.repo_id, "exists": remote.exists, "files": files, "card": card}))
        return
    width = max(len(file["path"]) for file in files)
    how = "a pull request to" if remote.create_pr else "one commit to"
    print(f"would upload {len(files)} files in {how} {remote.repo_id}{'' if remote.exists else ' (new)'}:\n")
    print("\n".join(f"  {file['path']:<{width}}  {file['bytes']:>12,} bytes" for file in files))
    print(f"\n{CARD}:\n\n{card}")


def _is_policy_folder(model: str) -> bool:
    # '' would be the current folder.
    return bool(model) and (Path(model) / policy_files.NAME).is_file()


def _results(model: str, options: BundleOptions) -> list[Results]:
    if options.results is not None:
        return [Results.read(folder) for folder in options.results]
    return results_beside(Path(model)) if _is_policy_folder(model) else []


def _bundle(model: str, options: BundleOptions, *, weights: bool = False) -> Bundle:
    """The files of `model` under a policy. The base model is loaded for its weights alone."""
    if _is_policy_folder(model) and options.policy is None and not weights:
        policy, origin = _named(policy_files.load(model).policy)
    else:
        source = ModelSource.find(model)
        policy, origin = _checked(source, options.policy)
    if policy.config.dense_below is None:
        # As the commands that measure have it, lest it depend on the machine.
        policy = replace(policy, config=replace(policy.config, dense_below=DENSE_BELOW))
    try:
        if options.base_model is not None:
            policy = replace(policy, base_model=options.base_model, revision=options.base_revision)
        elif options.base_revision is not None:
            policy = replace(policy, revision=options.base_revision)
        if weights and policy.base_is_local:
            policy = replace(policy, base_model=None)
    except ValueError as error:
        raise UserError(str(error)) from error
    loaded: dict[str, Any] = {"model": source.model(), "tokenizer": source.tokenizer()} if weights else {}
    bundle = make_bundle(policy, origin, _results(model, options), license=options.license, **loaded)
    beside = Path(model) / CONFIG
    if bundle.base_config is None and _is_policy_folder(model) and beside.is_file():
        bundle = replace(bundle, base_config=inside(beside, Path(model)).read_bytes())
    return bundle


def _named(policy: Policy) -> tuple[Policy, Origin]:
    return policy, Origin(policy.base_model, policy.revision)


def _checked(source: ModelSource, path: Path | None) -> tuple[Policy, Origin]:
    """The policy for a model that was found, and where the model lies."""
    support = hf_sparse.inspect(source.config)
    if not support.supported:
        raise UserError(str(support))
    policy = (source.policy or Policy()) if path is None else policy_files.load(path).policy
    if policy.config.calibration is not None:
        try:
            check_calibration(policy.config.calibration, support, source.config)
        except ValueError as error:
            raise UserError(str(error)) from error
    if Path(source.location).is_dir():
        location = str(Path(source.location).absolute())
        return (policy if source.policy else replace(policy, base_model=location)), Origin(location)
    origin = Origin(source.location, source.commit or source.revision)
    return replace(policy, base_model=origin.name, revision=origin.revision), origin
