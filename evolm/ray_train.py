"""Ray Train as a launcher: what `evolm train` does, inside the workers of a `TorchTrainer`.

    from evolm.ray_train import trainer

    trainer({"recipe": "/data/recipe.yaml", "folder": "/data/out", "tokens": 10**9, "engine": "fsdp"}, workers=8,
            gpus=True).fit()

Ray brings the workers up, also on several nodes, and starts them again when one is lost; the training goes on from its
own folder, which all of them must see. A trial of a search does not come this way: seconds to start would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolm.errors import Interrupted
from evolm.ranks import free_port


def train_loop(config: Mapping[str, Any]) -> None:
    """The worker loop: `recipe` and `folder`, as absolute paths, and what else `train_recipe` takes. The first worker
    writes the model to the folder; its scores are reported to Ray. Raises what `train_recipe` raises, and Interrupted
    when a signal stopped it."""
    import ray.train

    from evolm.training import train_recipe

    _leave_group()
    paths = {key: Path(config[key]) for key in ("cache",) if key in config}
    options = {key: value for key, value in config.items() if key not in ("recipe", "folder")} | paths
    done = train_recipe(Path(config["recipe"]), Path(config["folder"]), **options)
    if done.record is None:
        raise Interrupted(done.signal or 2)
    ray.train.report(dict(done.record.get("validation", {})))


def _leave_group() -> None:
    """Leave the process group that Ray has made, and agree on a port where the ranks meet again: their own group
    reaches the CPU beside the GPU, and is looked at before the first step."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    port = torch.tensor([free_port() if dist.get_rank() == 0 else 0], device=device)
    dist.broadcast(port, 0)
    os.environ["MASTER_PORT"] = str(int(port.item()))
    dist.destroy_process_group()


def trainer(config: Mapping[str, Any], *, workers: int, gpus: bool = False, **options: Any) -> Any:
    """A `ray.train.torch.TorchTrainer` of so many workers, each with a GPU or none; `options` are its own, such as
    `run_config`. `config` is what `train_loop` takes."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    given = {"device": "cuda"} if gpus else {}
    scaling = ScalingConfig(num_workers=workers, use_gpu=gpus)
    return TorchTrainer(train_loop, train_loop_config={**given, **config}, scaling_config=scaling, **options)
