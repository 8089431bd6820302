"""`Bundle`: the files of a saved or published policy."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse.errors import OutOfReachError, UserError, first_line
from hf_sparse.files import check_writable, inside, leads_out, write_whole
from hf_sparse.policy import Policy
from hf_sparse.policy import files as policy_files
from hf_sparse.policy.hub_io import hub_errors
from hf_sparse.policy.origin import Origin
from hf_sparse.share.card import license_in, make_card
from hf_sparse.share.measured import Results, plots, quality

CARD, CONFIG = "README.md", "config.json"

# What loading adds to a configuration, or every release of transformers writes anew.
_INCIDENTAL = ("transformers_version", "_name_or_path", "architectures")


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

    def write(self, folder: Path, name: str, card: str | None) -> None:
        """Write everything, the policy last.

        Args:
            folder: Made if it is not there.
            name: What the card says to give `from_pretrained`.
            card: A card to edit, or `None` for a new one.

        Raises:
            UserError: see `check`. Nothing has been written then.
        """
        self.check(folder, name, card)
        text = make_card(self.policy, name, existing=card, plots=plots(self.results), license=self.license)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_weights(folder)
        for results in self.results:
            results.copy_to(folder)
        write_whole(folder / CARD, text.encode())
        policy_files.write(self.policy, folder / policy_files.NAME)

    def check(self, folder: Path, name: str, card: str | None) -> None:
        """Refuse what `write` cannot do; the arguments are the same.

        Raises:
            UserError: if `card` cannot be edited, `folder` cannot be made or written to, or something in it is in the
                way.
        """
        make_card(self.policy, name, existing=card)
        check_writable(folder, (CARD, CONFIG, policy_files.NAME))
        for results in self.results:
            check_writable(folder / results.kind, (path.name for path in results.files()))

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
        kind = type(self.model.config)
        written, base = (
            kind.from_dict(json.loads(text)).to_dict() for text in (path.read_bytes(), self.base_config or b"{}")
        )
        for said in (written, base):
            for name in _INCIDENTAL:
                said.pop(name, None)
        return bool(written == base)


def make_bundle(
    policy: Policy,
    origin: Origin,
    results: Sequence[str | os.PathLike[str] | Results] = (),
    *,
    license: str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Bundle:
    """A bundle, with what the base model says about itself.

    Args:
        policy: The policy; its quality is replaced by that of `results` if there are any.
        origin: Where the model came from.
        results: Folders of results.
        license: Licence of the base model; `None` to look it up in its card.
        model: The model whose weights are written, or `None`.
        tokenizer: The tokenizer that is written with them.

    Raises:
        UserError: if a folder holds no results of this configuration.
    """
    read = [folder if isinstance(folder, Results) else Results.read(folder) for folder in results]
    if read:
        policy = replace(policy, quality=quality(read, policy.config))
    policy = replace(policy, versions=versions(), weights=model is not None)
    config, card = _base_files(origin)
    found = license or (license_in(card.decode("utf-8", errors="replace")) if card else None)
    return Bundle(policy, read, config, found, model, tokenizer)


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


def versions() -> dict[str, str]:
    """Versions of what writes a policy."""
    return {name: version(name) for name in ("hf_sparse", "torch", "transformers")}


def _base_files(origin: Origin) -> tuple[bytes | None, bytes | None]:
    """`config.json` and card of the base model; `None` for what it lacks, or what is out of reach."""
    if origin.name is None:
        return None, None
    if origin.is_local:
        paths = [Path(origin.name) / name for name in (CONFIG, CARD)]
        there = (path.is_file() and not leads_out(path, Path(str(origin.name))) for path in paths)
        config, card = (path.read_bytes() if ours else None for path, ours in zip(paths, there, strict=True))
        return config, card
    found: list[bytes | None] = []
    for name in (CONFIG, CARD):
        try:
            with hub_errors(f"cannot read {name} of {origin.name}"):
                found.append(Path(hf_hub_download(origin.name, name, revision=origin.revision)).read_bytes())
        except OutOfReachError:
            # Asking again takes as long as asking once.
            return (*found, None, None)[0], None
        except UserError:
            found.append(None)
    return found[0], found[1]
