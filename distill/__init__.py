"""On-policy distillation of causal language models: several rollouts a prompt, one optimizer step a group."""
