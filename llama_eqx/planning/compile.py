"""The training step compiled ahead of time, for devices that need not be here."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError, UserError, first_line, unknown_option
from llama_eqx.sharding import Layout, MeshConfig
from llama_eqx.training.program import Program
from llama_eqx.training.run import RunConfig
from llama_eqx.training.state import abstract


class Compiled(NamedTuple):
    """`text` is that of the compiled program. `peak`, `arguments` (the state and the batch) and `temporary` are bytes on one device, `host`
    those in the memory of its host.
    """

    text: str
    peak: int
    arguments: int
    temporary: int
    host: int
    lower_seconds: float
    compile_seconds: float


class TooBig(Exception):
    """The compiler rejects a program: it `needs` bytes per device where it `may` use fewer. Either is None where it does not say."""

    def __init__(self, message: str, needs: int | None, may: int | None):
        super().__init__(message)
        self.needs, self.may = needs, may


def build_mesh(config: MeshConfig) -> Mesh:
    """The mesh of the devices here, or, for a TPU slice, of those that its compiler describes.

    Raises `ConfigError` when they do not make the mesh, `UserError` when the TPU compiler is not installed.
    """
    return config.build(_slice_devices(config.topology)) if config.topology else config.build()


def compile_step(config: RunConfig, program: Program, layout: Layout) -> Compiled:
    """Compiles the very step that the loop runs, on abstract values.

    Raises `TooBig`; `ConfigError` when the compiler does not know an option or fails by an error of its own; `UserError` when the compiled
    program cannot be read.
    """
    state = abstract(program.shapes, program.shardings)
    batch = abstract_batch(layout, config.train.batch_size, config.train.seq_len)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.sharding((), ()))
    begin = time.perf_counter()
    lowered = jax.jit(program.step, donate_argnums=1).lower((batch, key), state)
    middle = time.perf_counter()
    with _refused(), _uncached() if config.mesh.topology else contextlib.nullcontext():
        compiled = lowered.compile(compiler_options=dict(config.mesh.compiler_options))  # pyright: ignore[reportArgumentType]
    end = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    host = memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes
    return Compiled(
        text=program_text(compiled),
        peak=device_peak(memory, host) if config.mesh.topology else device_total(memory),  # others do not report a peak
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        host=host,
        lower_seconds=middle - begin,
        compile_seconds=end - middle,
    )


def device_total(memory: Any) -> int:
    """Bytes on a device, as if all of it existed at the same time."""
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def device_peak(memory: Any, host: int) -> int:
    """The peak of a TPU, or an upper bound: with bytes on the `host`, the compiler's own number is the peak of both together."""
    peak = memory.peak_memory_in_bytes
    return min(peak, device_total(memory)) if host else peak


def program_text(compiled: Any) -> str:
    """The program's text. Raises `UserError` for one by a libtpu whose instructions this JAX does not know."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the step is compiled, but JAX cannot read the program: {first_line(error)}",
            where=f"jax {jax.__version__} with libtpu {importlib.metadata.version('libtpu')}",
            next=f"pip install 'jax[tpu]=={jax.__version__}' brings the libtpu that matches this JAX",
        ) from error


def abstract_batch(layout: Layout, size: int, length: int) -> Batch:
    """A batch as the pipeline gives it, as shapes and shardings."""

    def batch() -> Batch:
        ids = jnp.zeros((size, length), jnp.int32)
        return Batch(tokens=ids, targets=ids, loss_mask=jnp.zeros((size, length)))

    shapes, sharding = jax.eval_shape(batch), layout.sharding(("batch", "seq"), (size, length))
    return abstract(shapes, jax.tree.map(lambda _: sharding, shapes))


def too_big(message: str) -> TooBig:
    """Reads the sizes in bytes from the compiler's message that it is out of memory."""
    sizes = r"([\d.]+)([KMGT]?)i?B?"
    found = re.search(rf"\({sizes}\) exceeds available HBM \({sizes}\)|[Uu]sed {sizes} of {sizes}", message)
    numbers = [text for text in found.groups() if text is not None] if found else []
    if len(numbers) != 4:
        return TooBig(message.splitlines()[0], None, None)
    needs, may = (int(float(amount) * 1024 ** (" KMGT".index(unit or " "))) for amount, unit in (numbers[:2], numbers[2:]))
    return TooBig(message.splitlines()[0], needs, may)


def _slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice, as the compiler's own library describes them. JAX itself is kept on the CPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs its compiler, which is not installed", where="mesh", next="pip install 'llama_eqx[plan]' (484 MB)"
        )
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # no cloud machine to ask
        "TPU_ACCELERATOR_TYPE": "v4-8",  # any type: every generation can be compiled for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(RuntimeError):  # a backend is up already
        jax.config.update("jax_platforms", "cpu")
    megacore = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}  # its two cores as one device
    alone = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}  # otherwise hosts have 2 x 2 chips
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore, **alone).devices)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """A context without the compilation cache: programs for devices that are not here cannot be read back from it."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "memory space vmem" in str(error):
            raise ConfigError(
                f"a kernel is too big for the chip's vector memory: {re.sub(r'.*memory space vmem. ', '', str(error)).splitlines()[0]}",
                where="kernel",
                next="kernel.q_block=512 kernel.kv_block=512",
            ) from None
        if "RESOURCE_EXHAUSTED" in str(error):
            raise too_big(str(error)) from None
        if said := unknown_option(error):
            raise said from None
        if "INTERNAL" in str(error):
            raise ConfigError(
                f"the compiler fails on this step, with an internal error: {first_line(error)}",
                where="mesh.compiler_options, or what the step is made of",
                next="train.microbatch_size=null, or for a TPU +mesh.compiler_options.xla_tpu_enable_collective_pipeliner=false: "
                "one or the other has avoided such errors",
            ) from None
        raise
