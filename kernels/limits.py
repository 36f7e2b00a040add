"""How much is worked on at a time, in numbers: read where memory is predicted, so without torch."""

LOGITS_ON_CPU = 1 << 23
"""Logits in a chunk on a CPU: 32 MiB of fp32. A quarter of it is 3 to 10 percent slower, an eighth 15."""
LOGITS_ON_GPU = 1 << 27
