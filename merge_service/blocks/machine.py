"""Machine code of the compiled loops: made once, kept in a file, loaded without the compiler that made it.

numba takes most of a second to start, more than a merge of small models. What it made of a loop needs none of it, so the code is
kept and later processes load it with llvmlite, the library that numba itself generates code with. numba is imported only where a loop
has to be compiled.

Invariant: the code of a file is that of these sources, this compiler and this kind of processor, whole, or it is made again. What is
loaded is what was compiled, in the process that compiles as in all others.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from merge_service.files.leftovers import temporary

if TYPE_CHECKING:
    from llvmlite.binding import TargetMachine

SOURCES = ("reading", "kernels", "counting", "loops", "machine")
"""The modules in this folder whose text decides the code."""
_DIGEST = 64
_lock = threading.RLock()
_engines: list[object] = []
"""What holds loaded code in memory."""


@functools.cache
def loop(name: str) -> Callable[..., None]:
    """A compiled loop: a function of integers, which lets other threads run."""
    with _lock:  # the cache lets two threads in
        return _loaded(name, _kept(name) or _made(name))


def _kept(name: str) -> bytes | None:
    """The code of a loop as it was kept; None if it was not, or not whole."""
    for place in _places():
        try:
            body = (place / _file(name)).read_bytes()
        except OSError:
            continue
        digest, code = body[:_DIGEST], body[_DIGEST:]
        if code and hashlib.sha256(code).hexdigest().encode() == digest:
            return code
    return None


def _made(name: str) -> bytes:
    """The code of a loop, compiled now, and kept where that is possible."""
    code = _compiled(name)
    for place in _places():
        try:
            place.mkdir(parents=True, exist_ok=True)
            whole = temporary(place / _file(name))
            whole.write_bytes(hashlib.sha256(code).hexdigest().encode() + code)
            whole.replace(place / _file(name))
            break
        except OSError:
            continue
    return code


def _compiled(name: str) -> bytes:
    """The object file of a loop, whose one visible symbol has its name."""
    import numba
    from llvmlite import binding

    loops = {
        name: function
        for module in SOURCES
        for name, function in getattr(
            importlib.import_module(f"merge_service.blocks.{module}"), "LOOPS", {}
        ).items()
    }
    function = loops[name]
    arguments = [numba.types.int64] * function.__code__.co_argcount
    made = numba.cfunc(numba.types.void(*arguments), error_model="numpy")(function)
    code = binding.parse_assembly(made.inspect_llvm())
    code.get_function(made.native_name).name = name
    for other in code.functions:
        if not other.is_declaration and other.name != name:
            other.linkage = "internal"
    machine = _machine()
    passes = binding.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(code, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    needed = [
        other.name for other in code.functions if other.is_declaration and not other.name.startswith("llvm.")
    ]
    assert not needed, f"{name} allocates or raises: it needs {needed}"
    return bytes(machine.emit_object(code))


def _loaded(name: str, code: bytes) -> Callable[..., None]:
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    function = ctypes.CFUNCTYPE(None)(engine.get_function_address(name))
    return lambda *numbers: function(*map(ctypes.c_int64, numbers))


def _machine() -> "TargetMachine":
    """What generates and links code for this processor, as numba's does."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


@functools.cache
def _places() -> tuple[Path, ...]:
    """Where code is kept, and looked for, in this order: where the user says, beside the package, in the user's cache."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return (Path(given) / "temporal-merge",)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(__file__).parent / "__pycache__", cache / "temporal-merge" / "loops"


def _file(name: str) -> str:
    return f"{name}-{_identity()[:20]}.o"


@functools.cache
def _identity() -> str:
    """What the code depends on: the sources, the compiler, the processor."""
    import llvmlite
    from llvmlite import binding

    digest = hashlib.sha256()
    for module in SOURCES:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    features = binding.get_host_cpu_features().flatten()
    for part in (
        importlib.metadata.version("numba"),
        llvmlite.__version__,
        binding.get_host_cpu_name(),
        features,
    ):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()
