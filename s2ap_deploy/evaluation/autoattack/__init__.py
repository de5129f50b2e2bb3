"""AutoAttack: its attacks, the cascade that runs them block by block, and the network that judges."""
