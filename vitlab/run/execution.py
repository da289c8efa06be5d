"""Execute one notebook in a kernel of this interpreter, stopped in time and never left behind."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

PATIENCE = 10  # seconds between asking a kernel to stop and killing it


def papermill_run(path, output, parameters, **options):
    """papermill.execute_notebook for any path, without its remarks on parameters: they are checked before."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    literal = {ord("{"): "{{", ord("}"): "}}"}  # papermill formats paths
    source, target = (str(p).translate(literal) for p in (path, output))
    return papermill.execute_notebook(
        source, target, parameters, kernel_name="python3", language="python", **options
    )


def execute(path, scratch, parameters, cwd, end=None):
    """Run the notebook `path` into the file `scratch`, its working folder `cwd`, with output as it comes.

    Returns (error, overran): the first exception as (name, message, traceback) or None; whether it was
    stopped because the unix time `end` had come.
    """
    from papermill.exceptions import PapermillExecutionError

    kernels, overran, error = [], [], None
    try:
        with _interrupt_at(end, kernels, overran):
            papermill_run(
                path, scratch, parameters, progress_bar=False, cwd=str(cwd),
                stdout_file=sys.stdout, stderr_file=sys.stderr, autosave_cell_every=30,
                kernel_manager_class=_kernel_manager(kernels), shutdown_kernel="immediate",
                extra_arguments=["--log-level=ERROR"],
            )
    except PapermillExecutionError as failure:
        error = (failure.ename, failure.evalue, "\n".join(failure.traceback[-30:]))
    except Exception as failure:  # a dead kernel, one that does not start: the other notebooks still run
        error = (type(failure).__name__, str(failure) or "the kernel died", "")
    finally:
        _signal(kernels, signal.SIGKILL)
    return error, bool(overran)


def _kernel_manager(started):
    """A kernel manager class that runs this interpreter, whatever kernels are installed on the machine.

    Each manager that is made appends itself to `started`.
    """
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisInterpreter(KernelSpecManager):
        def get_kernel_spec(self, kernel_name):
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    class Manager(AsyncKernelManager):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, kernel_spec_manager=ThisInterpreter())
            started.append(self)

    return Manager


def _signal(kernels, number):
    for kernel in kernels:
        pid = getattr(kernel.provisioner, "pid", None)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid and kernel.provisioner.process is not None:
                # a kernel leads a process group of its own: workers that it started go with it
                (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)


@contextlib.contextmanager
def _interrupt_at(moment, kernels, overran):
    """Interrupt the kernel at `moment` (unix time; None: never), kill it PATIENCE seconds later."""
    over = threading.Event()

    def watch():
        if over.wait(max(0, moment - time.time())):
            return
        overran.append(True)
        for _ in range(PATIENCE // 2):  # a kernel that is just starting a cell does not hear the first one
            _signal(kernels, signal.SIGINT)
            if over.wait(2):
                return
        _signal(kernels, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    if moment is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def environment(root, deadline=None, fresh=False):
    """For the length of the block, the environment that kernels get.

    VITLAB_ROOT: where results go. VITLAB_DEADLINE: unix time by which training is to have stopped.
    VITLAB_FRESH: "1" where arms are to be trained again.
    """
    wanted = {
        "VITLAB_ROOT": str(root),
        "VITLAB_DEADLINE": None if deadline is None else repr(deadline),
        "VITLAB_FRESH": "1" if fresh else None,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    if data := os.environ.get("VITLAB_DATA"):
        wanted["VITLAB_DATA"] = str(Path(data).absolute())
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values):
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
