"""From an adversarially robust checkpoint to a pruned, attacked and exported model with a verdict."""
