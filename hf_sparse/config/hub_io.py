"""What `huggingface_hub` raises, as one line that says what the user can do."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from hf_sparse.errors import OutOfReachError, UserError

# Of httpx or of its successor, whichever huggingface_hub is built on.
_HTTP_ERROR: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

UNREADABLE: tuple[Any, ...] = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    RuntimeError,
    EOFError,
    SafetensorError,
    struct.error,
    pickle.UnpicklingError,
    _HTTP_ERROR,
)
"""What transformers raises on a model that is absent, out of reach or damaged."""

_OUT_OF_REACH = "the Hub is out of reach; check the connection, or HF_ENDPOINT and HF_HUB_OFFLINE"
_OFFLINE = "HF_HUB_OFFLINE is set"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"

# The first that an error is an instance of.
_KINDS: dict[type[Exception], str] = {
    OfflineModeIsEnabled: _OFFLINE,
    LocalTokenNotFoundError: f"there is no token; {_LOGIN}",
    GatedRepoError: f"its owner asks readers to agree to terms on its page first; {_LOGIN}",
    RevisionNotFoundError: "there is no such revision",
    RepositoryNotFoundError: f"there is no such repository, or it is private and needs a token; {_LOGIN}",
    EntryNotFoundError: "there is no such file",
}
_STATUS = {
    400: "the Hub refuses the request",
    401: f"the Hub does not accept the token, or needs one; {_LOGIN}",
    403: "the token has no right to do this; use a token with write access to this repository",
    404: "not found on the Hub",
    409: "it was changed by someone else, or exists already, at the same time; try again",
    412: "it was changed by someone else at the same time; try again",
    413: "the Hub finds it too large",
    429: "the Hub asks for fewer requests; try again in a few minutes",
}


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn errors of the Hub into `UserError`s of one line: what was being done, and why it failed.

    Args:
        doing: Such as `"cannot read user/name"`.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, HFValidationError, EntryNotFoundError, _HTTP_ERROR) as error:
        said = _explain(error)
        kind = OutOfReachError if said.startswith((_OUT_OF_REACH, _OFFLINE)) else UserError
        raise kind(f"{doing}: {said}") from error
    except RuntimeError as error:
        # What failed in a thread that uploads is wrapped.
        if not isinstance(error.__cause__, OSError | _HTTP_ERROR):
            raise
        raise UserError(f"{doing}: {_explain(error.__cause__)}") from error


def _explain(error: BaseException) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        # The request failed before it; what is cached does not help either.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            return _explain(cause)
        why = _OFFLINE if isinstance(cause, OfflineModeIsEnabled) else _OUT_OF_REACH
        return f"{why}, and it was not downloaded before"
    for kind, said in _KINDS.items():
        if isinstance(error, kind):
            return said
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f" ({_line(error.server_message)})" if error.server_message else ""
        if status >= 500:
            return f"the Hub answers with an error of its own, {status}; try again later{said}"
        return f"{_STATUS.get(status, 'the Hub answers')}, {status}{said}"
    if isinstance(error, _HTTP_ERROR | ConnectionError):
        return _OUT_OF_REACH
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(" .")[:200]
