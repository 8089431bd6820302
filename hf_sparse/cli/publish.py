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

from hf_sparse.cli.options import Json, Model
from hf_sparse.config import Origin, Policy
from hf_sparse.config import files as policy_files
from hf_sparse.errors import OutOfReachError, UserError
from hf_sparse.measure.run import ATTENTION_ERROR, PERPLEXITY, RETRIEVAL
from hf_sparse.patching import check_calibration
from hf_sparse.results import inside, plot_name
from hf_sparse.share.bundle import CARD, CONFIG, Bundle, card_in, check_publishable, make_bundle
from hf_sparse.share.measured import Results, results_beside
from hf_sparse.share.publish import MESSAGE
from hf_sparse.share.remote import Remote
from hf_sparse.share.source import ModelSource

_DRAWN = {kind.command: kind for kind in (PERPLEXITY, ATTENTION_ERROR, RETRIEVAL)}


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
            help="Folder that perplexity, attention-error, retrieval or bench wrote. May be repeated; of a second "
            "one of a command, named as in perplexity-decode, what the first does not have is taken.",
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


def card(
    model: Model,
    bundle: BundleOptions,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="MODEL, if it is a folder with a policy")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write sparse_config.json, model card and plots from results; on a folder that has them, write them anew."""
    if output is None and not _is_policy_folder(model):
        raise UserError(f"{model or repr(model)} is not a folder with a {policy_files.NAME}: pass --output")
    folder = Path(model) if output is None else output
    made = _bundle(model, bundle, in_place=output is None, beside=folder)
    made.write(folder, folder.resolve().name, card_in(folder), _draw)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(folder), "files": files}) if as_json else "\n".join([f"{folder}:", *files]))


def publish(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name, or name.", show_default=False)],
    bundle: BundleOptions,
    weights: Annotated[bool, typer.Option("--weights", help="Publish weights and tokenizer, too.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = MESSAGE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a policy and its model card on the Hub, in one commit."""
    remote = Remote(repo_id, revision=revision, create_pr=create_pr, private=private or None)
    made = _bundle(model, bundle, weights=weights)
    check_publishable(made.policy)
    try:
        remote = remote.look(anonymous=dry_run)
    except OutOfReachError as error:
        if not dry_run:
            raise
        print(f"{error}; shown as for a new repository", file=sys.stderr)
    existing = card_in(Path(model)) if remote.card is None and _is_policy_folder(model) else remote.card
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made.write(folder, remote.repo_id, existing)
        files = [{"path": name, "bytes": path.stat().st_size} for name, path in remote.additions(folder)]
        if dry_run:
            _show(remote, files, (folder / CARD).read_text(encoding="utf-8"), as_json=as_json)
            return
        url = remote.commit(folder, message)
    said = {"repo_id": remote.repo_id, "url": url, "files": files}
    print(json.dumps(said) if as_json else f"published {remote.repo_id}: {url}")


def _draw(results: Results) -> None:
    kind = _DRAWN.get(results.kind)
    if kind is not None and find_spec("matplotlib") is not None:
        kind.draw(results.summary, results.folder / plot_name(kind.command))


def _show(remote: Remote, files: list[dict[str, Any]], card: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"repo_id": remote.repo_id, "exists": remote.sha is not None, "files": files, "card": card}))
        return
    width = max(len(file["path"]) for file in files)
    how = "a pull request to" if remote.create_pr else "one commit to"
    print(f"would upload {len(files)} files in {how} {remote.repo_id}{' (new)' if remote.sha is None else ''}:\n")
    print("\n".join(f"  {file['path']:<{width}}  {file['bytes']:>12,} bytes" for file in files))
    print(f"\n{CARD}:\n\n{card}")


def _is_policy_folder(model: str) -> bool:
    # '' would be the current folder.
    return bool(model) and (Path(model) / policy_files.NAME).is_file()


def _bundle(
    model: str, options: BundleOptions, *, weights: bool = False, in_place: bool = False, beside: Path | None = None
) -> Bundle:
    """The files of `model` under a policy. The base model is loaded for its weights alone.

    Args:
        model: The model, or the folder of a policy.
        options: What goes beside the policy.
        weights: Whether its weights are written.
        in_place: Whether the files are written where `model` lies, beside the weights there if it has any.
        beside: A folder whose results are taken, too, but for those that results of `options` replace.
    """
    ours = _is_policy_folder(model)
    loaded: dict[str, Any] = {}
    if ours and options.policy is None and not weights:
        policy = policy_files.load(model)
        origin = policy.origin if policy.has_weights else policy.base
    else:
        source = ModelSource.find(model)
        policy, origin = _checked(source, options.policy)
        if weights:
            loaded = {"model": source.model(), "tokenizer": source.tokenizer()}
    results = [Results.read(folder) for folder in options.results or ()]
    if options.results is None and ours:
        results = results_beside(Path(model))
    if beside is not None:
        results += results_beside(beside, without={result.place for result in results})
    bundle = make_bundle(
        policy,
        origin,
        results,
        base=Origin(options.base_model, options.base_revision),
        weights=weights or (in_place and policy.has_weights),
        license=options.license,
        **loaded,
    )
    config = Path(model) / CONFIG
    if bundle.base_config is None and ours and config.is_file():
        bundle = replace(bundle, base_config=inside(config, Path(model)).read_bytes())
    return bundle


def _checked(source: ModelSource, path: Path | None) -> tuple[Policy, Origin]:
    """The policy for a model that was found, and where the model lies."""
    if not source.support.supported:
        raise UserError(str(source.support))
    policy = (source.policy or Policy()) if path is None else policy_files.load(path)
    if policy.config.calibration is not None:
        check_calibration(policy.config.calibration, source.support, source.config)
    return policy, replace(source.origin, revision=source.commit or source.origin.revision)
