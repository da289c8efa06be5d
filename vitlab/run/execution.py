"""Execute one notebook in a kernel of this interpreter, stopped in time and never left behind."""

import contextlib
import logging
import math
import os
import signal
import sys
import time


def papermill_run(path, output, parameters, **options):
    """papermill.execute_notebook for any path, without its remarks on parameters: they are checked before."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    source, target = (str(p).replace("{", "{{").replace("}", "}}") for p in (path, output))  # papermill formats paths
    return papermill.execute_notebook(source, target, parameters, kernel_name="python3", language="python", **options)


def execute(path, scratch, parameters, cwd, *, end, env, prefix, kernels):
    """Run the notebook `path` into the file `scratch`, its working folder `cwd`, with output as it comes.

    Returns the first exception as (name, message, traceback), or None. At the unix time `end` the running cell is
    interrupted, and its kernel killed where that does not help. env: the kernel's environment. prefix: put before each
    line of output. kernels: a list that the kernel is added to, so that another thread can kill it.
    """
    from papermill.exceptions import PapermillExecutionError

    mine = []
    try:
        papermill_run(
            path, scratch, parameters, progress_bar=False, cwd=str(cwd), autosave_cell_every=30,
            stdout_file=Prefixed(sys.stdout, prefix), stderr_file=Prefixed(sys.stderr, prefix),
            kernel_manager_class=_kernel_manager(env, mine, kernels), shutdown_kernel="immediate",
            extra_arguments=["--log-level=ERROR"], interrupt_on_timeout=True,
            timeout_func=lambda cell: max(0.1, end - time.time()) if end < math.inf else None,
            error_on_timeout={"ename": "TimeoutError", "evalue": "", "traceback": []},
        )  # fmt: skip
    except PapermillExecutionError as failure:
        return failure.ename, failure.evalue, "\n".join(failure.traceback[-30:])
    except Exception as failure:  # a dead kernel, one that does not start: the other notebooks still run
        return type(failure).__name__, str(failure) or "the kernel died", ""
    finally:
        kill(mine)
    return None


class Prefixed:
    """A text stream whose whole lines go to `stream` with `prefix` before them; without a prefix, all as it comes."""

    def __init__(self, stream, prefix):
        self.stream, self.prefix, self.rest, self.flush = stream, prefix, "", stream.flush

    def write(self, text):
        if not self.prefix:
            return self.stream.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        return self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))


def _kernel_manager(env, *started):
    """A kernel manager class; each kernel it starts, in the environment `env`, is added to the lists `started`."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class Manager(AsyncKernelManager):
        @property
        def kernel_spec(self):
            """This interpreter, whatever kernels are installed on the machine."""
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

        def start_kernel(self, **options):
            for known in started:
                known.append(self)
            return super().start_kernel(env=env, **options)

    return Manager


def kill(kernels):
    """Kill kernels and the workers that they started: each leads a process group of its own."""
    for kernel in kernels:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if kernel.has_kernel:
                os.killpg(kernel.provisioner.process.pid, signal.SIGKILL)
