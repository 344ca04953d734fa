"""Which Triton kernels were built, in how many seconds, and what each takes of a multiprocessor."""

from collections.abc import Iterator
from types import ModuleType

from bench.targets import rounded

Row = dict[str, object]


class BuildLog:
    """Listens to Triton's compiler in this process. Needs the package triton."""

    def __init__(self) -> None:
        from triton import knobs

        self._builds: dict[str, Row] = {}
        knobs.compilation.listener = self._note

    def _note(self, *, src: object, metadata: dict, metadata_group: object, times: object, cache_hit: bool) -> None:
        """Triton's own call for each kernel that it builds or finds; times are microseconds."""
        names = getattr(getattr(src, "fn", None), "arg_names", [])
        constants = getattr(src, "constants", None) or {}
        known = {names[at[0]]: value for at, value in constants.items() if len(at) == 1 and at[0] < len(names)}
        self._builds[str(metadata["hash"])] = {
            "kernel": str(metadata["name"]),
            "build_s": rounded(times.total / 1e6),
            "from_cache": cache_hit,
            "num_warps": metadata["num_warps"],
            "shared_bytes": metadata["shared"],
            "constants": {name: value for name, value in known.items() if isinstance(value, (int, bool, float))},
        }

    def rows(self, modules: list[ModuleType]) -> Iterator[tuple[str, Row]]:
        """Name and figures of each kernel; with registers and spills where it was loaded onto a card."""
        loaded = {kernel.hash: kernel for module in modules for kernel in _loaded_kernels(module)}
        for number, (key, build) in enumerate(self._builds.items()):
            kernel = loaded.get(key)
            resources = {"registers": getattr(kernel, "n_regs", None), "spills": getattr(kernel, "n_spills", None)}
            yield f"kernel {build['kernel']} {key[:8]}", {"number": number, **build, **resources}


def _loaded_kernels(module: ModuleType) -> Iterator[object]:
    """Every compiled kernel of a module's jitted functions, on any device."""
    for function in vars(module).values():
        for caches in getattr(function, "device_caches", {}).values():
            yield from (kernel for kernel in caches[0].values() if hasattr(kernel, "hash"))
