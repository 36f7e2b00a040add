"""Where a stack of layers is cut into stages, so that the costliest stage costs least.

    costs 3 3 3 3 3 3, three stages, the head costs 4 more:    [3 3] [3 3 3] [3 + 4]      most 9
                                            not by number      [3 3] [3 3] [3 3 + 4]      most 10

The pipeline goes at the pace of its costliest stage. Costs are floats: what they are of, this file does not know.
"""

from itertools import accumulate
from math import inf


def cut_layers(
    costs: list[float], num_stages: int, *, first_extra: float = 0.0, last_extra: float = 0.0
) -> list[range]:
    """Return the layers of each stage, at least one in each; of equal cuts, the one that begins last stages first.

    `first_extra` and `last_extra` are what the two ends cost beside layers: the embedding, and the norm and output.

    Raises:
        ValueError: if there are fewer layers than stages.
    """
    if not 0 < num_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers make no {num_stages} stages of at least one layer each")
    sums = [0.0, *accumulate(costs)]

    def cost(stage: int, begin: int, end: int) -> float:
        ends = (first_extra if stage == 0 else 0.0) + (last_extra if stage == num_stages - 1 else 0.0)
        return sums[end] - sums[begin] + ends

    # best[end]: the least possible cost of the costliest of the stages so far, which hold the layers before `end`.
    best = [0.0] + [inf] * len(costs)
    cuts: list[list[int]] = []
    for stage in range(num_stages):
        following, begins = [inf] * (len(costs) + 1), [0] * (len(costs) + 1)
        for end in range(stage + 1, len(costs) - (num_stages - 1 - stage) + 1):
            options = [(max(best[begin], cost(stage, begin, end)), begin) for begin in range(stage, end)]
            following[end], begins[end] = min(options)
        best = following
        cuts.append(begins)
    stages, end = [], len(costs)
    for begins in reversed(cuts):
        stages.append(range(begins[end], end))
        end = begins[end]
    return stages[::-1]
