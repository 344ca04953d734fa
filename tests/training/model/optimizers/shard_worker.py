"""One of torchrun's four processes: a sharded model is updated as the whole one, bit for bit, or this fails."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from alpaca.training.model.optimizers.by_chance import StochasticAdamW


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 3)).to(torch.bfloat16)
    for shape, names in (((4,), None), ((2, 2), ("machines", "processes"))):
        compare(
            copy.deepcopy(whole),
            fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names)),
        )
    print("equal", flush=True)
    dist.destroy_process_group()


def compare(whole: nn.Module, sharded: nn.Module) -> None:
    before = [parameter.detach().clone() for parameter in whole.parameters()]
    optimizers = [StochasticAdamW(model.parameters(), lr=1e-3, seed=3) for model in (whole, sharded)]
    for step in range(5):
        for number, (own, part) in enumerate(zip(whole.parameters(), sharded.parameters(), strict=True)):
            generator = torch.Generator().manual_seed(100 * step + number)
            own.grad = torch.randn(own.shape, generator=generator).to(torch.bfloat16)
            part.grad = distribute_tensor(own.grad, part.device_mesh, part.placements)
        for optimizer in optimizers:
            optimizer.step()
    for own, part, old in zip(whole.parameters(), sharded.parameters(), before, strict=True):
        assert torch.equal(own, part.full_tensor())
        assert not torch.equal(own, old)


if __name__ == "__main__":
    main()
