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


def execute(path, scratch, parameters, cwd, end=None, *, env=None, prefix="", kernels=None):
    """Run the notebook `path` into the file `scratch`, its working folder `cwd`, with output as it comes.

    Returns (error, overran): the first exception as (name, message, traceback) or None; whether it was stopped because
    the unix time `end` had come. env: the kernel's environment. prefix: put before each line of output. kernels: a
    list that the kernel is added to, so that another thread can stop it.
    """
    from papermill.exceptions import PapermillExecutionError

    mine, overran, error = [], [], None
    try:
        with _interrupt_at(end, mine, overran):
            papermill_run(
                path, scratch, parameters, progress_bar=False, cwd=str(cwd), autosave_cell_every=30,
                stdout_file=Prefixed(sys.stdout, prefix), stderr_file=Prefixed(sys.stderr, prefix),
                kernel_manager_class=_kernel_manager(env, mine, [] if kernels is None else kernels),
                shutdown_kernel="immediate", extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
    except PapermillExecutionError as failure:
        error = (failure.ename, failure.evalue, "\n".join(failure.traceback[-30:]))
    except Exception as failure:  # a dead kernel, one that does not start: the other notebooks still run
        error = (type(failure).__name__, str(failure) or "the kernel died", "")
    finally:
        send(mine, signal.SIGKILL)
    return error, bool(overran)


class Prefixed:
    """A text stream whose whole lines go to `stream` with `prefix` before them; without a prefix, all as it comes."""

    def __init__(self, stream, prefix):
        self.stream, self.prefix, self.rest = stream, prefix, ""

    def write(self, text):
        if not self.prefix:
            return self.stream.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        return self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))

    def flush(self):
        self.stream.flush()


def _kernel_manager(env, *started):
    """A kernel manager class that runs this interpreter, whatever kernels are installed on the machine.

    Its kernels get the environment `env`; each manager that is made appends itself to the lists `started`.
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
            for known in started:
                known.append(self)

        async def _async_pre_start_kernel(self, **kwargs):
            return await super()._async_pre_start_kernel(**{"env": dict(os.environ if env is None else env)} | kwargs)

        pre_start_kernel = _async_pre_start_kernel

    return Manager


def send(kernels, number):
    """Send a signal to kernels; SIGKILL to all they have started, too."""
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
            send(kernels, signal.SIGINT)
            if over.wait(2):
                return
        send(kernels, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    if moment is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()


def environment(root, stamp, *, deadline=None, fresh=False, jobs=1):
    """The environment of a kernel: this one's, with what the runner has to say in it.

    VITLAB_ROOT: where results go. VITLAB_STAMP: what rows are stamped with. VITLAB_DEADLINE: unix time by which
    training is to have stopped. VITLAB_FRESH: "1" where arms are to be trained again. VITLAB_JOBS: how many kernels
    run side by side, where it is more than one.
    """
    wanted = {
        "VITLAB_ROOT": str(root),
        "VITLAB_STAMP": stamp,
        "VITLAB_DEADLINE": None if deadline is None else repr(deadline),
        "VITLAB_FRESH": "1" if fresh else None,
        "VITLAB_JOBS": str(jobs) if jobs > 1 else None,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    if data := os.environ.get("VITLAB_DATA"):
        wanted["VITLAB_DATA"] = str(Path(data).absolute())
    everything = {**os.environ, **wanted}
    return {name: value for name, value in everything.items() if value is not None}
