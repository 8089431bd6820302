"""Presses of kvpress on the items of a folder, in an environment of their own: kvpress needs an older transformers.

python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 "transformers<5.3"
kvpress/bin/python scripts/rivals/kvpress_presses.py FOLDER MODEL  # resumes; MODEL is a folder or a Hub id

A press reads the text with dense attention and then drops keys and values from the cache for good; what follows is
dense over what is left. hf_sparse keeps all, and each query chooses.
"""

import argparse
import platform
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import measuring
import torch
from transformers import AutoModelForCausalLM

PRESSES = {
    "StreamingLLM": kvpress.StreamingLLMPress,
    "SnapKV": kvpress.SnapKVPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "KeyDiff": kvpress.KeyDiffPress,
}
"""With the settings that kvpress gives them."""


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()

    def measure(item: dict[str, Any], method: str, share: float | None) -> dict[str, Any]:
        if share is None:
            cache, start = measuring.read(model, item, nullcontext)
        else:
            press = PRESSES[method](compression_ratio=1 - share)
            cache, start = measuring.read(model, item, lambda: press(model))
        kept = sum(layer.keys.shape[2] for layer in cache.layers) / (start * len(cache.layers))
        return {**measuring.follow(model, item, cache, start), "density": kept}

    methods = [(measuring.RIVAL_DENSE, None)]
    methods += [(name, share) for share in measuring.SHARES for name in PRESSES]
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    about = {"model": Path(args.model).name, "dtype": args.dtype, "device_name": platform.processor() or "cpu"}
    measuring.measure_all(args.folder, methods, measure, {**about, "versions": versions})


if __name__ == "__main__":
    main()
