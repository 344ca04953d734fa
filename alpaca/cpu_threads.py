"""How a CPU's threads wait for each other and what oneDNN keeps: variables that are read when torch is imported."""

import os

# Figures: one step of a 46M model for 8 sequences, in a thread that is not the main one, on 2 cores that are idle, and
# with a program that uses one of them. libgomp's own: 7.8 ms, 95 ms. These: 5.4 ms, 10 ms.
_DEFAULTS = {
    # Threads wait by spinning. Unbounded, they spin away whole time slices where something else needs their cores.
    "GOMP_SPINCOUNT": "2000",
    # Without it they do not spin at all in a process that has made two teams of threads, for the engine's thread beside
    # the main one, and are woken for each of a step's parallel parts.
    "OMP_WAIT_POLICY": "active",
    # oneDNN keeps a kernel for every number of rows it has met; unbounded, they come to hundreds of MB.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


def set_defaults() -> None:
    """To be called before torch is imported. What the environment has already stays."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
