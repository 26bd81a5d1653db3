"""The suites: which cases are measured, and in which order.

A time budget may end a suite early, so the most informative cases come first. A suite has its own
sizes on each device: what takes a GPU a millisecond takes two cores half a minute. `cpu.py` and
`cuda.py` have a function of each suite's name. Nothing here imports them, because they import
torch, which takes seconds, and the command line needs these names for its help.
"""

from __future__ import annotations

# Name -> description.
SUITES = {
    "quick": "cases for every plot, in about three minutes per device",
    "first": "the first minutes on a GPU: SDDMM on seven real masks (on a CPU: a rehearsal)",
    "second": "the next minutes: the other real masks, decoding, merging (on a CPU: a rehearsal)",
    "rosa": "the 21 real masks, at their own shapes and replicated to model shapes, and uniform "
    "masks",
    "density": "uniform masks and generated masks of every kind of layer, at several densities",
    "tokens": "SpMM at 1 to 64 tokens, as in decoding; SDDMM at several numbers of tokens",
    "llm": "the linear layers of named models: SDDMM in training, SpMM in decoding, merging",
    "layer": "a RoSA layer and a whole training step, against LoRA, full fine-tuning and PEFT",
    "overhead": "one tiny case per op: the cost of a call in addition to its kernel",
}
