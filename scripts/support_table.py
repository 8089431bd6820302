"""Which architectures of the installed transformers can be patched, proven on a small random model of each.

python scripts/support_table.py                    # all that are not in the records yet, then the tables
python scripts/support_table.py llama gemma3_text  # these anew
python scripts/support_table.py --draw             # the tables alone

Every causal language model that transformers knows, and every model of images and text, is built small and random.
`hf_sparse.inspect` gives its verdict, and probes that read text prove it: that a patch does what it promises, or that
the reason of a refusal is the true one. Each runs in a process of its own, which may crash or hang. Records are
appended to model_cards/support/records.jsonl as they come; the tables are model_cards/support/tables.md.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import hf_sparse
from hf_sparse.errors import first_line
from hf_sparse.patching.support import text_part
from hf_sparse.probing import class_of, default_config, evidence, probe, small_model
from hf_sparse.results.tables import markdown_table

FOLDER = Path(__file__).parents[1] / "model_cards/support"
RECORDS, TABLES = FOLDER / "records.jsonl", FOLDER / "tables.md"

VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__}

LIMIT = 300
"""Seconds that an architecture may take."""


def architectures() -> list[str]:
    """The `model_type` of every causal language model that the installed transformers knows, then those with images."""
    others = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    return [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *sorted(others)]


def records() -> dict[str, dict[str, Any]]:
    """What was found so far, the newest of each architecture that the installed transformers has."""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    found = {record["architecture"]: record for record in map(json.loads, lines)}
    return {name: found[name] for name in architectures() if name in found}


def examined(architecture: str) -> dict[str, Any]:
    """The record of one architecture: what `inspect` says of a small model of it, and what proves that."""
    start = time.perf_counter()
    config = default_config(architecture)
    kind = class_of(config)
    record: dict[str, Any] = {"architecture": architecture, "class": kind.__name__, **VERSIONS}
    try:
        model = small_model(config)
    except Exception:
        return record | not_built(config, kind)
    support = hf_sparse.inspect(model)
    record |= {
        "supported": support.supported,
        "reasons": support.reasons,
        "windows": [layer.sliding_window for layer in support.layers],
    }
    if support.supported:
        found = probe(model, support)
        record["probes"] = {name: {"held": one.held, "found": one.found} for name, one in found.items()}
    else:
        seen = evidence(model)
        record |= {"against": seen.against(support), "not_run": seen.failure}
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def not_built(config: transformers.PreTrainedConfig, kind: Any) -> dict[str, Any]:
    """What to say of an architecture of which no small model can be built, nor a large one either.

    Raises:
        RuntimeError: If a large one can be.
    """
    try:
        with torch.device("meta"):
            kind._from_config(text_part(config, kind))
    except Exception as error:
        reason = f"this version of transformers cannot build it ({type(error).__name__}: {first_line(error)})"
        return {"supported": False, "reasons": [reason], "against": "", "not_run": reason}
    raise RuntimeError(f"{kind.__name__} is not made small as it should be")


def in_a_process(architecture: str) -> dict[str, Any]:
    """The record of one architecture, or why there is none."""
    context = multiprocessing.get_context("fork")  # What is imported already need not be again.
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(examined(architecture)))
    process.start()
    sender.close()
    failure = f"no answer within {LIMIT} s"
    if receiver.poll(LIMIT):
        try:
            record: dict[str, Any] = receiver.recv()
            return record
        except EOFError:
            process.join()
            failure = f"exit code {process.exitcode}"
    process.kill()
    return {"architecture": architecture, "failure": failure, **VERSIONS}


def verdict(record: dict[str, Any]) -> str:
    """`patched` and `refused` are proven; `wrong` is what a probe speaks against, `unknown` what gave no answer."""
    if "failure" in record:
        return "unknown"
    if record["supported"]:
        return "wrong" if any(one["held"] is False for one in record["probes"].values()) else "patched"
    return "wrong" if record["against"] else "refused"


def cells(record: dict[str, Any]) -> list[str]:
    """An architecture's line of the table."""
    name, said = record["architecture"], verdict(record)
    if said == "unknown":
        return [name, "", said, "", record["failure"]]
    if not record["supported"]:
        reasons = "; ".join(record["reasons"]).split("; keep it dense")[0]
        return [name, record["class"], said, "", f"{reasons}: {record['against']}" if record["against"] else reasons]
    windows = [window for window in record["windows"] if window is not None]
    layers = f"{len(record['windows']) - len(windows)} full" + f", {len(windows)} windowed" * bool(windows)
    held = {key: [name for name, one in record["probes"].items() if one["held"] is key] for key in (True, False, None)}
    text = f"{len(held[True])} hold"
    if held[None]:
        text += f"; as the dense model: {', '.join(held[None])}"
    if held[False]:
        text += f"; failed: {', '.join(held[False])}"
    return [name, record["class"], said, layers, text]


def draw() -> None:
    """Write the tables: counts, causal language models, models of images and text."""
    found = records()
    causal = [record for name, record in found.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    groups = [causal, [record for record in found.values() if record not in causal]]
    counts = [Counter(map(verdict, group)) for group in groups]
    lines = [[name, *(str(count[name]) for count in counts)] for name in ("patched", "refused", "wrong", "unknown")]
    titles = ["architecture", "class", "verdict", "attention layers", "probes, or reason"]
    tables = [markdown_table(["verdict", "causal language models", "models of images and text"], lines)]
    tables += [markdown_table(titles, [cells(record) for record in group], left=range(5)) for group in groups]
    TABLES.write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def main() -> None:
    """Examine architectures, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE")
    parser.add_argument("--draw", action="store_true", help="write the tables alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [] if args.draw else args.architectures or [name for name in architectures() if name not in records()]
    for name in missing:
        record = in_a_process(name)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {verdict(record)}", file=sys.stderr, flush=True)
    draw()


if __name__ == "__main__":
    main()
