"""What a setup trains, tensor by tensor: for counting it, and for optimizers whose moments depend on shapes."""

from collections.abc import Iterator

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.tensors import hf_name
from alpaca.training.model.optimizers.choosing import Trained, moment_bytes
from alpaca.training.planning.workload import Setup


def count_trained(shape: ModelDescription, setup: Setup) -> int:
    if setup.method == "full":
        return shape.num_parameters
    return count_adapter(shape, setup) + count_beside(shape, setup)


def count_adapter(shape: ModelDescription, setup: Setup) -> int:
    """Parameters of the adapter's own matrices and magnitudes. lora_ranks: sums over the layers, by targets."""
    if not setup.lora_ranks:
        return shape.num_adapter(rank=setup.lora_rank, targets=setup.lora_targets, dora=setup.dora)
    sums = dict(setup.lora_ranks)
    sizes = [(sums[name], *size) for name, size in shape.linears.items() if name in setup.lora_targets]
    return sum(rank * (rows + columns) + shape.num_layers * rows * setup.dora for rank, rows, columns in sizes)


def count_beside(shape: ModelDescription, setup: Setup) -> int:
    """Parameters trained beside an adapter: whole tables and other modules, and rows of tokens."""
    tables = (setup.trains_embedding + setup.trains_head) * shape.vocab_size
    return (tables + setup.num_token_rows) * shape.width + setup.num_others


def moments_bytes(shape: ModelDescription, setup: Setup) -> int:
    """A process's share of the optimizer's moments; AdamW has two of each element."""
    if setup.optimizer != "adamw_torch":
        tensors = _list_whole(shape) if setup.method == "full" else _list_adapter(shape, setup)
        return sum(number * moment_bytes([trained], setup.optimizer) for trained, number in tensors)
    return 2 * setup.state_bytes * count_trained(shape, setup) // setup.num_shards


def largest_trained(shape: ModelDescription, setup: Setup) -> int:
    """Elements of the largest trained matrix."""
    tensors = _list_whole(shape) if setup.method == "full" else _list_adapter(shape, setup)
    return max(trained.shape[0] * trained.shape[1] for trained, _ in tensors if len(trained.shape) == 2)


def _list_whole(shape: ModelDescription) -> Iterator[tuple[Trained, int]]:
    """The tensors of a full fine-tune, each with how many of its shape there are. Vectors are laid end to end."""
    table = (shape.vocab_size, shape.width)
    yield Trained(name="embedding", shape=table, in_table=True, in_layers=False), 1
    rest = shape.num_parameters - shape.num_linear - shape.num_head
    if hf_name("head") in shape.outer_shapes:
        yield Trained(name="head", shape=table, in_layers=False), 1
        rest -= shape.num_head
    for name, size in shape.linears.items():
        yield Trained(name=name, shape=size), shape.num_layers
    yield Trained(name="vectors", shape=(rest,), in_table=True, in_layers=False), 1


def _list_adapter(shape: ModelDescription, setup: Setup) -> Iterator[tuple[Trained, int]]:
    sums = dict(setup.lora_ranks)
    for name, (rows, columns) in shape.linears.items():
        if name in setup.lora_targets:
            rank = round(sums.get(name, setup.lora_rank * shape.num_layers) / shape.num_layers)
            yield Trained(name=f"{name}.lora_A.weight", shape=(rank, columns)), shape.num_layers
            yield Trained(name=f"{name}.lora_B.weight", shape=(rows, rank)), shape.num_layers
            if setup.dora:
                yield Trained(name="magnitudes", shape=(rows,), in_table=True), shape.num_layers
    table = (shape.vocab_size, shape.width)
    if setup.trains_embedding:
        yield Trained(name="embedding", shape=table, in_table=True, in_layers=False), 1
    if setup.trains_head:
        yield Trained(name="head", shape=table, in_layers=False), 1
    if setup.num_token_rows:
        yield Trained(name="rows", shape=(setup.num_token_rows, shape.width), in_layers=False), 1
    if setup.num_others:
        yield Trained(name="others", shape=(setup.num_others,), in_table=True, in_layers=False), 1
