"""One training step without a trainer: from messages to loss and gradients, top to bottom.

    python examples/one_step.py

Computes a conversation of N turns in one pass and in N passes and compares. Needs no GPU and no
network: the model is a small Qwen3 with random weights.
"""

import torch
from small_model import make_model, make_tokenizer, read_conversations
from torch.nn.functional import cross_entropy

from onepass_trl import OnePassCollator, build_tree, linearize, render_passes, use_onepass_attention

conversations = read_conversations()
messages = conversations[0]["messages"]
tokenizer = make_tokenizer(conversations)
model = make_model(tokenizer)

# One pass per assistant turn: what inference sees in that turn, then what the model must generate.
passes = render_passes(messages, tokenizer)
num_targets = sum(one.num_trained for one in passes)


def gradients() -> dict[str, torch.Tensor]:
    """Take the accumulated gradients out of the model."""
    taken = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return taken


# N passes: each is an ordinary causal sequence, whose labels are its own tokens.
n_pass_loss = 0.0
for one in passes:
    ids = torch.tensor(one.token_ids)[None].long()
    labels = ids.masked_fill(~torch.tensor(one.trained), -100)
    logits = model(input_ids=ids).logits
    loss = cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / num_targets
    loss.backward()
    n_pass_loss += loss.item()
n_pass_gradients = gradients()

# One pass: the prefix tree of all passes, laid out as one row. `visible_end` says which token sees
# which, and `shift_labels` what each must predict.
use_onepass_attention(model)
row = linearize(build_tree(passes))
batch = OnePassCollator()([row])
inputs = {name: batch[name] for name in ("input_ids", "position_ids", "visible_end")}
logits = model(**inputs, use_cache=False).logits
losses = cross_entropy(logits[0], batch["shift_labels"][0], reduction="none")  # 0 at -100
loss = (losses * batch["weights"][0]).sum() / num_targets
loss.backward()
one_pass_gradients = gradients()

difference = max(
    (one_pass_gradients[name] - expected).norm() / expected.norm()
    for name, expected in n_pass_gradients.items()
)
for name, tokens, mean in (
    (f"{len(passes)} passes", sum(map(len, passes)), n_pass_loss),
    ("one pass", len(row), loss.item()),
):
    print(f"{name}: {tokens:5} tokens, loss {mean:.6f}")
print(f"largest relative difference of a parameter's gradients: {difference:.1e}")
