"""Float32 and bfloat16 master weights: `python tests/bench/master_dtype.py`.

The toy student learns the toy teacher's distribution of the next token, over sequences that the teacher sampled, in
bfloat16, by the optimizers that `train.master_dtype` selects, and by torch's AdamW on bfloat16 weights, which rounds to
nearest. The loss is the forward KL in nats a token.
"""

import argparse

import torch
from torch import Tensor, nn

from opdctl.models.directory import ModelDir, find_or_download
from opdctl.models.loading import load_model
from opdctl.recipe.schema import Model, Train
from opdctl.training.optimizer import make_adamw


def load_toy(name: str) -> nn.Module:
    return load_model(ModelDir(find_or_download(Model(model=name), name), "float32"), device="cpu")


@torch.no_grad()
def sample(teacher: nn.Module, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return ids that the teacher sampled, [count, length], and its log-probs of every id at each place."""
    ids = torch.randint(2, 50, (count, 12))
    while ids.shape[1] < length:
        next_ids = teacher(input_ids=ids).logits[:, -1].softmax(-1).multinomial(1)
        ids = torch.cat([ids, next_ids], dim=1)
    return ids, teacher(input_ids=ids).logits.log_softmax(-1)


def train(name: str, args: argparse.Namespace, ids: Tensor, teacher_logp: Tensor) -> list[float]:
    """Return the loss before, in the middle of, and after training, by the weights in bfloat16."""
    student, losses = load_toy("toy:student"), []
    masters = [weight.detach().clone() for weight in student.parameters()]
    student.bfloat16()
    if name != "float32":
        masters = [weight.bfloat16() for weight in masters]
    holder = nn.ParameterList(nn.Parameter(master) for master in masters)
    settings = {"steps": 1, "learning_rate": args.learning_rate}
    adamw = make_adamw(holder, Train(**settings, master_dtype="float32" if name == "nearest" else name))
    for step in range(args.steps + 1):
        with torch.no_grad():
            for weight, master in zip(student.parameters(), holder, strict=True):
                weight.copy_(master)
        logp = student(input_ids=ids).logits.float().log_softmax(-1)
        loss = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1).mean()
        if step % (args.steps // 2) == 0:
            losses.append(loss.item())
        student.zero_grad()
        loss.backward()
        for weight, master in zip(student.parameters(), holder, strict=True):
            master.grad = weight.grad.to(master.dtype)
        adamw.step()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args()
    torch.manual_seed(0)
    ids, teacher_logp = sample(load_toy("toy:teacher"), 16, 40)
    titles = {"float32": "float32", "bfloat16": "bfloat16, stochastic", "nearest": "bfloat16, to nearest"}
    print(f"| master weights | before | after {args.steps // 2} updates | after {args.steps} |\n|---|---:|---:|---:|")
    for name, title in titles.items():
        print(f"| {title} | " + " | ".join(f"{loss:.4f}" for loss in train(name, args, ids, teacher_logp)) + " |")


if __name__ == "__main__":
    main()
