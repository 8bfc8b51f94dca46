"""On-policy distillation of causal language models: several rollouts a prompt, one optimizer step a group."""

import logging

# transformers imports torchao wherever it is installed; that warns of its files for other GPUs, and torch warns of it.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
