"""The variance study: what several rollouts of a prompt buy, measured on gradients and on whole training runs."""
