"""hf_sparse and the dense model on the items of a folder.

python scripts/rivals/ours.py FOLDER MODEL --policy model_cards/SmolLM2-135M-Instruct-calibrated  # resumes

`hf_sparse, fraction` keeps the same share of keys in every layer but the first, which stays dense: so few of them
that the share of all layers is the one wanted. Text and continuation are both sparse.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import measuring
import torch

import hf_sparse
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.measure.evaluation import sum_counts
from hf_sparse.results import provenance
from hf_sparse.share.source import ModelSource


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--policy", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = ModelSource.find(args.model)
    model = source.model(dtype=args.dtype, device_map="cpu").eval()
    layers = model.config.get_text_config().num_hidden_layers

    def measure(item: dict[str, Any], method: str, share: float | None) -> dict[str, Any]:
        if method == "dense":
            cache, start = measuring.read(model, item, nullcontext)
            return {**measuring.follow(model, item, cache, start), "density": 1.0}
        config: SparseAttentionConfig | str = SparseAttentionConfig() if method == "hf_sparse, default" else args.policy
        if share is not None:
            config = SparseAttentionConfig(law="fraction", fraction=(share * layers - 1) / (layers - 1))
        with hf_sparse.patched(model, config):
            cache, start = measuring.read(model, item, nullcontext)
            before = hf_sparse.report(model)
            found = measuring.follow(model, item, cache, start)
            return {**found, "density": sum_counts(hf_sparse.report(model), before=before)["density"]}

    methods = [("dense", None), ("hf_sparse, default", None), ("hf_sparse, calibrated", None)]
    methods += [("hf_sparse, fraction", share) for share in measuring.SHARES]
    about = {**provenance(source.info(), model, seed=0), "package": f"hf_sparse {hf_sparse.__version__}"}
    measuring.measure_all(args.folder, methods, measure, about)


if __name__ == "__main__":
    main()
