"""How a rank joins the others."""

from __future__ import annotations

import os


def init_process_group(rank: int, world: int, address: str, port: int) -> None:
    """Join the learner group, over gloo on a CPU, else over what the device has (nccl: not run on a GPU yet).

    DeepSpeed would compile a shared-memory collective at first use, which takes a minute and a compiler; gloo is as
    fast for two ranks, so that operator is switched off.
    """
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # an actor sees its own device only
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world,
    )
