"""Faults to plant: a stage of a pipeline computes its part, and the step is wrong."""

from mutations.fault import DENSE, Fault

PIPELINE = [
    Fault(
        "a tied embedding counted at both ends of the pipeline",
        "parallel/grad_norm.py",
        'if any(axis.name == "ends" and axis.rank > 0 for axis in part.placement.grad_sum):',
        "if False:",
        quantity="norm",
        axis="pp",
        model=DENSE | {"tie_embeddings": True},
        layout={"pp": 2, "dp_shard": 1},
    ),
    Fault(
        "gradients divided by the number of micro-batches",
        "parallel/pipeline/adapter.py",
        "scale_grads=False",
        "scale_grads=True",
        named="gradient of output.weight",
        axis="pp",
        model=DENSE | {"num_layers": 4},
        layout={"pp": 2, "dp_shard": 1},
        tables={"pipeline": {"schedule": "zbv"}},
    ),
    Fault(
        "norm of one stage taken for the norm",
        "parallel/grad_norm.py",
        "all_reduce(of_stages, pp)",
        "of_stages.mul_(1.0)",
        quantity="norm",
        axis="pp",
        not_axis="dp_shard",
        layout={"pp": 2, "dp_shard": 2},
    ),
    Fault(
        "S8: gradients taken by hooks under a schedule that splits the backward",
        "parallel/zero/engine.py",
        'take_at_end=schedule == "split backward"',
        "take_at_end=False",
        named="got no gradient in this step",
        axis="pp",
        model=DENSE | {"num_layers": 4},
        layout={"pp": 2, "dp_shard": 1},
        tables={"pipeline": {"schedule": "zbv"}},
    ),
    Fault(
        "S2: a schedule that splits the backward is not refused under ZeRO-3",
        "launcher/runfile/pipeline_checks.py",
        'stage == 3, "would',
        'False, "would',
        named="units were reduced [1, 0, 1, 0] times",
        model=DENSE | {"num_layers": 4},
        layout={"pp": 2, "dp_shard": 2},
        zero=3,
        tables={"pipeline": {"schedule": "zbv"}},
    ),
]
