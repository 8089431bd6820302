"""The model `hf-sparse` of lm-evaluation-harness: a patched model, measured on the tasks that the harness has.

    python -m hf_sparse.harness --model hf-sparse --model_args pretrained=MODEL,alpha=12 --tasks wikitext

This takes all that the command `lm_eval` takes. From Python, `import hf_sparse.harness` makes the name known to
`lm_eval.simple_evaluate`; a model that is patched already is `lm_eval.models.huggingface.HFLM(pretrained=model,
tokenizer=tokenizer)`. Needs `pip install "hf_sparse[harness]"`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.monitor import SparsityReport
from hf_sparse.patching import patch, report
from hf_sparse.results import process_state
from hf_sparse.share.source import ModelSource

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import setup_logging
except ImportError as error:
    raise ImportError(f'lm-evaluation-harness cannot be used ({error}): pip install "hf_sparse[harness]"') from error

DENSE = "dense"
"""The policy that leaves the model as it is, for the figures to compare with."""

# What the harness passes where no device is asked for.
_DEFAULT_DEVICE = "cuda:0"

_FIELDS = {field.name for field in fields(SparseAttentionConfig)}


@register_model("hf-sparse")
class SparseLM(HFLM):  # type: ignore[misc]
    """A patched causal language model.

    Args:
        pretrained: Hub id, folder or .gguf file, of a model or of a `sparse_config.json` that names one.
        policy: A `sparse_config.json`, by its folder, file or Hub id; `dense` for no patch. If it is not given: that of
            `pretrained`, or the default configuration.
        revision: Of `pretrained` on the Hub.
        dtype: float32, bfloat16, float16, or auto for that of the weights.
        device: Such as cpu or cuda:0; the best there is if it is not given.
        **options: Fields of `SparseAttentionConfig`, such as `alpha`, which go before those of the policy; all others
            are those of `HFLM`, such as `batch_size` and `max_length`.

    Raises:
        UserError: (a `ValueError`) if the model cannot be read or patched.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        source = ModelSource.find(pretrained, revision)
        own = {name: options.pop(name) for name in list(options) if name in _FIELDS}
        if policy == DENSE and own:
            raise UserError(f"policy={DENSE} leaves the model as it is; got {', '.join(own)} besides")
        tokenizer = options.pop("tokenizer", None) or source.tokenizer()
        if device == _DEFAULT_DEVICE and not torch.cuda.is_available():
            device = None
        model = source.model(dtype=dtype, device_map=device or str(process_state().device))
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.pretrained = pretrained
        if policy != DENSE:
            patch(self.model, policy or source.policy, **own)

    def sparsity(self) -> SparsityReport:
        """What the patched model did: `hf_sparse.report`."""
        return report(self.model)


def main() -> None:
    """Run the command of lm-evaluation-harness."""
    setup_logging()
    parser = HarnessCLI()
    parser.execute(parser.parse_args())


if __name__ == "__main__":
    main()
