"""`Bundle`: the files of a saved or published policy, the same whichever function or command writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.config import Origin, Policy
from hf_sparse.config import files as policy_files
from hf_sparse.config.hub_io import hub_errors
from hf_sparse.errors import OutOfReachError, UserError, first_line
from hf_sparse.results import check_writable, inside, leads_out, versions, write_whole
from hf_sparse.share.card import license_in, make_card, parse_card
from hf_sparse.share.measured import Results, in_order, plots, quality

CARD, CONFIG = "README.md", "config.json"

# What loading adds to a configuration, or every release of transformers writes anew.
_INCIDENTAL = {"transformers_version", "_name_or_path", "architectures"}


@dataclass(frozen=True)
class Bundle:
    """What `write` puts into a folder.

    Attributes:
        policy: The policy.
        results: Results to copy; their plots are in the card.
        base_config: The bytes of the base model's `config.json`, or `None` if they cannot be had.
        license: Licence of the base model, if it is known.
        model: The model whose weights are written, or `None`.
        tokenizer: The tokenizer that is written with them.
    """

    policy: Policy
    results: Sequence[Results] = ()
    base_config: bytes | None = None
    license: str | None = None
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def write(
        self, folder: Path, name: str, card: str | None, draw: Callable[[Results], None] = lambda results: None
    ) -> None:
        """Write everything, the policy last.

        Args:
            folder: Made if it is not there.
            name: What the card says to give `from_pretrained`.
            card: A card to edit, or `None` for a new one.
            draw: Draws the plots of results beside them, before the card names those that are there.

        Raises:
            UserError: if `card` cannot be edited, `folder` cannot be made or written to, or something in it is in the
                way. Nothing has been written then.
        """
        parsed = parse_card(card, name)
        check_writable(folder, (CARD, CONFIG, policy_files.NAME))
        for results in self.results:
            check_writable(folder / results.place, (path.name for path in results.files()))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_weights(folder)
        copied = [results.copy_to(folder) for results in self.results]
        for results in copied:
            draw(results)
        text = make_card(parsed, self.policy, name, plots=plots(copied), license=self.license)
        write_whole(folder / CARD, text.encode())
        policy_files.write(self.policy, folder / policy_files.NAME)

    def _write_weights(self, folder: Path) -> None:
        if self.model is not None:
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        if self.base_config is not None and (self.model is None or self._is_base_config(folder / CONFIG)):
            write_whole(folder / CONFIG, self.base_config)

    def _is_base_config(self, path: Path) -> bool:
        """Whether the configuration written with the weights says what the base's says: dtype and all."""
        assert self.model is not None
        texts = (path.read_bytes(), self.base_config or b"{}")
        said = [type(self.model.config).from_dict(json.loads(text)).to_dict() for text in texts]
        written, base = ({name: found[name] for name in found.keys() - _INCIDENTAL} for found in said)
        return written == base


def make_bundle(
    policy: Policy,
    origin: Origin,
    results: Sequence[str | os.PathLike[str] | Results] = (),
    *,
    base: Origin = Origin(),  # noqa: B008 - frozen
    weights: bool = False,
    license: str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Bundle:
    """The files of a policy for a model: what the policy says of its base follows from where the model lies.

    Args:
        policy: Its quality is replaced by that of `results` if there are any.
        origin: Where the model came from.
        results: Folders of results.
        base: What the caller says of the base model, before anything else.
        weights: Whether weights lie, or will lie, beside the policy.
        license: Of the base model; `None` to look it up in its card.
        model: The model whose weights are written, or `None`.
        tokenizer: The tokenizer that is written with them.

    Raises:
        UserError: if a folder holds no results of this configuration, or two are of one command and have no names of
            their own, the base is no name, or the policy holds code.
    """
    policy_files.check_no_code(policy.config)
    lineage = _lineage(origin) if weights else origin
    if base.name is not None or base.revision is not None:
        lineage = Origin(base.name or lineage.name, base.revision)
    read = in_order(folder if isinstance(folder, Results) else Results.read(folder) for folder in results)
    measured = quality(read, policy.config) if read else policy.quality
    try:
        policy = replace(
            policy,
            base_model=lineage.name,
            revision=lineage.revision,
            weights=weights,
            versions=versions(),
            quality=measured,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    config, card = _base_files(origin)
    found = license or (license_in(card.decode("utf-8", errors="replace")) if card else None)
    return Bundle(policy, read, config, found, model, tokenizer)


def check_publishable(policy: Policy) -> None:
    """Refuse a policy that others could not load: one without weights that names no base model on the Hub."""
    if not policy.weights and not policy.base.is_on_hub:
        raise UserError(
            "a policy without weights is published with the Hub id of its base model: name it with base_model=... "
            "(--base-model), or publish the weights, too"
        )


def card_in(folder: Path) -> str | None:
    """The text of the model card in a folder, or `None`.

    Raises:
        UserError: if it cannot be read, or is a link that leads out of the folder.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        return inside(path, folder).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _lineage(origin: Origin) -> Origin:
    """The base on the Hub of weights that are saved: of those in a folder, what the policy beside them names."""
    if not origin.is_local:
        return origin
    beside = Path(str(origin.name)) / policy_files.NAME
    base = policy_files.read(beside).base if beside.is_file() else Origin()
    return Origin() if base.is_local else base


def _base_files(origin: Origin) -> tuple[bytes | None, bytes | None]:
    """`config.json` and card of the base model; `None` for what it lacks, or what is out of reach."""
    if origin.name is None:
        return None, None
    found: dict[str, bytes] = {}
    for name in (CONFIG, CARD):
        path = Path(origin.name) / name
        if origin.is_local:
            if path.is_file() and not leads_out(path, path.parent):
                found[name] = path.read_bytes()
            continue
        try:
            with hub_errors(f"cannot read {name} of {origin.name}"):
                found[name] = Path(hf_hub_download(origin.name, name, revision=origin.revision)).read_bytes()
        except OutOfReachError:
            break  # asking again takes as long as asking once
        except UserError:
            pass
    return found.get(CONFIG), found.get(CARD)
