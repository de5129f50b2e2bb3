"""The security curve: the distance to the nearest adversarial point, and accuracy against the radius."""
