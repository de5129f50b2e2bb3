"""The provable side: sound bounds on what a network can answer to a perturbed input."""
