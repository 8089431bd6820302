"""llama.cpp after a prompt: time to the first token and to each later one, with keys and values in 8 or 16 bits.

pip install llama-cpp-python
python scripts/rivals/with_llama_cpp.py MODEL.gguf --text TEXT --tokens 8000,32000 --output FOLDER

It computes with the weights as the file has them (4 bits, for the models here). `hf-sparse bench MODEL.gguf --text
TEXT --generate 8000,32000` times the same file, whose weights transformers expands to the `--dtype` given.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp

BATCH = 512


def processor() -> str:
    """Its name, as Linux has it, or its kind: hf_sparse is not installed here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def timed(model: llama_cpp.Llama, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and for each of the later ones."""
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    token = model.sample(temp=0.0)
    first = time.perf_counter() - start
    later = []
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        model.eval([token])
        token = model.sample(temp=0.0)
        later.append(time.perf_counter() - start)
    return first, later


def main() -> None:
    """Measure each length, and append a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", default="8000")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cache", choices=("q8_0", "f16"), default="q8_0", help="type of keys and values")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kind = llama_cpp.GGML_TYPE_Q8_0 if args.cache == "q8_0" else llama_cpp.GGML_TYPE_F16
    for tokens in map(int, args.tokens.split(",")):
        model = llama_cpp.Llama(
            str(args.model),
            n_ctx=tokens + args.new_tokens,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            flash_attn=args.cache == "q8_0",  # which values in 8 bits need
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        text = args.text.read_bytes()[: 16 * tokens]
        prompt = model.tokenize(text, add_bos=False)[:tokens]
        if len(prompt) < tokens:
            parser.error(f"{args.text.name} has {len(prompt)} tokens; {tokens} are needed")
        timed(model, prompt[:256], 4)  # loads all that a first call loads
        for _ in range(args.repeats):
            first, later = timed(model, prompt, args.new_tokens)
            record: dict[str, Any] = {
                "model": args.model.name,
                "tokens": tokens,
                "first_token_seconds": first,
                "token_seconds": statistics.median(later),
                "threads": args.threads,
                "device_name": processor(),
                "cache": args.cache,
                "versions": {"llama-cpp-python": version("llama-cpp-python"), "python": platform.python_version()},
                "system": llama_cpp.llama_print_system_info().decode(),
            }
            with (args.output / "llama_cpp.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{tokens:,} tokens: first {first:.2f} s, then {1000 * statistics.median(later):.1f} ms a token",
                flush=True,
            )


if __name__ == "__main__":
    main()
