"""Records as `attention_error.evaluate` gives them, with errors that follow a known power of n."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf_sparse import SparseAttentionConfig
from hf_sparse.results import Record

LENGTHS = [512, 1024, 2048, 4096]
# method -> slope of ln error against ln n
EXPONENTS = {"topk": 0.1, "fixed": 0.8, "fraction": -0.4, "log": 0.5, "grouped": 0.05, "window": 0.0}
DENSITY = 0.25

_BASE = SparseAttentionConfig(selector="topk")
_CONFIGS = {
    "topk": _BASE,
    "fixed": replace(_BASE, law="fixed", keys=300),
    "fraction": replace(_BASE, law="fraction", fraction=0.13),
    "log": replace(_BASE, law="log", alpha=53.0),
    "grouped": replace(_BASE, selector="grouped"),
    "window": replace(_BASE, selector="window"),
}


def rows(documents: int = 3, noise: float = 0.0) -> list[Record]:
    """Records of `documents` documents, two layers of two heads; `noise` is the spread of ln error between them."""
    rng = np.random.default_rng(0)
    out = []
    for document in range(documents):
        levels = np.exp(noise * rng.standard_normal(1) + noise * rng.standard_normal(4))
        for length in LENGTHS:
            n = length - 63.5
            for method in ("dense", *EXPONENTS):
                columns = {
                    "layer": [0, 0, 1, 1],
                    "head": [0, 1, 0, 1],
                    "windowed": [False] * 4,
                    "visible": [n] * 4,
                    "kept": [n if method == "dense" else DENSITY * n] * 4,
                    "density": [1.0 if method == "dense" else DENSITY] * 4,
                }
                if method == "dense":
                    values = dict.fromkeys(("keys_90", "keys_95", "keys_99", "entropy"), n**0.6 * levels)
                else:
                    error = 1e-3 * n ** EXPONENTS[method] * levels
                    values = dict.fromkeys(("l1", "max_entry", "l2", "output_error"), error)
                    values["retained_mass"] = 1 - error / 2
                    columns["frobenius"] = (error * 11).tolist()
                for metric, value in values.items():
                    columns[f"{metric}_mean"], columns[f"{metric}_worst"] = value.tolist(), (3 * value).tolist()
                out.append(
                    {
                        "document": f"d{document}",
                        "text_sha256": f"sha {document}",
                        "length": length,
                        "method": method,
                        "rows": 128,
                        "columns": columns,
                        "config": None if method == "dense" else _CONFIGS[method].to_dict(),
                        "model": {"name": "tiny", "revision": "abc"},
                        "dtype": "float32",
                        "device": "cpu",
                        "device_name": "x86_64",
                        "versions": {},
                        "commit": None,
                    }
                )
    return out
