"""Gaps of 6 bits, four numbers in three bytes; of the steps that need more, the rest is stored apart."""

from __future__ import annotations

from s2ap_deploy.codecs.encodings.gaps4 import Gaps4


class Gaps6(Gaps4):
    """n mod 64 of each step n + 1, and of longer ones 2 bits more, with a distance of 6 bits."""

    name = "gaps6"
    title = "gaps, 6 bits"
    summary = "6 bits per step"
    order = 14
    decode_memory = (32.0, 0.0)
    node_bytes = (600, 636)
    bits = 6
    longest = (256,)
    long_nodes = 215


CODEC = Gaps6()
