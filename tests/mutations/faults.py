"""Faults to plant, as data: one line of product source and what it becomes, and what `prove` must say of it.

The classes are those of bugs that other systems had, each on the smallest layout that shows it, some with an axis more
that must not be blamed. The first difference must be of the `quantity`, with `named` in its words; `axis` must be among
the axes that are blamed, `not_axis` not. What is compared, and which line is broken, was written down before `prove`
read that quantity. They lie by topic: sums over ranks, tokens and parts, limits, pipelines, checkpoints.
"""

from mutations.checkpoint_faults import CHECKPOINT
from mutations.limits_faults import LIMITS
from mutations.pipeline_faults import PIPELINE
from mutations.sums_faults import SUMS
from mutations.tokens_faults import TOKENS

FAULTS = [*SUMS, *TOKENS, *LIMITS, *PIPELINE, *CHECKPOINT]
